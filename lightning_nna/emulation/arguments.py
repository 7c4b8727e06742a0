"""Tensors among the arguments of torch functions, and those that a call writes to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# In-place functions by name that change a shape or autograd's state, and no value.
_WRITE_NOTHING = frozenset(
    """
    as_strided_ detach_ requires_grad_ share_memory_ squeeze_ swapaxes_ swapdims_ t_ transpose_
    unsqueeze_
    """.split()
)
# Types of most arguments that are no tensors and contain none.
_LEAVES = (int, float, str, slice, torch.dtype, torch.device, type(None))


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors, of any shape, among values nested in tuples, lists and dicts.

    Example:
        >>> x = torch.zeros(1)
        >>> len(tensors_in(((x, 1.0), {"other": [x, x]})))
        3
    """
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (tuple, list)):
        return []
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (tuple, list, dict)):
            tensors += tensors_in(value)
    return tensors


def floats(values: Any) -> list[Tensor]:
    """Return the float tensors, of any shape, among nested values.

    Example:
        >>> x = torch.zeros(1)
        >>> len(floats(((x, 1.0, x > 0), {"other": [x]})))
        2
    """
    if isinstance(values, Tensor):
        return [values] if values.is_floating_point() else []
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (tuple, list)):
        # Other containers, which a library has told PyTorch how to open.
        leaves = tree_leaves(values)
        return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                tensors.append(value)
        elif not isinstance(value, _LEAVES):
            tensors += floats(value)
    return tensors


def first_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument: ``input`` by its name, or ``tensor`` in ``torch.nn.init``."""
    return args[0] if args else kwargs.get("input", kwargs.get("tensor"))


def is_in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a call overwrites its first argument.

    Example:
        >>> x = torch.zeros(1)
        >>> is_in_place(torch.Tensor.add_, (x, 1), {}), is_in_place(torch.add, (x, 1), {})
        (True, False)
        >>> is_in_place(torch.nn.functional.celu, (x, 1.0, True), {})
        True
    """
    position = _position_of_inplace(func)
    return position is not None and _overwrites(position, args, kwargs)


def _overwrites(position: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a call overwrites its first argument, given the position of ``inplace``."""
    if position < 0:
        return True
    return bool(kwargs.get("inplace", len(args) > position and args[position]))


def written(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """List the tensors, of any shape, that a call writes to: its first argument or ``out``.

    Args:
        func: Torch function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Example:
        >>> x = torch.zeros(1)
        >>> len(written(torch._foreach_mul_, ([x, x], 2.0), {}))
        2
    """
    if kwargs and (out := kwargs.get("out")) is not None:
        return [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    position = _position_of_inplace(func)
    if position is not None and _overwrites(position, args, kwargs):
        first = first_of(args, kwargs)
        # The first argument of ``_foreach_mul_`` or ``_fused_adam_`` is a list of tensors.
        targets = first if isinstance(first, (list, tuple)) else [first]
        return [x for x in targets if isinstance(x, Tensor)]
    return []


@cache
def _position_of_inplace(func: Callable[..., Any]) -> int | None:
    """Return the position of the argument ``inplace``.

    Returns:
        None for a function without it, -1 for one that always writes to its first argument.
    """
    # ``torch.ops`` has names with an overload, as ``mul_.Scalar``.
    name = getattr(func, "__name__", "").partition(".")[0]
    if name == "__set__":
        return -1 if getattr(getattr(func, "__self__", None), "__name__", "") == "data" else None
    if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
        return None if name in _WRITE_NOTHING else -1
    try:
        parameters = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):  # A built-in function has no signature, and no ``inplace``.
        return None
    return parameters.index("inplace") if "inplace" in parameters else None
