r"""Local response normalization: every channel is divided by its neighbors' mean square.

.. math:: y_c = x_c \, d_c^{-\beta}, \qquad
          d_c = k + \frac{\alpha}{n} \sum_{c' \in \text{window of } c} x_{c'}^2

In 16 bits, :math:`d` is one convolution over the channels of the squares, whose bias is :math:`k`.
The accelerator has an inverse square root and no power, so :math:`\beta` is a multiple of 1/4, as
that of AlexNet (3/4) is: :math:`d^{-3/4}` is :math:`d^{-1/2} (d \cdot d^{-1/2})^{-1/2}`.

Reference:
    Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep convolutional neural
    networks", NeurIPS 2012, section 3.3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.operators import elementwise
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.composition import compose
from lightning_nna.emulation.operators.convolution import convolve, convolve_in_float
from lightning_nna.emulation.operators.convolution_layout import Geometry
from lightning_nna.emulation.operators.normalization import inverse_square_root
from lightning_nna.emulation.operators.record import Operator, register_operator

# Quarters that an exponent may be.
_QUARTERS = (1, 2, 3, 4)


def local_response_norm(
    call: Call,
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
) -> Tensor:
    """Emulate ``F.local_response_norm`` of shape ``(batch, channels, ...)``."""

    def in_float(x: Tensor) -> Tensor:
        return F.local_response_norm(x, size, alpha, beta, k)

    def steps(wide: Call, x: Tensor) -> Tensor:
        square = elementwise.mul(wide.child("square"), x, x)
        divisor = _divisor(wide.child("divisor"), square, size, alpha, k)
        return elementwise.mul(wide.child("result"), x, _power(wide, divisor, round(4 * beta)))

    return compose(call, [call.operand(input, "input")], in_float, steps)


def supports_local_response_norm(
    input: Any, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> bool:
    """Tell whether roots make up the power, and nothing is divided by zero."""
    return 4 * beta in _QUARTERS and k > 0 and alpha > 0 and input.numel() > 0


def _divisor(call: Call, square: Tensor, size: int, alpha: float, k: float) -> Tensor:
    """The constant and the weighted sum of neighboring channels, in the shape of ``square``."""
    columns = square.reshape(len(square), 1, square.shape[1], -1)
    taps = torch.full((1, 1, size, 1), alpha / size, device=square.device)
    bias = torch.full((1,), k, device=square.device)
    padding = ((size // 2, (size - 1) // 2), (0, 0))
    geometry = Geometry((1, 1), padding, (1, 1), groups=1)

    def in_float() -> Tensor:
        return convolve_in_float(columns, taps, bias, geometry)

    x = call.operand(call.viewed(columns, square), "input")
    if call.observing:
        result = call.observed(in_float())
    else:
        y = call.output(in_float)
        result = convolve(call, x, taps, bias, call.quantized(taps), geometry, y)
    return call.viewed(result.reshape(square.shape), result)


def _power(call: Call, divisor: Tensor, quarters: int) -> Tensor:
    """The inverse power of a number of quarters."""
    root = inverse_square_root(call.child("root"), divisor)
    if quarters == 2:
        return root
    if quarters == 4:
        return elementwise.mul(call.child("power"), root, root)
    square_root = elementwise.mul(call.child("square_root"), divisor, root)
    fourth = inverse_square_root(call.child("fourth"), square_root)
    return fourth if quarters == 1 else elementwise.mul(call.child("power"), root, fourth)


register_operator(
    Operator(
        "local_response_norm",
        torch=("local_response_norm",),
        emulate=local_response_norm,
        supports=supports_local_response_norm,
        arithmetic="products, a convolution over channels and interpolated inverse square roots in "
        "16 bits; for an exponent of 1/4, 1/2, 3/4 or 1",
    )
)
