"""Run an operator: what every operator does, whatever its arithmetic."""

from __future__ import annotations

from typing import Any

from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.record import Operator


def run(operator: Operator, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one call of a torch function as the accelerator does.

    Args:
        operator: Operator of the function.
        call: Call site, with the state of the module.
        args: Positional arguments of the torch function.
        kwargs: Its keyword arguments.

    Returns:
        The function's result, with quantization parameters where the accelerator computes it.
    """
    assert operator.emulate is not None
    return operator.emulate(call, *args, **kwargs)
