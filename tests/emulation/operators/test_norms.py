"""Norms, variances and unit vectors pass the oracle, however much lengths differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import coverage, emulate
from lightning_nna.testing.operator_oracle import CHECKS, Check, Example, check_operator
from lightning_nna.testing.replay import replays
from tests.emulation.modules import Function

pytestmark = pytest.mark.exactness
SPECS = {8: "litert-int8", 16: "litert-int16x8"}


def of(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Example:
    return Example(lambda: Function(function), shapes, fast_tolerance=2e-3)


ROWS, CUBE = (120, 100), (30, 20, 20)
MOMENTS = {
    "var": of(lambda x: x.var(1), ROWS),
    "var, biased, of axes": of(lambda x: torch.var(x, (0, 2), False, True), CUBE),
    "var, of all": of(lambda x: x.var(), ROWS),
    "var, corrected": of(lambda x: torch.var(x, dim=-1, correction=3), ROWS),
    "var and mean": of(lambda x: torch.cat(torch.var_mean(x, 0)), ROWS),
}
ROOTS = {
    "std": of(lambda x: x.std(1), ROWS),
    "std, biased": of(lambda x: torch.std(x, unbiased=False), ROWS),
    "std and mean": of(lambda x: torch.cat(torch.std_mean(x, (1, 2), keepdim=True)), CUBE),
}
NORMS = {
    "norm": of(lambda x: x.norm(dim=1), ROWS),
    "norm of all": of(torch.norm, ROWS),
    "norm of axes": of(lambda x: torch.norm(x, 2, (0, 2), keepdim=True), CUBE),
    "vector norm": of(lambda x: torch.linalg.vector_norm(x, dim=-1), ROWS),
    "linalg norm": of(lambda x: torch.linalg.norm(x, 2, dim=1), ROWS),
    "order 1": of(lambda x: x.norm(1, dim=1), ROWS),
    "order 1, of all": of(lambda x: torch.norm(x, p=1), ROWS),
    "infinite order": of(lambda x: torch.linalg.norm(x, float("inf"), dim=-1), ROWS),
    "least order": of(lambda x: torch.linalg.vector_norm(9 + x, -float("inf"), 1), (900, 12)),
}
UNITS = {
    "rows": of(F.normalize, ROWS),
    "last axis": of(lambda x: F.normalize(x, dim=-1), CUBE),
    "shortest": of(lambda x: F.normalize(x, dim=-1, eps=4.0), CUBE),
}
# Quotients, whose reciprocals have 8 bits.
QUOTIENTS = {
    "order 1": of(lambda x: F.normalize(x, p=1), (600, 20)),
    "infinite order": of(lambda x: F.normalize(x, float("inf"), dim=-1), CUBE),
}
COSINES = {
    "rows": of(F.cosine_similarity, ROWS, ROWS),
    "last axis": of(lambda a, b: F.cosine_similarity(a, b, -1), (30, 1, 40), (20, 40)),
}
LOCAL = {
    "images": Example(lambda: nn.LocalResponseNorm(5, alpha=0.5), ((4, 12, 16, 16),)),
    "even": Example(lambda: nn.LocalResponseNorm(4, alpha=0.5, beta=0.5, k=2.0), ((6, 20, 100),)),
    "quarter": Example(lambda: nn.LocalResponseNorm(3, alpha=0.2, beta=0.25), ((120, 100, 2),)),
    "whole": Example(lambda: nn.LocalResponseNorm(2, alpha=0.2, beta=1.0), ((120, 100, 1),)),
}
ALL = {**MOMENTS, **ROOTS, **NORMS, **UNITS, **COSINES, **LOCAL}
each_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


@each_check
@pytest.mark.parametrize("name", MOMENTS)
def test_variances(name: str, check: Check) -> None:
    check_operator("var", [MOMENTS[name]], checks=[check], runtime="litert")


@each_check
@pytest.mark.parametrize("name", ROOTS)
def test_deviations(name: str, check: Check) -> None:
    check_operator("std", [ROOTS[name]], checks=[check], runtime="litert")


@each_check
@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str, check: Check) -> None:
    check_operator("norm", [NORMS[name]], checks=[check], runtime="litert")


@each_check
@pytest.mark.parametrize("name", UNITS)
def test_unit_vectors(name: str, check: Check) -> None:
    check_operator("normalize", [UNITS[name]], checks=[check], runtime="litert")


@each_check
@pytest.mark.parametrize("name", QUOTIENTS)
def test_unit_vectors_of_other_orders(name: str, check: Check) -> None:
    check_operator("normalize", [QUOTIENTS[name]], checks=[check], runtime="litert")


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", QUOTIENTS)
def test_short_vectors_leave_the_range_to_others(name: str, bits: int) -> None:
    torch.manual_seed(0)
    module, x = QUOTIENTS[name].build(), torch.randn(30, 20, 20)
    x[:, 0], x[:, 1] = 0.0, 1e-9
    expected, leaf = module(x), x.clone().requires_grad_()
    with emulate(module, SPECS[bits]) as chip:
        with chip.observing():
            module(x)
        result = module(leaf)
        result.sum().backward()
    others = (result - expected)[:, 2:].abs().max() / expected.abs().max()
    assert float(others.detach()) < 0.03
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@each_check
@pytest.mark.parametrize("name", COSINES)
def test_cosines(name: str, check: Check) -> None:
    check_operator("cosine_similarity", [COSINES[name]], checks=[check], runtime="litert")


@each_check
@pytest.mark.parametrize("name", LOCAL)
def test_local_response(name: str, check: Check) -> None:
    check_operator("local_response_norm", [LOCAL[name]], checks=[check], runtime="litert")


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", ALL)
def test_results_are_near_those_of_float(name: str, bits: int) -> None:
    torch.manual_seed(0)
    module, inputs = ALL[name].build(), ALL[name].inputs()
    with torch.no_grad():
        expected = module(*inputs)
        with emulate(module, SPECS[bits]) as chip:
            with chip.observing():
                module(*inputs)
            result = module(*inputs)
    assert result.shape == expected.shape
    error = (result - expected).abs().max() / expected.abs().max()
    assert float(error) < {8: 0.02, 16: 0.002}[bits]


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize(
    "function",
    [F.normalize, lambda x: x.std(1, keepdim=True), lambda x: x.norm(dim=1, keepdim=True)],
    ids=["normalize", "std", "norm"],
)
def test_lengths_that_differ(function: Callable[..., Tensor], bits: int) -> None:
    torch.manual_seed(0)
    module = Function(function)
    x = torch.randn(500, 40) * torch.exp2(-5 * torch.rand(500, 1))
    x[0] = 0.0
    compared = replays(module, x, inputs=[1.1 * x], spec=SPECS[bits])
    assert compared["RSQRT"] >= 1000
    with emulate(module, SPECS[bits]) as chip, torch.no_grad():
        with chip.observing():
            module(x)
        result = module(x)
        (observed,) = (r for key, r in chip.ranges.ranges.items() if key.endswith("#0/input"))
    # Vectors of 1/32 of the largest length have few integers in 8 bits: the rounded ones count.
    step = (observed.maximum - observed.minimum) / (2**bits - 1)
    expected = function((x / step).round() * step)[1:]
    # In 16 bits their squares are 2^-10 of the largest, 32 steps of a scale.
    assert float((result[1:] - expected).abs().max() / expected.max()) < 0.05


def test_other_orders_run_in_float() -> None:
    x = torch.randn(6, 5)
    for function in (
        lambda x: x.norm(3),
        lambda x: torch.linalg.norm(x, 1),
        lambda x: torch.linalg.norm(x, 2),
        lambda x: F.normalize(x, p=3.0),
        lambda x: F.local_response_norm(x[None], 3, beta=0.6),
    ):
        assert coverage(Function(function), x).fallbacks


def test_a_count_is_written_otherwise() -> None:
    (row,) = coverage(Function(lambda x: (2 * x).norm(0)), torch.randn(6, 5)).fallbacks
    assert "(x != 0).float().sum(dim)" in row.remedy


def test_vectors_of_zeros_have_a_finite_gradient() -> None:
    x = torch.randn(8, 6)
    x[3] = 1e-6
    leaf = x.clone().requires_grad_()
    module = Function(F.normalize)
    with emulate(module) as chip:
        with chip.observing():
            module(x)
        module(leaf).sum().backward()
    assert leaf.grad is not None
    assert float(leaf.grad.abs().max()) < 1000
