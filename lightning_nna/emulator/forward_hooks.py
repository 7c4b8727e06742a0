"""Which module's forward is running: hooks that tell the interception."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from lightning_nna.emulator.engine import Emulator


class ForwardHooks:
    """Tell the interception which module's forward is running.

    Copies and pickles of a module are on their own: they carry hooks that do nothing.
    """

    def __init__(self, emulator: Emulator | None, path: str) -> None:
        self.emulator, self.path = emulator, path

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardHooks:
        return ForwardHooks(None, self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardHooks, (None, self.path)

    def before(self, module: nn.Module, args: Any) -> None:
        """Forward begins."""
        if self.emulator is not None:
            self.emulator.enter_scope()
            self.emulator.interception.scope.stack.append(self.path)

    def after(self, module: nn.Module, args: Any, result: Any) -> None:
        """Forward ends, or raised."""
        stack = None if self.emulator is None else self.emulator.interception.scope.stack
        if self.emulator is not None and stack:
            stack.pop()
            self.emulator.leave_scope()
