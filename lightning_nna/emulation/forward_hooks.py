"""Hooks that tell the dispatch which module's forward is running."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_nna.emulation.compilation import require_untraced
from lightning_nna.emulation.dispatch import Dispatch
from lightning_nna.emulation.scope import is_redirected
from lightning_nna.emulation.sites import ROOT


class SharedHooks:
    """Share an emulator among the hooks of all its modules.

    In a copy or pickle of the module they have no dispatch, but plain values from which
    :func:`.attached` builds an emulator for the copy.

    Args:
        dispatch: Dispatch of the emulator; None in a copy.
        carry: Function that returns the plain values, see :meth:`.Emulator.carried`; None in a
            copy.
        carried: Those plain values, in a copy.
    """

    def __init__(
        self,
        dispatch: Dispatch | None,
        carry: Callable[[], Mapping[str, Any]] | None = None,
        carried: Mapping[str, Any] | None = None,
    ) -> None:
        self.dispatch, self._carry, self.carried = dispatch, carry, carried

    def _plain(self) -> Mapping[str, Any] | None:
        return self.carried if self._carry is None else self._carry()

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedHooks:
        return SharedHooks(None, None, copy.deepcopy(self._plain(), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedHooks, (None, None, self._plain())


class ForwardHooks:
    """Tell the dispatch which module's forward is running.

    The hooks of a copy or pickle do nothing until :func:`.attached` builds an emulator from the
    state that they carry. In float, hooks do nothing, since a compiled module may trace them.

    Args:
        shared: Object that the hooks of all modules of an emulator share.
        path: Path of the module.
    """

    def __init__(self, shared: SharedHooks, path: str) -> None:
        self.shared, self.path = shared, path

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardHooks:
        return ForwardHooks(copy.deepcopy(self.shared, memo), self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardHooks, (self.shared, self.path)

    def before(self, module: nn.Module, args: Any) -> None:
        """Note that a forward begins.

        Raises:
            RuntimeError: If the module is to be emulated and has no ranges, or cannot be seen into.
        """
        dispatch = self.shared.dispatch
        if dispatch is None or dispatch.state.modes.idle:
            return
        require_untraced()
        if dispatch.state.phase == "float":
            if getattr(module, "_is_replica", False):
                dispatch.state.require_own_thread()
            return
        # A strategy's wrapper runs a step through the root's call: no forward begins.
        if self.path == ROOT and is_redirected(module):
            return
        dispatch.begin_forward(self.path)

    def after(self, module: nn.Module, args: Any, result: Any) -> None:
        """Note that a forward has ended, or raised."""
        dispatch = self.shared.dispatch
        if dispatch is None or dispatch.state.modes.idle or torch.compiler.is_compiling():
            return
        if dispatch.state.phase != "float":
            dispatch.end_forward(self.path, result, is_root=self.path == ROOT)


def hooks_of(module: nn.Module) -> list[ForwardHooks]:
    """Return the hooks of a module itself, of all emulators that it belongs to."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, ForwardHooks)]


def remove_copied_hooks(module: nn.Module) -> None:
    """Remove copied hooks from a module and all its parts.

    The hooks of a part that was copied by itself stay, since they carry its own emulation.
    """
    copied = [hooks.shared for hooks in hooks_of(module) if hooks.shared.dispatch is None]
    for child in module.modules():
        before, after = child._forward_pre_hooks, child._forward_hooks
        for key in [key for key, hook in before.items() if _is_one_of(hook, copied)]:
            del before[key]
        for key in [key for key, hook in after.items() if _is_one_of(hook, copied)]:
            del after[key]
            child._forward_hooks_always_called.pop(key, None)


def _is_one_of(hook: Any, shared: list[SharedHooks]) -> bool:
    owner = getattr(hook, "__self__", None)
    return isinstance(owner, ForwardHooks) and any(owner.shared is one for one in shared)
