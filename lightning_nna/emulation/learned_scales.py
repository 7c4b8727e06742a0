r"""Learned step size quantization (LSQ): scales are trained along with the weights.

With :math:`v = x / s` and integers in :math:`q_{lo} \dots q_{hi}`, LSQ gives a scale the gradient

.. math::
    \frac{\partial \hat x}{\partial s} = \begin{cases}
        \mathrm{round}(v) - v & q_{lo} \le v \le q_{hi} \\
        q_{lo} \text{ or } q_{hi} & \text{outside,} \end{cases}
    \qquad
    \frac{\partial \hat x}{\partial x} = \begin{cases}
        1 & q_{lo} \le v \le q_{hi} \\ 0 & \text{outside,} \end{cases}

times :math:`1 / \sqrt{n\, q_{hi}}` for the :math:`n` values that share the scale. The trained
parameter is :math:`p = \log_2 s`: the scale stays positive, and a change of :math:`p` is the same
relative change of every scale. The accelerator uses :math:`2^p` rounded to its significand, or
:math:`2^{\mathrm{round}(p)}`; the gradient passes this rounding unchanged.

Reference:
    Esser et al., "Learned step size quantization", ICLR 2020, arXiv 1902.08153.

Differs from the paper: the logarithm of the scale is learned, as in Jain et al., "Trained
quantization thresholds", MLSys 2020, arXiv 1903.08066, and starts at the scale that the emulation
has without learning. Weights have a learned scale for each scale of the accelerator and not one per
layer, activations keep the zero point of their calibration, and :math:`n` counts all values of an
activation.

Worked example: the weights :math:`x = (0.6, -1.3, 4.5)` share :math:`s = 0.5`, so :math:`p = -1`,
and have 3 bits, so integers from -3 to 3.

- :math:`v = (1.2, -2.6, 9)`, and the integers are :math:`(1, -3, 3)`: the last is clipped.
- :math:`\partial \hat x / \partial s = (1 - 1.2,\ -3 + 2.6,\ 3) = (-0.2, -0.4, 3)`.
- With a gradient of 1 for every :math:`\hat x`, these add to 2.4. Times
  :math:`1 / \sqrt{3 \cdot 3}`, that is 0.8.
- :math:`\partial s / \partial p = s \ln 2 = 0.347`, so :math:`p` gets the gradient 0.277:
  gradient descent makes the scale smaller.
- The weights get the gradients :math:`(1, 1, 0)`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from lightning_nna import elementary
from lightning_nna.distributed import is_distributed
from lightning_nna.emulation.arithmetic.quantized_weight import (
    SECOND_AXIS,
    QuantizedWeight,
    largest_scales,
    per_row,
    quantize_onto,
    round_significands,
)
from lightning_nna.emulation.first_order import first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.marks import Stamp, Writes
from lightning_nna.emulation.operators.record import operators
from lightning_nna.emulation.ranges import (
    QParams,
    RangeTable,
    affine_qparams,
    round_to_significand,
)
from lightning_nna.emulation.spec import NNASpec
from lightning_nna.weights.pipeline import pipeline_of

Learned = Literal["none", "weights", "all"]
LEARNED: tuple[Learned, ...] = ("none", "weights", "all")


class LearnedScales:
    """Hold the learned scales of one module, as logarithms to base 2.

    Args:
        module: Module whose parameters may have learned scales.
        spec: Accelerator.
        writes: Writes to tensors, see :mod:`.marks`.

    Attributes:
        learning: Tensors whose scales are being learned now. Learned scales are always used.
        weights: Log2 scales of weights, float32, shape ``(groups,)``, by ``name:rows``, with
            ``rows`` the number of rows that share a scale.
        activations: Log2 scales of outputs, float32, shape ``()``, by ``site/output``.
    """

    def __init__(self, module: nn.Module, spec: NNASpec, writes: Writes) -> None:
        self.spec, self._writes = spec, writes
        self.pipeline = pipeline_of(module)
        self.learning: Learned = "none"
        self.weights: dict[str, Tensor] = {}
        self.activations: dict[str, Tensor] = {}
        # By the key of the output: a log2 scale, its stamp, and the parameters that follow from it.
        self._output_qparams: dict[str, tuple[Tensor, Stamp, QParams]] = {}
        self.follow(module)

    def follow(self, module: nn.Module) -> None:
        """Look the module's parameters up again, when a weight is next asked for."""
        self._module = ref(module)
        self._names: dict[int, tuple[str, ReferenceType[nn.Parameter]]] | None = None

    @property
    def learns_outputs(self) -> bool:
        """Tell whether the scales of outputs change with every optimizer step."""
        return self.learning == "all"

    def tensors(self) -> dict[str, Tensor]:
        """Return log2 scales by key, in an order that is the same on all ranks.

        Those of weights have the shape ``(groups,)``, those of outputs the shape ``()``.
        """
        return {**dict(sorted(self.weights.items())), **dict(sorted(self.activations.items()))}

    def learn(self, learning: Learned, ranges: RangeTable | None) -> None:
        """Set which scales are learned from now on.

        Args:
            learning: Tensors whose scales are learned: ``"none"``, ``"weights"`` or ``"all"``.
            ranges: Frozen ranges, from which scales of activations start; None before the freeze.

        Raises:
            ValueError: If ``learning`` is unknown.
        """
        if learning not in LEARNED:
            raise ValueError(f"learned_scales must be one of {list(LEARNED)}, got {learning!r}")
        self.learning = learning
        if learning == "all" and ranges is not None and not self.activations:
            self._start(ranges)

    def _start(self, ranges: RangeTable) -> None:
        """Create the scales of all outputs that can learn one; a weight's is created at its use."""
        bits, power_of_two = self.spec.activation_bits, self.spec.power_of_two_scales
        for key in sorted(ranges.ranges):
            if key not in self.activations and _is_learnable(key):
                qparams = affine_qparams(
                    ranges[key].minimum,
                    ranges[key].maximum,
                    bits=bits,
                    power_of_two=power_of_two,
                )
                self.activations[key] = _leaf(torch.tensor(elementary.log2(qparams.scale)))

    # --- weights ------------------------------------------------------------------------------

    def of_weight(self, weight: Tensor, rows_per_scale: int) -> Tensor | None:
        """Return the log2 scales of a weight, created here if the weight is to learn them.

        Args:
            weight: Weight, float32, shape ``(rows, …)``.
            rows_per_scale: Number of rows that share a scale, or :data:`.SECOND_AXIS`.

        Returns:
            Log2 scales, float32, shape ``(rows / rows_per_scale,)``; None if none are learned.
        """
        if self.learning == "none" and not self.weights:
            return None
        if self.pipeline.grid_of(weight) is not None:  # Another method has quantized it.
            return None
        if self._names is None:
            module = self._module()
            named = () if module is None else module.named_parameters()
            self._names = {id(parameter): (name, ref(parameter)) for name, parameter in named}
        name, parameter = self._names.get(id(weight), ("", None))
        if parameter is None or parameter() is not weight:  # Computed from parameters, or a buffer.
            return None
        key = f"{name}:{rows_per_scale}"
        log2_scales = self.weights.get(key)
        if log2_scales is None and self.learning != "none" and weight.requires_grad:
            log2_scales = self._first_log2_scales(weight, rows_per_scale)
            if log2_scales is not None:
                self.weights[key] = log2_scales
        if log2_scales is not None and log2_scales.device != weight.device:
            log2_scales = self.weights[key] = _leaf(log2_scales.to(weight.device))
        return log2_scales

    def _first_log2_scales(self, weight: Tensor, rows_per_scale: int) -> Tensor | None:
        """Compute the scales without learning; a group of zeros takes the largest of its tensor.

        A tensor of zeros has no scale to start from: its scale is created once it is not zero.
        """
        rows, count = weight.detach(), rows_per_scale
        if rows_per_scale == SECOND_AXIS:
            rows, count = rows.transpose(0, 1), 1
        groups = rows.reshape(len(rows) // count, -1)
        scale = largest_scales(
            groups, maximum=self.spec.weight_max, power_of_two=self.spec.power_of_two_scales
        )
        zero = ~groups.any(1)
        if bool(zero.all()):
            return None
        return _leaf(elementary.log2(torch.where(zero, scale.max(), scale)).float())

    def stamps(self, weight: Tensor, log2_scales: Tensor | None) -> tuple[Stamp, Stamp | None]:
        """Return stamps that differ once a weight or its scales have changed.

        Args:
            weight: Weight, shape ``(rows, …)``.
            log2_scales: Its log2 scales, shape ``(groups,)``, or None.
        """
        of_scales = None if log2_scales is None else self._writes.stamp(log2_scales)
        return self._writes.stamp(weight), of_scales

    def quantized(
        self, weight: Tensor, log2_scales: Tensor, rows_per_scale: int
    ) -> QuantizedWeight:
        """Quantize a weight with its learned scales.

        Args:
            weight: Weight, float32, shape ``(rows, …)``.
            log2_scales: Its log2 scales, float32, shape ``(rows / rows_per_scale,)``.
            rows_per_scale: Number of rows that share a scale.
        """
        exponent = log2_scales.detach()
        if self.spec.power_of_two_scales:
            scale = elementary.exp2(exponent.round())
        else:
            scale = round_significands(elementary.exp2(exponent))
        if rows_per_scale == SECOND_AXIS:
            turned = weight.transpose(0, 1)
            return quantize_onto(turned, scale.float(), maximum=self.spec.weight_max).turned()
        scales = scale.float().repeat_interleave(rows_per_scale)
        return quantize_onto(weight, scales, maximum=self.spec.weight_max)

    def trainable(
        self,
        weight: Tensor,
        rows_per_scale: int,
        quantized: Callable[[Tensor, int], QuantizedWeight],
    ) -> Tensor:
        """Return the tensor that receives the gradient of a weight.

        Args:
            weight: Weight, float32, shape ``(rows, …)``.
            rows_per_scale: Number of rows that share a scale.
            quantized: Function that returns the quantized weight.

        Returns:
            The weight itself, or its quantized values if it has learned scales; same shape.
        """
        log2_scales = self.of_weight(weight, rows_per_scale)
        if log2_scales is None or not torch.is_grad_enabled():
            return weight
        # A new autograd node for every use: a shared one would have no gradient if its first use
        # had none, and would count twice under activation checkpointing.
        learned = log2_scales if self.learning != "none" else log2_scales.detach()
        with float32_arithmetic(weight):
            quantized_weight, limit = quantized(weight, rows_per_scale), self.spec.weight_max
            if rows_per_scale == SECOND_AXIS:
                turned = weight.transpose(0, 1)
                values = _WeightOnScales.apply(turned, learned, quantized_weight.turned(), limit)
                return values.transpose(0, 1)
            return _WeightOnScales.apply(weight, learned, quantized_weight, limit)

    # --- activations --------------------------------------------------------------------------

    def output_qparams(self, key: str, observed: QParams) -> QParams:
        """Return the quantization parameters of an output.

        Args:
            key: Key of the output, ``site/output``.
            observed: Parameters that follow from its range.

        Returns:
            The learned scale with the observed zero point; ``observed`` if no scale is learned.
        """
        log2_scale = self.activations.get(key)
        if log2_scale is None:
            return observed
        cached, stamp = self._output_qparams.get(key), self._writes.stamp(log2_scale)
        if cached is None or cached[0] is not log2_scale or cached[1] != stamp:
            exponent = float(log2_scale.detach())
            if self.spec.power_of_two_scales:
                scale = math.ldexp(1.0, round(exponent))
            else:
                scale = round_to_significand(elementary.exp2(exponent), observed.bits)
            qparams = QParams(scale, observed.zero_point, observed.low, observed.high)
            cached = self._output_qparams[key] = (log2_scale, stamp, qparams)
        return cached[2]

    def is_learned(self, key: str, qparams: QParams) -> bool:
        """Tell whether parameters are those that :meth:`output_qparams` last learned for a key."""
        return key in self._output_qparams and self._output_qparams[key][2] == qparams

    def learn_output(
        self,
        key: str,
        result: Tensor,
        qparams: QParams,
        func: Callable[..., Any],
        operands: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> Tensor:
        """Let the gradient of a result reach its learned scale, too.

        Args:
            key: Key of the output, ``site/output``, which has a learned scale.
            result: Emulated result, float32, any shape.
            qparams: Quantization parameters of the result.
            func: Torch function that computes the result before its rounding.
            operands: Positional and keyword arguments, quantized.

        Returns:
            A tensor of the values and shape of ``result``.
        """
        log2_scale = self.activations[key]
        if log2_scale.device != result.device:
            log2_scale = self.activations[key] = _leaf(log2_scale.to(result.device))
        args, kwargs = operands
        with float32_arithmetic(result):
            with torch.no_grad():
                # Computed before the backward, when operands may have been overwritten.
                v = func(*args, **kwargs) / qparams.scale
                factor = qparams.scale * _gradient_factor(v.numel(), qparams.largest)
                slope = _slope(v, *qparams.bounds).mul_(factor)
            return _OutputOnScale.apply(result, log2_scale, slope)

    # --- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the log2 scales of weights, shape ``(groups,)``, and of outputs, shape ``()``."""
        return {
            kind: {key: log2_scale.detach().clone() for key, log2_scale in sorted(scales.items())}
            for kind, scales in (("weights", self.weights), ("activations", self.activations))
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace all log2 scales by those of a state, of the same shapes."""
        self.weights, self.activations = (
            {key: _leaf(log2_scale) for key, log2_scale in state.get(kind, {}).items()}
            for kind in ("weights", "activations")
        )

    def adopt(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add the log2 scales of another rank, of any shapes, that are missing here."""
        for scales, kind in ((self.weights, "weights"), (self.activations, "activations")):
            for key, log2_scale in state[kind].items():
                if key not in scales:
                    scales[key] = _leaf(log2_scale)


def share_keys(scales: LearnedScales) -> None:
    """Give every rank the scales of all ranks: one may have run operators that others have not."""
    if not is_distributed():
        return
    tensors = scales.tensors()
    device = next((x.device for x in tensors.values()), torch.device("cpu"))
    # All ranks have the same keys if the largest and the smallest checksum agree.
    checksum = zlib.crc32("\n".join(tensors).encode())
    extremes = torch.tensor([checksum, -checksum], device=device)
    torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX)
    if int(extremes[0]) == -int(extremes[1]):
        return
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, scales.state_dict())
    for state in states:
        scales.adopt(state)


class _WeightOnScales(torch.autograd.Function):
    """Return the quantized weight; backward, LSQ's gradients of the weight and its scales."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, log2_scales: Tensor, quantized: QuantizedWeight, maximum: int
    ) -> Tensor:
        ctx.maximum = maximum
        ctx.save_for_backward(weight, quantized.scales)
        ctx.groups = len(log2_scales)
        return quantized.values.detach()

    @staticmethod
    @first_order("learned scale of a weight")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales = ctx.saved_tensors
        with float32_arithmetic(grad):
            grad = grad.to_dense() if grad.is_sparse else grad
            v = weight / per_row(scales, weight)
            log2_scales_grad = None
            if ctx.needs_input_grad[1]:
                slopes = _slope(v, -ctx.maximum, ctx.maximum).mul_(grad)
                count = v.numel() // ctx.groups
                # d/dp = s ln(2) d/ds; all rows of a group have the same scale s.
                factor = scales.view(ctx.groups, -1)[:, 0] * _gradient_factor(count, ctx.maximum)
                log2_scales_grad = slopes.reshape(ctx.groups, -1).sum(1).mul_(factor)
            return grad * (v.abs_() <= ctx.maximum), log2_scales_grad, None, None


class _OutputOnScale(torch.autograd.Function):
    """Return the result unchanged; backward, LSQ's gradient of its scale."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, log2_scale: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        # Not a view: in-place functions on a view that a Function returns are an error.
        return result.detach()

    @staticmethod
    @first_order("learned scale of an output")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (slope,) = ctx.saved_tensors
        with float32_arithmetic(grad):
            return grad, (slope * grad).sum(), None


def _leaf(log2_scale: Tensor) -> Tensor:
    """Copy a log2 scale to a tensor that can be trained, also in inference mode."""
    with torch.inference_mode(False):
        return log2_scale.detach().clone().requires_grad_()


def _slope(v: Tensor, low: int, high: int) -> Tensor:
    """Compute d(s q)/ds for values v = x / s.

    Example:
        >>> _slope(torch.tensor([1.25, -2.5, 9.0]), -3, 3)
        tensor([-0.2500,  0.5000,  3.0000])
    """
    q = v.round().clamp_(low, high)
    return torch.where((v >= low) & (v <= high), q - v, q)


def _gradient_factor(count: int, maximum: int) -> float:
    """Return LSQ's factor 1 / sqrt(n q_hi), times ln 2 of the derivative of 2^p."""
    return math.log(2) / math.sqrt(count * maximum)


def _is_learnable(key: str) -> bool:
    """Tell whether a range belongs to the output of an operator that can learn its scale."""
    label, is_site, _ = key.removesuffix("/output").rsplit("/", 1)[-1].partition("#")
    operator = operators().get(label)
    learns = operator is not None and operator.learns_scale
    return key.endswith("/output") and bool(is_site) and learns
