r"""Power-average pooling, as the operators it consists of, in 16 bits.

.. math:: y = \Bigl(\sum_{i} x_i^p\Bigr)^{1/p}

over the elements of a window: for :math:`p = 2` the root of an average of squares times the number
of elements, for :math:`p = 1` a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.operators import elementwise
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.composition import compose
from lightning_nna.emulation.operators.convolution_layout import each_axis
from lightning_nna.emulation.operators.elementary_kernels import sqrt
from lightning_nna.emulation.operators.pooling import average_pool, supports_average_pool
from lightning_nna.emulation.operators.record import Form, Operator, register_operator


def power_average_pool(
    call: Call,
    input: Tensor,
    norm_type: float,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    ceil_mode: bool = False,
    *,
    axes: int = 2,
) -> Tensor:
    """Emulate ``F.lp_pool2d`` of shapes ``(N, C, H, W)``, or of one axis, ``F.lp_pool1d``."""
    in_torch: Any = F.lp_pool1d if axes == 1 else F.lp_pool2d
    elements = prod(each_axis(kernel_size, axes))

    def in_float(values: Tensor) -> Tensor:
        result: Tensor = in_torch(values, norm_type, kernel_size, stride, ceil_mode)
        return result

    def steps(wide: Call, x: Tensor) -> Tensor:
        powers = elementwise.mul(wide.child("square"), x, x) if norm_type == 2 else x
        mean = average_pool(
            wide.child("mean"), powers, kernel_size, stride, ceil_mode=ceil_mode, axes=axes
        )
        total = elementwise.mul(wide.child("total"), mean, float(elements))
        return sqrt(wide.child("root"), total) if norm_type == 2 else total

    return compose(call, [call.operand(input, "input")], in_float, steps)


def supports_power_average_pool(
    input: Any,
    norm_type: float,
    kernel_size: int | Sequence[int],
    *args: Any,
    axes: int = 2,
    **kwargs: Any,
) -> bool | str:
    """Tell whether a pooling is of order 1 or 2."""
    if norm_type not in (1, 2):
        return "powers of 1 and 2 are products and roots: write norm_type=2"
    return supports_average_pool(input, kernel_size, axes=axes)


register_operator(
    Operator(
        "power_average_pool",
        torch=("lp_pool2d",),
        emulate=power_average_pool,
        supports=supports_power_average_pool,
        forms=(
            Form(
                ("lp_pool1d",),
                partial(power_average_pool, axes=1),
                partial(supports_power_average_pool, axes=1),
            ),
        ),
        learns_scale=True,
        arithmetic="`lp_pool`: average pooling of squares in 16 bits, and the root of the sum",
    )
)
