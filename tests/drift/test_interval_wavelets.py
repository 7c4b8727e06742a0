"""Interval wavelets: orthonormal, and polynomials kept up to the edge."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import pywt
import torch

from lightning_nna.drift.interval_wavelets import (
    ORDERS,
    detail_filter,
    edge_filters,
    interval_transform,
    inverse_interval_transform,
    most_levels,
    scaling_filter,
)


def polynomials(n: int, order: int) -> torch.Tensor:
    """Every monomial of degree below the order, as rows of unit norm."""
    rows = torch.linspace(-1, 1, n, dtype=torch.float64) ** torch.arange(order)[:, None]
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("order", ORDERS)
def test_the_transform_is_orthonormal(order: int) -> None:
    n = 64 * order
    levels = most_levels(n, order)
    averages, details = interval_transform(torch.eye(n, dtype=torch.float64), order, levels)
    matrix = torch.cat([averages, *details], dim=1)
    assert levels >= 3
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(n).double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_polynomials_have_no_details_up_to_the_edges(order: int) -> None:
    n = 64 * order
    _, details = interval_transform(polynomials(n, order), order, most_levels(n, order))
    for level in details:
        torch.testing.assert_close(level, torch.zeros_like(level), rtol=0, atol=1e-10)
    # One degree more is no longer reproduced.
    beyond = torch.linspace(-1, 1, n, dtype=torch.float64)[None] ** order
    _, details = interval_transform(beyond, order, 3)
    assert max(float(level.abs().max()) for level in details) > 1e-8


@pytest.mark.parametrize("order", ORDERS)
def test_polynomials_are_kept_at_deep_levels(order: int) -> None:
    block = np.arange(order, 3 * order - 1)
    interior = np.polynomial.legendre.legvander(
        2.0 * block / max(3 * order - 2, 1) - 1.0, order - 1
    )
    for mirrored in (False, True):
        filters = edge_filters(order, mirrored=mirrored)
        for before, after in pairwise(filters[:31]):
            values = np.concatenate([before.polynomials, interior])
            np.testing.assert_allclose(after.high @ values, 0.0, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 5, 8])
def test_the_inverse_gives_every_value_back(order: int) -> None:
    x = torch.randn(3, 2, 48 * order, dtype=torch.float64)
    averages, details = interval_transform(x, order, 2)
    back = inverse_interval_transform(averages, details, order)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [2, 4, 8])
def test_the_interior_is_that_of_pywavelets(order: int) -> None:
    n = 32 * order
    x = np.random.default_rng(0).standard_normal(n)
    low_and_high = interval_transform(torch.from_numpy(x), order, 1)
    averages, details = low_and_high[0].numpy(), low_and_high[1][0].numpy()
    scaling = scaling_filter(order)
    windows = np.lib.stride_tricks.sliding_window_view(x, 2 * order)
    inner = np.arange(order, n // 2 - order)
    starts = 2 * inner - order + 1
    np.testing.assert_allclose(averages[inner], windows[starts] @ scaling, atol=1e-12)
    np.testing.assert_allclose(details[inner], windows[starts] @ detail_filter(scaling), atol=1e-12)
    # The same numbers stand there at another place; details but for their sign. PyWavelets begins
    # at every even entry, and of an even order ours begins at the odd ones.
    low, high = pywt.dwt(x[1:], f"db{order}", mode="zero")
    assert np.isin(np.round(averages[inner], 9), np.round(low, 9)).all()
    assert np.isin(np.round(np.abs(details[inner]), 9), np.round(np.abs(high), 9)).all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="even and at least 10; take fewer levels"):
        interval_transform(torch.zeros(36), 2, 3)
    with pytest.raises(ValueError, match="one of 1 to 8, got 9"):
        scaling_filter(9)
    assert [most_levels(n, 2) for n in (7, 8, 10, 36, 64)] == [0, 0, 1, 2, 3]
