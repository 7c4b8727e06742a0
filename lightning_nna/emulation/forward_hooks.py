"""Hooks that tell which module's forward is running."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_nna.emulation.dispatch import ROOT, refuse_tracing
from lightning_nna.emulation.scope import is_redirected

if TYPE_CHECKING:
    from lightning_nna.emulation.emulator import Emulator


class Emulation:
    """Shared part of a module's hooks: its emulator, or the state from which a copy builds one.

    Args:
        emulator: The emulator; None in a copy or pickle of the module.
        carried: Plain state of the original's emulator, see :meth:`.Emulator.carried`.
    """

    def __init__(self, emulator: Emulator | None, carried: Mapping[str, Any] | None = None) -> None:
        self.emulator, self.carried = emulator, carried

    def _plain(self) -> Mapping[str, Any] | None:
        return self.carried if self.emulator is None else self.emulator.carried()

    def __deepcopy__(self, memo: dict[int, Any]) -> Emulation:
        return Emulation(None, copy.deepcopy(self._plain(), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Emulation, (None, self._plain())


class ForwardHooks:
    """Tell the dispatch which module's forward is running.

    A copy or pickle of a module has hooks that do nothing before :func:`.attach` meets it; they
    carry the state of the emulation. In float hooks do nothing, since a compiled module may trace
    them.

    Args:
        emulation: Shared by the hooks of all modules of an emulator.
        path: Path of the module.
    """

    def __init__(self, emulation: Emulation, path: str) -> None:
        self.emulation, self.path = emulation, path

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardHooks:
        return ForwardHooks(copy.deepcopy(self.emulation, memo), self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardHooks, (self.emulation, self.path)

    def before(self, module: nn.Module, args: Any) -> None:
        """Forward begins.

        Raises:
            RuntimeError: If the module is to be emulated and has no ranges, or cannot be seen into.
        """
        emulator = self.emulation.emulator
        if emulator is None or emulator.modes.idle:
            return
        refuse_tracing()
        if emulator.phase == "float":
            if getattr(module, "_is_replica", False):
                emulator.refuse_replica()
            return
        # A strategy's wrapper runs a step through the root's call: no forward begins.
        if self.path == ROOT and is_redirected(module):
            return
        emulator.require_ranges()
        emulator.enter_scope()
        stack = emulator.dispatch.scope.stack
        if not stack:
            emulator.constants.begin()
        stack.append(self.path)

    def after(self, module: nn.Module, args: Any, result: Any) -> None:
        """Forward ends, or raised."""
        emulator = self.emulation.emulator
        if emulator is None or emulator.modes.idle or torch.compiler.is_compiling():
            return
        if emulator.phase == "float":
            return
        stack = emulator.dispatch.scope.stack
        # Where another hook raised, the forward may never have begun.
        if stack and stack[-1] == self.path:
            stack.pop()
            if self.path == ROOT:
                emulator.read(result)
            emulator.leave_scope()


def hooks_of(module: nn.Module) -> list[ForwardHooks]:
    """The hooks on a module itself, of every emulator that it belongs to."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, ForwardHooks)]


def remove_copied_hooks(module: nn.Module) -> None:
    """Take hooks that a copy has brought along off a module and all it contains.

    Those of a part that is a copy by itself stay: it carries an emulation of its own.
    """
    copied = [hooks.emulation for hooks in hooks_of(module) if hooks.emulation.emulator is None]
    for child in module.modules():
        before, after = child._forward_pre_hooks, child._forward_hooks
        for key in [key for key, hook in before.items() if _is_one_of(hook, copied)]:
            del before[key]
        for key in [key for key, hook in after.items() if _is_one_of(hook, copied)]:
            del after[key]
            child._forward_hooks_always_called.pop(key, None)


def _is_one_of(hook: Any, emulations: list[Emulation]) -> bool:
    owner = getattr(hook, "__self__", None)
    return isinstance(owner, ForwardHooks) and any(owner.emulation is one for one in emulations)
