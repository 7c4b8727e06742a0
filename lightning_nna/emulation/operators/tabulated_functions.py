"""Functions that LiteRT has no kernel for: tables that a program looks up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna import elementary
from lightning_nna.emulation.operators.record import register_operator
from lightning_nna.emulation.operators.tabulated import tabulated

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """max(x, 0) + log(1 + exp(-beta |x|)) / beta, and x itself above the threshold."""
    rest = elementary.log1p(elementary.exp(-beta * x.abs())) / beta
    return torch.where(beta * x > threshold, x, (x.relu() + rest).float())


def _mish(x: Tensor) -> Tensor:
    return (x * elementary.tanh(_softplus(x))).float()


def _celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(x > 0, x, (alpha * elementary.expm1(x / alpha)).float())


def _selu(x: Tensor) -> Tensor:
    below = (_SELU_SCALE * _SELU_ALPHA * elementary.expm1(x)).float()
    return torch.where(x > 0, _SELU_SCALE * x, below)


def _hard_shrink(x: Tensor, lambd: float = 0.5) -> Tensor:
    return torch.where(x.abs() > lambd, x, torch.zeros_like(x))


def _soft_shrink(x: Tensor, lambd: float = 0.5) -> Tensor:
    return x - x.clamp(-lambd, lambd)


def _in_double(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function in float64, whose last bit is lost in the rounding."""
    return lambda x: function(x.double()).float()


def _supports_round(input: Any, *, decimals: int = 0, **_: Any) -> bool:
    """Tell whether it rounds to whole numbers."""
    return decimals == 0


for _operator in (
    tabulated(
        "softplus",
        lambda input, beta=1.0, threshold=20.0: F.softplus(input, beta, threshold),
        _softplus,
        torch=("softplus",),
    ),
    tabulated("mish", lambda input: F.mish(input), _mish, torch=("mish", "mish_")),
    tabulated(
        "celu",
        lambda input, alpha=1.0: F.celu(input, alpha),
        _celu,
        torch=("celu", "celu_"),
    ),
    tabulated("selu", lambda input: F.selu(input), _selu, torch=("selu", "selu_")),
    tabulated(
        "log_sigmoid",
        lambda input: F.logsigmoid(input),
        lambda x: -_softplus(-x),
        torch=("log_sigmoid", "logsigmoid"),
    ),
    tabulated("softsign", F.softsign, lambda x: x / (1 + x.abs())),
    tabulated(
        "erf",
        torch.erf,
        lambda x: (1 - elementary.erfc(x)).float(),
        torch=("erf", "erf_", "special_erf"),
    ),
    tabulated(
        "erfc",
        torch.erfc,
        lambda x: elementary.erfc(x).float(),
        torch=("erfc", "erfc_", "special_erfc"),
    ),
    tabulated(
        "tanhshrink",
        F.tanhshrink,
        lambda x: (x - elementary.tanh(x)).float(),
    ),
    tabulated(
        "hardshrink",
        lambda input, lambd=0.5: F.hardshrink(input, lambd),
        _hard_shrink,
        torch=("hardshrink",),
    ),
    tabulated(
        "softshrink",
        lambda input, lambd=0.5: F.softshrink(input, lambd),
        _soft_shrink,
        torch=("softshrink",),
    ),
    tabulated("sign", torch.sign, torch.sign, torch=("sign", "sign_", "sgn", "sgn_")),
    tabulated("floor", torch.floor, torch.floor, torch=("floor", "floor_")),
    tabulated("ceil", torch.ceil, torch.ceil, torch=("ceil", "ceil_")),
    tabulated("trunc", torch.trunc, torch.trunc, torch=("trunc", "trunc_", "fix", "fix_")),
    tabulated(
        "round",
        lambda input, *, decimals=0: torch.round(input, decimals=decimals),
        lambda x, decimals=0: torch.round(x),
        torch=("round", "round_"),
        supports=_supports_round,
    ),
    tabulated("sin", torch.sin, _in_double(torch.sin), torch=("sin", "sin_")),
    tabulated("cos", torch.cos, _in_double(torch.cos), torch=("cos", "cos_")),
):
    register_operator(_operator)
