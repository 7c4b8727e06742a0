"""Stages on parameters: their order, their gradient, and that nothing is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_nna.emulation.spec import resolve_spec
from lightning_nna.emulation.weight_grids import on_grid
from lightning_nna.weights.pipeline import WeightGrid, WeightPipeline, pipeline_of


class Mask:
    """Keeps every second column."""

    method, order, grid = "mask", 0, None

    def apply(self, weight: Tensor, *, hard: bool) -> Tensor:
        return weight * self.kept(weight)

    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        return grad * self.kept(weight)

    def kept(self, weight: Tensor) -> Tensor:
        return (torch.arange(weight.shape[1]) % 2 == 0).to(weight)


class Softened:
    """tanh in training; on a grid when hard."""

    method, order = "softened", 1
    grid: WeightGrid | None = WeightGrid(torch.tensor([0.125]), 127)

    def apply(self, weight: Tensor, *, hard: bool) -> Tensor:
        return (weight * 8).round() / 8 if hard else weight.tanh()

    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        return grad * (1 - weight.tanh().square())


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4)


@pytest.mark.parametrize("order", [(Mask, Softened), (Softened, Mask)])
def test_stages_act_in_their_places_and_gradients_flow_back(order: tuple[type, type]) -> None:
    layer, pipeline = linear(), WeightPipeline()
    latent = layer.weight.detach().clone()
    for transform in order:
        pipeline.claim("weight", layer.weight, transform())
    x = torch.randn(3, 6)
    pipeline.substitute("train")
    assert pipeline.latent("weight").equal(latent)
    for _ in range(2):  # Accumulated: pulled back once, at the end.
        layer(x).square().sum().backward()
    pipeline.restore()
    assert torch.equal(layer.weight, latent)
    pipeline.pull_back(layer.parameters())

    w = latent.clone().requires_grad_()
    used = (w * Mask().kept(w)).tanh()
    loss = 2 * nn.functional.linear(x, used, layer.bias.detach()).square().sum()
    (expected,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(layer.weight.grad, expected)
    pulled = layer.weight.grad
    pipeline.pull_back(layer.parameters())  # Nothing is pending: it is the latent weight's now.
    assert layer.weight.grad is pulled


def test_phases() -> None:
    layer, pipeline = linear(), WeightPipeline()
    pipeline.claim("weight", layer.weight, Softened())
    latent = layer.weight.detach().clone()
    hard = pipeline.hard(layer.weight)
    assert torch.equal(hard, (latent * 8).round() / 8)
    assert torch.equal(pipeline.deployed(layer.weight), hard)
    pipeline.substitute("hard")
    pipeline.substitute("hard")
    assert torch.equal(layer.weight, hard)
    assert pipeline.deployed(layer.weight) is layer.weight
    with pytest.raises(RuntimeError, match="for 'hard' already: restore first"):
        pipeline.substitute("train")
    pipeline.restore()
    pipeline.restore()
    assert (pipeline.phase, torch.equal(layer.weight, latent)) == ("latent", True)


def test_claims() -> None:
    layer, pipeline = linear(), WeightPipeline()
    mine = Softened()
    pipeline.claim("weight", layer.weight, mine)
    pipeline.claim("weight", layer.weight, mine)
    with pytest.raises(ValueError, match="weight is claimed by softened and by softened"):
        pipeline.claim("weight", layer.weight, Softened())
    assert pipeline.transforms_of(layer.weight) == [mine]
    assert pipeline.transforms_of(layer.weight.detach()) == pipeline.transforms_of(layer.bias) == []
    pipeline.release(mine)
    assert pipeline.transforms_of(layer.weight) == []
    pipeline.claim("weight", layer.weight, Softened())


def test_a_sparse_gradient_stays_sparse() -> None:
    torch.manual_seed(0)
    table, pipeline = nn.Embedding(9, 6, sparse=True), WeightPipeline()
    pipeline.claim("weight", table.weight, Mask())
    pipeline.substitute("train")
    table(torch.tensor([2, 5, 2])).sum().backward()
    pipeline.restore()
    pipeline.pull_back(table.parameters())
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse
    expected = torch.zeros(9, 6)
    expected[2, ::2], expected[5, ::2] = 2.0, 1.0
    assert torch.equal(table.weight.grad.to_dense(), expected)


def test_the_chip_takes_the_grid_of_the_last_stage() -> None:
    layer = linear()
    pipeline = pipeline_of(layer)
    pipeline.claim("weight", layer.weight, Softened())
    held = on_grid(pipeline, layer.weight, 1, resolve_spec("litert-int8"))
    assert torch.equal(held.integers, (layer.weight.detach() * 8).round().to(held.integers.dtype))
    assert held.scales.tolist() == [0.125] * 4


@pytest.mark.parametrize(
    ("grid", "rows_per_scale", "chip", "message"),
    [
        (WeightGrid(torch.ones(1), 2047), 1, "litert-int8", "set grid_bits=8"),
        (WeightGrid(torch.ones(4), 127), 4, "litert-int8", "set granularity='per_tensor'"),
        (WeightGrid(torch.full((1,), 0.3), 127), 1, "shift", "set power_of_two_scales=True"),
    ],
)
def test_a_grid_that_the_chip_has_not(
    grid: WeightGrid, rows_per_scale: int, chip: str, message: str
) -> None:
    layer, transform = linear(), Softened()
    transform.grid = grid
    pipeline_of(layer).claim("weight", layer.weight, transform)
    with pytest.raises(ValueError, match=message):
        on_grid(pipeline_of(layer), layer.weight, rows_per_scale, resolve_spec(chip))


def test_a_copy_of_the_module_has_no_stages() -> None:
    layer = linear()
    pipeline_of(layer).claim("weight", layer.weight, Softened())
    twin = copy.deepcopy(layer)
    assert pipeline_of(twin).transforms_of(twin.weight) == []


def write_in_place(weight: nn.Parameter, values: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(values)


def write_through_data(weight: nn.Parameter, values: Tensor) -> None:
    weight.data.copy_(values)


def assign_data(weight: nn.Parameter, values: Tensor) -> None:
    weight.data = values


def write_through_numpy(weight: nn.Parameter, values: Tensor) -> None:
    weight.detach().numpy()[:] = values.numpy()


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize(
    "write", [write_in_place, write_through_data, assign_data, write_through_numpy]
)
def test_an_ended_stage_counts_until_the_weight_is_changed_in_whatever_way(
    write: Callable[[nn.Parameter, Tensor], None], hard: bool
) -> None:
    layer, spec = linear(), resolve_spec("litert-int8")
    pipeline, transform = pipeline_of(layer), Softened()
    pipeline.claim("weight", layer.weight, transform)
    write_in_place(layer.weight, pipeline.hard(layer.weight) if hard else layer.weight)
    pipeline.end(transform)
    deployed = transform.apply(layer.weight.detach(), hard=True)
    assert torch.equal(on_grid(pipeline, layer.weight, 1, spec).values, deployed)
    pipeline.substitute("hard")
    pipeline.restore()
    write(layer.weight, layer.weight.detach().clone())  # The same values.
    assert torch.equal(on_grid(pipeline, layer.weight, 1, spec).values, deployed)
    values = torch.randn(4, 6)
    write(layer.weight, values)
    fresh = nn.Parameter(values.clone())
    expected = on_grid(WeightPipeline(), fresh, 1, spec)
    assert torch.equal(on_grid(pipeline, layer.weight, 1, spec).values, expected.values)
    assert pipeline.transforms_of(layer.weight) == []
