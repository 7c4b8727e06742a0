"""Tell by its weights whether a module is the one that a callback was copied beside."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_nna.emulator.weight_pipeline import unseen


@unseen
def digests(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Compute what tells the values of parameters from any others, by their names.

    Args:
        parameters: Names and parameters, of any shape, on any device.

    Example:
        >>> one, other = torch.zeros(2), torch.ones(2)
        >>> digests([("weight", one)]) == digests([("weight", other)])
        False
    """
    found = {}
    for name, parameter in parameters:
        values = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        found[name] = hashlib.sha256(values.numpy().data).hexdigest()
    return found
