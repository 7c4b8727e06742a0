r"""The LSTM kernels of LiteRT and TFLite-Micro, as far as they differ.

With :math:`M` the fixed-point multiplication, doubly rounded, and :math:`\lfloor\cdot\rceil`
rounding to the nearest, ties away from zero:

====================  ==========================================  ==================================
step                  LiteRT                                      TFLite-Micro
====================  ==========================================  ==================================
recurrent product     added in 32 bits, the sum saturated         saturated to 16 bits, then added
sigmoid, tanh         exponential and reciprocal in fixed point   a table, interpolated linearly
product of two gates  :math:`\lfloor x\,2^{-n} \rceil`            :math:`M(x;\ 2^{-n})`
factors of scales     formed in float32                           formed in float64
====================  ==========================================  ==================================

Reference:
    Measured on the kernels of both; TFLite-Micro composes its own of the fully connected, logistic,
    tanh, product and sum that it has in 16 bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nna.elementary import power_of_two
from lightning_nna.emulation.arithmetic.fixed_point import (
    INT16_MAX,
    INT16_MIN,
    lstm_sigmoid_table,
    lstm_tanh_table,
)
from lightning_nna.emulation.arithmetic.pointwise import logistic_int16, tanh_int16
from lightning_nna.emulation.arithmetic.rescaling import TIES_AWAY, Rescaler, RoundingKind

GATE_SCALE = 2.0**-12
GATE_OUTPUT_SCALE = 2.0**-15


class LSTMKernel(ABC):
    """What one runtime computes in its own way.

    Attributes:
        saturates_recurrent: Whether the recurrent part of a gate's input is saturated to 16 bits by
            itself.
        divides_products: Whether it divides products of two gates by a power of two, ties away from
            zero, where others multiply.
        dtype: Type in which it forms the factors of its multipliers.
    """

    saturates_recurrent: bool
    divides_products: bool
    dtype: torch.dtype

    @abstractmethod
    def sigmoid(self) -> Tensor:
        """Return the sigmoid of every gate input: Q3.12 in, Q0.15 out, ``(65536,)``."""

    @abstractmethod
    def tanh(self, exponent: int) -> Tensor:
        """Return the tanh of every 16-bit number, Q0.15, shape ``(65536,)``.

        Args:
            exponent: Exponent e of the scale 2^e of the numbers, -15 to -9.
        """

    @abstractmethod
    def products(self, exponents: Tensor, rounding: RoundingKind) -> Callable[[Tensor], Tensor]:
        """Return the rounding of products of two 16-bit numbers to multiples of powers of two.

        Args:
            exponents: Exponents of the factors, int64, that broadcast against the products.
            rounding: Rounding of the accelerator's multipliers.

        Returns:
            Function of products, float64, that writes over them.
        """

    def factor(self, first: Tensor, second: Tensor, output: Tensor) -> Tensor:
        """Return the factor of a product's multiplier, float64, as the kernel forms it.

        Args:
            first: Scales of one factor of the product, any shape.
            second: Scale of the other, no axis.
            output: Scale of the result, no axis.
        """
        a, b, y = (x.to(self.dtype) for x in (first, second, output))
        return (a * b / y).double()


class _LiteRT(LSTMKernel):
    """The reference kernel of LiteRT."""

    saturates_recurrent = False
    divides_products = True
    dtype = torch.float32

    @override
    def sigmoid(self) -> Tensor:
        return lstm_sigmoid_table()

    @override
    def tanh(self, exponent: int) -> Tensor:
        return lstm_tanh_table(15 + exponent)

    @override
    def products(self, exponents: Tensor, rounding: RoundingKind) -> Callable[[Tensor], Tensor]:
        factors = power_of_two(exponents) * TIES_AWAY
        return lambda x: x.mul_(factors).round_()


class _TFLiteMicro(LSTMKernel):
    """The kernel of TFLite-Micro."""

    saturates_recurrent = True
    divides_products = False
    dtype = torch.float64

    @override
    def sigmoid(self) -> Tensor:
        return logistic_int16(_NUMBERS, GATE_SCALE)

    @override
    def tanh(self, exponent: int) -> Tensor:
        return tanh_int16(_NUMBERS, 2.0**exponent)

    @override
    def products(self, exponents: Tensor, rounding: RoundingKind) -> Callable[[Tensor], Tensor]:
        # 16383 * 2^-15 is 0.49997. The first rounding halves to 8192, and 8192 / 2^14 = 0.5 is 1.
        return Rescaler(power_of_two(exponents), rounding=rounding, largest=2.0**30)


_NUMBERS = torch.arange(INT16_MIN, INT16_MAX + 1)
_KERNELS: dict[str, LSTMKernel] = {"litert": _LiteRT(), "tflm": _TFLiteMicro()}


def kernel_of(runtime: str) -> LSTMKernel:
    """Return the kernel of a runtime.

    Args:
        runtime: ``"litert"`` or ``"tflm"``.

    Example:
        >>> kernel_of("tflm").sigmoid()[32768 + 4096], kernel_of("litert").sigmoid()[32768 + 4096]
        (tensor(23956), tensor(23952, dtype=torch.int32))
    """
    return _KERNELS[runtime]


@lru_cache(maxsize=8)
def gate_table(kernel: LSTMKernel, margin: int, device: torch.device) -> Tensor:
    """Return the sigmoid and, behind it, the tanh of gates' inputs in 16 bits and beyond.

    Args:
        kernel: Kernel.
        margin: Number of entries by which each goes on at both ends.
        device: Device of the table.

    Returns:
        int16, shape ``(2 * (65536 + 2 * margin),)``.
    """
    tables = (kernel.sigmoid(), kernel.tanh(-12))
    ends = (torch.cat([t[:1].expand(margin), t, t[-1:].expand(margin)]) for t in tables)
    return torch.cat(list(ends)).to(torch.int16).to(device)


@lru_cache(maxsize=16)
def cell_table(kernel: LSTMKernel, exponent: int, device: torch.device) -> Tensor:
    """Return the tanh of cells, int16, shape ``(65536,)``.

    Args:
        kernel: Kernel.
        exponent: Exponent of the cells' scale.
        device: Device of the table.
    """
    return kernel.tanh(exponent).to(torch.int16).to(device)
