"""Hooks that tell which module's forward is running."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_nna.emulator.interception import ROOT

if TYPE_CHECKING:
    from lightning_nna.emulator.engine import Emulator


class ForwardHooks:
    """Tell the interception which module's forward is running.

    Copies and pickles of a module are on their own: they carry hooks that do nothing. Nor do they
    in float, where a compiled module may trace them.

    Args:
        emulator: The emulator, or None for a copy.
        path: Path of the module.
    """

    def __init__(self, emulator: Emulator | None, path: str) -> None:
        self.emulator, self.path = emulator, path

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardHooks:
        return ForwardHooks(None, self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardHooks, (None, self.path)

    def before(self, module: nn.Module, args: Any) -> None:
        """Forward begins."""
        if self.emulator is not None and self.emulator.phase != "float":
            self.emulator.enter_scope()
            self.emulator.interception.scope.stack.append(self.path)

    def after(self, module: nn.Module, args: Any, result: Any) -> None:
        """Forward ends, or raised."""
        if self.emulator is None or self.emulator.phase == "float":
            return
        stack = self.emulator.interception.scope.stack
        if stack:
            if stack.pop() == ROOT:
                self.emulator.read(result)
            self.emulator.leave_scope()
