"""What the arguments of a torch function say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

#: Place of the argument ``inplace`` of functions that have one.
_INPLACE_ARGUMENT = {
    "relu": 1, "relu6": 1, "silu": 1, "hardswish": 1, "hardsigmoid": 1, "leaky_relu": 2, "elu": 2,
    "hardtanh": 3, "dropout": 3, "feature_dropout": 3,
}  # fmt: skip


def floats(values: Any) -> list[Tensor]:
    """Float tensors among nested values."""
    leaves = [values] if isinstance(values, Tensor) else tree_leaves(values)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def is_in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call overwrites its first argument."""
    name = getattr(func, "__name__", "")
    position = _INPLACE_ARGUMENT.get(name)
    if position is not None:
        return bool(kwargs.get("inplace", len(args) > position and args[position]))
    return name.endswith("_") and not name.endswith("__")
