"""The call of an operator: its site, its quantized operands, and its result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.deferred_checks import DEFERRED
from lightning_nna.emulation.arithmetic.on_host import in_memory, on_host
from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight, quantize_weight
from lightning_nna.emulation.arithmetic.rescaling import (
    rescale,
    rescale_fast,
    round_half_away,
    spills,
)
from lightning_nna.emulation.clipping import clip, inside, requantize_by_kernel
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.kernels import definitions as kernels
from lightning_nna.emulation.kernels.library import runs_kernel
from lightning_nna.emulation.parameter_numbers import magnitude
from lightning_nna.emulation.program import SCHEMA_TYPES, Activation, Instruction, Stored
from lightning_nna.emulation.ranges import (
    PENDING,
    MixedQParams,
    QParams,
    affine_qparams,
    not_finite,
    round_to_significand,
    symmetric_qparams,
)
from lightning_nna.emulation.runtime_kernels import reason_against_kernel
from lightning_nna.emulation.state import EmulationState
from lightning_nna.emulation.telemetry import Telemetry


class UnsupportedError(Exception):
    """A form that the accelerator does not have, which shows only as its operands are known.

    The function then runs in float, and what was recorded of it is dropped. An operator raises it
    while it observes, too, so that coverage knows.
    """


@dataclass(frozen=True)
class Call:
    """One call of one operator.

    Args:
        state: What is known of the module.
        site: Key of the call site.
        observing: Ranges are being observed and the operator runs in float.
        exact: Every output bit counts; otherwise requantization may round in float.
        bits: Width of the activations of this operator.
        min_value: What the output's grid reaches down to, if its range does not.
        recorder: Receives every instruction that runs in exact fidelity, where somebody listens.
        telemetry: Receives the metrics of the site, where somebody samples them.
    """

    state: EmulationState
    site: str
    observing: bool
    exact: bool
    bits: int = 8
    min_value: float = 0.0
    recorder: Callable[[Instruction], None] | None = None
    telemetry: Telemetry | None = None

    def child(self, name: str, bits: int | None = None) -> Call:
        """One instruction of a composite, with ranges and perhaps a width of its own."""
        site, width = f"{self.site}/{name}", bits or self.bits
        return replace(self, site=site, bits=width)

    def operand(self, x: Tensor | float, name: str) -> Activation:
        """Quantize an operand of any shape, unless it is quantized already or is a constant.

        While observing, the value comes back unchanged, and the range of an operand that no
        operator of the chip has produced is noted under ``site/name``.

        Raises:
            FloatingPointError: If a value that comes from float is not finite.
        """
        if not isinstance(x, Tensor):
            return self._scalar(float(x))
        tag = self.state.qparams_of(x)
        if tag is not None:
            self.state.fusion.note_consumer(x, self.site)
            x = x if x.dtype == torch.float32 else x.float()  # After a detour through float64.
            # The ReLU's backward takes care of what was clipped for it, and no other.
            tag = tag.without_relu if tag.fused_relu else tag
            operand = Activation(x, tag)
            return operand if tag.bits == self.bits else self._of_width(operand)
        if self.state.constants.in_program(x):
            return self.constant(x)
        if x.dtype == torch.bool:
            return self._of_condition(x)
        key = f"{self.site}/{name}"
        if not x.is_floating_point() and self.state.constants.kind_of([x]) is None:
            return self._of_integers(x, key)
        if self.observing:
            self.state.ranges.observe(key, x)
            return Activation(x, PENDING)
        self.state.fusion.require_computed(x, self.site)
        qparams = self._frozen(key, x)
        if (mixed := self.state.mixed_qparams_of(x)) is not None:
            return Activation(self._joined(x, mixed, qparams), qparams)
        with float32_arithmetic(x):
            result = Activation(quantize(x, qparams, key), qparams)
        if self.recording:
            self._record_quantize(x, result)
        return result

    def observed(
        self, result: Tensor, name: str = "output", *, seen: Tensor | None = None
    ) -> Tensor:
        """Note the range of a float result of any shape while observing, and mark it as emulated.

        The range is that of ``seen``, if more than the result shares its quantization parameters.
        """
        self.state.ranges.observe(f"{self.site}/{name}", result if seen is None else seen)
        self.state.set_qparams(result, PENDING)
        if name == "output" and self.bits == 8:
            self.state.fusion.note_output(result, self.site)
        return result

    def unchanged(self, result: Tensor, like: Activation) -> Tensor:
        """Pass on the parameters of an operand to a result of any shape."""
        self.state.set_qparams(result, like.qparams)
        return result

    def output(self, compute: Callable[[], Tensor], name: str = "output") -> QParams:
        """Parameters of the result; ``compute`` returns it in float, any shape, for a new site."""
        key, ranges = f"{self.site}/{name}", self.state.ranges.ranges
        if key not in ranges:
            frozen = self._frozen(key, compute())
            if key not in ranges:
                return frozen
        grid = self._grid(key, self.min_value)
        if name == "output" and self.site in self.state.fusion.fused_relu:
            return grid.with_relu
        return grid

    def with_qparams(self, result: Tensor, qparams: QParams) -> Tensor:
        """Let the result, of any shape, carry its parameters."""
        state = self.state
        state.set_qparams(result, qparams)
        if qparams.fused_relu:
            state.fusion.note_fused_output(result, self.site)
        return result

    def viewed(self, view: Tensor, of: Tensor) -> Tensor:
        """Let a view, of any shape, carry the parameters of its activation, or be a constant."""
        tag = self.state.qparams_of(of)
        if tag is not None:
            return self.with_qparams(view, tag)
        kind = self.state.constants.kind_of(of)
        if kind is not None:
            self.state.constants.mark(view, kind)
        return view

    def quantized(self, weight: Tensor) -> QuantizedWeight:
        """Quantize a weight that was computed from parameters, shape ``(rows, ...)``."""
        spec = self.state.spec
        per_channel = spec.weight_granularity == "per_channel"
        return quantize_weight(
            weight,
            rows_per_scale=1 if per_channel else weight.shape[0],
            maximum=spec.weight_max,
            power_of_two=spec.power_of_two_scales,
        )

    def initial_state(self, x: Tensor, y: QParams, name: str) -> Tensor:
        """Quantize a state, of any shape, that comes from before the call with parameters ``y``."""
        tag = self.state.qparams_of(x)
        if tag is not None and tag != PENDING:
            return requantize(self, Activation(x, tag), y)
        with float32_arithmetic(x):
            result = quantize(x, y, f"{self.site}/{name}")
        if self.recording:
            self._record_quantize(x, Activation(result, y))
        return result

    def selected(self, x: Tensor, index: int) -> Tensor:
        """Select one part of a tensor, shape ``(parts, ...)``, with the part's own parameters."""
        result = self.viewed(x[index], x)
        mixed = self.state.mixed_qparams_of(x)
        grid = None if mixed is None else MixedQParams(mixed.index[index], mixed.qparams).single()
        return result if grid is None else self.with_qparams(result, grid)

    def _joined(self, x: Tensor, mixed: MixedQParams, y: QParams) -> Tensor:
        """A tensor of several grids on one."""
        values, index = x.reshape(-1), mixed.index.reshape(-1)
        moved, positions = [], []
        for number, grid in enumerate(mixed.qparams):
            position = (index == number).nonzero().flatten()
            if not len(position):
                continue
            assert grid is not None
            moved.append(requantize(self, Activation(values[position], grid), y))
            positions.append(position)
        return torch.cat(moved)[torch.cat(positions).argsort()].reshape(x.shape)

    def constant(self, x: Tensor) -> Activation:
        """Quantize a tensor of the program, of any shape, symmetrically by its own values."""
        if self.observing:
            return Activation(x, PENDING, constant=True)
        largest = self.magnitude(x)
        return _constant(x, largest, self.bits, self.state.spec.power_of_two_scales)

    def magnitude(self, x: Tensor) -> float:
        """Return the largest absolute value of a constant of any shape."""
        return float(magnitude(x)) if in_memory(x) else self.state.numbers.read(x, magnitude)

    @property
    def recording(self) -> bool:
        """Tell whether somebody wants to know the instructions of this call."""
        return self.recorder is not None and self.exact and not self.observing

    def record(
        self,
        operator: str,
        inputs: Sequence[Stored | None],
        outputs: Sequence[Stored],
        intermediates: Sequence[Stored] = (),
        new_state: Sequence[Stored] = (),
        **options: Any,
    ) -> None:
        """Report an instruction, see :class:`Instruction`."""
        if self.recording and self.recorder is not None:
            self.require(operator, next(each.dtype for each in inputs if each is not None))
            rest = tuple(intermediates), tuple(new_state)
            self.recorder(
                Instruction(operator, self.site, tuple(inputs), tuple(outputs), options, *rest)
            )

    def has(self, kernel: str, dtype: str | None = None) -> bool:
        """Tell whether the runtime has a kernel, by default for activations of this width."""
        return self.state.spec.has_kernel(kernel, dtype or f"int{self.bits}")

    def require(self, kernel: str, dtype: str | None = None) -> None:
        """Raise unless the runtime has a kernel, by default for activations of this width.

        Raises:
            UnsupportedError: If it has none; the message has the remedy.
        """
        if not self.has(kernel, dtype):
            runtime, dtype = self.state.spec.runtime, dtype or f"int{self.bits}"
            raise UnsupportedError(reason_against_kernel(runtime, kernel, dtype))

    def _of_width(self, x: Activation) -> Activation:
        """An activation of another width than this operator's: widened without loss, or narrowed.

        Narrowing has no range of its own: the 8-bit grid covers what the 16-bit one does. Where
        more is known of the range, requantize explicitly.
        """
        if x.qparams is PENDING or x.qparams.bits == self.bits:
            return x
        if self.bits == 16:
            widened = Activation(x.value, x.qparams.widened(), x.constant)
            if self.recording:
                self.record("QUANTIZE", [x.stored()], [widened.stored()])
            return widened
        low, high = (bound * x.qparams.scale for bound in x.qparams.bounds)
        grid = affine_qparams(low, high, power_of_two=self.state.spec.power_of_two_scales)
        return Activation(requantize(self, x, grid), grid, x.constant)

    def _of_condition(self, x: Tensor) -> Activation:
        """A condition of the data, of any shape, as ones and zeros."""
        if self.observing:
            return Activation(x.float(), PENDING)
        grid = QParams(2.0**-6, 0) if self.bits == 8 else QParams(2.0**-6, 0).widened()
        with float32_arithmetic(x):
            result = Activation(x.float(), grid)
        if self.recording:
            result = Activation(result.value.clone(), grid)
            numbers = [Activation(torch.tensor(n), grid, constant=True) for n in (1.0, 0.0)]
            condition = Stored(x, "bool", source=x)
            self.record("SELECT_V2", [condition, *(n.stored() for n in numbers)], [result.stored()])
        return result

    def _of_integers(self, x: Tensor, key: str) -> Activation:
        """Integers of the data, of any shape, as numbers on a scale of 1; then on their range's.

        They have 16 bits where calibration has seen some that 8 do not hold.
        """
        if self.observing:
            self.state.ranges.observe(key, x.float())
            return Activation(x.float(), PENDING)
        self._frozen(key, x.float())
        seen = self.state.ranges[key]
        grid = QParams(1.0, 0)
        if self.bits == 16 or seen.minimum < grid.low or seen.maximum > grid.high:
            grid = QParams(1.0, 0, -(2**15), 2**15 - 1)
        if seen.minimum < grid.low or seen.maximum > grid.high:
            raise UnsupportedError("numbers of indices have 16 bits: divide them before")
        at_least = x.clamp_min(grid.low)
        at_most = at_least.clamp_max(grid.high)
        result = Activation(at_most.float(), grid)
        if self.recording:
            steps = [Stored(each.long(), "int32", source=each) for each in (x, at_least, at_most)]
            bounds = zip(("MAXIMUM", "MINIMUM"), (grid.low, grid.high), strict=True)
            for position, (kernel, bound) in enumerate(bounds):
                number = Stored(torch.tensor(bound), "int32", constant=True)
                self.record(kernel, [steps[position], number], [steps[position + 1]])
            types: dict[str, Any] = {
                "inDataType": SCHEMA_TYPES["int32"],
                "outDataType": SCHEMA_TYPES[f"int{grid.bits}"],
            }
            self.record("CAST", [steps[-1]], [result.stored()], **types)
        if grid.bits == self.bits:
            return result
        y = self._grid(key)
        return Activation(requantize(self, result, y), y)

    def _frozen(self, key: str, x: Tensor) -> QParams:
        """Parameters of a frozen range; a site that calibration never met takes this tensor's."""
        if key not in self.state.ranges:
            if not x.numel():  # Says nothing of a range, and any grid holds it.
                return QParams(1.0, 0) if self.bits == 8 else QParams(1.0, 0).widened()
            self.state.first_run_after_freeze(key)
            self.state.ranges.observe(key, x)
        return self._grid(key)

    def _grid(self, key: str, min_value: float = 0.0) -> QParams:
        state = self.state
        observed, power_of_two = state.ranges.ranges[key], state.spec.power_of_two_scales
        minimum = min(observed.minimum, min_value)
        grid = affine_qparams(minimum, observed.maximum, bits=self.bits, power_of_two=power_of_two)
        if min_value or not state.scales.activations:
            return grid
        return state.scales.output_qparams(key, grid)

    def _scalar(self, x: float) -> Activation:
        """A Python number as a constant of one element."""
        if self.observing:
            return Activation(torch.tensor(x), PENDING, constant=True)
        return _number(x, self.bits, self.state.spec.power_of_two_scales)

    def _record_quantize(self, x: Tensor, result: Activation) -> None:
        source = Stored(x.detach().float(), "float32", source=x)
        self.record("QUANTIZE", [source], [result.stored()])


def _constant(x: Tensor, largest: float, bits: int, power_of_two: bool) -> Activation:
    qparams = symmetric_qparams(largest, bits=bits, power_of_two=power_of_two)
    with float32_arithmetic(x):
        return Activation(quantize(x, qparams), qparams, constant=True)


@lru_cache(maxsize=256)
def _number(x: float, bits: int, power_of_two: bool) -> Activation:
    # Kept for training, whoever asks first.
    with torch.inference_mode(False):
        number = torch.tensor(x, dtype=torch.float32)
        return _constant(number, float(number.abs()), bits, power_of_two)


def stored_bytes(value: Tensor, qparams: QParams) -> Tensor:
    """Return integers with their zero point, int8, in the shape of ``value``."""
    if runs_kernel("centered_integers", value):
        scale, zero_point = qparams.scale, qparams.zero_point
        return kernels.centered_integers(value.detach(), scale=scale, zero_point=zero_point)
    integers = (value.detach() / qparams.scale).add_(qparams.zero_point)
    return (integers if on_host(integers) else integers.round_()).to(torch.int8)


def quantize(x: Tensor, qparams: QParams, key: str = "a constant") -> Tensor:
    """Quantize a float tensor; the gradient is 1 inside the range and 0 outside.

    Args:
        x: Float tensor of any shape.
        qparams: Quantization parameters.
        key: Name of the tensor in errors.

    Raises:
        FloatingPointError: If a value is not finite.
    """
    return _Quantize.apply(x, qparams, key)


def requantize(call: Call, x: Activation, y: QParams) -> Tensor:
    """Requantize an activation of any shape to parameters ``y``, as the kernel does."""
    if x.qparams == y:
        return x.value
    with float32_arithmetic(x.value):
        result = _Requantize.apply(x.value, x, y, call)
    if call.recording:
        call.record("QUANTIZE", [x.stored()], [Activation(result, y).stored()])
    return call.with_qparams(result, y)


def holds_any_integer(qparams: QParams) -> bool:
    """Tell whether float32 holds all integers times the scale, see :func:`with_any_integer`."""
    scale = qparams.scale
    return qparams.bits == 8 or scale == round_to_significand(scale, bits=16)


def with_any_integer(call: Call, x: Activation) -> Activation:
    """Requantize an activation if float32 does not hold all integers times its scale.

    That is so for 8 bits that were widened to 16 without loss: the integers are multiples of 128
    and the scale has the digits of one of 8 bits.

    Args:
        call: The call.
        x: Activation of any shape.
    """
    if call.observing or holds_any_integer(x.qparams):
        return x
    reach = x.qparams.largest * x.qparams.scale
    power_of_two = call.state.spec.power_of_two_scales
    y = affine_qparams(-reach, reach, bits=16, power_of_two=power_of_two)
    return Activation(requantize(call, x, y), y)


class _Quantize(torch.autograd.Function):
    """float -> grid, straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, qparams: QParams, key: str) -> Tensor:
        if runs_kernel("quantize", x):
            return _quantize_by_kernel(ctx, x, qparams, key)
        # LiteRT's quantize divides in float32 and rounds ties away from zero.
        scaled = x.detach().float() / qparams.scale
        low, high = (float(x) for x in torch.aminmax(scaled)) if scaled.numel() else (0.0, 0.0)
        if not math.isfinite(high - low):
            raise FloatingPointError(not_finite(key, low, high))
        centered = round_half_away(scaled)
        clipped = None
        if low < qparams.bounds[0] or high > qparams.bounds[1]:
            centered, clipped = clip(centered, qparams, keep=True)
        ctx.save_for_backward(clipped)
        return centered.mul_(qparams.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Outside of the block: with activation checkpointing, asking for what was saved runs the
        # forward again.
        (clipped,) = ctx.saved_tensors
        with float32_arithmetic(grad):
            return inside(grad, clipped), None, None


def _quantize_by_kernel(ctx: Any, x: Tensor, qparams: QParams, key: str) -> Tensor:
    low, high = qparams.bounds
    values, clipped, is_finite = kernels.quantize(
        x.detach(), scale=qparams.scale, low=low, high=high, fused_relu=qparams.fused_relu
    )
    if isinstance(is_finite, Tensor):
        DEFERRED.require(is_finite, FloatingPointError(not_finite(key)))
    elif not is_finite:
        smallest, largest = torch.aminmax(x.detach().float() / qparams.scale)
        raise FloatingPointError(not_finite(key, float(smallest), float(largest)))
    ctx.save_for_backward(clipped)
    return values


class _Requantize(torch.autograd.Function):
    """The same value on another grid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation, y: QParams, call: Call) -> Tensor:
        factor = activation.qparams.scale / y.scale
        rounding = call.state.spec.rounding_of("double")
        integers = activation.integers()
        clipped: Tensor | None
        if runs_kernel("requantize", x):
            values, clipped = requantize_by_kernel(
                integers, y, rounding=rounding, scale_before=factor
            )
            ctx.save_for_backward(clipped)
            return values
        largest = float(activation.qparams.largest)
        if call.exact or spills(factor, rounding=rounding, largest=largest):
            rounded = rescale(
                integers, factor, rounding=rounding, largest=largest, zero_point=y.zero_point
            )
        else:
            rounded = rescale_fast(integers, factor, rounding=rounding)
        centered, clipped = clip(rounded, y, keep=True)
        ctx.save_for_backward(clipped)
        return centered.mul_(y.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (clipped,) = ctx.saved_tensors
        with float32_arithmetic(grad):
            return inside(grad, clipped), None, None, None
