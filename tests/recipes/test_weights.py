"""Weights files: what goes in comes out, and what is not one is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from recipes.asr.rnnt import transducer
from recipes.weights import TrainedWeights, load_weights, put_into, save_weights


@pytest.fixture
def weights() -> TrainedWeights:
    network = transducer(num_mels=4, num_labels=5, encoder_size=8, joint_size=8)
    recipe: dict[str, Any] = {"name": "x", "method": "float", "seed": 1, "beam_width": 2}
    recipe |= {"data": {}, "model": {}}
    data = {"vocabulary": {"kind": "character", "units": ["A"]}, "normalisation": {"mean": [0.1]}}
    return TrainedWeights(network.state_dict(), {**recipe, "run_dir": "somewhere"}, data)


def test_half_precision_comes_back_with_its_settings(
    weights: TrainedWeights, tmp_path: Path
) -> None:
    path = tmp_path / "deeper" / "a.safetensors"
    save_weights(path, weights, command="python -m recipes.train")
    found = load_weights(path)
    assert found.data == weights.data
    assert "run_dir" not in found.recipe
    assert found.recipe.keys() == weights.recipe.keys() - {"run_dir"}
    for name, tensor in weights.network.items():
        assert found.network[name].dtype == torch.float32
        assert torch.equal(found.network[name], tensor.half().float())
    assert [entry.name for entry in path.parent.iterdir()] == ["a.safetensors"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt; train one"):
        load_weights(tmp_path / "nothing.ckpt")


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("other.ckpt", "other.safetensors"):
        with pytest.raises(ValueError, match="was not written by"):
            load_weights(tmp_path / name)


def test_another_network_is_refused(weights: TrainedWeights) -> None:
    other = transducer(num_mels=4, num_labels=6, encoder_size=8, joint_size=8)
    with pytest.raises(ValueError, match=r"(?s)another network.*size mismatch"):
        put_into(other, weights)
