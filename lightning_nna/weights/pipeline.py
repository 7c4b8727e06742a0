"""The weight pipeline: what methods make of a parameter before the chip's grid.

A method claims a parameter with a *stage*: a mask, or a set of centroids. While a forward runs,
the parameter itself holds what its stages make of it, in one fixed order whatever the order of the
callbacks; the weight that is trained (the *latent* weight) is kept aside, and is back in its place
when the optimizer steps. So no layer is replaced and no function is wrapped: functional calls,
scripted and compiled modules, recurrent layers, an emulated chip and a plain one see the same
values. The gradient that reaches the transformed weight is pulled back through the stages once,
when the optimizer is about to step: it is linear, so accumulated gradients need no more.

A stage is *live* during a run of its method, and *ended* after it. An ended stage makes room for
another method, and no longer takes part in training. It still counts where the module is exported
or emulated, as long as nobody changes the weight that its run left.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, ParamSpec, Protocol, TypeVar, runtime_checkable
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_nna.non_finite import require_finite_weights

P = ParamSpec("P")
R = TypeVar("R")

#: ``latent``: parameters hold what is trained; ``train`` and ``hard``: what stages make of it.
PipelinePhase = Literal["latent", "train", "hard"]


#: Tensors without stages that are remembered.
_STRANGERS = 4096


def unseen(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function run without gradient, and unseen by the chip's dispatch.

    Within a batch, the dispatch would ask of every operation whose it is, and that takes longer
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

    Args:
        module: Parameters are looked up in it by their names, since loading a state with
            ``assign=True`` replaces them; None keeps those that were claimed.

    Attributes:
        phase: What the parameters hold now.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self.phase: PipelinePhase = "latent"
        self._module = None if module is None else ref(module)
        self._stages: dict[str, list[Stage]] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._by_id: dict[int, str] = {}
        self._latent: dict[str, Tensor] = {}
        # Where latent weights lay in the last step: memory that is freed in every step is fetched
        # from the system in every step.
        self._spare: dict[str, Tensor] = {}
        # Parameters whose gradient is that of a transformed weight.
        self._pending: set[str] = set()
        self._steppers: list[tuple[int, Callable[[bool], None]]] = []
        self._stepped: list[functools.partial[None]] = []
        # Of stages whose run has ended, by their ids; and digests of the values that they left.
        self._ended: set[int] = set()
        self._left: dict[str, str | None] = {}
        # Tensors that were asked for and have no stages, by their ids.
        self._strangers: dict[int, ReferenceType[Tensor]] = {}

    # --- claims -------------------------------------------------------------------------------

    def claim(self, name: str, parameter: nn.Parameter, stage: Stage) -> None:
        """Put a stage on a parameter for a run; again the same one changes nothing.

        A stage whose run has ended makes room.

        Raises:
            ValueError: If another method has that place.
        """
        self._strangers.clear()
        held = self._stages.setdefault(name, [])
        for other in list(held):
            if other is not stage and other.place == stage.place:
                if id(other) not in self._ended:
                    raise ValueError(
                        f"{name} is claimed by {other.method} and by {stage.method}: a tensor "
                        f"takes one of them; narrow the targets of either"
                    )
                held.remove(other)
                self._ended.discard(id(other))
        self._ended.discard(id(stage))
        if not any(other is stage for other in held):
            held.append(stage)
            held.sort(key=lambda one: one.place)
        self._holds(name, parameter)

    def release(self, stage: Stage) -> None:
        """Take a stage off its parameter."""
        for name, stages in list(self._stages.items()):
            self._keep(name, [one for one in stages if one is not stage])
        self._ended.discard(id(stage))

    def end(self, stage: Stage) -> None:
        """Note that the run of a stage is over: see the module on what it still does."""
        for name, stages in self._stages.items():
            if any(one is stage for one in stages):
                self._ended.add(id(stage))
                self._left[name] = digest_of(self.latent(name))

    def forget_ended(self) -> None:
        """Take stages of earlier runs off: weights are about to be trained."""
        for name, stages in list(self._stages.items()):
            self._keep(name, [one for one in stages if id(one) not in self._ended])
        self._ended.clear()
        self._left.clear()

    def refresh(self) -> None:
        """Take the module's parameters of now: another object may have a name."""
        module = None if self._module is None else self._module()
        if module is None:
            return
        for name, held in list(self._parameters.items()):
            now = _parameter_of(module, name)
            if now is not None and now is not held:
                self._holds(name, now)
                if name in self._left:
                    self._left[name] = None

    @unseen
    def carried(self) -> dict[str, tuple[list[Stage], str]]:
        """Stages by parameter, for :meth:`adopt`, and a digest of what each parameter holds."""
        return {name: (list(stages), digest_of(held)) for name, held, stages in self.claims()}

    @unseen
    def adopt(self, carried: Mapping[str, tuple[list[Stage], str]]) -> None:
        """Take the stages of the module that this one is a copy of, as those of an ended run.

        Args:
            carried: From :meth:`carried` of that module's pipeline. Stages of a weight that has
                changed since are left out, as are those of one that a method has claimed here.
        """
        module = None if self._module is None else self._module()
        for name, (stages, digest) in carried.items():
            parameter = None if module is None else _parameter_of(module, name)
            if parameter is None or name in self._stages or digest_of(parameter) != digest:
                continue
            with torch.inference_mode(False):  # Weights may be trained, wherever they were loaded.
                own = copy.deepcopy(stages)
            for stage in own:
                self.claim(name, parameter, stage)
                self.end(stage)

    def stages_of(self, weight: Tensor) -> list[Stage]:
        """Stages of a parameter, in order; none for any other tensor."""
        name = self._name_of(weight)
        return [] if name is None else self._counting(name)

    def claims(self) -> Iterator[tuple[str, nn.Parameter, list[Stage]]]:
        """Name, parameter and stages of all that is claimed, in the order of the first claims."""
        self.refresh()
        for name in list(self._stages):
            if stages := self._counting(name):
                yield name, self._parameters[name], stages

    def _holds(self, name: str, parameter: nn.Parameter) -> None:
        before = self._parameters.get(name)
        if before is not None and before is not parameter:
            self._by_id.pop(id(before), None)
        self._parameters[name] = parameter
        self._by_id[id(parameter)] = name

    def _keep(self, name: str, stages: list[Stage]) -> None:
        """Leave a parameter the stages that are given; without any it is forgotten."""
        self._stages[name] = stages
        if not stages:
            del self._stages[name]
            self._left.pop(name, None)
            self._by_id.pop(id(self._parameters.pop(name)), None)

    def _name_of(self, weight: Tensor) -> str | None:
        name = self._by_id.get(id(weight))
        if name is not None and self._parameters[name] is weight:
            return name
        seen = self._strangers.get(id(weight))
        if not self._stages or (seen is not None and seen() is weight):
            return None
        self.refresh()
        name = self._by_id.get(id(weight))
        if name is not None and self._parameters[name] is weight:
            return name
        if len(self._strangers) > _STRANGERS:
            self._strangers.clear()  # Weights that a parametrization makes anew in every forward.
        self._strangers[id(weight)] = ref(weight)
        return None

    def _counting(self, name: str) -> list[Stage]:
        """Stages of a parameter; ended ones are taken off once the weight has changed."""
        stages = self._stages.get(name, [])
        if self.phase != "latent" or not any(id(one) in self._ended for one in stages):
            return stages
        weight = self._parameters[name].detach()
        # By values: PyTorch does not count writes through ``.data``.
        left = digest_of(weight)
        if self._left.get(name) == left:
            return stages
        if torch.equal(unseen(_transformed)(weight, stages, hard=True), weight):
            self._left[name] = left
            return stages
        self._keep(name, [one for one in stages if id(one) not in self._ended])
        return self._stages.get(name, [])

    # --- steps --------------------------------------------------------------------------------

    def attend(self, place: int, stepped: Callable[[bool], None]) -> None:
        """Let a method say what it does after the step of any optimizer; masks do it first.

        Args:
            place: Of the method.
            stepped: Called with whether the clock has advanced: with several optimizers the step
                of one of them counts.
        """
        self._steppers.append((place, stepped))
        self._steppers.sort(key=lambda one: one[0])

    def leave(self, stepped: Callable[[bool], None]) -> None:
        """Undo :meth:`attend`."""
        self._steppers = [one for one in self._steppers if one[1] != stepped]
        self._stepped = []
        if not self._steppers:
            self._spare = {}

    def has_stepped(self, stepped: Callable[[bool], None], advanced: bool) -> None:
        """A method has seen an optimizer step; when all have, they act in their order."""
        self._stepped.append(functools.partial(stepped, advanced))
        if len(self._stepped) == len(self._steppers):
            acts = {one.func: one for one in self._stepped}
            self._stepped = []
            for _, act in self._steppers:
                acts[act]()

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
        self.refresh()
        counting = {name: self._counting(name) for name in list(self._stages)}
        require_finite_weights({name: self._parameters[name] for name in self._stages})
        self.phase = phase
        for name, stages in counting.items():
            if not stages:
                continue
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
            parameters: Of the optimizer that is about to step; the latent weights are in place.
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
        return self.hard_of(name, self.latent(name))

    @unseen
    def hard_of(self, name: str, latent: Tensor) -> Tensor:
        """Transform any latent weight of a parameter's shape by the parameter's stages."""
        require_finite_weights({name: latent})
        return _transformed(latent, self._counting(name), hard=True)

    def grid_of(self, weight: Tensor) -> WeightGrid | None:
        """The grid on which the last stage leaves a parameter, if it is on one."""
        stages = self.stages_of(weight)
        return stages[-1].grid if stages else None


@unseen
def digest_of(weight: Tensor) -> str:
    """Compute a few bytes that tell a weight's values from any others, on every device alike.

    Args:
        weight: Any tensor, of any shape and type.

    Example:
        >>> digest_of(torch.zeros(2)) == digest_of(torch.ones(2))
        False
    """
    values = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(values.numpy().data, digest_size=16).hexdigest()


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


def _parameter_of(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that a module has under a name, if it has one."""
    path, _, leaf = name.rpartition(".")
    for part in path.split(".") if path else ():
        child = module._modules.get(part)
        if child is None:
            return None
        module = child
    return module._parameters.get(leaf)


_PIPELINES: WeakKeyDictionary[nn.Module, WeightPipeline] = WeakKeyDictionary()


def pipeline_of(module: nn.Module) -> WeightPipeline:
    """The pipeline of a module; an empty one is made where there is none.

    It is remembered here and not on the module, so that nothing is saved with its weights. A copy
    or pickle of an emulated module brings the stages along with the emulation.

    Example:
        >>> module = nn.Linear(2, 2)
        >>> pipeline_of(module) is pipeline_of(module)
        True
    """
    held = _PIPELINES.get(module)
    if held is None:
        held = _PIPELINES[module] = WeightPipeline(module)
    return held
