r"""Learned step size quantization: the step of a grid is trained along with the weights.

With :math:`v = x / s` and integers in :math:`q_{lo} \dots q_{hi}`, LSQ gives the step the gradient

.. math::
    \frac{\partial \hat x}{\partial s} = \begin{cases}
        \mathrm{round}(v) - v & q_{lo} \le v \le q_{hi} \\
        q_{lo} \text{ or } q_{hi} & \text{outside,} \end{cases}
    \qquad
    \frac{\partial \hat x}{\partial x} = \begin{cases}
        1 & q_{lo} \le v \le q_{hi} \\ 0 & \text{outside,} \end{cases}

times :math:`1 / \sqrt{n\, q_{hi}}` for the :math:`n` values that share the step. What is learned is
:math:`p = \log_2 s`: it can never make a step negative, and a change of :math:`p` is the same
relative change of a step of whatever size. The chip holds :math:`2^p` rounded to its significand,
or :math:`2^{\mathrm{round}(p)}`; the gradient passes this rounding unchanged.

Reference:
    Esser et al., "Learned step size quantization", ICLR 2020, arXiv 1902.08153.

Differs from the paper: the step is learned by its logarithm, as in Jain et al., "Trained
quantization thresholds", MLSys 2020, arXiv 1903.08066, and starts at the scale that the emulation
has without learning. Weights have a step per scale of the chip and not per layer, activations
keep the zero point of their calibration, and :math:`n` counts all values of an activation.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_nna import elementary
from lightning_nna.distributed import is_distributed
from lightning_nna.emulation.arithmetic.quantized_weight import (
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
    """The steps of one module, as the logarithms to base 2 that are trained.

    Args:
        module: Its parameters may get steps.
        spec: The chip.
        writes: Writes to tensors that the emulator has seen, see :mod:`.marks`.

    Attributes:
        learning: Which steps are being learned now. Those that exist are used in any case.
        weights: By ``name:rows``, with ``rows`` the rows that share a step; shape ``(groups,)``.
        activations: By the key of the output, ``site/output``; no axes.
    """

    def __init__(self, module: nn.Module, spec: NNASpec, writes: Writes) -> None:
        self.spec, self._writes = spec, writes
        self.pipeline = pipeline_of(module)
        self.learning: Learned = "none"
        self.weights: dict[str, Tensor] = {}
        self.activations: dict[str, Tensor] = {}
        self._grids: dict[str, tuple[Tensor, Stamp, QParams]] = {}
        self.follow(module)

    def follow(self, module: nn.Module) -> None:
        """Know parameters by their name, whichever tensors stand for them now."""
        self._names = {id(p): (name, ref(p)) for name, p in module.named_parameters()}

    @property
    def moves_outputs(self) -> bool:
        """Tell whether the scales of outputs change with every step of an optimizer."""
        return self.learning == "all"

    def tensors(self) -> dict[str, Tensor]:
        """Every step by its key, in an order that is the same on all ranks."""
        return {**dict(sorted(self.weights.items())), **dict(sorted(self.activations.items()))}

    def learn(self, learning: Learned, ranges: RangeTable | None) -> None:
        """Choose which steps are learned from now on.

        Args:
            learning: See :attr:`learning`.
            ranges: Frozen ones, from which steps of activations start; None before that.

        Raises:
            ValueError: If ``learning`` is unknown.
        """
        if learning not in LEARNED:
            raise ValueError(f"learned_scales must be one of {list(LEARNED)}, got {learning!r}")
        self.learning = learning
        if learning == "all" and ranges is not None and not self.activations:
            self._start(ranges)

    def _start(self, ranges: RangeTable) -> None:
        """Give a step to every output that can learn one; those of weights follow at first use."""
        bits, power_of_two = self.spec.activation_bits, self.spec.power_of_two_scales
        for key in sorted(ranges.ranges):
            if key not in self.activations and _is_learnable(key):
                seen = affine_qparams(
                    ranges[key].minimum,
                    ranges[key].maximum,
                    bits=bits,
                    power_of_two=power_of_two,
                )
                self.activations[key] = _leaf(torch.tensor(elementary.log2(seen.scale)))

    # --- weights ------------------------------------------------------------------------------

    def of_weight(self, weight: Tensor, rows_per_scale: int) -> Tensor | None:
        """The step of a weight; made here if weights learn and this one is trained."""
        if self.learning == "none" and not self.weights:
            return None
        if self.pipeline.grid_of(weight) is not None:  # Another method has put it on a grid.
            return None
        name, held = self._names.get(id(weight), ("", None))
        if held is None or held() is not weight:  # Computed from parameters, or a buffer.
            return None
        key = f"{name}:{rows_per_scale}"
        step = self.weights.get(key)
        if step is None and self.learning != "none" and weight.requires_grad:
            step = self._first_step(weight, rows_per_scale)
            if step is not None:
                self.weights[key] = step
        if step is not None and step.device != weight.device:
            step = self.weights[key] = _leaf(step.to(weight.device))
        return step

    def _first_step(self, weight: Tensor, rows_per_scale: int) -> Tensor | None:
        """The scales without learning; a group of zeros takes the largest one of its tensor.

        A tensor of zeros says nothing of a step: it gets one when it has left zero.
        """
        groups = weight.detach().reshape(weight.shape[0] // rows_per_scale, -1)
        scale = largest_scales(
            groups, maximum=self.spec.weight_max, power_of_two=self.spec.power_of_two_scales
        )
        zero = ~groups.any(1)
        if bool(zero.all()):
            return None
        return _leaf(elementary.log2(torch.where(zero, scale.max(), scale)).float())

    def stamps(self, weight: Tensor, step: Tensor | None) -> tuple[Stamp, Stamp | None]:
        """Return stamps of a weight and its scale: equal ones mean that neither has changed."""
        return self._writes.stamp(weight), None if step is None else self._writes.stamp(step)

    def quantized(self, weight: Tensor, step: Tensor, rows_per_scale: int) -> QuantizedWeight:
        """A weight on the grid of its step."""
        exponent = step.detach()
        if self.spec.power_of_two_scales:
            scale = elementary.exp2(exponent.round())
        else:
            scale = round_significands(elementary.exp2(exponent))
        scales = scale.float().repeat_interleave(rows_per_scale)
        return quantize_onto(weight, scales, maximum=self.spec.weight_max)

    def trainable(
        self,
        weight: Tensor,
        rows_per_scale: int,
        quantized: Callable[[Tensor, int], QuantizedWeight],
    ) -> Tensor:
        """What the gradient of a weight goes to: the weight itself, or its grid.

        Args:
            weight: Of an operator.
            rows_per_scale: Rows that share a step.
            quantized: Gives the weight on the chip.
        """
        step = self.of_weight(weight, rows_per_scale)
        if step is None or not torch.is_grad_enabled():
            return weight
        # A node for every use: one kept from use to use would miss the gradient where it was made
        # without, and would count twice under activation checkpointing.
        learned = step if self.learning != "none" else step.detach()
        with float32_arithmetic(weight):
            held = quantized(weight, rows_per_scale)
            return _WeightOnScales.apply(weight, learned, held, self.spec.weight_max)

    # --- activations --------------------------------------------------------------------------

    def grid(self, key: str, observed: QParams) -> QParams:
        """The grid of an output: that of its step, if it has one, with the observed zero point."""
        step = self.activations.get(key)
        if step is None:
            return observed
        held, stamp = self._grids.get(key), self._writes.stamp(step)
        if held is None or held[0] is not step or held[1] != stamp:
            exponent = float(step.detach())
            if self.spec.power_of_two_scales:
                scale = math.ldexp(1.0, round(exponent))
            else:
                scale = round_to_significand(elementary.exp2(exponent), observed.bits)
            qparams = QParams(scale, observed.zero_point, observed.low, observed.high)
            held = self._grids[key] = (step, stamp, qparams)
        return held[2]

    def made(self, key: str, grid: QParams) -> bool:
        """Whether a grid is the one that a step has given last."""
        return key in self._grids and self._grids[key][2] == grid

    def learn_output(
        self,
        key: str,
        result: Tensor,
        grid: QParams,
        func: Callable[..., Any],
        operands: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> Tensor:
        """Let the gradient of a result reach its step, too.

        Args:
            key: ``site/output``, which has a step.
            result: Of the operator.
            grid: The result's.
            func: The torch function, which gives the result before its rounding.
            operands: Positional and keyword arguments, on the chip's grids.

        Returns:
            The same values.
        """
        step = self.activations[key]
        if step.device != result.device:
            step = self.activations[key] = _leaf(step.to(result.device))
        args, kwargs = operands
        with float32_arithmetic(result):
            with torch.no_grad():
                # Now, and not backward: by then, operands may have been overwritten.
                v = func(*args, **kwargs) / grid.scale
                factor = grid.scale * _per_log2(v.numel(), grid.largest)
                slope = _slope(v, *grid.bounds).mul_(factor)
            return _OutputOnScale.apply(result, step, slope)

    # --- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Logarithms of the steps by key."""
        return {
            kind: {key: step.detach().clone() for key, step in sorted(steps.items())}
            for kind, steps in (("weights", self.weights), ("activations", self.activations))
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace every step by the saved ones."""
        self.weights, self.activations = (
            {key: _leaf(step) for key, step in state.get(kind, {}).items()}
            for kind in ("weights", "activations")
        )

    def adopt(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the steps of another rank that are not known here."""
        for steps, kind in ((self.weights, "weights"), (self.activations, "activations")):
            for key, step in state[kind].items():
                if key not in steps:
                    steps[key] = _leaf(step)


def agree_on_keys(steps: LearnedScales) -> None:
    """Let every rank have the steps of all: one may have taken a path that others did not."""
    if not is_distributed():
        return
    tensors = steps.tensors()
    device = next((x.device for x in tensors.values()), torch.device("cpu"))
    name = zlib.crc32("\n".join(tensors).encode())
    extremes = torch.tensor([name, -name], device=device)
    torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX)
    if int(extremes[0]) == -int(extremes[1]):
        return
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, steps.state_dict())
    for state in states:
        steps.adopt(state)


class _WeightOnScales(torch.autograd.Function):
    """The chip's weight forward; LSQ's gradients of weight and step backward."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, step: Tensor, quantized: QuantizedWeight, maximum: int
    ) -> Tensor:
        ctx.maximum = maximum
        ctx.save_for_backward(weight, quantized.scales)
        ctx.groups = len(step)
        return quantized.values.detach()

    @staticmethod
    @first_order("learned scale of a weight")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales = ctx.saved_tensors
        with float32_arithmetic(grad):
            grad = grad.to_dense() if grad.is_sparse else grad
            v = weight / per_row(scales, weight)
            d_step = None
            if ctx.needs_input_grad[1]:
                slopes = _slope(v, -ctx.maximum, ctx.maximum).mul_(grad)
                share = v.numel() // ctx.groups
                # d/dp = s ln(2) d/ds, by one scale a group.
                factor = scales.view(ctx.groups, -1)[:, 0] * _per_log2(share, ctx.maximum)
                d_step = slopes.reshape(ctx.groups, -1).sum(1).mul_(factor)
            return grad * (v.abs_() <= ctx.maximum), d_step, None, None


class _OutputOnScale(torch.autograd.Function):
    """The result as it is; backward, the step gets the gradient of what was rounded to it."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, step: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        # No view, so that what works in place on the result may.
        return result.detach()

    @staticmethod
    @first_order("learned scale of an output")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (slope,) = ctx.saved_tensors
        with float32_arithmetic(grad):
            return grad, (slope * grad).sum(), None


def _leaf(step: Tensor) -> Tensor:
    """A tensor of its own to be trained, even where an evaluation makes it."""
    with torch.inference_mode(False):
        return step.detach().clone().requires_grad_()


def _slope(v: Tensor, low: int, high: int) -> Tensor:
    """d(s q)/ds of values in units of the step."""
    q = v.round().clamp_(low, high)
    return torch.where((v >= low) & (v <= high), q - v, q)


def _per_log2(count: int, maximum: int) -> float:
    """LSQ's scale of the gradient, and the derivative of 2^p but for its value."""
    return math.log(2) / math.sqrt(count * maximum)


def _is_learnable(key: str) -> bool:
    """Whether a range is that of the output of a site of one instruction."""
    label, is_site, _ = key.removesuffix("/output").rsplit("/", 1)[-1].partition("#")
    operator = operators().get(label)
    learns = operator is not None and operator.learns_scale
    return key.endswith("/output") and bool(is_site) and learns
