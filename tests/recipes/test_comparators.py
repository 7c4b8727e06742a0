"""DKM as a weight method: the contract, the gradient, and a run of the recipes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from lightning_nna.callbacks import NNAEmulation
from lightning_nna.testing.contract import CHECKS, module, trainer
from recipes.comparators import DifferentiableKMeans, DKMTransform
from recipes.train import train
from recipes.weights import load_weights
from tests.recipes.test_train import overrides

Compose = Callable[..., DictConfig]
__all__ = ["overrides"]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[..., None], tmp_path: Path) -> None:
    check(lambda: DifferentiableKMeans(2), tmp_path)


def definition(weight: Tensor, centroids: Tensor, temperature: float, iterations: int) -> Tensor:
    """Algorithm 1 of the paper, in float64, centroid by centroid."""
    flat = weight.flatten()
    for _ in range(iterations):
        scores = torch.stack([-((flat - c) ** 2) / temperature for c in centroids])
        attention = scores.exp() / scores.exp().sum(0)
        centroids = torch.stack([(row * flat).sum() / row.sum() for row in attention])
    return sum(row * c for row, c in zip(attention, centroids, strict=True)).view_as(weight)  # type: ignore[union-attr,return-value]


@pytest.mark.parametrize("iterations", [1, 5])
@pytest.mark.parametrize("bits", [1, 3])
def test_weights_and_gradients_are_those_of_the_definition(bits: int, iterations: int) -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    transform = DKMTransform(weight, bits, iterations)
    temperature = float(weight.var()) / 4**bits
    wide = weight.double().requires_grad_()
    expected = definition(wide, transform.centroids.double(), temperature, iterations)
    torch.testing.assert_close(
        transform.apply(weight, hard=False).double(), expected.detach(), rtol=1e-4, atol=1e-5
    )
    (pulled,) = torch.autograd.grad((expected * grad).sum(), wide)
    torch.testing.assert_close(
        transform.pull_back(weight, grad).double(), pulled, rtol=1e-3, atol=1e-4
    )


def test_hard_weights_are_at_the_nearest_centroid_and_a_forward_moves_none() -> None:
    weight = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    transform = DKMTransform(weight, 2, 5)
    start = transform.centroids.clone()
    transform.apply(weight, hard=False)
    assert torch.equal(transform.centroids, start)
    transform.advance()
    assert not torch.equal(transform.centroids, start)
    hard = transform.apply(weight, hard=True)
    nearest = (weight[..., None] - transform.centroids).abs().argmin(-1)
    assert torch.equal(hard, transform.centroids[nearest])


def test_every_weight_ends_at_few_centroids_under_the_emulation() -> None:
    fitted, callback = module(), DifferentiableKMeans(2, overrides={"head.first": 1})
    before = copy.deepcopy(fitted.state_dict())
    run = trainer(NNAEmulation(calibration_steps=2), callback, steps=9)
    run.fit(fitted)
    for name in callback.selected:
        size = 2 if name.startswith("head.first") else 4
        assert 1 < len(fitted.get_parameter(name).unique()) <= size
        assert not torch.equal(fitted.get_parameter(name), before[name])
    assert 0.5 < run.logged_metrics["nna/differentiable_k_means/used_centroids"] <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"temperature": 0.0}, r"temperature must be positive, got 0\.0"),
    ],
)
def test_arguments_are_validated(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DifferentiableKMeans(2, **settings)  # type: ignore[arg-type]


def test_centroids_of_other_bits_are_an_error(tmp_path: Path) -> None:
    first = trainer(DifferentiableKMeans(2), steps=2)
    first.fit(module())
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    with pytest.raises(ValueError, match="cannot change what the checkpoint has fixed: bits"):
        trainer(DifferentiableKMeans(3)).fit(module(), ckpt_path=tmp_path / "stopped.ckpt")


@pytest.mark.filterwarnings("ignore:NNAEmulation. 0 of")
def test_a_run_of_the_recipes_has_few_values(
    compose_config: Compose, overrides: list[str], tmp_path: Path
) -> None:
    settings = ["experiment=an4_rnnt", "compression=dkm", "bits=2", "callbacks.average=null"]
    summary = train(compose_config("train", *settings, *overrides))
    assert summary["method"] == "dkm"
    weights = load_weights(tmp_path / "run" / "checkpoints" / "last.ckpt").network
    matrices = {name: one for name, one in weights.items() if one.ndim == 2}
    assert matrices
    assert all(len(one.unique()) <= 4 for one in matrices.values())
