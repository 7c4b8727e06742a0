"""Name the call site and the parameter in errors of values that are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def with_cause(
    error: FloatingPointError, site: str, operands: Any, names: Mapping[int, str]
) -> FloatingPointError:
    """Return an error that names a site and its parameters that are not finite.

    Args:
        error: Error that an operator has raised.
        site: Key of the call site.
        operands: Arguments of the torch function, nested.
        names: Names of the module's parameters and buffers by ``id``.

    Example:
        >>> weight = torch.tensor([float("nan")])
        >>> with_cause(FloatingPointError(""), "head/mul#0", [weight], {id(weight): "head.gain"})
        FloatingPointError('head/mul#0: head.gain has a value that is not finite; ...')
    """
    tensors = [x for x in tree_leaves(operands) if isinstance(x, Tensor) and id(x) in names]
    non_finite = [names[id(x)] for x in tensors if not bool(torch.isfinite(x).all())]
    if non_finite:
        return FloatingPointError(
            f"{site}: {', '.join(non_finite)} has a value that is not finite; "
            f"lower the learning rate, clip gradients, or look for a value that is not finite in "
            f"the loss"
        )
    message = str(error)
    return error if message.startswith(site) else FloatingPointError(f"{site}: {message}")
