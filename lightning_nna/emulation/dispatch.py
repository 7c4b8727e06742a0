"""The one door: every torch function that a forward calls passes here.

``Dispatch`` is a ``TorchFunctionMode``. For each function it finds the call site (module path,
operator, ordinal of the code location), and runs the chip's operator, a movement, or, in float,
whatever the chip does not have. Which module a function belongs to is known from forward hooks,
and outside of any forward (a decoder's ``transcribe``, ``predict``, ``join``) from the frames of
the call stack.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from inspect import CO_VARARGS
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchmetrics import Metric

from lightning_nna.elementary import square_root
from lightning_nna.emulation.arguments import first_of, written
from lightning_nna.emulation.constants import Constants
from lightning_nna.emulation.operators.catalog import operator_of, operators
from lightning_nna.emulation.operators.layout import (
    JOINS,
    MOVEMENTS,
    VIEW_PROPERTIES,
    chooses_a_number,
    is_zero_padding,
)

log = logging.getLogger(__name__)

#: Path of the module that the emulator is attached to.
ROOT = "."

# With the separator: torchaudio and its like are no part of torch.
_TORCH_FOLDER = str(Path(torch.__file__).parent) + os.sep
#: Files of other function modes, which may stand between a call and the dispatch.
#: This one too: where two modules are emulated in nested blocks, one dispatch calls the other.
TRANSPARENT_FILES: set[str] = {__file__}
_MODULE_CALL = nn.Module.__call__.__code__.co_filename
_CHECKPOINT = torch.utils.checkpoint.checkpoint_sequential.__code__.co_filename
_BACKWARD = frozenset({"backward", "grad"})
#: A LightningModule's steps compute losses and metrics, also where another module calls them.
_STEPS = frozenset({"training_step", "validation_step", "test_step", "predict_step"})
# Functions that give numbers or masks of values: no value changes, but somebody has read it.
_DECISIONS = frozenset(
    """
    item tolist numpy __bool__ __repr__ __format__ __array__ eq ne lt le gt ge __eq__ __ne__ __lt__
    __le__ __gt__ __ge__ isnan isinf isfinite any all argmax argmin nonzero equal allclose
    """.split()
)
# Functions that give shapes or random tensors.
_IGNORED = frozenset(
    """
    __len__ __get__ __set__ size dim numel stride is_contiguous storage_offset data_ptr
    __hash__ is_floating_point is_complex is_inference untyped_storage rand randn rand_like
    randn_like randint
    is_same_size register_hook retain_grad
    record_stream is_tensor is_autocast_enabled get_device type element_size nelement
    _nested_tensor_from_mask_left_aligned
    """.split()
)
# Functions that give tensors of the code's own values.
_FACTORIES = frozenset(
    """
    zeros ones empty full arange range tensor as_tensor scalar_tensor zeros_like ones_like
    empty_like full_like new_zeros new_ones new_empty new_full new_tensor linspace logspace eye
    bartlett_window blackman_window hamming_window hann_window kaiser_window
    """.split()
)
# Functions whose result is random whatever they are given.
_RANDOM = frozenset(
    """
    bernoulli bernoulli_ cauchy_ exponential_ geometric_ log_normal_ multinomial normal normal_
    poisson random_ uniform_
    """.split()
)
_HIDDEN = (
    "compiled code calls a module on the chip, whose operators it would hide: call it "
    "inside `with emulate(module)`, where torch.compile is set aside, or strip(module)"
)
_FLOAT, _COMPLEX = 1, 2
_FILLS = ("masked_fill", "masked_fill_")

#: By function, see :func:`_kind_of`: asked for with every call.
_KINDS: dict[Callable[..., Any], tuple[str, str]] = {}


@dataclass
class SiteTable:
    """Call sites by key, and the code locations that their ordinals stand for.

    The key of a site is ``path/operator#ordinal``. Ordinals are given in the order in which
    locations first run and are saved, so that a resumed run keeps them whatever it runs first.
    """

    locations: dict[str, list[str]] = field(default_factory=dict)

    def key(self, path: str, operator: str, location: str) -> str:
        """Key of the site at a location, with a new ordinal if the location is new."""
        known = self.locations.setdefault(f"{path}/{operator}", [])
        if location not in known:
            known.append(location)
        return f"{path}/{operator}#{known.index(location)}"

    def unite(self, tables: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, str]:
        """Take in the locations of every rank of a distributed run, in the order of the ranks.

        Ranks on different data may run locations in different orders, and one key must not name
        different code.

        Args:
            tables: ``locations`` of every rank; this rank's own is among them.

        Returns:
            The new key by the old one, for keys of this rank that change.

        Example:
            >>> mine = SiteTable({"./mul": ["f:2:0"]})
            >>> mine.unite([{"./mul": ["f:1:0"]}, mine.locations])
            {'./mul#0': './mul#1'}
        """
        united: dict[str, list[str]] = {}
        for table in tables:
            for kind, locations in table.items():
                known = united.setdefault(kind, [])
                known.extend(location for location in locations if location not in known)
        renamed = {
            f"{kind}#{old}": f"{kind}#{united[kind].index(location)}"
            for kind, locations in self.locations.items()
            for old, location in enumerate(locations)
            if united[kind].index(location) != old
        }
        self.locations = united
        return renamed


class Scope(threading.local):
    """Modules whose forward is running in this thread, outermost first.

    A thread of its own, because activation checkpointing calls forward from the thread that runs
    the backward.
    """

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.entered = 0


class Dispatch(TorchFunctionMode):
    """Runs torch functions in the modules of interest as the chip does.

    Args:
        paths: Path of every module by ``id``.
        allowed: Paths that are emulated; not among them: losses, metrics, what no target selects.
        forwards: Code of the modules' forwards and of decorators around them, see
            :func:`.forward_codes`.
        lightning: LightningModules by ``id``. Their steps do not count, nor do methods of a root
            among them that its forward has not called.
        run: Called with ``(operator, key, func, args, kwargs)`` for an operator in scope.
        move: Called with ``(func, args, kwargs)`` for a movement.
        joins: Called with a function's name; whether all float tensors among arguments lie on one
            grid, whatever ranges will be.
        read: Called with what a function out of scope takes in, or one that decides by values.
        fallback: Called with ``(key, func, args, kwargs)`` for anything else in scope.
        in_backward: Threads that run a backward, which this keeps up to date.
        constants: Of the emulator, see :mod:`.constants`.
        fold: Called with ``(key, func, args, kwargs, kind)`` for what depends on constants alone.
        wrote: Called with the tensors that a function out of scope has written to.
        after_backward: Called after a backward, whose hooks cannot be seen.
    """

    def __init__(
        self,
        paths: Mapping[int, str],
        allowed: set[str],
        forwards: Iterable[tuple[CodeType, Any]],
        lightning: Container[int],
        *,
        sites: SiteTable,
        run: Callable[..., Any],
        move: Callable[..., Any],
        joins: Callable[..., bool],
        read: Callable[[Any], None],
        fallback: Callable[..., Any],
        in_backward: list[int],
        constants: Constants,
        fold: Callable[..., Any],
        wrote: Callable[[Iterable[Tensor]], None],
        after_backward: Callable[[], None],
    ) -> None:
        super().__init__()
        # By identity: a code object computes its hash anew whenever it is asked.
        self._forwards: dict[int, CodeType] = {}
        self._decorators: dict[int, tuple[CodeType, dict[int, Any]]] = {}
        for code, inner in forwards:
            if inner is None:
                self._forwards[id(code)] = code
            else:
                self._decorators.setdefault(id(code), (code, {}))[1][id(inner)] = inner
        self._lightning, self._in_backward = lightning, in_backward
        self.paths, self.allowed = paths, allowed
        self.sites, self.run, self.fallback = sites, run, fallback
        self.constants, self.fold = constants, fold
        self.move, self.joins, self.read, self.wrote = move, joins, read, wrote
        self.after_backward = after_backward
        self.scope = Scope()
        self._keys: dict[tuple[object, ...], str] = {}
        self._code: list[CodeType] = []
        self._naming = threading.Lock()
        self._warned_of_checkpointing = False

    def enter(self) -> None:
        """Start intercepting in this thread; calls nest.

        Code that was compiled would hide its functions, so it runs as it was written meanwhile.

        Raises:
            RuntimeError: If compiled code is running already.
        """
        if self.scope.entered == 0:
            _COMPILING.enter()
            self.__enter__()
        self.scope.entered += 1

    def leave(self) -> None:
        """Undo one :meth:`enter`."""
        self.scope.entered -= 1
        if self.scope.entered == 0:
            self.__exit__(None, None, None)
            _COMPILING.leave()

    def unwind(self, entered: int, depth: int) -> None:
        """Undo what an exception has left of forwards and scopes.

        Args:
            entered: Scopes that stay.
            depth: Modules that stay among those whose forward is running.
        """
        del self.scope.stack[depth:]
        while self.scope.entered > entered:
            self.leave()

    def forget_keys(self) -> None:
        """Look sites up anew: their table has been replaced."""
        self._keys.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Sort a function into operator, movement, ignored, or fallback."""
        kwargs = kwargs or {}
        known = _KINDS.get(func)
        if known is None:
            known = _KINDS[func] = _kind_of(func)
        name, kind = known
        if kind == "ignored" and "out" not in kwargs:
            return func(*args, **kwargs)
        if kind in ("ignored", "assignment"):
            return self._plainly(func, args, kwargs)
        if kind == "backward":
            return self._outside(func, args, kwargs)
        if kind == "factory":
            return self._make(func, args, kwargs)
        if kind == "decision":
            self.read((args, kwargs))
            return self._decide(func, args, kwargs)
        if kind == "movement" or name == "copy_" or _is_padding(name, args, kwargs):
            return self.move(func, args, kwargs)
        if name in JOINS and not chooses_a_number(name, args) and self.joins(name, (args, kwargs)):
            return self.move(func, args, kwargs)
        found = _types_in(args) | _types_in(kwargs.values())
        if not found:
            return self._decide(func, args, kwargs)
        path, location = self._locate()
        if path is None:
            self.read((args, kwargs))
            return self._plainly(func, args, kwargs)
        operator = operator_of(name)
        label = name.strip("_") if operator is None else operator.name or name
        run = _IN_DOUBLE.get(name, func)
        # A layer with weights is the accelerator's whatever it is given: what it takes in is an
        # activation, though it may have come in as integers.
        layer = operators().get(label)
        has_weights = layer is not None and layer.has_weights
        if not has_weights and not label.startswith("embedding") and name not in _RANDOM:
            depends = self.constants.kind_of((args, kwargs))
            if depends is not None:
                return self.fold(self._key(path, label, location), run, args, kwargs, depends)
        if _makes_a_mask(name, args, kwargs) and not self.joins(name, first_of(args, kwargs)):
            return self._plainly(func, args, kwargs)
        if operator is None or found & _COMPLEX:
            key = self._key(path, name.strip("_"), location)
            return self.fallback(key, run, args, kwargs)
        if has_weights:
            self.constants.enters(args)
        return self.run(operator, self._key(path, label, location), func, args, kwargs)

    def in_scope(self) -> bool:
        """Tell whether the code that calls is part of what is emulated."""
        return self._locate()[0] is not None

    def _make(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor of the code's own values: a constant, if the code is emulated."""
        result = self._plainly(func, args, kwargs)
        # What a tensor is like says nothing of its values; what it is filled with does.
        filled = (args[1:], kwargs) if func.__name__.startswith(("new_", "full")) else ()
        filled = (args, kwargs) if func.__name__ in ("tensor", "as_tensor", "full") else filled
        if isinstance(result, Tensor) and self.in_scope():
            self.constants.made(result, filled)
        return result

    def _decide(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Integers and masks, or floats of them: they are data if they come from data."""
        result = self._plainly(func, args, kwargs)
        self.constants.follow(result, (args, kwargs), self.in_scope)
        return result

    def _plainly(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a function as torch does; what it writes to is no longer what it was."""
        result = func(*args, **kwargs)
        if targets := written(func, args, kwargs):
            self.wrote(targets)
        return result

    def _outside(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a function that may call forwards itself, as a backward does under checkpointing.

        PyTorch takes the mode off while it handles a function; the forwards put it on again.
        """
        entered, stack = self.scope.entered, self.scope.stack
        self.scope.entered, self.scope.stack = 0, []
        self._in_backward.append(threading.get_ident())
        try:
            return func(*args, **kwargs)
        finally:
            self._in_backward.remove(threading.get_ident())
            self.scope.entered, self.scope.stack = entered, stack
            self.after_backward()

    def _key(self, path: str, operator: str, location: tuple[tuple[CodeType, int], ...]) -> str:
        """Key of a call site; code locations are turned into text once."""
        identity = (path, operator, *((id(code), at) for code, at in location))
        if identity not in self._keys:
            if not self._warned_of_checkpointing and _is_checkpointed_function():
                self._warned_of_checkpointing = True
                log.warning(
                    "torch.utils.checkpoint is given a function in %s: the backward computes it "
                    "again in float, and gradients are wrong or PyTorch raises CheckpointError; "
                    "give it a module (nn.Module) that has these operators in its forward",
                    "the module" if path == ROOT else path,
                )
            with self._naming:
                self._code.extend(code for code, _ in location)  # An id must not be used again.
                text = ">".join(_describe(code, at) for code, at in reversed(location))
                self._keys[identity] = self.sites.key(path, operator, text)
        return self._keys[identity]

    def _locate(self) -> tuple[str | None, tuple[tuple[CodeType, int], ...]]:
        """Module path of the running code, and its location inside the module's own code.

        The module is the one whose method runs, or else the one whose forward is running. A forward
        has the same sites whether the module or its ``forward`` is called.

        Frames of torch itself do not count for the location: one ``nn.LSTM`` is one site, however
        its forward reaches the operator.
        """
        stack = self.scope.stack
        location: list[tuple[CodeType, int]] = []
        path, owner, end = None, None, 0
        for frame in _callers():
            code = frame.f_code
            if code.co_filename == _MODULE_CALL:
                if stack or path is not None:
                    break
                continue
            if not (
                code.co_filename.startswith(_TORCH_FOLDER) or code.co_filename in TRANSPARENT_FILES
            ):
                location.append((code, frame.f_lasti))
            if path is not None:
                if id(code) in self._forwards and self._owner(frame) is owner:
                    end = len(location)
                continue
            if stack and frame.f_back and frame.f_back.f_code.co_filename == _MODULE_CALL:
                break  # The forward of the module that was called last.
            owner = self._owner(frame)
            found = None if owner is None else self._path_of(owner, frame)
            if found == "/":
                return None, ()
            if found is not None and stack[-1:] != [found]:
                path, end = found, len(location)
        if path is None:
            if not stack:
                return None, ()
            path, end = stack[-1], len(location)
        return (path if path in self.allowed else None), tuple(location[:end])

    def _owner(self, frame: FrameType) -> Any:
        """Object whose method a frame runs; None if it seems to run none."""
        code = frame.f_code
        names = code.co_varnames
        if names[:1] == ("self",):
            return frame.f_locals.get("self")
        if id(code) not in self._forwards and not self._decorates_forward(frame):
            return None
        if code.co_argcount:
            return frame.f_locals.get(names[0])
        # A decorator's ``(*args, **kwargs)``.
        positional = frame.f_locals.get(names[code.co_kwonlyargcount], ())
        return positional[0] if code.co_flags & CO_VARARGS and positional else None

    def _decorates_forward(self, frame: FrameType) -> bool:
        """Tell whether a frame runs a decorator of a module's forward, and of no other function."""
        known = self._decorators.get(id(frame.f_code))
        if known is None:
            return False
        return any(id(value) in known[1] for value in frame.f_locals.values())

    def _path_of(self, owner: Any, frame: FrameType) -> str | None:
        """Path of a module whose method runs; '/' where looking further is in vain."""
        if isinstance(owner, (torch.optim.Optimizer, Metric)):
            return "/"
        path = self.paths.get(id(owner))
        if path is None:
            return None
        code = frame.f_code
        if code.co_name in _STEPS and id(owner) in self._lightning:
            return "/"
        is_forward = id(code) in self._forwards or self._decorates_forward(frame)
        if path == ROOT and id(owner) in self._lightning and not is_forward:
            return None  # Its forward may have called this method, or one of its steps.
        return path if path in self.allowed else "/"


def _in_double(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of float32 that stays on the CPU, rounded once from float64.

    PyTorch's own last bit of a float32 is another one from processor to processor, and from a long
    tensor to a short one. That of a float64 is lost in the rounding, but once in 2^28 values.
    """

    def rounded(input: Tensor, **kwargs: Any) -> Tensor:
        if kwargs or input.dtype != torch.float32:
            return function(input, **kwargs)
        return function(input.double()).float()

    return rounded


def _inverse_square_root(input: Tensor, **kwargs: Any) -> Tensor:
    """One over the rounded root, as a runtime computes it: both are rounded as IEEE 754 has it."""
    if kwargs or input.dtype != torch.float32:
        return torch.rsqrt(input, **kwargs)
    return square_root(input).reciprocal()


_IN_DOUBLE: dict[str, Callable[..., Tensor]] = {
    "rsqrt": _inverse_square_root,
    **{f.__name__: _in_double(f) for f in (torch.cos, torch.exp, torch.log, torch.sin, torch.sqrt)},
}


class _CompilingSetAside:
    """Sets ``torch.compile`` aside in the whole process, as long as any thread intercepts."""

    def __init__(self) -> None:
        self._entered = 0
        self._lock = threading.Lock()
        self._stance: AbstractContextManager[None] | None = None

    def enter(self) -> None:
        """Set it aside.

        Raises:
            RuntimeError: If compiled code is running already.
        """
        with self._lock:
            if self._entered == 0:
                self._stance = _without_compiling()
            self._entered += 1

    def leave(self) -> None:
        """Undo one :meth:`enter`."""
        with self._lock:
            self._entered -= 1
            if self._entered == 0 and self._stance is not None:
                self._stance.__exit__(None, None, None)


_COMPILING = _CompilingSetAside()


def _without_compiling() -> AbstractContextManager[None]:
    """Set ``torch.compile`` aside until the result is exited."""
    refuse_tracing()
    try:
        return torch.compiler.set_stance("force_eager")
    except RuntimeError as error:
        raise RuntimeError(_HIDDEN) from error


def refuse_tracing() -> None:
    """Raise where ``torch.compile`` traces the caller, which could not see through the emulation.

    Raises:
        RuntimeError: If it does.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(_HIDDEN)


def _callers() -> Iterator[FrameType]:
    """Frames of the code that called the torch function, innermost first."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_checkpointed_function() -> bool:
    """Tell whether checkpointing runs the code of a module whose forward it has not called.

    The hooks of a module that it calls tell the dispatch that its forward runs again.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != _MODULE_CALL:
        if frame.f_code.co_filename == _CHECKPOINT:
            return True
        frame = frame.f_back
    return False


def _describe(code: CodeType, instruction: int) -> str:
    """Where in a function an instruction stands: stable under edits elsewhere in the file."""
    line, _, column, _ = list(code.co_positions())[instruction // 2]
    offset = (line or code.co_firstlineno) - code.co_firstlineno
    return f"{code.co_qualname}:{offset}:{column}"


def _kind_of(func: Callable[..., Any]) -> tuple[str, str]:
    """Name of a function, and what it always is; the empty string if that depends on the call."""
    name = getattr(func, "__name__", "")
    if name in _BACKWARD:
        return name, "backward"
    if name in MOVEMENTS:
        return name, "movement"
    if name == "__get__":
        viewed = getattr(getattr(func, "__self__", None), "__name__", "") in VIEW_PROPERTIES
        return name, "movement" if viewed else "ignored"
    if name == "__set__":
        assigned = getattr(getattr(func, "__self__", None), "__name__", "")
        return name, "assignment" if assigned == "data" else "ignored"
    if name in _FACTORIES:
        return name, "factory"
    if name in _DECISIONS:
        return name, "decision"
    return name, "ignored" if name in _IGNORED else ""


def _is_padding(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in _FILLS:
        return _filled_in(args, kwargs) == 0
    if name != "pad":
        return False
    return is_zero_padding(*args[1:], **{k: v for k, v in kwargs.items() if k != "input"})


def _makes_a_mask(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether minus infinity is filled in: in no activation, that makes a mask of scores."""
    return name in _FILLS and _filled_in(args, kwargs) == float("-inf")


def _filled_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The number that ``masked_fill`` fills in; None for a tensor."""
    value = kwargs["value"] if "value" in kwargs else args[-1]
    return None if isinstance(value, Tensor) else value


def _types_in(values: Iterable[Any]) -> int:
    """Tell whether float tensors, complex tensors or complex numbers are among arguments, as bits.

    Without any of them there is nothing to emulate.
    """
    found = 0
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                found |= _FLOAT
            elif value.is_complex():
                found |= _COMPLEX
        elif isinstance(value, (tuple, list)):
            found |= _types_in(value)
        elif isinstance(value, dict):
            found |= _types_in(value.values())
        elif isinstance(value, complex):
            found |= _COMPLEX
    return found
