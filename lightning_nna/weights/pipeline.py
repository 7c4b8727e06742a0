"""The weight pipeline: transforms of a parameter before it is quantized for the accelerator.

A method claims a parameter with a *transform*: a mask, or a set of centroids. During a forward the
parameter itself holds the result of its transforms, which are applied in one fixed order whatever
the order of the callbacks. The weight that is trained (the *latent* weight) is stored aside, and
is back when the optimizer steps. So no layer is replaced and no function is wrapped: functional
calls, scripted and compiled modules, recurrent layers and an emulated module see the same values.
The gradient of the transformed weight is pulled back through the transforms once, when the
optimizer is about to step: the pull-back is linear, so accumulated gradients need no more.

A transform is *live* during a run of its method, and *ended* after it. An ended transform makes
room for another method, and no longer takes part in training. It still counts where the module is
exported or emulated, as long as nobody changes the weight that its run left.
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

#: ``latent``: parameters hold the trained weights; ``train`` and ``hard``: transformed ones.
PipelinePhase = Literal["latent", "train", "hard"]


#: Number of tensors without transforms that are remembered.
_STRANGERS = 4096


def unseen(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function run without gradient, and unseen by the emulator's dispatch.

    Within a batch, the dispatch would look up the owner of every operation, which takes longer
    than the operation.

    Args:
        function: Function on weights.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return function(*args, **kwargs)

    return run


@dataclass(frozen=True)
class WeightGrid:
    """Quantization parameters of a transformed weight: symmetric integers times scales.

    Args:
        scales: Scales, float32, shape ``(groups,)``, positive: one for each group of rows (first
            axis of the weight).
        maximum: Largest integer, for example 127 for 8 bits.
    """

    scales: Float[Tensor, " groups"]
    maximum: int


class WeightTransform(Protocol):
    """Transform of one parameter by one method: a mask, or a set of centroids.

    Attributes that the method learns get their gradients from :meth:`pull_back`.
    """

    #: Name of the method, for messages.
    method: str
    #: Position in the pipeline: masks 0, centroids 1. A parameter has one transform of each.
    order: int

    @property
    def grid(self) -> WeightGrid | None:
        """Quantization parameters of hard weights; None for float weights."""

    def apply(self, weight: Tensor, *, hard: bool) -> Tensor:
        """Transform a weight.

        Args:
            weight: Latent weight, or the result of the transform before.
            hard: Return the deployed weight; else the one that training uses.

        Returns:
            Transformed weight, in the shape and type of ``weight``; ``weight`` itself if unchanged.
        """

    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Pull a gradient back through the transform that training used.

        Args:
            weight: Input of :meth:`apply`.
            grad: Gradient of the transformed weight, in the shape of ``weight``.

        Returns:
            Gradient of ``weight``.
        """


@runtime_checkable
class Masking(Protocol):
    """A transform of order 0: its zeros stay zero, whatever comes after it."""

    @property
    def mask(self) -> Tensor:
        """Mask in the shape of the parameter, bool: True for kept weights."""

    @property
    def keeps_all(self) -> bool:
        """True if the mask is True everywhere."""

    def zero_(self, weight: Tensor) -> None:
        """Zero a weight in place where the mask is False."""


class WeightPipeline:
    """Transforms of one module's parameters. Use :func:`pipeline_of`.

    Args:
        module: Module in which parameters are looked up by name, since loading a state with
            ``assign=True`` replaces them; None for the parameters that were claimed.

    Attributes:
        phase: Kind of weights that the parameters hold now.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self.phase: PipelinePhase = "latent"
        self._module = None if module is None else ref(module)
        self._transforms: dict[str, list[WeightTransform]] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._by_id: dict[int, str] = {}
        self._latent: dict[str, Tensor] = {}
        # Transformed weights of other optimizers' parameters while one optimizer steps.
        self._aside: dict[str, Tensor] = {}
        # Buffers of the latent weights of the last step: memory that is freed in every step is
        # fetched from the system in every step.
        self._spare: dict[str, Tensor] = {}
        # Parameters whose gradient is that of a transformed weight.
        self._pending: set[str] = set()
        self._steppers: list[tuple[int, Callable[[bool], None]]] = []
        self._stepped: list[functools.partial[None]] = []
        # Ids of transforms whose run has ended, and digests of the weights that they left.
        self._ended: set[int] = set()
        self._left: dict[str, str | None] = {}
        # Tensors without transforms, by their ids: a look-up of them is not repeated.
        self._strangers: dict[int, ReferenceType[Tensor]] = {}

    # --- claims -------------------------------------------------------------------------------

    def claim(self, name: str, parameter: nn.Parameter, transform: WeightTransform) -> None:
        """Put a transform on a parameter for a run; again the same one changes nothing.

        A transform whose run has ended makes room.

        Raises:
            ValueError: If another method has claimed that order.
        """
        self._strangers.clear()
        claimed = self._transforms.setdefault(name, [])
        for other in list(claimed):
            if other is not transform and other.order == transform.order:
                if id(other) not in self._ended:
                    raise ValueError(
                        f"{name} is claimed by {other.method} and by {transform.method}: a tensor "
                        f"takes one of them; narrow the targets of either"
                    )
                claimed.remove(other)
                self._ended.discard(id(other))
        self._ended.discard(id(transform))
        if not any(other is transform for other in claimed):
            claimed.append(transform)
            claimed.sort(key=lambda one: one.order)
        self._remember(name, parameter)

    def release(self, transform: WeightTransform) -> None:
        """Take a transform off its parameter."""
        for name, transforms in list(self._transforms.items()):
            self._keep(name, [one for one in transforms if one is not transform])
        self._ended.discard(id(transform))

    def end(self, transform: WeightTransform) -> None:
        """Mark a transform as ended: its run is over, see the module."""
        for name, transforms in self._transforms.items():
            if any(one is transform for one in transforms):
                self._ended.add(id(transform))
                self._left[name] = digest_of(self.latent(name))

    def forget_ended(self) -> None:
        """Take transforms of earlier runs off: weights are about to be trained."""
        for name, transforms in list(self._transforms.items()):
            self._keep(name, [one for one in transforms if id(one) not in self._ended])
        self._ended.clear()
        self._left.clear()

    def refresh(self) -> None:
        """Take the module's parameters of now: another object may have a name."""
        module = None if self._module is None else self._module()
        if module is None:
            return
        for name, known in list(self._parameters.items()):
            now = _parameter_of(module, name)
            if now is not None and now is not known:
                self._remember(name, now)
                if name in self._left:
                    self._left[name] = None

    @unseen
    def carried(self) -> dict[str, tuple[list[WeightTransform], str]]:
        """Return transforms by parameter and digests of the parameters, for :meth:`adopt`."""
        return {
            name: (list(transforms), digest_of(weight))
            for name, weight, transforms in self.claims()
        }

    @unseen
    def adopt(self, carried: Mapping[str, tuple[list[WeightTransform], str]]) -> None:
        """Take the transforms of the module that this one is a copy of, as those of an ended run.

        Args:
            carried: Result of :meth:`carried` of that module's pipeline. Transforms of a weight
                that has changed since are left out, as are those of one that is claimed here.
        """
        module = None if self._module is None else self._module()
        for name, (transforms, digest) in carried.items():
            parameter = None if module is None else _parameter_of(module, name)
            if parameter is None or name in self._transforms or digest_of(parameter) != digest:
                continue
            with torch.inference_mode(False):  # Weights may be trained, wherever they were loaded.
                own = copy.deepcopy(transforms)
            for transform in own:
                self.claim(name, parameter, transform)
                self.end(transform)

    def transforms_of(self, weight: Tensor) -> list[WeightTransform]:
        """Return the transforms of a parameter, in order; none for any other tensor."""
        name = self._name_of(weight)
        return [] if name is None else self._counting(name)

    def claims(self) -> Iterator[tuple[str, nn.Parameter, list[WeightTransform]]]:
        """Yield name, parameter and transforms of each claimed weight, in order of the claims."""
        self.refresh()
        for name in list(self._transforms):
            if transforms := self._counting(name):
                yield name, self._parameters[name], transforms

    def _remember(self, name: str, parameter: nn.Parameter) -> None:
        before = self._parameters.get(name)
        if before is not None and before is not parameter:
            self._by_id.pop(id(before), None)
        self._parameters[name] = parameter
        self._by_id[id(parameter)] = name

    def _keep(self, name: str, transforms: list[WeightTransform]) -> None:
        """Leave a parameter only these transforms; without any it is forgotten."""
        self._transforms[name] = transforms
        if not transforms:
            del self._transforms[name]
            self._left.pop(name, None)
            self._by_id.pop(id(self._parameters.pop(name)), None)

    def _name_of(self, weight: Tensor) -> str | None:
        name = self._by_id.get(id(weight))
        if name is not None and self._parameters[name] is weight:
            return name
        stranger = self._strangers.get(id(weight))
        if not self._transforms or (stranger is not None and stranger() is weight):
            return None
        self.refresh()
        name = self._by_id.get(id(weight))
        if name is not None and self._parameters[name] is weight:
            return name
        if len(self._strangers) > _STRANGERS:
            self._strangers.clear()  # A parametrization computes its weight in every forward.
        self._strangers[id(weight)] = ref(weight)
        return None

    def _counting(self, name: str) -> list[WeightTransform]:
        """Return the transforms of a parameter; a changed weight drops the ended ones."""
        transforms = self._transforms.get(name, [])
        if self.phase != "latent" or not any(id(one) in self._ended for one in transforms):
            return transforms
        weight = self._parameters[name].detach()
        # By values: PyTorch does not count writes through ``.data``.
        left = digest_of(weight)
        if self._left.get(name) == left:
            return transforms
        if torch.equal(unseen(_applied)(weight, transforms, hard=True), weight):
            self._left[name] = left
            return transforms
        self._keep(name, [one for one in transforms if id(one) not in self._ended])
        return self._transforms.get(name, [])

    # --- steps --------------------------------------------------------------------------------

    def attend(self, order: int, stepped: Callable[[bool], None]) -> None:
        """Register the work that a method does after the step of any optimizer; masks come first.

        Args:
            order: Order of the method's transforms.
            stepped: Function of whether the count of steps has advanced: with several optimizers
                the step of one of them counts.
        """
        self._steppers.append((order, stepped))
        self._steppers.sort(key=lambda one: one[0])

    def leave(self, stepped: Callable[[bool], None]) -> None:
        """Undo :meth:`attend`."""
        self._steppers = [one for one in self._steppers if one[1] != stepped]
        self._stepped = []
        if not self._steppers:
            self._spare = {}

    def has_stepped(self, stepped: Callable[[bool], None], advanced: bool) -> None:
        """Note that a method has seen an optimizer step; when all have, they act in their order."""
        self._stepped.append(functools.partial(stepped, advanced))
        if len(self._stepped) == len(self._steppers):
            acts = {one.func: one for one in self._stepped}
            self._stepped = []
            waiting = tuple(self._parameters[name] for name in self._aside)
            with torch.autograd._unsafe_preserve_version_counter(waiting):
                for _, act in self._steppers:
                    acts[act]()

    # --- phases -------------------------------------------------------------------------------

    @unseen
    def substitute(self, phase: Literal["train", "hard"]) -> None:
        """Let the parameters hold the transformed weights.

        A second call in the same phase changes nothing.

        Raises:
            RuntimeError: If they hold the weights of the other phase.
            FloatingPointError: If a weight is not finite; names it.
        """
        if self.phase == phase:
            return
        if self.phase != "latent":
            raise RuntimeError(f"weights are substituted for {self.phase!r} already: restore first")
        self.refresh()
        counting = {name: self._counting(name) for name in list(self._transforms)}
        require_finite_weights({name: self._parameters[name] for name in self._transforms})
        self.phase = phase
        for name, transforms in counting.items():
            if not transforms:
                continue
            weight = self._parameters[name].detach()
            if phase == "train" and name in self._aside:
                self._latent[name] = self._stored(name, weight)
                _put_back(weight, self._aside[name])
                continue
            mask = _mask_of(transforms)
            if mask is not None and len(transforms) == 1:
                if mask.keeps_all:
                    continue
                self._latent[name] = self._stored(name, weight)
                mask.zero_(weight)  # In place: weights are read and written half as often.
            else:
                result = _applied(weight, transforms, hard=phase == "hard")
                if result is weight:
                    continue
                self._latent[name] = self._stored(name, weight)
                weight.copy_(result)
            if phase == "train":
                self._pending.add(name)

    @unseen
    def restore(self, stepping: Sequence[Tensor] | None = None) -> None:
        """Let the parameters hold the latent weights again.

        While an optimizer steps, graphs of other optimizers' parameters may wait for their
        backward, as that of a GAN's generator while its discriminator is trained. In the next
        forward or backward those parameters have the same transformed weights again.

        Args:
            stepping: Parameters of the optimizer that is about to step; None if none steps.
        """
        own = {self._by_id.get(id(parameter)) for parameter in stepping or ()}
        others = [] if stepping is None else [name for name in self._transforms if name not in own]
        self._aside = {name: self._aside[name] for name in others if name in self._aside}
        if self.phase == "train":
            # Also those that no transform changes yet: the work after a step may write to them.
            self._aside |= {name: self._parameters[name].detach().clone() for name in others}
        for name, latent in self._latent.items():
            if name in self._aside:
                _put_back(self._parameters[name], latent)
            else:
                self._parameters[name].copy_(latent)
        if self._latent:
            self._spare = dict(self._latent) if self._steppers else {}
        self._latent.clear()
        self.phase = "latent"

    def _stored(self, name: str, weight: Tensor) -> Tensor:
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
            parameters: Parameters of the optimizer that is about to step; they hold latent weights.
        """
        for parameter in parameters:
            name = self._by_id.get(id(parameter))
            if name not in self._pending or name is None or parameter.grad is None:
                continue
            self._pending.discard(name)
            sparse = parameter.grad if parameter.grad.is_sparse else None
            grad = parameter.grad if sparse is None else sparse.to_dense()
            grad = _pulled_back(parameter.detach(), self._transforms[name], grad)
            parameter.grad = grad if sparse is None else grad.sparse_mask(sparse.coalesce())

    # --- look-ups ----------------------------------------------------------------------------

    def latent(self, name: str) -> Tensor:
        """Return the latent weight of a parameter, in every phase."""
        return self._latent.get(name, self._parameters[name].detach())

    @unseen
    def deployed(self, weight: Tensor) -> Tensor:
        """Return a parameter as an operator uses it now; any other tensor unchanged."""
        transforms = self.transforms_of(weight)
        if self.phase != "latent" or not transforms:
            return weight
        return self.hard(weight)

    @unseen
    def hard(self, weight: Tensor) -> Tensor:
        """Compute the deployed weight of a parameter that holds its latent weight."""
        name = self._by_id.get(id(weight))
        if name is not None:
            require_finite_weights({name: weight})
        return _applied(weight.detach(), self.transforms_of(weight), hard=True)

    @unseen
    def hard_latent(self, name: str) -> Tensor:
        """Compute the deployed weight of a parameter, in every phase."""
        return self.hard_of(name, self.latent(name))

    @unseen
    def hard_of(self, name: str, latent: Tensor) -> Tensor:
        """Transform any latent weight of a parameter's shape by the parameter's transforms."""
        require_finite_weights({name: latent})
        return _applied(latent, self._counting(name), hard=True)

    def grid_of(self, weight: Tensor) -> WeightGrid | None:
        """Return the quantization parameters of the last transform of a parameter, or None."""
        transforms = self.transforms_of(weight)
        return transforms[-1].grid if transforms else None


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


def _put_back(parameter: Tensor, weight: Tensor) -> None:
    """Write a weight for a time; graphs with the parameter stay valid for what it had before."""
    with torch.autograd._unsafe_preserve_version_counter(parameter):
        parameter.copy_(weight)


def _mask_of(transforms: Sequence[WeightTransform]) -> Masking | None:
    return transforms[0] if isinstance(transforms[0], Masking) else None


def _applied(weight: Tensor, transforms: Sequence[WeightTransform], *, hard: bool) -> Tensor:
    """Apply all transforms to a weight; a mask comes first and last."""
    result = weight
    for transform in transforms:
        result = transform.apply(result, hard=hard)
    if len(transforms) > 1 and isinstance(transforms[0], Masking) and result is not weight:
        result = transforms[0].apply(result, hard=hard)
    return result


def _pulled_back(weight: Tensor, transforms: Sequence[WeightTransform], grad: Tensor) -> Tensor:
    """Pull a gradient back through all transforms; masked weights skip those after the mask."""
    inputs = [weight]
    for transform in transforms[:-1]:
        inputs.append(transform.apply(inputs[-1], hard=False))
    masking = _mask_of(transforms)
    mask = None if masking is None else masking.mask
    for transform, before in reversed(list(zip(transforms, inputs, strict=True))):
        if mask is not None and transform is not transforms[0]:
            grad = torch.where(mask, transform.pull_back(before, grad * mask), grad)
        else:
            grad = transform.pull_back(before, grad)
    return grad


def _parameter_of(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return the parameter of a name, if the module has one."""
    path, _, leaf = name.rpartition(".")
    for child_name in path.split(".") if path else ():
        child = module._modules.get(child_name)
        if child is None:
            return None
        module = child
    return module._parameters.get(leaf)


_PIPELINES: WeakKeyDictionary[nn.Module, WeightPipeline] = WeakKeyDictionary()


def pipeline_of(module: nn.Module) -> WeightPipeline:
    """Return the pipeline of a module; a new one if it has none.

    It is remembered here and not on the module, so that nothing is saved with its weights. A copy
    or pickle of an emulated module brings the transforms along with the emulation.

    Args:
        module: Module whose weights are transformed.

    Example:
        >>> module = nn.Linear(2, 2)
        >>> pipeline_of(module) is pipeline_of(module)
        True
    """
    pipeline = _PIPELINES.get(module)
    if pipeline is None:
        pipeline = _PIPELINES[module] = WeightPipeline(module)
    return pipeline
