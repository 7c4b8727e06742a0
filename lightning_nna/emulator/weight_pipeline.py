"""The weight pipeline: what methods make of a parameter before the chip's grid.

A method claims a parameter with a *stage*: a mask, or a set of centroids. While a forward runs,
the parameter itself holds what its stages make of it, in one fixed order whatever the order of the
callbacks; the weight that is trained (the *latent* weight) is kept aside, and is back in its place
when the optimiser steps. So no layer is replaced and no function is wrapped: functional calls,
scripted and compiled modules, recurrent layers, an emulated chip and a plain one see the same
values. The gradient that reaches the transformed weight is pulled back through the stages once,
when the optimiser is about to step: it is linear, so accumulated gradients need no more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, ParamSpec, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_nna.emulator.non_finite import require_finite_weights
from lightning_nna.emulator.spec import NNASpec
from lightning_nna.emulator.weights import QuantizedWeight, quantize_onto, quantize_weight

P = ParamSpec("P")
R = TypeVar("R")

#: ``latent``: parameters hold what is trained; ``train`` and ``hard``: what stages make of it.
PipelinePhase = Literal["latent", "train", "hard"]


def unseen(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function run without gradient, and unseen by the chip's interception.

    Within a batch, the interception would ask of every operation whose it is, and that takes longer
    than the operation.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return function(*args, **kwargs)

    return run


@dataclass(frozen=True)
class WeightGrid:
    """The integer grid on which a stage leaves a parameter.

    Args:
        steps: One positive step for each group of rows (first axis of the weight), float32.
        maximum: Largest integer.
    """

    steps: Float[Tensor, " groups"]
    maximum: int


class Stage(Protocol):
    """One method's hold on one parameter."""

    #: Name of the method, for messages.
    method: str
    #: Place in the pipeline: masks 0, centroids 1. One stage a place.
    place: int

    @property
    def grid(self) -> WeightGrid | None:
        """Where results lie in phase ``hard``; None for anywhere."""

    def transform(self, weight: Tensor, *, hard: bool) -> Tensor:
        """What to use instead of ``weight``; ``weight`` itself if nothing is to be done."""

    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Gradient of ``weight``, given that of what it was transformed to in training."""


@runtime_checkable
class Masking(Protocol):
    """A stage of place 0: what it zeroes stays zero, whatever comes after it."""

    @property
    def mask(self) -> Tensor:
        """True where weights are kept, in the shape of the parameter."""

    @property
    def keeps_all(self) -> bool:
        """Whether the mask is True everywhere."""

    def zero_(self, weight: Tensor) -> None:
        """Zero in place what the mask does not keep."""


class WeightPipeline:
    """The stages of one module's parameters. Use :func:`pipeline_of`.

    Attributes:
        phase: What the parameters hold now.
    """

    def __init__(self) -> None:
        self.phase: PipelinePhase = "latent"
        self._stages: dict[str, list[Stage]] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._by_id: dict[int, str] = {}
        self._latent: dict[str, Tensor] = {}
        # Where latent weights lay in the last step: memory that is freed in every step is fetched
        # from the system in every step.
        self._spare: dict[str, Tensor] = {}
        # Parameters whose gradient is that of a transformed weight.
        self._pending: set[str] = set()
        self._steppers: list[tuple[int, Callable[[], None]]] = []
        self._stepped: list[Callable[[], None]] = []

    # --- claims -------------------------------------------------------------------------------

    def claim(self, name: str, parameter: nn.Parameter, stage: Stage) -> None:
        """Put a stage on a parameter; again the same one changes nothing.

        Raises:
            ValueError: If another method has that place.
        """
        held = self._stages.setdefault(name, [])
        for other in held:
            if other is stage:
                self._parameters[name] = parameter
                self._by_id[id(parameter)] = name
                return
            if other.place == stage.place:
                raise ValueError(
                    f"{name} is claimed by {other.method} and by {stage.method}: a tensor takes "
                    f"one of them; narrow the targets of either"
                )
        held.append(stage)
        held.sort(key=lambda one: one.place)
        self._parameters[name] = parameter
        self._by_id[id(parameter)] = name

    def release(self, stage: Stage) -> None:
        """Take a stage off its parameter."""
        for name in [n for n, stages in self._stages.items() if stage in stages]:
            self._stages[name].remove(stage)
            if not self._stages[name]:
                del self._stages[name]
                self._by_id.pop(id(self._parameters.pop(name)), None)

    def stages_of(self, weight: Tensor) -> list[Stage]:
        """Stages of a parameter, in order; none for any other tensor."""
        name = self._by_id.get(id(weight))
        if name is None or self._parameters[name] is not weight:
            return []
        return self._stages[name]

    def claims(self) -> Iterator[tuple[str, nn.Parameter, list[Stage]]]:
        """Name, parameter and stages of all that is claimed, in the order of the first claims."""
        for name, stages in self._stages.items():
            yield name, self._parameters[name], stages

    # --- steps --------------------------------------------------------------------------------

    def attend(self, place: int, stepped: Callable[[], None]) -> None:
        """Let a method say what it does after an optimiser step; masks do it first."""
        self._steppers.append((place, stepped))
        self._steppers.sort(key=lambda one: one[0])

    def leave(self, stepped: Callable[[], None]) -> None:
        """Undo :meth:`attend`."""
        self._steppers = [one for one in self._steppers if one[1] != stepped]
        self._stepped = []
        if not self._steppers:
            self._spare = {}

    def has_stepped(self, stepped: Callable[[], None]) -> None:
        """A method has seen the optimiser step; when all have, they act in their order."""
        self._stepped.append(stepped)
        if len(self._stepped) == len(self._steppers):
            self._stepped = []
            for _, act in self._steppers:
                act()

    # --- phases -------------------------------------------------------------------------------

    @unseen
    def substitute(self, phase: Literal["train", "hard"]) -> None:
        """Let the parameters hold what their stages make of them.

        A second call in the same phase changes nothing.

        Raises:
            RuntimeError: If they hold that of the other phase.
            FloatingPointError: If a weight is not finite; names it.
        """
        if self.phase == phase:
            return
        if self.phase != "latent":
            raise RuntimeError(f"weights are substituted for {self.phase!r} already: restore first")
        require_finite_weights({name: self._parameters[name] for name in self._stages})
        self.phase = phase
        for name, stages in self._stages.items():
            weight = self._parameters[name].detach()
            mask = _mask_of(stages)
            if mask is not None and len(stages) == 1:
                if mask.keeps_all:
                    continue
                self._latent[name] = self._aside(name, weight)
                mask.zero_(weight)  # In place: weights are read and written half as often.
            else:
                result = _transformed(weight, stages, hard=phase == "hard")
                if result is weight:
                    continue
                self._latent[name] = self._aside(name, weight)
                weight.copy_(result)
            if phase == "train":
                self._pending.add(name)

    @unseen
    def restore(self) -> None:
        """Let the parameters hold the latent weights again."""
        for name, latent in self._latent.items():
            self._parameters[name].copy_(latent)
        if self._latent:
            self._spare = dict(self._latent) if self._steppers else {}
        self._latent.clear()
        self.phase = "latent"

    def _aside(self, name: str, weight: Tensor) -> Tensor:
        spare = self._spare.pop(name, None)
        if spare is None or (spare.shape, spare.dtype, spare.device) != (
            weight.shape,
            weight.dtype,
            weight.device,
        ):
            return weight.clone()
        return spare.copy_(weight)

    @unseen
    def pull_back(self, parameters: Iterable[Tensor]) -> None:
        """Turn gradients of transformed weights into gradients of the latent ones.

        Args:
            parameters: Of the optimiser that is about to step; the latent weights are in place.
        """
        for parameter in parameters:
            name = self._by_id.get(id(parameter))
            if name not in self._pending or name is None or parameter.grad is None:
                continue
            self._pending.discard(name)
            sparse = parameter.grad if parameter.grad.is_sparse else None
            grad = parameter.grad if sparse is None else sparse.to_dense()
            grad = _pulled_back(parameter.detach(), self._stages[name], grad)
            parameter.grad = grad if sparse is None else grad.sparse_mask(sparse.coalesce())

    # --- what others ask ----------------------------------------------------------------------

    def latent(self, name: str) -> Tensor:
        """The latent weight of a parameter, whatever it holds now."""
        return self._latent.get(name, self._parameters[name].detach())

    @unseen
    def deployed(self, weight: Tensor) -> Tensor:
        """A parameter as an operator is to use it now; any other tensor as it is."""
        stages = self.stages_of(weight)
        if self.phase != "latent" or not stages:
            return weight
        return self.hard(weight)

    @unseen
    def hard(self, weight: Tensor) -> Tensor:
        """What is deployed of a parameter that holds its latent weight."""
        name = self._by_id.get(id(weight))
        if name is not None:
            require_finite_weights({name: weight})
        return _transformed(weight.detach(), self.stages_of(weight), hard=True)

    @unseen
    def hard_latent(self, name: str) -> Tensor:
        """What is deployed of a parameter, whatever it holds now."""
        return _transformed(self.latent(name), self._stages[name], hard=True)

    def grid_of(self, weight: Tensor) -> WeightGrid | None:
        """The grid on which the last stage leaves a parameter, if it is on one."""
        stages = self.stages_of(weight)
        return stages[-1].grid if stages else None


def _mask_of(stages: Sequence[Stage]) -> Masking | None:
    return stages[0] if isinstance(stages[0], Masking) else None


def _transformed(weight: Tensor, stages: Sequence[Stage], *, hard: bool) -> Tensor:
    """What all stages make of a weight; a mask has the last word, too."""
    result = weight
    for stage in stages:
        result = stage.transform(result, hard=hard)
    if len(stages) > 1 and isinstance(stages[0], Masking) and result is not weight:
        result = stages[0].transform(result, hard=hard)
    return result


def _pulled_back(weight: Tensor, stages: Sequence[Stage], grad: Tensor) -> Tensor:
    """Gradient of a weight through its stages; what a mask has zeroed goes by the mask alone."""
    inputs = [weight]
    for stage in stages[:-1]:
        inputs.append(stage.transform(inputs[-1], hard=False))
    masking = _mask_of(stages)
    mask = None if masking is None else masking.mask
    for stage, before in reversed(list(zip(stages, inputs, strict=True))):
        if mask is not None and stage is not stages[0]:
            grad = torch.where(mask, stage.pull_back(before, grad * mask), grad)
        else:
            grad = stage.pull_back(before, grad)
    return grad


_PIPELINES: WeakKeyDictionary[nn.Module, WeightPipeline] = WeakKeyDictionary()


def pipeline_of(module: nn.Module) -> WeightPipeline:
    """The pipeline of a module; an empty one is made where there is none.

    It is remembered here and not on the module, so that nothing is copied, pickled or saved.

    Example:
        >>> module = nn.Linear(2, 2)
        >>> pipeline_of(module) is pipeline_of(module)
        True
    """
    return _PIPELINES.setdefault(module, WeightPipeline())


def on_grid(
    pipeline: WeightPipeline, weight: Tensor, rows_per_scale: int, spec: NNASpec
) -> QuantizedWeight:
    """A weight on the chip's grid: after its stages, if methods have claimed it.

    Args:
        pipeline: Of the module.
        weight: Of an operator.
        rows_per_scale: Rows that share a scale.
        spec: The chip.

    Raises:
        ValueError: If the chip cannot hold the grid of a stage; says what to change.
        FloatingPointError: If a weight is not finite.
    """
    grid, weight = pipeline.grid_of(weight), pipeline.deployed(weight)
    if grid is not None:
        return quantize_onto(
            weight, _scales_of_rows(grid, weight, rows_per_scale, spec), maximum=spec.weight_max
        )
    return quantize_weight(
        weight,
        rows_per_scale=rows_per_scale,
        maximum=spec.weight_max,
        power_of_two=spec.power_of_two_scales,
    )


def _scales_of_rows(
    grid: WeightGrid, weight: Tensor, rows_per_scale: int, spec: NNASpec
) -> Float[Tensor, " rows"]:
    """The steps of a grid as scales of rows, if an operator of the chip can have them."""
    rows, groups = weight.shape[0], len(grid.steps)
    if grid.maximum > spec.weight_max:
        raise ValueError(
            f"a weight has centroids in ±{grid.maximum}, the chip's weights are in "
            f"±{spec.weight_max}: set grid_bits={spec.weight_bits} on the method"
        )
    if (rows // groups) % rows_per_scale:
        raise ValueError(
            f"a weight of {rows} rows has {groups} scales, and an operator of the chip needs one "
            f"for every {rows_per_scale} rows: set granularity='tensor' on the method"
        )
    if spec.power_of_two_scales and bool((torch.frexp(grid.steps).mantissa != 0.5).any()):
        raise ValueError(
            "the chip's scales are powers of two and those of the centroids are not: set "
            "power_of_two_steps=True on the method"
        )
    return grid.steps.repeat_interleave(rows // groups)
