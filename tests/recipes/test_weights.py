"""Files of weights: a round trip, and errors for other files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors.torch import save_file

from recipes.asr.rnnt import transducer
from recipes.preparation import recipe_of
from recipes.train import train
from recipes.weights import TrainedWeights, load_weights, put_into, save_weights

PRETRAINED = Path(__file__).resolve().parents[2] / "recipes/pretrained/an4_rnnt.safetensors"


@pytest.fixture
def weights() -> TrainedWeights:
    network = transducer(num_mels=4, num_labels=5, encoder_size=8, joint_size=8)
    recipe: dict[str, Any] = {"name": "x", "method": "float", "seed": 1, "beam_width": 2}
    recipe |= {"data": {}, "model": {}}
    data = {"vocabulary": {"kind": "character", "units": ["A"]}, "normalization": {"mean": [0.1]}}
    return TrainedWeights(network.state_dict(), {**recipe, "run_dir": "somewhere"}, data)


def test_half_precision_comes_back_with_its_settings(
    weights: TrainedWeights, tmp_path: Path
) -> None:
    path = tmp_path / "deeper" / "a.safetensors"
    save_weights(path, weights, command="python -m recipes.train")
    loaded = load_weights(path)
    assert loaded.data == weights.data
    assert "run_dir" not in loaded.recipe
    assert loaded.recipe.keys() == weights.recipe.keys() - {"run_dir"}
    for name, tensor in weights.network.items():
        assert loaded.network[name].dtype == torch.float32
        assert torch.equal(loaded.network[name], tensor.half().float())
    assert [entry.name for entry in path.parent.iterdir()] == ["a.safetensors"]


def test_committed_weights_fit_the_code() -> None:
    """The names of settings in the file's header are those of the code."""
    weights = load_weights(PRETRAINED)
    datamodule = instantiate(weights.recipe["data"])
    datamodule.load_state_dict(weights.data)
    recognizer = instantiate(
        weights.recipe["model"],
        vocabulary=datamodule.vocabulary,
        num_mels=datamodule.num_mels,
        beam_width=1,
    )
    put_into(recognizer.model, weights)
    assert len(datamodule.normalization.mean) == datamodule.num_mels == 64


def test_data_of_another_version_is_named() -> None:
    weights = load_weights(PRETRAINED)
    datamodule = instantiate(weights.recipe["data"])
    data = {"normalisation" if k == "normalization" else k: v for k, v in weights.data.items()}
    with pytest.raises(ValueError, match=r"lack \['normalization'\].*another version"):
        datamodule.load_state_dict(data)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt; train one"):
        load_weights(tmp_path / "nothing.ckpt")


def test_files_of_others_are_an_error(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("other.ckpt", "other.safetensors"):
        with pytest.raises(ValueError, match="was not written by"):
            load_weights(tmp_path / name)


class Harmful:
    """Makes a file when it is unpickled, as any other code could run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    trace, ckpt = tmp_path / "trace", tmp_path / "harmful.ckpt"
    torch.save({"state_dict": {}, "recipe": Harmful(trace)}, ckpt)
    with pytest.raises(ValueError, match=r"harmful\.ckpt is not read: .* could run code"):
        load_weights(ckpt)
    assert not trace.exists()
    torch.load(ckpt, weights_only=False)  # The file is harmful indeed.
    assert trace.exists()


def test_a_run_does_not_resume_from_code(
    compose_config: Callable[..., DictConfig], small_an4: Path, tmp_path: Path
) -> None:
    trace, folder = tmp_path / "trace", tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"state_dict": {}, "recipe": Harmful(trace)}, folder / "last.ckpt")
    settings = [f"data.root={small_an4}", f"data.cache_dir={tmp_path}", "trainer.accelerator=cpu"]
    with pytest.raises(ValueError, match=r"last\.ckpt is not read: .* could run code"):
        train(compose_config("train", "experiment=an4_rnnt", "data.speeds=[1.0]", *settings))
    assert not trace.exists()


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "short.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"short\.ckpt is damaged or no checkpoint"):
        load_weights(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"short\.ckpt is damaged or no checkpoint"):
        load_weights(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="it holds a list"):
        load_weights(path)


def test_truncated_small_weights_are_named(weights: TrainedWeights, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    save_weights(path, weights, command="a test")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"short\.safetensors is damaged or no safetensors file"):
        load_weights(path)


def test_another_network_is_an_error(weights: TrainedWeights) -> None:
    other = transducer(num_mels=4, num_labels=6, encoder_size=8, joint_size=8)
    with pytest.raises(ValueError, match=r"(?s)another network.*size mismatch"):
        put_into(other, weights)


@pytest.mark.parametrize("name", ["deploy", "evaluate"])
def test_data_settings_of_a_checkpoint_are_changed_by_name(name: str, compose_config: Any) -> None:
    weights = TrainedWeights({}, {"data": {"root": "a", "cache_dir": "b", "num_mels": 8}}, {})
    same = recipe_of(weights, compose_config(name, "ckpt=x"))
    moved = recipe_of(weights, compose_config(name, "ckpt=x", "data.root=c", "+data.num_mels=9"))
    # Whatever part a run was scored on, its checkpoint is scored on the test part.
    assert same.data == {"root": "a", "cache_dir": "b", "num_mels": 8, "test_part": "test"}
    assert moved.data == {"root": "c", "cache_dir": "b", "num_mels": 9, "test_part": "test"}
