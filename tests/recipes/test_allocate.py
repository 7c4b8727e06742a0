"""Allocation of bits for a trained recognizer, and training with them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from lightning_nna.weights.allocation import BitAllocation
from recipes.allocate import allocate, price_zeros
from recipes.train import train
from recipes.weights import load_weights
from tests.recipes.test_train import overrides

Compose = Callable[..., DictConfig]
__all__ = ["overrides"]


@pytest.mark.filterwarnings("ignore:NNAEmulation. 0 of")  # Shorter than its calibration.
def test_bits_are_allocated_saved_and_trained_with(
    compose_config: Compose,
    overrides: list[str],
    tmp_path: Path,
) -> None:
    common = ["experiment=an4_rnnt", *overrides, "test=false"]
    train(compose_config("train", *common, f"run_dir={tmp_path / 'float'}"))
    ckpt = tmp_path / "float" / "checkpoints" / "last.ckpt"
    settings = [f"ckpt={ckpt}", "candidates=[1,2,4]", "batches=2", f"run_dir={tmp_path / 'bits'}"]
    allocation = allocate(compose_config("allocate", *settings, "target_mean_bits=2.5"))
    path = tmp_path / "bits" / "bits.json"
    assert allocation.mean_bits <= 2.5
    assert BitAllocation.load(path) == allocation
    assert set(json.loads(path.read_text())["overrides"].values()) <= {1, 2, 4}

    low_bit = ["compression=gq", "bits=8", f"bit_overrides={path}", f"run_dir={tmp_path / 'few'}"]
    train(compose_config("train", *common, *low_bit, f"init_from={ckpt}", "callbacks.average=null"))
    trained = load_weights(tmp_path / "few" / "checkpoints" / "last.ckpt").network
    assert trained.keys() >= allocation.bits.keys()
    report = json.loads((tmp_path / "few" / "compression" / "compression.json").read_text())
    actual = {tensor["name"]: tensor["bits"] for tensor in report["snapshots"][-1]["tensors"]}
    assert actual == allocation.bits


def test_without_a_checkpoint(compose_config: Compose) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        allocate(compose_config("allocate", "ckpt=nowhere.ckpt", "target_mean_bits=4"))


@pytest.mark.skipif(
    importlib.util.find_spec("ethosu") is None, reason="ethos-u-vela is not installed"
)
@pytest.mark.filterwarnings("ignore:NNAEmulation. 0 of")  # Shorter than its calibration.
def test_bits_and_zeros_are_priced_in_cycles_of_an_utterance(
    compose_config: Compose,
    overrides: list[str],
    tmp_path: Path,
) -> None:
    common = ["experiment=an4_rnnt", *overrides, "test=false"]
    train(compose_config("train", *common, f"run_dir={tmp_path / 'float'}"))
    ckpt = tmp_path / "float" / "checkpoints" / "last.ckpt"
    settings = [
        f"ckpt={ckpt}",
        *("candidates=[2,8]", "batches=1", "budget=cycles", f"price_cache={tmp_path / 'vela'}"),
        *("targets=[model.encoder,model.joint]", "system=Ethos_U55_Deep_Embedded"),
    ]
    run = f"run_dir={tmp_path / 'bits'}"
    allocation = allocate(compose_config("allocate", *settings, run, "target_price_ratio=0.8"))
    widest = sum(row[8] for row in allocation.prices.values())
    assert 0 < allocation.price <= 0.8 * widest
    assert allocation.unit == "cycles"
    # A step of the encoder is for two frames or more, a joint for a step or a label.
    layers = [name for name in allocation.prices if "encoder.layers" in name]
    assert all(allocation.prices[name][8] > allocation.prices[name][2] for name in layers)

    run = f"run_dir={tmp_path / 'zeros'}"
    prices = price_zeros(compose_config("allocate", *settings, run, "zeros=0.8"))
    path = tmp_path / "zeros" / "zero_prices.json"
    assert json.loads(path.read_text()) == prices
    assert set(prices) == set(allocation.bits)
    assert all(price >= 0 for price in prices.values())
    assert any(prices.values())
    pruned = ["compression=csp", "sparsity=0.5", f"+callbacks.prune.prices={path}"]
    pruned += ["callbacks.prune.targets=[model.encoder,model.joint]"]
    run = f"run_dir={tmp_path / 'pruned'}"
    train(
        compose_config(
            "train", *common, *pruned, run, f"init_from={ckpt}", "callbacks.average=null"
        )
    )
    with pytest.raises(ValueError, match="zeros needs a budget: add budget=cycles"):
        price_zeros(compose_config("allocate", f"ckpt={ckpt}", "zeros=0.8"))
