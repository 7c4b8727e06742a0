from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_nna.quantization.mu_law import (
    SoftAssignment,
    cell_middles,
    cell_of,
    cells_for,
    inverse_mu_law,
    inverse_mu_law_slope,
    mean_spacing,
    mu_law,
    nearest_by_cell,
)


@pytest.mark.parametrize("mu", [0.0, 1.0, 15.0, 255.0])
def test_the_law_and_its_inverse(mu: float) -> None:
    x = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    v = mu_law(x, mu)
    torch.testing.assert_close(inverse_mu_law(v, mu), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(v, -v.flip(0), rtol=0, atol=1e-12)
    assert bool((v.diff() > 0).all())
    v.requires_grad_()
    (slope,) = torch.autograd.grad(inverse_mu_law(v, mu).sum(), v)
    away = v.detach() != 0
    torch.testing.assert_close(inverse_mu_law_slope(v.detach(), mu)[away], slope[away])


def test_mu_255_is_that_of_telephony() -> None:
    """G.711: an eighth of the range holds five eighths of the steps, and a bit more."""
    assert float(mu_law(torch.tensor([1 / 8], dtype=torch.float64), 255.0)) == pytest.approx(
        math.log(1 + 255 / 8) / math.log(256)
    )


def naive(x: Tensor, z: Tensor, sharpness: float | Tensor, mu: float, power: int) -> Tensor:
    """The definition: a softmax over every centroid, for every point, in float64."""
    v = mu_law(x, mu)
    alpha = sharpness / mean_spacing(z) ** power
    shares = torch.softmax(-alpha * (v[:, None] - z).abs() ** power, 1)
    return inverse_mu_law((shares * z).sum(1), mu)


CENTROIDS = {
    "two": torch.tensor([-0.2, 0.4]),
    "even": torch.linspace(-0.95, 0.95, 16),
    "clustered": torch.tensor([-0.9, -0.31, -0.3, -0.29, 0.0, 0.02, 0.5, 1.0]),
    "alike": torch.tensor([-0.5, 0.1, 0.1, 0.7]),
    "many": torch.linspace(-1, 1, 256) ** 3,
    "one": torch.tensor([0.3]),
}


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 8.0, 64.0])
@pytest.mark.parametrize("name", CENTROIDS)
def test_cells_hold_the_definition_and_its_gradients(
    name: str, sharpness: float, power: int
) -> None:
    """Away from kinks of the absolute value; what is left out is below 1e-4 of the range."""
    z = CENTROIDS[name].double().requires_grad_()
    soft = SoftAssignment(z.detach().float(), sharpness=sharpness, mu=15.0, power=power)
    x = cell_middles(cells_for(len(z))).double().requires_grad_()
    expected = naive(x, z, sharpness, 15.0, power)
    torch.testing.assert_close(soft.values.double(), expected.detach(), rtol=0, atol=2e-4)
    weights = torch.randn(len(x), generator=torch.Generator().manual_seed(0)).double()
    slopes, centroids = torch.autograd.grad((expected * weights).sum(), (x, z))
    inner = slice(1, -1)
    torch.testing.assert_close(
        soft.slopes.double()[inner] * weights[inner], slopes[inner], rtol=2e-3, atol=2e-2
    )
    torch.testing.assert_close(
        soft.centroid_gradient(weights.float()).double(), centroids, rtol=2e-3, atol=5e-2
    )
    assert float(soft.slopes[0]) == float(soft.slopes[-1]) == 0


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 8.0, 64.0])
@pytest.mark.parametrize("name", CENTROIDS)
def test_values_rise_with_the_logarithm_of_the_sharpness(
    name: str, sharpness: float, power: int
) -> None:
    z = CENTROIDS[name]
    x = cell_middles(cells_for(len(z))).double()
    log = torch.full((len(x), 1), math.log(sharpness), dtype=torch.float64, requires_grad=True)
    (rises,) = torch.autograd.grad(naive(x, z.double(), log.exp(), 15.0, power).sum(), log)
    soft = SoftAssignment(z, sharpness=sharpness, mu=15.0, power=power, learns_sharpness=True)
    torch.testing.assert_close(soft.sharpness_slopes.double(), rises[:, 0], rtol=1e-3, atol=2e-4)
    plain = SoftAssignment(z, sharpness=sharpness, mu=15.0, power=power)
    for one, other in ((soft.values, plain.values), (soft.slopes, plain.slopes)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("sharpness", [0.5, 4.0, 64.0, 2000.0, 1e5])
@pytest.mark.parametrize("name", CENTROIDS)
def test_neighbors_in_single_precision_stand_for_all_in_double(
    name: str, sharpness: float, power: int
) -> None:
    """What is left out is 6e-6 of a term; rounding is as if the point were off by 1e-7."""
    z = CENTROIDS[name]
    soft = SoftAssignment(z, sharpness=sharpness, mu=15.0, power=power)
    x = cell_middles(cells_for(len(z))).double().requires_grad_()
    expected = naive(x, z.double(), sharpness, 15.0, power)
    (slopes,) = torch.autograd.grad(expected.sum(), x)
    error = (soft.values - expected.detach()).abs()
    assert float((error - 6e-6 - 1e-7 * slopes.abs()).max()) <= 0
    assert bool(soft.slopes.isfinite().all())
    assert bool(soft.centroid_gradient(torch.ones(len(x))).isfinite().all())


@pytest.mark.parametrize("name", CENTROIDS)
@pytest.mark.parametrize("mu", [0.0, 15.0])
def test_the_nearest_centroid_of_a_cell_is_the_nearest_of_all(name: str, mu: float) -> None:
    z = CENTROIDS[name].double()
    v = mu_law(cell_middles(cells_for(len(z))).double(), mu)
    distance = (v[:, None] - z).abs()
    found = distance.gather(1, nearest_by_cell(CENTROIDS[name], mu)[:, None])[:, 0]
    torch.testing.assert_close(found, distance.min(1).values, rtol=0, atol=1e-12)


def test_it_hardens_to_the_nearest_centroid() -> None:
    z = CENTROIDS["even"]
    soft = SoftAssignment(z, sharpness=2000.0, mu=0.0)
    x = cell_middles(cells_for(len(z)))
    nearest = z[(x[:, None] - z).abs().argmin(1)]
    between = (x[:, None] - z).abs().sort(1).values
    clear = between[:, 1] - between[:, 0] > 0.01
    torch.testing.assert_close(soft.values[clear], nearest[clear], rtol=0, atol=1e-4)


def test_the_cell_of_a_weight_by_groups() -> None:
    weight = torch.tensor([[-1.0, 0.0], [0.49, 2.0]])
    assert cell_of(weight, 4, torch.tensor([1.0, 2.0])).tolist() == [[1, 3], [3, 5]]
    assert cell_of(weight, 4, torch.tensor([1.0])).tolist() == [[1, 3], [3, 5]]


def test_a_weight_lies_in_its_cell() -> None:
    weight = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    middles = cell_middles(1024)[cell_of(weight, 1024).long()]
    assert float((middles - weight).abs().max()) <= 1 / 1024 + 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharpness": 0.0}, "sharpness must be positive, got 0.0"),
        ({"mu": -1.0}, "mu must be at least 0"),
        ({"power": 3}, "power must be 1 or 2, got 3"),
    ],
)
def test_wrong_arguments_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftAssignment(torch.zeros(2), **({"sharpness": 1.0, "mu": 1.0} | settings))
