"""The transform of the General Quantizer against its definition in float64, by autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nna.quantization.general_quantizer_transform import GeneralQuantizerTransform
from lightning_nna.quantization.lloyd_max import lloyd_max
from lightning_nna.quantization.mu_law import (
    cell_middles,
    cells_for,
    inverse_mu_law,
    mean_spacing,
    mu_law,
)
from lightning_nna.weights.codebook import Codebook


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def at_middles(transform: GeneralQuantizerTransform, rows: int, columns: int) -> Tensor:
    """Weights in the middle of cells, where the table and the definition are to agree."""
    count = cells_for(transform.centroids.shape[-1])
    inner = cell_middles(count)[1:-1]
    chosen = torch.randint(count, (rows, columns), generator=torch.Generator().manual_seed(7))
    scales = (transform.scales * transform.maximum).repeat_interleave(rows // len(transform.scales))
    return inner[chosen] * scales[:, None]


def definition(
    transform: GeneralQuantizerTransform, weight: Tensor, z: Tensor, log2: Tensor
) -> Tensor:
    """Clip, compand, softmax over every centroid of the tensor or channel, expand, scale."""
    scales = torch.exp2(log2).repeat_interleave(len(weight) // len(log2))[:, None]
    v = mu_law((weight / scales).clamp(-1, 1), transform.mu)
    own = z.reshape(-1, 1, z.shape[-1])
    own = own.repeat_interleave(len(weight) // len(own), 0)
    alpha = transform.sharpness / mean_spacing(own)[..., None] ** transform.power
    shares = torch.softmax(-alpha * (v[..., None] - own).abs() ** transform.power, -1)
    return scales * inverse_mu_law((shares * own).sum(-1), transform.mu)


@pytest.mark.parametrize(
    ("groups", "channels"), [(1, None), (4, None), (1, 4), (4, 4), (8, 8)], ids=str
)
@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("power", [1, 2])
def test_soft_weights_and_gradients_are_those_of_the_definition(
    groups: int, channels: int | None, bits: int, power: int
) -> None:
    transform = GeneralQuantizerTransform(
        *(weights(8, 500), bits),
        groups=groups,
        power=power,
        grid_bits=None,
        learn_scale=True,
        channels=channels,
    )
    transform.sharpness = 4.0
    weight = at_middles(transform, 8, 500)
    w = weight.double().requires_grad_()
    z = transform.centroids.double().sort().values.requires_grad_()
    log2 = transform.scale_log2.double().requires_grad_()
    expected = definition(transform, w, z, log2)
    found = transform.apply(weight, hard=False)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=0, atol=1e-4)
    grad = weights(8, 500, seed=3)
    by_weight, by_centroid, by_scale = torch.autograd.grad((expected * grad).sum(), (w, z, log2))
    pulled = transform.pull_back(weight, grad)
    torch.testing.assert_close(pulled.double(), by_weight, rtol=5e-3, atol=2e-3)
    assert transform.centroids.grad is not None
    ascending = transform.centroids.grad.gather(-1, transform.centroids.argsort())
    torch.testing.assert_close(ascending.double(), by_centroid, rtol=5e-3, atol=5e-3)
    assert transform.scale_log2.grad is not None
    scaled = by_scale / math.sqrt(4000 / groups * transform.maximum)
    torch.testing.assert_close(transform.scale_log2.grad.double(), scaled, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"grid_bits": None, "mu": 0.0},
        {"pin_zero": True, "mu": 255.0},
        {"scale": "centroids"},
        {"scale": "centroids", "power_of_two_scales": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("gradient_sharpness", [None, 2.0])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_channels_are_as_each_by_itself(
    bits: int, gradient_sharpness: float | None, settings: dict[str, Any]
) -> None:
    """Hard weights in every bit, in whatever order the centroids are."""
    spread = torch.tensor([0.01, 1.0, 3.0, 0.2, 0.0])[:, None]
    weight, grad = weights(5, 90) * spread, weights(5, 90, seed=3)
    together = GeneralQuantizerTransform(weight, bits, groups=5, channels=5, **settings)
    together.centroids = together.centroids.flip(1).mul(0.97).add_(0.01).clamp_(-1, 1)
    alone = [GeneralQuantizerTransform(row, bits, **settings) for row in weight.split(1)]
    for transform, centroids in zip(alone, together.centroids, strict=True):
        transform.centroids = centroids.clone()
    for transform in (together, *alone):
        transform.is_hard, transform.sharpness = True, 16.0
        transform.gradient_sharpness = gradient_sharpness
    rows = list(zip(alone, weight.split(1), grad.split(1), strict=True))
    assert torch.equal(together.scales, torch.cat([transform.scales for transform in alone]))
    for hard in (True, False):
        expected = torch.cat([transform.apply(row, hard=hard) for transform, row, _ in rows])
        assert torch.equal(together.apply(weight, hard=hard), expected)
    pulled = together.pull_back(weight, grad)
    expected = torch.cat([transform.pull_back(row, part) for transform, row, part in rows])
    # A soft assignment has the neighbors of all channels, of which those of one may be fewer.
    tolerance = 0.0 if gradient_sharpness is None else 1e-5
    torch.testing.assert_close(pulled, expected, rtol=tolerance, atol=tolerance)
    gradients = torch.stack([transform.centroids.grad for transform in alone])  # type: ignore[misc]
    # One scale is multiplied with the sum of a cell, several with each term of it.
    torch.testing.assert_close(together.centroids.grad, gradients, rtol=1e-5, atol=1e-7)
    books = [transform.codebook for transform in alone]
    assert torch.equal(together.codebook.centroids, torch.stack([b.centroids for b in books]))
    assert torch.equal(together.codebook.thresholds, torch.stack([b.thresholds for b in books]))


@pytest.mark.parametrize(("groups", "channels"), [(1, None), (4, None), (1, 8), (8, 8)])
@pytest.mark.parametrize("power", [1, 2])
def test_a_trained_sharpness_has_the_gradient_of_the_definition(
    groups: int, channels: int | None, power: int
) -> None:
    transform = GeneralQuantizerTransform(
        weights(8, 500), 3, groups=groups, channels=channels, power=power
    )
    transform.train_sharpness(4.0)
    assert transform.trained_sharpness == 4.0
    assert transform.sharpness_log2 is not None
    transform.sharpness = 4.0
    weight, grad = at_middles(transform, 8, 500), weights(8, 500, seed=3)
    z = mu_law(transform.codebook.centroids.double() / 127, transform.mu)
    z = z.expand(8, 8) if channels is None else z
    log2 = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    scales = (transform.scales.double() * 127).repeat_interleave(8 // groups)[:, None]
    v = mu_law((weight.double() / scales).clamp(-1, 1), transform.mu)
    alpha = torch.exp2(log2) / mean_spacing(z)[:, None, None] ** power
    shares = torch.softmax(-alpha * (v[..., None] - z[:, None]).abs() ** power, -1)
    values = scales * inverse_mu_law((shares * z[:, None]).sum(-1), transform.mu)
    (expected,) = torch.autograd.grad((values * grad).sum(), log2)
    transform.apply(weight, hard=False)
    transform.pull_back(weight, grad)
    assert transform.sharpness_log2.grad is not None
    torch.testing.assert_close(
        transform.sharpness_log2.grad.double(), expected, rtol=5e-3, atol=1e-5
    )
    # Hard weights do not depend on it.
    transform.is_hard, transform.sharpness_log2.grad = True, None
    transform.apply(weight, hard=False)
    transform.pull_back(weight, grad)
    assert transform.sharpness_log2.grad is None


@pytest.mark.parametrize(
    ("bits", "pin_zero", "integers"),
    [
        (1, False, [-127, 127]),
        # (16 ** (1 / 3) - 1) / 15 * 127 = 12.87.
        (2, False, [-127, -13, 13, 127]),
        # (16 ** 0.5 - 1) / 15 * 127 = 25.4.
        (2, True, [-127, -25, 0, 25]),
        # 16 ** 0.25 and 16 ** 0.75 are 2 and 8: 8.47 and 59.27.
        (3, True, [-127, -59, -25, -8, 0, 8, 25, 59]),
    ],
)
def test_a_uniform_start_is_even_in_the_domain_of_the_law(
    bits: int, pin_zero: bool, integers: list[int]
) -> None:
    weight = weights(40, 300)
    transform = GeneralQuantizerTransform(weight, bits, pin_zero=pin_zero, start="uniform")
    assert transform.codebook.centroids.tolist() == integers
    assert float(transform.centroids.diff().diff().abs().sum()) < 1e-5
    fitted = GeneralQuantizerTransform(weight, bits, pin_zero=pin_zero)
    assert torch.equal(transform.scales, fitted.scales)
    hard = transform.apply(weight, hard=True)
    levels = transform.codebook.centroids * transform.scales
    assert set(hard.unique().tolist()) <= set(levels.tolist())
    wide = GeneralQuantizerTransform(
        weight, bits, pin_zero=pin_zero, start="uniform", scale="centroids"
    )
    assert torch.equal(wide.apply(weight, hard=True), hard)
    each = GeneralQuantizerTransform(weight, bits, pin_zero=pin_zero, start="uniform", channels=40)
    assert each.codebook.centroids.tolist() == [integers] * 40
    assert torch.equal(each.apply(weight, hard=True), hard)


@pytest.mark.parametrize("bits", range(1, 9))
def test_it_starts_at_lloyd_max_points_and_hard_weights_take_the_nearest(bits: int) -> None:
    weight = weights(40, 300)
    transform = GeneralQuantizerTransform(weight, bits, mu=0.0)
    largest = weight.abs().max()
    expected = lloyd_max(weight / largest, 2**bits).centroids
    torch.testing.assert_close(transform.centroids, expected, rtol=0, atol=1e-5)
    hard = transform.apply(weight, hard=True)
    assert len(hard.unique()) <= 2**bits
    integers = hard / transform.scales
    assert float((integers - integers.round()).abs().max()) < 1e-4
    # The nearest of what the grid makes of the centroids, unless a border runs through the cell.
    levels = transform.codebook.centroids * transform.scales
    least = (weight[..., None] - levels).abs().min(-1).values
    width = 2 * largest / cells_for(2**bits)
    assert float(((weight - hard).abs() - least).max()) <= float(width)


@pytest.mark.parametrize("mu", [0.0, 15.0, 255.0])
@pytest.mark.parametrize("groups", [1, 8])
def test_hard_weights_are_those_of_the_codebook_and_stay(mu: float, groups: int) -> None:
    transform = GeneralQuantizerTransform(weights(8, 900), 5, mu=mu, groups=groups)
    hard = transform.apply(weights(8, 900), hard=True)
    assert torch.equal(transform.apply(hard, hard=True), hard)
    assert torch.equal(transform.codebook.project(hard), hard)


def test_once_hard_a_centroid_has_the_gradient_of_its_weights() -> None:
    weight = weights(6, 700)
    transform = GeneralQuantizerTransform(weight, 2, grid_bits=None)
    transform.is_hard, transform.gradient_sharpness = True, None
    found = transform.apply(weight, hard=False)
    grad = weights(6, 700, seed=5)
    pulled = transform.pull_back(weight, grad)
    z = transform.centroids.double().sort().values.requires_grad_()
    nearest = (found[..., None] - transform.codebook.scaled_centroids[0]).abs().argmin(-1)
    values = (
        transform.scales.double() * transform.maximum * inverse_mu_law(z[nearest], transform.mu)
    )
    (expected,) = torch.autograd.grad((values * grad).sum(), z)
    assert transform.centroids.grad is not None
    torch.testing.assert_close(
        transform.centroids.grad[transform.centroids.argsort()].double(),
        expected,
        rtol=1e-4,
        atol=1e-6,
    )
    # Straight-through: unchanged, except for the largest weight, at the end of the range.
    inside = weight.abs() < weight.abs().max() * (1 - 1e-5)
    assert torch.equal(pulled[inside], grad[inside])


def test_the_gradient_has_the_sharpness_it_was_given() -> None:
    weight = weights(4, 800)
    soft = GeneralQuantizerTransform(weight, 3)
    soft.sharpness = 2.0
    hard = GeneralQuantizerTransform(weight, 3)
    hard.sharpness, hard.is_hard, hard.gradient_sharpness = 32.0, True, 2.0
    grad = weights(4, 800, seed=2)
    for transform in (soft, hard):
        transform.apply(weight, hard=False)
    assert torch.equal(soft.pull_back(weight, grad), hard.pull_back(weight, grad))


def test_centroids_in_any_order_get_their_own_gradient() -> None:
    weight = weights(4, 800)
    plain, shuffled = (GeneralQuantizerTransform(weight, 2) for _ in range(2))
    order = torch.tensor([2, 0, 3, 1])
    shuffled.centroids = plain.centroids[order].clone()
    grad = weights(4, 800, seed=2)
    for transform in (plain, shuffled):
        transform.apply(weight, hard=False)
        transform.pull_back(weight, grad)
    assert plain.centroids.grad is not None
    assert shuffled.centroids.grad is not None
    assert torch.equal(shuffled.centroids.grad, plain.centroids.grad[order])


@pytest.mark.parametrize("channels", [None, 4])
def test_a_pinned_zero_gets_no_gradient(channels: int | None) -> None:
    weight = weights(4, 800)
    transform = GeneralQuantizerTransform(weight, 2, pin_zero=True, channels=channels)
    transform.apply(weight, hard=False)
    transform.pull_back(weight, weights(4, 800, seed=2))
    assert transform.centroids.grad is not None
    is_zero = transform.centroids == 0
    assert int(is_zero.sum()) == (channels or 1)
    assert bool(is_zero.any(-1).all())
    assert bool((transform.centroids.grad == 0).eq(is_zero).all())
    assert 0.0 in transform.apply(weight, hard=True)


def test_a_trained_sharpness_is_saved_and_loaded() -> None:
    transform = GeneralQuantizerTransform(weights(4, 300), 3)
    assert "sharpness_log2" not in transform.state_dict()
    transform.train_sharpness(1.0)
    assert transform.sharpness_log2 is not None
    transform.sharpness_log2.add_(1.5)
    other = GeneralQuantizerTransform(weights(4, 300, seed=9), 3)
    other.load_state_dict(transform.state_dict())
    assert other.trained_sharpness == transform.trained_sharpness == pytest.approx(2**1.5)


@pytest.mark.parametrize(
    "settings", [{}, {"learn_scale": True}, {"grid_bits": None}, {"groups": 4, "channels": 4}]
)
def test_saved_and_loaded_it_gives_the_same_bits(settings: dict[str, Any]) -> None:
    weight = weights(4, 300)
    transform = GeneralQuantizerTransform(weight, 3, **settings)
    transform.centroids.add_(0.01)
    transform.scale_log2.sub_(0.1)
    other = GeneralQuantizerTransform(weights(4, 300, seed=9), 3, **settings)
    other.load_state_dict(transform.state_dict())
    assert torch.equal(other.apply(weight, hard=True), transform.apply(weight, hard=True))
    assert torch.equal(other.apply(weight, hard=False), transform.apply(weight, hard=False))


def test_the_gap_closes_as_the_assignment_hardens() -> None:
    weight = weights(10, 1000)
    transform = GeneralQuantizerTransform(weight, 2)
    gaps = []
    for sharpness in (1.0, 8.0, 64.0, 1e5):
        transform.sharpness = sharpness
        gaps.append(transform.soft_hard_gap(weight))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.1
    assert gaps[-1] < 0.02


@pytest.mark.parametrize("groups", [1, 4])
def test_a_scale_at_the_centroids_clips_what_lies_beyond(groups: int) -> None:
    weight = weights(8, 500)
    transform = GeneralQuantizerTransform(weight, 2, groups=groups, mu=0.0, scale="centroids")
    transform.is_hard, transform.gradient_sharpness = True, None
    limits = (transform.scales * transform.maximum).repeat_interleave(8 // groups)[:, None]
    assert float(transform.centroids.abs().max()) == pytest.approx(1.0, abs=1e-5)
    assert float(limits.max()) < 0.7 * float(weight.abs().max())
    hard = transform.apply(weight, hard=True)
    wide = GeneralQuantizerTransform(weight, 2, groups=groups, mu=0.0).apply(weight, hard=True)
    # The grid is finer now; a weight at a border may go to the other side.
    assert float(((hard - wide).abs() < 2e-3).float().mean()) > 0.99
    transform.apply(weight, hard=False)
    pulled = transform.pull_back(weight, torch.ones_like(weight))
    cell = 2 * limits / cells_for(4)
    assert not pulled[weight.abs() > limits + cell].any()
    assert bool((pulled[weight.abs() < limits - cell] == 1).all())


def test_powers_of_two_steps_stay_such_as_scales_are_learned() -> None:
    transform = GeneralQuantizerTransform(
        weights(4, 90), 3, learn_scale=True, power_of_two_scales=True
    )
    transform.scale_log2.add_(0.37)
    assert torch.frexp(transform.scales).mantissa.tolist() == [0.5]


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("channels", [None, 3])
def test_a_codebook_is_the_nearest_level_of_every_weight(bits: int, channels: int | None) -> None:
    weight = weights(6, 400) * torch.tensor([1.0, 1.0, 0.1, 0.1, 7.0, 7.0])[:, None]
    book = Codebook.fit(weight, bits, groups=3, channels=channels)
    hard = book.project(weight)
    distance = (weight.reshape(3, -1, 1).double() - book.scaled_centroids.double()[:, None]).abs()
    expected = book.scaled_centroids.gather(1, distance.argmin(-1)).reshape(weight.shape)
    # A weight half-way between two levels may go to either, as float32 has it.
    torch.testing.assert_close((weight - hard).abs(), (weight - expected).abs(), atol=1e-7, rtol=0)
    assert torch.equal(book.project(hard), hard)
    tables = book.centroids.reshape(book.channels, -1)
    assert all(len(table.unique()) <= 2**bits for table in tables)
    assert len(tables) == (channels or 1)
    assert book.packed_bytes(weight, bits) == 2400 * bits // 8 + len(tables) * 2**bits + 3 * 4


@pytest.mark.parametrize("pin_zero", [False, True])
@pytest.mark.parametrize("groups", [1, 8])
def test_levels_on_the_grid_keep_the_entropy_that_was_asked_for(
    groups: int, pin_zero: bool
) -> None:
    weight = weights(80, 500)
    settings: dict[str, Any] = {"groups": groups, "pin_zero": pin_zero, "max_entropy_bits": 4.3}
    book = Codebook.fit(weight, 5, **settings)
    transform = GeneralQuantizerTransform(weight, 5, mu=0.0, **settings)
    for hard in (book.project(weight), transform.apply(weight, hard=True)):
        integers = (hard.reshape(groups, -1) / transform.scales[:, None]).round()
        shares = integers.unique(return_counts=True)[1] / weight.numel()
        # Below it by what a level that drops out takes along; above by what the grid moves borders.
        assert 4.3 - 0.06 <= float(-(shares * shares.log2()).sum()) <= 4.3 + 0.02
        assert len(shares) <= 32
        assert not pin_zero or bool((hard == 0).any())


@pytest.mark.parametrize("groups", [1, 3])
def test_centroids_of_a_channel_are_its_lloyd_max_points(groups: int) -> None:
    weight = weights(6, 400) * torch.tensor([1.0, 1.0, 0.1, 0.1, 7.0, 7.0])[:, None]
    book = Codebook.fit(weight, 3, groups=groups, channels=3, grid_bits=None)
    errors = (book.project(weight) - weight).double().square().reshape(3, -1).mean(1)
    expected = [lloyd_max(row, 8).distortion for row in weight.reshape(3, -1)]
    assert errors.tolist() == pytest.approx(expected, rel=1e-4)


def test_a_codebook_without_a_grid_is_lloyd_max() -> None:
    weight = weights(20, 300)
    book = Codebook.fit(weight, 3, grid_bits=None)
    assert book.grid is None
    error = float((book.project(weight) - weight).double().square().mean())
    assert error == pytest.approx(lloyd_max(weight, 8).distortion, rel=1e-4)
