"""Keep copies of tables on the devices that read them, so that each is moved once."""

from __future__ import annotations

from weakref import ref

import torch
from torch import Tensor

_COPIES: dict[tuple[int, torch.device], tuple[ref[Tensor], Tensor]] = {}


def on_device_of(x: Tensor, table: Tensor) -> Tensor:
    """Return a table on the device of a tensor.

    Args:
        x: Tensor of any shape.
        table: Table of any shape, which nobody writes to.

    Example:
        >>> table = torch.arange(3)
        >>> on_device_of(torch.zeros(1), table) is table
        True
    """
    if table.device == x.device:
        return table
    key = id(table), x.device
    source, copy = _COPIES.get(key, (None, None))
    if source is None or copy is None or source() is not table:
        with torch.inference_mode(False):
            copy = table.to(x.device)
        _COPIES[key] = ref(table, lambda _: _COPIES.pop(key, None)), copy
    return copy
