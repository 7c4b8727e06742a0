"""Masks as bits, and one budget for all layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_nna.pruning.masks import MaskTransform, MatrixLayout, global_sparsities
from lightning_nna.pruning.sparsity_pattern import SparsityPattern


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_masked_is_a_plain_zero(dtype: torch.dtype) -> None:
    weight = torch.tensor([[-1.5, 2.0], [torch.inf, -0.25], [torch.nan, -torch.inf]], dtype=dtype)
    transform = MaskTransform("method", weight, revives=False)
    assert transform.apply(weight, hard=True) is weight
    transform.set_mask(torch.tensor([[True, False], [False, True], [False, False]]))
    expected = torch.tensor([[-1.5, 0.0], [0.0, -0.25], [0.0, 0.0]], dtype=dtype)
    in_place = weight.clone()
    transform.zero_(in_place)
    for masked in (
        transform.apply(weight, hard=False),
        transform.pull_back(weight, weight),
        in_place,
    ):
        assert torch.equal(masked, expected)
        assert not torch.signbit(masked[expected == 0]).any()
    transform.revives = True
    assert transform.pull_back(weight, weight) is weight


def test_a_new_mask_takes_the_place_of_the_old_one() -> None:
    weight = torch.arange(1.0, 4.0)
    transform = MaskTransform("method", weight, revives=False)
    for kept in ([True, False, True], [False, True, True]):
        transform.set_mask(torch.tensor(kept))
        assert transform.kept_count == 2
        assert transform.sparsity == pytest.approx(1 / 3)
        assert torch.equal(transform.apply(weight, hard=True) != 0, torch.tensor(kept))


@pytest.mark.parametrize(
    "layer",
    [
        *(nn.Linear(6, 4), nn.Conv1d(6, 4, 1), nn.Conv2d(6, 4, 1), nn.Conv1d(6, 4, 1, groups=2)),
        *(nn.ConvTranspose1d(6, 4, 1), nn.ConvTranspose2d(6, 4, 1, groups=2)),
    ],
    ids=str,
)
def test_rows_of_a_matrix_are_outputs_and_columns_inputs(layer: nn.Module) -> None:
    """With one place a kernel is a matrix for each group; and every layout can be undone."""
    weight = layer.weight.detach()
    layout = MatrixLayout.of(layer, weight)
    matrix = layout.to_matrix(weight)
    assert matrix.shape == layout.matrix_shape
    assert torch.equal(layout.from_matrix(matrix), weight)
    x = torch.randn(5, 6)
    groups = getattr(layer, "groups", 1)
    parts = zip(x.chunk(groups, 1), matrix.chunk(groups), strict=True)
    expected = torch.cat([part @ rows.T for part, rows in parts], 1)
    places = (1,) * (weight.ndim - 2)
    found = layer(x.view(5, 6, *places)).flatten(1) - layer.bias
    torch.testing.assert_close(found.detach(), expected)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(6, 4, 3), nn.Conv2d(6, 4, (2, 3), groups=2), nn.ConvTranspose2d(6, 4, 3, groups=2)],
    ids=str,
)
def test_input_channels_lie_side_by_side(layer: nn.Module) -> None:
    weight = layer.weight.detach()
    layout = MatrixLayout.of(layer, weight)
    assert torch.equal(layout.from_matrix(layout.to_matrix(weight)), weight)
    first = layout.to_matrix(weight)[0, : layout.channels]
    place = weight.flatten(2)[..., 0]
    is_transposed = isinstance(layer, nn.ConvTranspose2d)
    assert torch.equal(first, place[: layout.channels, 0] if is_transposed else place[0])
    assert layout.channels == 6 // layer.groups


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("patterns", ["unstructured", "1x4", "row"])
def test_the_least_of_all_layers_go(patterns: str, relative: bool) -> None:
    """Against a sort of all units by what each of their weights is worth."""
    pattern = SparsityPattern.of(patterns)
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a": torch.randn(30, 8, generator=generator),
        "b": 1.5 * torch.randn(20, 16, generator=generator),
    }
    importance_scores = {name: pattern.importance_scores(w) for name, w in weights.items()}
    shapes = {name: (w.shape[0], w.shape[1]) for name, w in weights.items()}
    wanted = {"a": 0.2, "b": 0.3}
    found = global_sparsities(importance_scores, wanted, pattern, shapes, relative=relative)
    units = []
    for name, scores in importance_scores.items():
        size = weights[name].numel() // scores.numel()
        total = float(scores.double().sum()) if relative else 1.0
        units += [(float(e) / total / size, size, name) for e in scores.flatten()]
    budget = sum(wanted[name] * weights[name].numel() for name in weights)
    gone = dict.fromkeys(weights, 0)
    taken = 0
    for _, size, name in sorted(units):
        taken += size
        if taken > budget:
            break
        gone[name] += size
    assert found == {name: gone[name] / weights[name].numel() for name in weights}


def test_a_price_is_saved_with_the_least_loss_of_scores() -> None:
    """All pairs of sparsities that save as much lose no less; with equal prices nothing changes."""
    torch.manual_seed(0)
    scores = {"a": torch.rand(4, 8), "b": 3 * torch.rand(4, 8), "c": torch.rand(4, 8)}
    shapes, pattern = dict.fromkeys(scores, (4, 8)), SparsityPattern.of("unstructured")
    prices, wanted = {"a": 1.0, "b": 7.0, "c": 0.0}, dict.fromkeys(scores, 0.6)
    found = global_sparsities(scores, wanted, pattern, shapes, relative=False, prices=prices)
    assert found["c"] == 0.0
    counts = {name: round(32 * fraction) for name, fraction in found.items()}
    saved = sum(counts[name] * prices[name] for name in scores)
    assert 0.6 * 32 * 8 - 7.0 <= saved <= 0.6 * 32 * 8
    lost = {
        name: [0.0, *x.flatten().sort().values.cumsum(0).tolist()] for name, x in scores.items()
    }
    mine = lost["a"][counts["a"]] + lost["b"][counts["b"]]
    for a in range(33):
        for b in range(33):
            assert a + 7 * b < saved or lost["a"][a] + lost["b"][b] >= mine - 1e-6
    plain = global_sparsities(scores, wanted, pattern, shapes)
    equal = dict.fromkeys(scores, 0.1)
    assert global_sparsities(scores, wanted, pattern, shapes, prices=equal) == plain
    free = dict.fromkeys(scores, 0.0)
    assert global_sparsities(scores, wanted, pattern, shapes, prices=free) == free
