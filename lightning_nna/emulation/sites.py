"""Call sites: where in a module's code a torch function is called.

The key of a site is ``path/operator#ordinal``: the path of the module, the operator, and the
ordinal of the code location. Which module a function belongs to is known from forward hooks, and
outside of any forward (a decoder's ``transcribe``, ``predict``, ``join``) from the frames of the
call stack.
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

# With the separator: torchaudio and its like are no part of torch.
_TORCH_FOLDER = str(Path(torch.__file__).parent) + os.sep
#: Files of function modes, which may stand between a call and the dispatch.
TRANSPARENT_FILES: set[str] = {__file__}
_MODULE_CALL = nn.Module.__call__.__code__.co_filename
_CHECKPOINT = torch.utils.checkpoint.checkpoint_sequential.__code__.co_filename
#: A LightningModule's steps compute losses and metrics, also where another module calls them.
_STEPS = frozenset({"training_step", "validation_step", "test_step", "predict_step"})
#: Path of a function beyond which no other frame is worth looking at.
_OUTSIDE = "/"

#: Where in the code a function is called: code objects and their instructions, innermost first.
Location = tuple[tuple[CodeType, int], ...]


@dataclass
class SiteTable:
    """Call sites by key, and the code locations that their ordinals stand for.

    The key of a site is ``path/operator#ordinal``. Ordinals are given in the order in which
    locations first run and are saved, so that a resumed run keeps them whatever it runs first.
    """

    locations: dict[str, list[str]] = field(default_factory=dict)

    def key(self, path: str, operator: str, location: str) -> str:
        """Return the key of the site at a location, with a new ordinal if the location is new."""
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
    """Modules whose forward is running in this thread, outermost first.

    A thread of its own, because activation checkpointing calls forward from the thread that runs
    the backward.
    """

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.entered = 0


class CallSites:
    """Find the call site of the running code.

    Args:
        table: Call sites by key.
        paths: Path of every module by ``id``.
        allowed: Paths that are emulated; not among them: losses, metrics, what no target selects.
        forwards: Code of the modules' forwards and of decorators around them, see
            :func:`.forward_codes`.
        lightning: LightningModules by ``id``. Their steps do not count, nor do methods of a root
            among them that its forward has not called.

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
    ) -> None:
        # By identity: a code object computes its hash anew whenever it is asked.
        self._forwards: dict[int, CodeType] = {}
        self._decorators: dict[int, tuple[CodeType, dict[int, Any]]] = {}
        for code, inner in forwards:
            if inner is None:
                self._forwards[id(code)] = code
            else:
                self._decorators.setdefault(id(code), (code, {}))[1][id(inner)] = inner
        self.table, self.paths, self.allowed = table, paths, allowed
        self._lightning = lightning
        self.scope = Scope()
        self._keys: dict[tuple[object, ...], str] = {}
        self._code: list[CodeType] = []
        self._naming = threading.Lock()
        self._warned_of_checkpointing = False

    def forget_keys(self) -> None:
        """Look sites up again: their table has been replaced."""
        self._keys.clear()

    def in_scope(self) -> bool:
        """Tell whether the code that calls is part of what is emulated."""
        return self.locate()[0] is not None

    @property
    def path(self) -> str:
        """Path of the module whose forward is running."""
        return (self.scope.stack or [ROOT])[-1]

    def key(self, path: str, operator: str, location: Location) -> str:
        """Return the key of a call site; code locations are turned into text once."""
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
                self._keys[identity] = self.table.key(path, operator, text)
        return self._keys[identity]

    def locate(self) -> tuple[str | None, Location]:
        """Return the module path of the running code, and its location in the module's own code.

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
            owner_path = None if owner is None else self._path_of(owner, frame)
            if owner_path == _OUTSIDE:
                return None, ()
            if owner_path is not None and stack[-1:] != [owner_path]:
                path, end = owner_path, len(location)
        if path is None:
            if not stack:
                return None, ()
            path, end = stack[-1], len(location)
        return (path if path in self.allowed else None), tuple(location[:end])

    def _owner(self, frame: FrameType) -> Any:
        """Return the object whose method a frame runs; None if it seems to run none."""
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
        """Return the path of a module whose method runs; ``_OUTSIDE`` if no outer frame counts."""
        if isinstance(owner, (torch.optim.Optimizer, Metric)):
            return _OUTSIDE
        path = self.paths.get(id(owner))
        if path is None:
            return None
        code = frame.f_code
        if code.co_name in _STEPS and id(owner) in self._lightning:
            return _OUTSIDE
        is_forward = id(code) in self._forwards or self._decorates_forward(frame)
        if path == ROOT and id(owner) in self._lightning and not is_forward:
            return None  # Its forward may have called this method, or one of its steps.
        return path if path in self.allowed else _OUTSIDE


def _callers() -> Iterator[FrameType]:
    """Yield the frames of the code that called the torch function, innermost first."""
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
    """Return the position of an instruction in its function, stable under other edits."""
    line, _, column, _ = list(code.co_positions())[instruction // 2]
    offset = (line or code.co_firstlineno) - code.co_firstlineno
    return f"{code.co_qualname}:{offset}:{column}"
