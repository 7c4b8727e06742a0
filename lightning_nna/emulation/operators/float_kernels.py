"""Kernels that compute in float what the accelerator has no operator for, on a runtime's CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_nna.elementary import square_root
from lightning_nna.emulation.operators.record import NO_OPTIONS, Kernel, register_kernel

for _kernel in (
    Kernel("COS", order="elements", computes_in_float=("cos",)),
    Kernel("FLOOR", order="elements", options=NO_OPTIONS, computes_in_float=("floor",)),
    Kernel("SIN", order="elements", options=NO_OPTIONS, computes_in_float=("sin",)),
    Kernel("SQUARE", order="elements", computes_in_float=("square",)),
):
    register_kernel(_kernel)


def _in_double(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function of float32 that stays on the CPU, rounded once from float64.

    PyTorch's own last bit of a float32 is another one from processor to processor, and from a long
    tensor to a short one. That of a float64 is lost in the rounding, except once in 2^28 values.
    """

    def rounded(input: Tensor, **kwargs: Any) -> Tensor:
        if kwargs or input.dtype != torch.float32:
            return function(input, **kwargs)
        return function(input.double()).float()

    return rounded


def _inverse_square_root(input: Tensor, **kwargs: Any) -> Tensor:
    """Return one over the rounded root, as a runtime has it: both rounded as in IEEE 754."""
    if kwargs or input.dtype != torch.float32:
        return torch.rsqrt(input, **kwargs)
    return square_root(input).reciprocal()


#: By the name of the torch function: the emulator's float function of a kernel, where PyTorch's own
#: has other bits from processor to processor.
FLOAT_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "rsqrt": _inverse_square_root,
    **{f.__name__: _in_double(f) for f in (torch.cos, torch.exp, torch.log, torch.sin, torch.sqrt)},
}
