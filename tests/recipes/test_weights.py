"""Files of weights: a round trip, and errors for other files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import nn

from recipes.asr.rnnt import transducer
from recipes.preparation import build, recipe_of
from recipes.train import train
from recipes.weights import TrainedWeights, load_weights, put_into, save_weights
from tests.recipes import own_modules

PRETRAINED = Path(__file__).resolve().parents[2] / "recipes/pretrained/an4_rnnt.safetensors"


class Recognizer(LightningModule):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.model = transducer(num_mels=4, num_labels=5, encoder_size=size, joint_size=8)


@pytest.fixture
def weights() -> TrainedWeights:
    recipe: dict[str, Any] = {"name": "x", "method": "float", "seed": 1, "beam_width": 2}
    recipe |= {"targets": ["model"], "data": {}, "model": {}}
    data = {"vocabulary": {"kind": "character", "units": ["A"]}, "normalization": {"mean": [0.1]}}
    return TrainedWeights(Recognizer().state_dict(), {**recipe, "run_dir": "somewhere"}, data)


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
    put_into(recognizer, weights, ["model"])
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
    with pytest.raises(ValueError, match=r"(?s)another network.*size mismatch"):
        put_into(Recognizer(size=16), weights, ["model"])


def test_init_from_another_module_names_the_setting_the_file_and_the_networks(
    compose_config: Any, tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    recipe = {"targets": ["encoder"], "model": {"_target_": "images.Encoder"}}
    save_weights(path, TrainedWeights({"encoder.a": torch.ones(2)}, recipe, {}), command="a test")
    config = compose_config("train", f"init_from={path}")
    config.data = {"_target_": f"{own_modules.__name__}.Numbers"}
    config.model = {"_target_": f"{own_modules.__name__}.Classifier"}
    config.targets = ["network"]
    with pytest.raises(ValueError, match=r"another network") as error:
        build(config, load_weights(config.init_from))
    assert str(error.value).startswith(
        f"init_from={path} has weights of another network, targets=['encoder'] of images.Encoder, "
        "than targets=['network'] of this run's Classifier: "
    )
    assert "model.network" not in str(error.value)


@pytest.mark.parametrize("name", ["deploy", "evaluate"])
def test_data_settings_of_a_checkpoint_are_changed_by_name(name: str, compose_config: Any) -> None:
    data = {"root": "a", "cache_dir": "b", "num_mels": 8, "test_part": "validation"}
    weights = TrainedWeights({}, {"data": data}, {})
    same = recipe_of(weights, compose_config(name, "ckpt=x"))
    moved = recipe_of(weights, compose_config(name, "ckpt=x", "data.root=c", "+data.num_mels=9"))
    # Whatever part a run was scored on, its checkpoint is scored on the test part.
    assert same.data == {"root": "a", "cache_dir": "b", "num_mels": 8, "test_part": "test"}
    assert moved.data == {"root": "c", "cache_dir": "b", "num_mels": 9, "test_part": "test"}


def test_data_without_parts_is_not_asked_for_one(compose_config: Any) -> None:
    weights = TrainedWeights({}, {"data": {"_target_": "mine.Data"}}, {})
    assert recipe_of(weights, compose_config("evaluate", "ckpt=x")).data == {
        "_target_": "mine.Data"
    }


def test_files_of_the_package_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_weights("recipes/pretrained/an4_rnnt.safetensors").recipe["name"]
    with pytest.raises(FileNotFoundError, match="no weights file recipes/pretrained/none"):
        load_weights("recipes/pretrained/none.safetensors")


def test_integers_and_what_is_no_network_are_kept(tmp_path: Path) -> None:
    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
            self.temperature = nn.Parameter(torch.rand(1))

    trained, fresh = Classifier(), Classifier()
    trained.network[1].num_batches_tracked += 70_000
    network = {f"network.{k}": v for k, v in trained.network.state_dict().items()}
    recipe = {"targets": ["network"], "name": "x", "data": {}, "model": {}}
    save_weights(tmp_path / "a.safetensors", TrainedWeights(network, recipe, {}), command="a test")
    temperature = fresh.temperature.clone()
    put_into(fresh, load_weights(tmp_path / "a.safetensors"), ["network"])
    assert int(fresh.network[1].num_batches_tracked) == 70_000
    assert torch.equal(fresh.temperature, temperature)
    assert torch.equal(fresh.network[0].weight, trained.network[0].weight.half().float())
