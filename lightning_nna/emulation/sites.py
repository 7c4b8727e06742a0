"""Find call sites: the locations in a module's code that call torch functions.

The key of a site is ``path/operator#ordinal``: the path of the module, the operator, and the
ordinal of the code location. The module is found by forward hooks, and outside of all forwards (a
decoder's ``transcribe``, ``predict``, ``join``) by the frames of the call stack.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import CO_VARARGS
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torchmetrics import Metric

log = logging.getLogger(__name__)

#: Path of the module that the emulator is attached to.
ROOT = "."

# With a separator at the end, so that torchaudio and the like are not part of torch.
_TORCH_FOLDER = str(Path(torch.__file__).parent) + os.sep
_OWN_FOLDERS = tuple(
    str(Path(__file__).parents[1] / room) + os.sep for room in ("deploy", "emulation")
)
#: Files whose frames are skipped: they may be between a call and the dispatch.
TRANSPARENT_FILES: set[str] = {__file__}
_MODULE_CALL = nn.Module.__call__.__code__.co_filename
_CHECKPOINT = torch.utils.checkpoint.checkpoint_sequential.__code__.co_filename
#: Steps of a LightningModule compute losses and metrics, also if another module calls them.
_STEPS = frozenset({"training_step", "validation_step", "test_step", "predict_step"})
# What is not emulated, whatever module it belongs to.
_OUTSIDE_CLASSES = (torch.optim.Optimizer, Metric)
#: Path of code that is not emulated, whatever the outer frames are.
_OUTSIDE = "/"

#: Location of a call in the code: ids of code objects and their instructions, innermost first.
Location = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Role:
    """Describe what frames of a code object mean for call sites.

    Args:
        code: Code object.
        identity: Its ``id``.
        is_module_call: Whether it is ``nn.Module.__call__`` or part of it.
        is_located: Whether it is part of a location: neither of torch nor of the emulation.
        is_forward: Whether it is a forward of a module.
        is_outside: Whether it is a method of an optimizer or a metric, which are not emulated.
        may_have_owner: Whether a module, optimizer or metric may be the ``self`` of a frame. To
            look is slow, since Python copies all variables of the frame.
    """

    code: CodeType
    identity: int
    is_module_call: bool
    is_located: bool
    is_forward: bool
    is_outside: bool
    may_have_owner: bool


@dataclass
class SiteTable:
    """Hold the code locations of all call sites.

    The key of a site is ``path/operator#ordinal``. Ordinals are assigned in the order in which
    locations first run. They are saved, so that a resumed run has the same keys.

    Args:
        locations: Code locations by ``path/operator``; the position in a list is the ordinal.
    """

    locations: dict[str, list[str]] = field(default_factory=dict)

    def key(self, path: str, operator: str, location: str) -> str:
        """Return the key of a site; a new location gets the next ordinal.

        Args:
            path: Path of the module.
            operator: Name of the operator.
            location: Code location.
        """
        known = self.locations.setdefault(f"{path}/{operator}", [])
        if location not in known:
            known.append(location)
        return f"{path}/{operator}#{known.index(location)}"

    def unite(self, tables: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, str]:
        """Merge the locations of all ranks of a distributed run, in the order of the ranks.

        Ranks with different data may run locations in different orders, and a key must name the
        same code on all of them.

        Args:
            tables: ``locations`` of every rank, with those of this rank.

        Returns:
            New keys by old keys, for keys of this rank that change.

        Example:
            >>> table = SiteTable({"./mul": ["f:2:0"]})
            >>> table.unite([{"./mul": ["f:1:0"]}, table.locations])
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
    """Hold the modules whose forward is running in a thread, outermost first.

    It is per thread, because activation checkpointing runs forwards in the thread of the backward.
    """

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.entered = 0


class CallSites:
    """Find the call site of the running code.

    Args:
        table: Call sites by key.
        paths: Path of every module by ``id``.
        allowed: Paths of the modules that are emulated: without losses, metrics and modules that
            no target selects.
        forwards: Code of the modules' forwards and of decorators around them, see
            :func:`.forward_codes`.
        lightning: LightningModules by ``id``. Their steps are not emulated; methods of a root among
            them are only if its forward calls them.
        classes: Classes of all modules.

    Attributes:
        scope: Modules whose forward is running in this thread.
    """

    def __init__(
        self,
        table: SiteTable,
        paths: Mapping[int, str],
        allowed: set[str],
        forwards: Iterable[tuple[CodeType, Any]],
        lightning: Container[int],
        classes: Iterable[type],
    ) -> None:
        # By ``id``, since code objects do not cache their hash.
        self._forwards: dict[int, CodeType] = {}
        self._decorators: dict[int, tuple[CodeType, dict[int, Any]]] = {}
        for code, inner in forwards:
            if inner is None:
                self._forwards[id(code)] = code
            else:
                self._decorators.setdefault(id(code), (code, {}))[1][id(inner)] = inner
        self.table, self.paths, self.allowed = table, paths, allowed
        self._lightning, self._classes = lightning, frozenset(classes)
        self.scope = Scope()
        #: Sites of data-movement operators, which have no ranges and are not saved.
        self.layout_table = SiteTable()
        self._keys: dict[tuple[object, ...], str] = {}
        # By ``id`` of the code; references to it keep the ids from being used again.
        self._roles: dict[int, Role] = {}
        self._naming = threading.Lock()
        self._warned_of_checkpointing = False

    def forget_keys(self) -> None:
        """Clear the cache of keys, after the table has been replaced."""
        self._keys.clear()

    def in_scope(self) -> bool:
        """Tell whether the calling code is emulated."""
        return self.locate()[0] is not None

    @property
    def path(self) -> str:
        """Path of the module whose forward is running."""
        return (self.scope.stack or [ROOT])[-1]

    def key(self, path: str, operator: str, location: Location, *, is_layout: bool = False) -> str:
        """Return the key of a call site, cached by path, operator and location.

        Args:
            path: Path of the module.
            operator: Name of the operator.
            location: Code location.
            is_layout: Whether it is a data-movement operator.
        """
        identity = (path, operator, is_layout, location)
        key = self._keys.get(identity)
        if key is None:
            if not self._warned_of_checkpointing and _is_checkpointed_function():
                self._warned_of_checkpointing = True
                log.warning(
                    "torch.utils.checkpoint is given a function in %s: the backward computes it "
                    "again in float, and gradients are wrong or PyTorch raises CheckpointError; "
                    "give it a module (nn.Module) that has these operators in its forward",
                    "the module" if path == ROOT else path,
                )
            with self._naming:
                codes = [(self._roles[code].code, offset) for code, offset in reversed(location)]
                text = ">".join(_describe(code, offset) for code, offset in codes)
                table = self.layout_table if is_layout else self.table
                key = self._keys[identity] = table.key(path, operator, text)
        return key

    def locate(self) -> tuple[str | None, Location]:
        """Return the path of the module that runs, and the location in the module's code.

        The module is the one whose method runs, or else the one whose forward is running. A forward
        has the same sites whether the module or its ``forward`` is called. Frames of torch are left
        out of the location: one ``nn.LSTM`` is one site, however its forward reaches the operator.

        Returns:
            The path, None for code that is not emulated; and the location.
        """
        stack = self.scope.stack
        location: list[tuple[int, int]] = []
        path, owner, end = None, None, 0
        roles = self._roles
        # The innermost two frames are those of the dispatch.
        frame: FrameType | None = sys._getframe(3)
        while frame is not None:
            role = roles.get(id(frame.f_code)) or self._role_of(frame)
            caller = frame.f_back
            if role.is_module_call:
                if stack or path is not None:
                    break
                frame = caller
                continue
            if role.is_located:
                location.append((role.identity, frame.f_lasti))
            if path is not None:
                if role.is_forward and self._owner(frame) is owner:
                    end = len(location)
            elif stack and caller is not None and caller.f_code.co_filename == _MODULE_CALL:
                break  # The forward of the module that was called last.
            elif role.is_outside:
                return None, ()
            elif role.may_have_owner:
                owner = self._owner(frame)
                owner_path = None if owner is None else self._path_of(owner, frame)
                if owner_path == _OUTSIDE:
                    return None, ()
                if owner_path is not None and stack[-1:] != [owner_path]:
                    path, end = owner_path, len(location)
            frame = caller
        if path is None:
            if not stack:
                return None, ()
            path, end = stack[-1], len(location)
        return (path if path in self.allowed else None), tuple(location[:end])

    def _role_of(self, frame: FrameType) -> Role:
        """Return the role of a frame's code, looked up when the code is first met."""
        code = frame.f_code
        file, is_forward = code.co_filename, id(code) in self._forwards
        is_method = code.co_varnames[:1] == ("self",)
        owner_class = _class_of(frame) if is_method else None
        may_have_owner = is_forward or id(code) in self._decorators
        role = self._roles[id(code)] = Role(
            code,
            id(code),
            is_module_call=file == _MODULE_CALL,
            is_located=not (file.startswith(_TORCH_FOLDER) or file in TRANSPARENT_FILES),
            is_forward=is_forward,
            is_outside=owner_class is not None and issubclass(owner_class, _OUTSIDE_CLASSES),
            may_have_owner=may_have_owner or (is_method and self._may_own(owner_class)),
        )
        return role

    def _may_own(self, cls: type | None) -> bool:
        """Tell whether the ``self`` of a class's methods may be a module, optimizer or metric.

        It never is, as with the trainer's class, unless one of these inherits from the class.

        Args:
            cls: Class; None if it was not found.
        """
        return cls is None or any(
            one in self._classes or issubclass(one, _OUTSIDE_CLASSES)
            for one in _with_subclasses(cls)
        )

    def _owner(self, frame: FrameType) -> Any:
        """Return the object whose method a frame runs; None if it runs no method."""
        code = frame.f_code
        names = code.co_varnames
        if names[:1] == ("self",):
            return frame.f_locals.get("self")
        if id(code) not in self._forwards and not self._decorates_forward(frame):
            return None
        if code.co_argcount:
            return frame.f_locals.get(names[0])
        # The signature of a decorator's function is ``(*args, **kwargs)``.
        positional = frame.f_locals.get(names[code.co_kwonlyargcount], ())
        return positional[0] if code.co_flags & CO_VARARGS and positional else None

    def _decorates_forward(self, frame: FrameType) -> bool:
        """Tell whether a frame runs a decorator of a module's forward, not of another function."""
        decorator = self._decorators.get(id(frame.f_code))
        if decorator is None:
            return False
        return any(id(value) in decorator[1] for value in frame.f_locals.values())

    def _path_of(self, owner: Any, frame: FrameType) -> str | None:
        """Return the path of the module whose method runs; ``_OUTSIDE`` if it is not emulated."""
        if isinstance(owner, _OUTSIDE_CLASSES):
            return _OUTSIDE
        path = self.paths.get(id(owner))
        if path is None:
            return None
        code = frame.f_code
        if code.co_name in _STEPS and id(owner) in self._lightning:
            return _OUTSIDE
        is_forward = id(code) in self._forwards or self._decorates_forward(frame)
        if path == ROOT and id(owner) in self._lightning and not is_forward:
            return None  # An outer frame tells whether the forward or a step called this method.
        return path if path in self.allowed else _OUTSIDE


def source_of_call() -> str:
    """Return file and line of the code, outside of torch and here, that called the function.

    A file below a folder of ``sys.path`` is named from there, as ``"timm/models/resnet.py:780"``.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH_FOLDER, *_OWN_FOLDERS)):
            return f"{_short(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def _short(file: str) -> str:
    """Return the path of a file from the deepest folder of ``sys.path`` that contains it."""
    folders = {str(Path(folder).absolute()) + os.sep for folder in sys.path}
    above = [folder for folder in folders if file.startswith(folder)]
    return file.removeprefix(max(above, key=len)) if above else file


def _class_of(frame: FrameType) -> type | None:
    """Return the class whose body defines the method that a frame runs; None if it is not found."""
    first, *nested = frame.f_code.co_qualname.split(".")[:-1] or [""]
    value: Any = frame.f_globals.get(first)
    for name in nested:
        value = getattr(value, name, None)
    return value if isinstance(value, type) else None


def _with_subclasses(cls: type) -> Iterator[type]:
    """Yield a class and all that inherit from it."""
    yield cls
    subclasses: list[type] = type.__subclasses__(cls)
    for each in subclasses:
        yield from _with_subclasses(each)


def _is_checkpointed_function() -> bool:
    """Tell whether activation checkpointing runs a function that is not the forward of a module.

    Such a function has no hooks that would tell the dispatch that it runs again.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != _MODULE_CALL:
        if frame.f_code.co_filename == _CHECKPOINT:
            return True
        frame = frame.f_back
    return False


def _describe(code: CodeType, instruction: int) -> str:
    """Return the position of an instruction relative to its function, as text."""
    line, _, column, _ = list(code.co_positions())[instruction // 2]
    offset = (line or code.co_firstlineno) - code.co_firstlineno
    return f"{code.co_qualname}:{offset}:{column}"
