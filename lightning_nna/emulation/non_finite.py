"""Errors of values that are not finite: they name the call site, and the parameter at fault."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def with_cause(
    error: FloatingPointError, site: str, operands: Any, names: Mapping[int, str]
) -> FloatingPointError:
    """The error that names a site and, if one is not finite, the parameter among its operands.

    Args:
        error: What an operator raised.
        site: Key of the call site.
        operands: Arguments of the torch function, nested.
        names: Names of parameters and buffers by ``id``.

    Example:
        >>> weight = torch.tensor([float("nan")])
        >>> with_cause(FloatingPointError(""), "head/mul#0", [weight], {id(weight): "head.gain"})
        FloatingPointError('head/mul#0: head.gain has a value that is not finite; ...')
    """
    tensors = [x for x in tree_leaves(operands) if isinstance(x, Tensor) and id(x) in names]
    culprits = [names[id(x)] for x in tensors if not bool(torch.isfinite(x).all())]
    if culprits:
        return FloatingPointError(
            f"{site}: {', '.join(culprits)} has a value that is not finite; an update has spoiled "
            f"it: lower the learning rate, clip gradients, or look for what is not finite in the "
            f"loss"
        )
    message = str(error)
    return error if message.startswith(site) else FloatingPointError(f"{site}: {message}")
