"""Functions that no kernel computes: a table that a program looks up.

Every entry is the function of a real number in single precision, rounded once, so that the error is
at most half a step of the output. In a program such a table is a GATHER (see
:mod:`.table_look_up`). An operator of one's own is one line:

    register_operator(tabulated("erf", F.erf, lambda x: 1 - elementary.erfc(x).float()))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lightning_nna.emulation.operators.driver import real, table
from lightning_nna.emulation.operators.record import Operator
from lightning_nna.emulation.operators.table_look_up import record_table


def tabulated(
    name: str,
    function: Callable[..., Tensor],
    reals: Callable[..., Tensor],
    *,
    torch: Sequence[str | Callable[..., Any]] | None = None,
    learns_scale: bool = True,
    **fields: Any,
) -> Operator:
    """Return the record of a function of one tensor as a table of 256 entries, or 65,536.

    Args:
        name: Name of the operator.
        function: The function on tensors of any shape, with the signature of the torch function.
        reals: The same for the entries, float32, of one axis, with the same bits on every
            processor (see :mod:`lightning_nna.elementary`); takes the other arguments by name.
        torch: Torch functions; None for ``function`` alone.
        learns_scale: Whether the scale of its output can be learned.
        fields: Other fields of the record.

    Example:
        >>> tabulated("halved", lambda input: input / 2, lambda x: x / 2, torch=("halved",)).widths
        (8, 16)
    """
    integers = table(real(reals))
    settings = {
        "arithmetic": "table of 256 entries, in 16 bits of 65,536 (128 KiB), looked up by GATHER"
    }
    return Operator(
        name,
        torch=(function,) if torch is None else torch,
        float=function,
        integers=integers,
        instructions=partial(record_table, integers),
        learns_scale=learns_scale,
        **{**settings, **fields},
    )
