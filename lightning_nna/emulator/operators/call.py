"""What an operator is given: its site, its operands on the grid, and a place for its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_nna.emulator.ranges import (
    PENDING,
    QParams,
    RangeTable,
    affine_qparams,
    symmetric_qparams,
)
from lightning_nna.emulator.spec import NNASpec
from lightning_nna.emulator.weights import QuantizedWeight
from lightning_nna.functional.fixed_point import round_half_away


class Host(Protocol):
    """What operators need of the emulator that runs them."""

    spec: NNASpec
    ranges: RangeTable

    def tag_of(self, x: Tensor) -> QParams | None:
        """Quantisation parameters that travel with an activation, if it has any."""

    def set_tag(self, x: Tensor, qparams: QParams) -> None:
        """Let quantisation parameters travel with an activation."""

    def is_constant(self, x: Tensor) -> bool:
        """Whether a tensor is a parameter or buffer of the module."""

    def weight(self, weight: Tensor, rows_per_scale: int) -> QuantizedWeight:
        """A weight after the whole weight pipeline."""

    def first_run_after_freeze(self, key: str) -> None:
        """Report a site that no calibration has seen."""


@dataclass(frozen=True)
class Activation:
    """A float32 tensor that lies on an integer grid, and the grid."""

    value: Tensor
    qparams: QParams

    def integers(self) -> Tensor:
        """Integers less the zero point, exact, in float32."""
        return (self.value.detach() / self.qparams.scale).round_()


@dataclass(frozen=True)
class Call:
    """One call of one operator.

    Args:
        host: The emulator.
        site: Key of the call site.
        observing: Ranges are being observed and the operator runs in float.
        exact: Every output bit counts; otherwise requantisation may round in float.
    """

    host: Host
    site: str
    observing: bool
    exact: bool

    def operand(self, x: Tensor | float, name: str) -> Activation:
        """Bring an operand onto the grid: it is there already, is a constant, or is quantised.

        While observing, the value comes back unchanged, and the range of an operand that no
        operator of the chip has produced is noted under ``site/name``.
        """
        if not isinstance(x, Tensor):
            return _scalar(float(x))
        tag = self.host.tag_of(x)
        if tag is not None:
            return Activation(x, tag)
        if self.host.is_constant(x):
            return self._constant(x)
        key = f"{self.site}/{name}"
        if self.observing:
            self.host.ranges.observe(key, x)
            return Activation(x, PENDING)
        qparams = self._frozen(key, x)
        with float32_arithmetic(x):
            return Activation(quantize(x, qparams), qparams)

    def observed(self, result: Tensor, name: str = "output") -> Tensor:
        """Note a float result's range while observing, and mark it as the chip's."""
        self.host.ranges.observe(f"{self.site}/{name}", result)
        self.host.set_tag(result, PENDING)
        return result

    def unchanged(self, result: Tensor, like: Activation) -> Tensor:
        """Pass on the parameters of an operand to a result on the same grid."""
        self.host.set_tag(result, like.qparams)
        return result

    def output(self, compute: Callable[[], Tensor], name: str = "output") -> QParams:
        """Parameters of the result; ``compute`` gives the float result for a site never seen."""
        key = f"{self.site}/{name}"
        if key not in self.host.ranges:
            self._frozen(key, compute())
        observed = self.host.ranges[key]
        return affine_qparams(observed.minimum, observed.maximum)

    def tagged(self, result: Tensor, qparams: QParams) -> Tensor:
        """Let the result carry its parameters."""
        self.host.set_tag(result, qparams)
        return result

    def _constant(self, x: Tensor) -> Activation:
        """A parameter used as an operand: on a symmetric grid of its present values."""
        if self.observing:
            return Activation(x, PENDING)
        qparams = symmetric_qparams(float(x.detach().abs().max()))
        with float32_arithmetic(x):
            return Activation(quantize(x, qparams), qparams)

    def _frozen(self, key: str, x: Tensor) -> QParams:
        """Parameters of a frozen range; a site that calibration never met takes this tensor's."""
        if key not in self.host.ranges:
            self.host.first_run_after_freeze(key)
            self.host.ranges.observe(key, x)
        observed = self.host.ranges[key]
        return affine_qparams(observed.minimum, observed.maximum)


Operator = Callable[..., object]


@contextmanager
def float32_arithmetic(x: Tensor) -> Iterator[None]:
    """Keep autocast and function modes off the chip's own arithmetic."""
    kind = x.device.type
    with torch._C.DisableTorchFunction():
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                yield
        else:
            yield


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Round a float tensor onto a grid; the gradient is 1 inside the range and 0 outside."""
    return _Quantize.apply(x, qparams)


def round_clip(
    scaled: Tensor, qparams: QParams, *, exact: bool, keep_mask: bool
) -> tuple[Tensor, Tensor | None]:
    """Round ``value / scale`` and clip it to the grid.

    Args:
        scaled: The value in units of the scale; overwritten where it may be.
        qparams: The grid.
        exact: Ties away from zero as the chip; otherwise to even, which is faster.
        keep_mask: Whether the backward needs to know what was clipped.

    Returns:
        Integers less the zero point as float32, and where they were inside the range.
    """
    low, high = qparams.bounds
    rounded = round_half_away(scaled) if exact else scaled.round_()
    mask = (rounded >= low) & (rounded <= high) if keep_mask else None
    return rounded.clamp_(low, high).float(), mask


class _Quantize(torch.autograd.Function):
    """float -> grid, straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, qparams: QParams) -> Tensor:
        # LiteRT's quantise divides in float32 and rounds ties away from zero.
        centred, mask = round_clip(
            x.detach().float() / qparams.scale, qparams, exact=True, keep_mask=True
        )
        ctx.save_for_backward(mask)
        return centred.mul_(qparams.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Outside of the block: with activation checkpointing, asking for what was saved runs the
        # forward again.
        (mask,) = ctx.saved_tensors
        with float32_arithmetic(grad):
            return grad * mask, None


def _scalar(x: float) -> Activation:
    """A Python number as a constant of one element."""
    qparams = symmetric_qparams(abs(x))
    integer = round(x / qparams.scale)
    return Activation(torch.tensor(integer * qparams.scale, dtype=torch.float32), qparams)
