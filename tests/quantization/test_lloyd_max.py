"""Lloyd-Max against exhaustive search, a textbook dynamic programme, k-means and Max's tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import laplace, norm
from sklearn.cluster import KMeans

from lightning_nna.quantization.lloyd_max import (
    lloyd_max,
    lloyd_max_groups,
    nearest,
    snap_to_grid,
)

Floats = NDArray[np.float64]


def squared_error(x: Floats, mass: Floats, *, is_zero: bool) -> float:
    if len(x) == 0:
        return 0.0
    centroid = 0.0 if is_zero else float(np.average(x, weights=mass))
    return float((mass * (x - centroid) ** 2).sum())


def exhaustive(x: Floats, mass: Floats, levels: int, *, pin_zero: bool) -> float:
    """Least mean squared error over every division into cells, and every choice of zero's cell."""
    order = np.argsort(x)
    x, mass = x[order], mass[order]
    errors = []
    for inner in itertools.combinations_with_replacement(range(len(x) + 1), levels - 1):
        cuts = [0, *inner, len(x)]
        cells = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        for zero in range(levels) if pin_zero else [None]:
            parts = [
                squared_error(x[cell], mass[cell], is_zero=place == zero)
                for place, cell in enumerate(cells)
            ]
            errors.append(sum(parts))
    return min(errors) / float(mass.sum())


def textbook(x: Floats, levels: int) -> float:
    """Least mean squared error by the quadratic dynamic programme, row by row."""
    x = np.sort(x)
    n = len(x)
    sums, squares = np.append(0, np.cumsum(x)), np.append(0, np.cumsum(x * x))
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    ends = np.arange(1, n + 1)
    for _ in range(levels):
        after = np.full(n + 1, np.inf)
        after[0] = 0.0
        for end in ends:
            begins = np.arange(end)
            total = sums[end] - sums[begins]
            error = squares[end] - squares[begins] - total**2 / (end - begins)
            after[end] = (best[begins] + error).min()
        best = after
    return float(best[n]) / n


def error_of(x: Floats, centroids: torch.Tensor) -> float:
    """Mean squared distance from the nearest of some centroids."""
    places = centroids.double().numpy()
    midpoints = (places[1:] + places[:-1]) / 2
    return float(((x - places[np.searchsorted(midpoints, x)]) ** 2).mean())


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-20, 20), min_size=1, max_size=7),
    st.integers(1, 4),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_no_division_into_cells_is_better(
    whole: list[int], levels: int, pin_zero: bool, random: np.random.Generator
) -> None:
    x = np.array(whole, float)
    mass = np.array([random.choice([0.25, 1.0, 3.0]) for _ in whole])
    found = lloyd_max(
        torch.from_numpy(x), levels, weights=torch.from_numpy(mass), pin_zero=pin_zero
    )
    assert found.distortion == pytest.approx(
        exhaustive(x, mass, levels, pin_zero=pin_zero), rel=1e-9, abs=1e-9
    )
    assert found.centroids.tolist() == sorted(found.centroids.tolist())
    assert len(found.centroids) == levels
    assert not pin_zero or 0.0 in found.centroids.tolist()


@pytest.mark.parametrize("levels", [2, 5, 16])
@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, n: rng.normal(size=n),
        lambda rng, n: rng.laplace(size=n),
        lambda rng, n: rng.standard_t(2, size=n),
        lambda rng, n: np.concatenate([rng.normal(-3, 0.01, n // 2), rng.normal(1, 1, n - n // 2)]),
    ],
    ids=["normal", "laplace", "heavy tails", "two heaps"],
)
@pytest.mark.parametrize("count", [900, 5000], ids=["whole programme", "bins and moves"])
def test_the_optimum_of_a_textbook_programme(draw, levels: int, count: int) -> None:  # type: ignore[no-untyped-def]
    x = draw(np.random.default_rng(levels), count)
    found = lloyd_max(torch.from_numpy(x), levels)
    assert found.distortion <= textbook(x, levels) * (1 + 1e-6)
    assert error_of(x, found.centroids) == pytest.approx(found.distortion, rel=1e-5)


def test_two_hundred_and_fifty_six_levels_are_optimal() -> None:
    x = np.random.default_rng(0).normal(size=700)
    assert lloyd_max(torch.from_numpy(x), 256).distortion <= textbook(x, 256) * (1 + 1e-6)


#: Half of the symmetric levels for a normal density of variance 1, and the error: Max, table I.
MAX_1960 = {
    1: ([0.0], 1.0),
    2: ([0.7980], 0.3634),
    3: ([0.0, 1.224], 0.1902),
    4: ([0.4528, 1.510], 0.1175),
    5: ([0.0, 0.7646, 1.724], 0.07994),
    8: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
    16: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
}


@pytest.mark.parametrize("levels", MAX_1960)
def test_levels_for_a_normal_density_are_those_of_max(levels: int) -> None:
    half, error = MAX_1960[levels]
    x = torch.linspace(-7, 7, 40001, dtype=torch.float64)
    density = torch.from_numpy(norm.pdf(x.numpy()))
    found = lloyd_max(x, levels, weights=density)
    expected = sorted({-z for z in half} | set(half))
    assert found.centroids.tolist() == pytest.approx(expected, abs=1e-3)
    assert found.distortion == pytest.approx(error, rel=2e-3)


@pytest.mark.parametrize("seed", range(4))
def test_k_means_is_never_better(seed: int) -> None:
    x = np.random.default_rng(seed).laplace(size=3000)
    theirs = KMeans(12, n_init=5, random_state=seed).fit(x[:, None]).inertia_ / len(x)
    assert lloyd_max(torch.from_numpy(x), 12).distortion <= theirs * (1 + 1e-9)


def test_from_quantiles_it_ends_where_nothing_moves() -> None:
    x = np.random.default_rng(1).normal(size=20000)
    found = lloyd_max(torch.from_numpy(x), 7, initialization="quantiles", tolerance=0.0)
    cells = np.searchsorted(((found.centroids[1:] + found.centroids[:-1]) / 2).numpy(), x)
    means = [x[cells == k].mean() for k in range(7)]
    assert found.centroids.tolist() == pytest.approx(means, abs=2e-4)
    optimum = lloyd_max(torch.from_numpy(x), 7).distortion
    assert optimum <= found.distortion <= optimum * 1.001


def test_above_256_levels_the_error_is_that_of_high_resolution() -> None:
    # Panter and Dite: (integral of the density's cube root)^3 / (12 n^2).
    x = torch.linspace(-30, 30, 200001, dtype=torch.float64)
    density = laplace.pdf(x.numpy())
    found = lloyd_max(x, 1024, weights=torch.from_numpy(density))
    integral = np.cbrt(density).sum() * float(x[1] - x[0])
    assert found.distortion == pytest.approx(integral**3 / (12 * 1024**2), rel=0.02)


def test_weights_count_as_repetitions() -> None:
    x = torch.tensor([0.0, 1.0, 4.0, 5.0, 9.0])
    counts = torch.tensor([3, 1, 2, 5, 1])
    assert torch.equal(
        lloyd_max(x, 3, weights=counts.float()).centroids,
        lloyd_max(x.repeat_interleave(counts), 3).centroids,
    )


def test_scale_and_shift_change_nothing_else() -> None:
    x = torch.from_numpy(np.random.default_rng(5).normal(size=6000))
    plain = lloyd_max(x, 8).centroids
    torch.testing.assert_close(lloyd_max(x * 4 + 64, 8).centroids, plain * 4 + 64)


def test_fewer_distinct_values_than_levels() -> None:
    found = lloyd_max(torch.tensor([2.0, 2.0, -1.0]), 4)
    assert (found.centroids.tolist(), found.distortion) == ([-1.0, 2.0, 2.0, 2.0], 0.0)
    assert lloyd_max(torch.full((3, 3), 0.5), 2, pin_zero=True).centroids.tolist() == [0.0, 0.5]


def test_every_row_by_itself() -> None:
    rows = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    mass = torch.rand(3, 500, generator=torch.Generator().manual_seed(1))
    found = lloyd_max_groups(rows, 5, weights=mass, pin_zero=True)
    each = [lloyd_max(r, 5, weights=m, pin_zero=True).centroids for r, m in zip(rows, mass)]  # noqa: B905
    assert torch.equal(found, torch.stack(each))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_nearest_of_two_as_near_is_the_lower(dtype: torch.dtype) -> None:
    centroids = torch.tensor([-1.0, 0.0, 0.3, 0.31, 2.0])
    values = torch.cat([torch.linspace(-2, 3, 20001), torch.tensor([-0.5, 0.15, 1.15])]).to(dtype)
    distance = (values.double()[:, None] - centroids.double()).abs()
    assert torch.equal(nearest(values, centroids), distance.argmin(1))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-4.5, 4.5), min_size=1, max_size=5, unique=True))
def test_snapping_moves_as_little_as_any_distinct_integers_allow(places: list[float]) -> None:
    ascending = sorted(round(place, 3) for place in places)
    distinct = sorted(set(ascending))
    snapped = snap_to_grid(torch.tensor(ascending, dtype=torch.float64), 1.0, maximum=4).tolist()
    zero = distinct.index(0.0) if 0.0 in distinct else None
    choices = [
        chosen
        for chosen in itertools.combinations(range(-4, 5), len(distinct))
        if zero is None or chosen[zero] == 0
    ]
    assert snapped == sorted(snapped)
    assert len(set(snapped)) == len(distinct)
    least = min(np.square(np.subtract(chosen, distinct)).sum() for chosen in choices)
    moved = np.square(np.subtract(sorted(set(snapped)), distinct)).sum()
    # The isotonic regression is over reals and is rounded after: within half a step each.
    assert moved <= least + 0.25 * len(distinct) + 1e-9


def test_snapping_what_is_on_the_grid_changes_nothing() -> None:
    whole = torch.tensor([-127.0, -3.0, 0.0, 1.0, 2.0, 127.0])
    assert torch.equal(snap_to_grid(whole * 0.25, 0.25), whole)
    assert snap_to_grid(torch.tensor([1.2, 1.2, 7.0]), 1.0).tolist() == [1.0, 1.0, 7.0]


def test_a_grid_without_room_is_shared() -> None:
    places = torch.linspace(-1, 1, 9)
    assert snap_to_grid(places, 1.0, maximum=1).unique().tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, "size must be 1 to 65536, got 0"),
        ({"size": 65537}, ValueError, "got 65537"),
        ({"values": torch.zeros(0)}, ValueError, "no values"),
        ({"values": torch.tensor([1.0, torch.nan])}, FloatingPointError, "not finite"),
        ({"values": torch.tensor([1.0, -torch.inf])}, FloatingPointError, "not finite"),
        ({"initialization": "random"}, ValueError, "'random'"),
        ({"weights": torch.ones(3)}, ValueError, r"shape \[3\], not \[2\]"),
        ({"weights": torch.tensor([1.0, -1.0])}, ValueError, "must not be negative"),
        ({"weights": torch.zeros(2)}, ValueError, "nor all zero"),
        ({"weights": torch.tensor([1.0, torch.inf])}, FloatingPointError, "not finite"),
    ],
)
def test_bad_input(arguments: dict, error: type[Exception], message: str) -> None:  # type: ignore[type-arg]
    given_arguments = {"values": torch.tensor([1.0, 2.0]), "size": 1} | arguments
    with pytest.raises(error, match=message):
        lloyd_max(given_arguments.pop("values"), given_arguments.pop("size"), **given_arguments)


def test_bad_groups_and_grids() -> None:
    with pytest.raises(ValueError, match="no groups"):
        lloyd_max_groups(torch.zeros(0, 4), 2)
    with pytest.raises(FloatingPointError, match="not finite"):
        lloyd_max_groups(torch.tensor([[0.0, 1.0], [0.0, torch.nan]]), 2)
    with pytest.raises(ValueError, match="must be positive"):
        snap_to_grid(torch.zeros(1), 0.0)
