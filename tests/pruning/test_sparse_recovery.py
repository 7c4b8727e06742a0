"""Sparse recovery against scikit-learn, exhaustive search and truly sparse weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso, orthogonal_mp_gram
from torch import Tensor

from lightning_nna.pruning.sparse_recovery import SparseSolution, recover_sparse_weight
from lightning_nna.pruning.sparsity_pattern import SparsityPattern
from lightning_nna.pruning.support_fit import (
    descend_on_support,
    measurement_nmse,
    refit_on_support,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(count: int, columns: int, correlation: float = 0.7, seed: int = 1) -> Tensor:
    """Correlated inputs of unlike strength."""
    plain = normal(count, columns, seed=seed)
    mixed = plain + correlation * plain.roll(1, 1)
    return mixed * torch.linspace(0.3, 2.0, columns, dtype=torch.float64)


def moment_of(a: Tensor) -> Tensor:
    return a.T @ a / len(a)


@pytest.mark.parametrize("penalty", [0.02, 0.1, 0.4])
def test_fista_is_scikit_learns_lasso(penalty: float) -> None:
    a, w = inputs(400, 24), normal(5, 24)
    found = recover_sparse_weight(
        w, moment_of(a), penalty=penalty, refit=False, max_iterations=5000, tolerance=1e-9
    )
    for row, x in zip(w, found.weight, strict=True):
        model = Lasso(alpha=penalty, fit_intercept=False, tol=1e-10, max_iter=100_000)
        expected = model.fit(a.numpy(), (a @ row).numpy()).coef_
        np.testing.assert_allclose(x.numpy(), expected, atol=2e-4)


def best_of_all(w: Tensor, moment: Tensor, kept: int) -> float:
    """Least error over every support of a row, by exhaustive search."""
    errors = []
    for support in itertools.combinations(range(w.shape[1]), kept):
        chosen = list(support)
        x = torch.zeros_like(w)
        solved = torch.linalg.solve(moment[chosen][:, chosen], (w @ moment)[0, chosen])
        x[0, chosen] = solved
        errors.append(measurement_nmse(w, x, moment))
    return min(errors)


@pytest.mark.parametrize("kept", [2, 4, 6])
def test_it_comes_near_to_the_best_support_of_all(kept: int) -> None:
    ratios, against_pursuit = [], []
    for seed in range(12):
        a, w = inputs(300, 12, seed=seed), normal(1, 12, seed=seed + 50)
        moment = moment_of(a)
        found = recover_sparse_weight(w, moment, sparsity=1 - kept / 12)
        least = best_of_all(w, moment, kept)
        assert found.nmse >= least * (1 - 1e-6)
        ratios.append(found.nmse / least)
        pursuit = orthogonal_mp_gram(moment.numpy(), (w @ moment)[0].numpy(), n_nonzero_coefs=kept)
        theirs = measurement_nmse(w, torch.from_numpy(pursuit)[None], moment)
        against_pursuit.append(found.nmse / theirs)
    assert np.median(ratios) < 1 + 1e-6
    assert np.mean(ratios) < 1.05
    assert np.mean(against_pursuit) < 1


def test_a_weight_that_is_sparse_is_recovered() -> None:
    a = inputs(500, 40)
    w = normal(30, 40) * (torch.rand(30, 40, generator=torch.Generator().manual_seed(3)) < 0.2)
    sparsity = 1 - int((w != 0).sum()) / w.numel()
    found = recover_sparse_weight(w, moment_of(a), sparsity=sparsity)
    assert torch.equal(found.mask, w != 0)
    torch.testing.assert_close(found.weight, w, rtol=0, atol=1e-6)
    assert found.nmse < 1e-12


@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.9])
def test_solvers_against_the_largest_weights(sparsity: float) -> None:
    a, w = inputs(500, 48, correlation=1.5), normal(32, 48)
    moment = moment_of(a)
    by_size = w * (w.abs() > w.abs().quantile(sparsity))
    fitted = refit_on_support(w, moment, by_size != 0)
    largest = recover_sparse_weight(w, moment, sparsity=sparsity, max_iterations=0).nmse
    iht = recover_sparse_weight(w, moment, sparsity=sparsity, solver="iht").nmse
    admm = recover_sparse_weight(w, moment, sparsity=sparsity).nmse
    assert admm < 0.95 * iht <= 0.95 * largest
    assert largest < measurement_nmse(w, fitted, moment) < measurement_nmse(w, by_size, moment)


@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "2x2", "row", "column"])
def test_the_error_grows_with_the_sparsity(pattern: str) -> None:
    a, w = inputs(300, 16), normal(20, 16)
    errors = [
        recover_sparse_weight(w, moment_of(a), sparsity=s, pattern=pattern).nmse
        for s in (0.0, 0.25, 0.5, 0.75, 0.95)
    ]
    assert errors == sorted(errors)
    assert errors[0] < 1e-12
    assert errors[1] > 1e-6


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_the_fit_is_least_squares_on_each_row(density: float) -> None:
    """With more kept than gone it is found from what goes."""
    a, w = inputs(300, 14), normal(9, 14)
    mask = torch.rand(9, 14, generator=torch.Generator().manual_seed(2)) < density
    mask[3] = False
    found = refit_on_support(w, moment_of(a), mask)
    for row, kept, x in zip(w, mask, found, strict=True):
        solved = torch.linalg.lstsq(a[:, kept], (a @ row)[:, None]).solution[:, 0]
        torch.testing.assert_close(x[kept], solved, rtol=1e-6, atol=1e-8)
        assert not x[~kept].any()


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_conjugate_gradients_go_to_the_fit(density: float) -> None:
    a, w = inputs(300, 14), normal(9, 14)
    moment = moment_of(a)
    mask = torch.rand(9, 14, generator=torch.Generator().manual_seed(2)) < density
    fitted = measurement_nmse(w, refit_on_support(w, moment, mask), moment)
    errors = [
        measurement_nmse(w, descend_on_support(w, moment, mask, iterations=i), moment)
        for i in (0, 1, 2, 4, 8, 40)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.05 * fitted
    assert errors[-1] == pytest.approx(fitted, rel=1e-5)
    begun = descend_on_support(w, moment, mask, iterations=2)
    further = descend_on_support(w, moment, mask, iterations=2, start=begun)
    assert errors[2] > measurement_nmse(w, further, moment) >= fitted * (1 - 1e-5)
    assert torch.equal(further != 0, mask)
    again = descend_on_support(w, moment, mask, iterations=0, start=begun)
    assert torch.equal(again, begun)


def test_inputs_that_repeat_each_other_have_a_fit() -> None:
    """The moment has no inverse: what is kept is solved for, though little goes."""
    a, w = inputs(300, 14).repeat(1, 2), normal(9, 28)
    mask = torch.ones(9, 28, dtype=torch.bool)
    mask[:, :5] = False
    moment = moment_of(a)
    assert measurement_nmse(w, w * mask, moment) > 1e-3
    assert measurement_nmse(w, refit_on_support(w, moment, mask), moment) < 1e-10
    found = descend_on_support(w, moment, mask, iterations=60)
    assert measurement_nmse(w, found, moment) < 1e-8


def test_without_a_moment_the_largest_stay() -> None:
    w = torch.tensor([[3.0, -1.0, 2.0, -4.0]])
    found = recover_sparse_weight(w, sparsity=0.5)
    assert found.weight.tolist() == [[3.0, 0.0, 0.0, -4.0]]
    assert found.nmse == pytest.approx(5 / 30)
    soft = recover_sparse_weight(w, penalty=1.5, refit=False)
    assert soft.weight.tolist() == [[1.5, 0.0, 0.5, -2.5]]


def test_inputs_that_say_nothing() -> None:
    w = normal(6, 8).float()
    nothing = recover_sparse_weight(w, torch.zeros(8, 8), sparsity=0.5)
    assert torch.equal(nothing.weight, recover_sparse_weight(w, sparsity=0.5).weight)
    # One input never moves and two are the same: the moment has rank 6.
    a = inputs(100, 8)
    a[:, 2], a[:, 5] = 0.0, a[:, 4]
    found = recover_sparse_weight(w.double(), moment_of(a), sparsity=0.25)
    assert torch.isfinite(found.weight).all()
    assert not found.mask[:, 2].any()
    assert found.nmse < 1e-3


@pytest.mark.parametrize("seed", range(8))
def test_inputs_that_never_fire(seed: int) -> None:
    # 20 of 192 inputs fire, in 8 examples. Single precision has no eigenvalues of most of these.
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.zeros(8, 192)
    live = torch.randperm(192, generator=generator)[:20]
    inputs[:, live] = torch.randn(8, 20, generator=generator)
    moment = inputs.T @ inputs
    weight = torch.randn(6, 192, generator=generator)
    solution = recover_sparse_weight(weight, moment, sparsity=0.95)
    away = (solution.weight - weight).double()
    largest = weight * (weight.abs() >= weight.abs().flatten().kthvalue(1095).values)
    naive = (largest - weight).double()
    error, of_largest = (((d @ moment.double()) * d).sum() for d in (away, naive))
    assert error < 0.5 * of_largest


def test_equal_candidates_are_decided_by_their_place() -> None:
    found = recover_sparse_weight(torch.ones(2, 4), torch.eye(4), sparsity=0.625)
    assert found.mask.tolist() == [[True, True, True, False], [False] * 4]
    again = recover_sparse_weight(torch.ones(2, 4), torch.eye(4), sparsity=0.625)
    assert torch.equal(again.weight, found.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("kind", ["unlike", "tied", "tiny", "zero", "huge"])
def test_the_greatest_are_those_of_a_stable_sort(kind: str, dtype: torch.dtype) -> None:
    values = {
        "unlike": normal(40, 50).square(),
        "tied": (2 * normal(40, 50)).round().square(),
        "tiny": normal(40, 50).square() * torch.finfo(dtype).tiny,
        "zero": torch.zeros(40, 50),
        "huge": normal(40, 50).square() * torch.finfo(dtype).max / 32,
    }[kind].to(dtype)
    order = values.flatten().argsort(descending=True, stable=True)
    for kept in (0, 1, 2, 700, 1999, 2000):
        expected = torch.zeros(2000, dtype=torch.bool)
        expected[order[:kept]] = True
        mask = SparsityPattern.of("unstructured").mask(values, 1 - kept / 2000, (40, 50))
        assert torch.equal(mask, expected.view(40, 50))


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
def test_less_effort_costs_little(sparsity: float) -> None:
    a, w = inputs(500, 48), normal(64, 48)
    moment = moment_of(a)
    thorough = recover_sparse_weight(w, moment, sparsity=sparsity)
    quick = recover_sparse_weight(w, moment, sparsity=sparsity, exact=False)
    largest = recover_sparse_weight(w, moment, sparsity=sparsity, max_iterations=0)
    assert quick.iterations <= 16 < thorough.iterations
    assert quick.nmse < thorough.nmse + 0.2 * (largest.nmse - thorough.nmse)
    assert quick.nmse == pytest.approx(measurement_nmse(w, quick.weight, moment), rel=1e-4)


def test_a_start_is_taken_where_it_is_better() -> None:
    a, w = inputs(200, 30, correlation=2.0), normal(10, 30)
    moment = moment_of(a)
    first = recover_sparse_weight(w, moment, sparsity=0.7)
    again = recover_sparse_weight(w, moment, sparsity=0.7, start=first.mask)
    assert again.nmse <= first.nmse * (1 + 1e-9)
    further = recover_sparse_weight(w, moment, sparsity=0.8, start=first.mask)
    assert int(further.mask.sum()) == 60


@pytest.mark.parametrize(
    ("pattern", "units"), [("2:4", (1, 1)), ("1:2", (1, 1)), ("2x4", (2, 4)), ("4x1", (4, 1))]
)
def test_zeros_lie_as_the_pattern_says(pattern: str, units: tuple[int, int]) -> None:
    a, w = inputs(200, 16), normal(8, 16)
    found = recover_sparse_weight(w, moment_of(a), sparsity=0.5, pattern=pattern)
    high, wide = units
    blocks = found.mask.reshape(8 // high, high, 16 // wide, wide).float().mean((1, 3))
    assert set(blocks.flatten().tolist()) <= {0.0, 1.0}
    assert float(found.mask.float().mean()) == 0.5


def test_two_of_four_in_every_group() -> None:
    found = recover_sparse_weight(normal(8, 16), sparsity=0.9, pattern="2:4")
    assert found.mask.reshape(-1, 4).sum(1).tolist() == [2] * 32


def test_blocks_with_a_penalty_go_as_one() -> None:
    a, w = inputs(200, 16), normal(8, 16)
    found = recover_sparse_weight(w, moment_of(a), penalty=0.3, pattern="2x4", refit=False)
    zeros = (found.weight == 0).reshape(4, 2, 4, 4).float().mean((1, 3))
    assert set(zeros.flatten().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "one of sparsity and penalty, got None and None"),
        ({"sparsity": 0.5, "penalty": 0.1}, ValueError, "one of sparsity and penalty"),
        ({"sparsity": 1.0}, ValueError, "at least 0 and below 1, got 1.0"),
        ({"sparsity": -0.1}, ValueError, "got -0.1"),
        ({"penalty": -1.0}, ValueError, "must not be negative, got -1.0"),
        ({"penalty": 1.0, "pattern": "2:4"}, ValueError, "'2:4' has no penalty"),
        (
            {"sparsity": 0.5, "pattern": "1x5"},
            ValueError,
            "2 rows of 4 weights, which pattern '1x5'",
        ),
        ({"sparsity": 0.5, "pattern": "3:2"}, ValueError, "keeps 3 weights of 2: N is over M"),
        ({"sparsity": 0.5, "pattern": "rows"}, ValueError, "unknown pattern 'rows'"),
        ({"sparsity": 0.5, "solver": "omp"}, ValueError, "'admm' or 'iht', got 'omp'"),
        (
            {"sparsity": 0.5, "second_moment": torch.full((4, 4), torch.nan)},
            FloatingPointError,
            "second_moment is not finite",
        ),
    ],
)
def test_wrong_arguments_are_named(
    settings: dict,  # type: ignore[type-arg]
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        recover_sparse_weight(torch.ones(2, 4), **settings)


def test_many_rows_are_solved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    a, w = inputs(300, 12), normal(40, 12)
    mask = torch.rand(40, 12, generator=torch.Generator().manual_seed(0)) < 0.6
    whole = refit_on_support(w, moment_of(a), mask)
    monkeypatch.setattr("lightning_nna.pruning.support_fit._BATCH", 100)
    torch.testing.assert_close(refit_on_support(w, moment_of(a), mask), whole)


def test_the_solution_keeps_the_dtype() -> None:
    found = recover_sparse_weight(torch.randn(4, 8), torch.eye(8), sparsity=0.5)
    assert isinstance(found, SparseSolution)
    assert found.weight.dtype == torch.float32
