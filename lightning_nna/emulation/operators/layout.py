"""Functions that move values and do not change them: the parameters of the tensor go along."""

from __future__ import annotations

from typing import Any

#: Names of torch functions and methods whose float result holds values of their first tensor
#: (and, where they pad, zeros, which every grid has).
MOVEMENTS = frozenset(
    """
    _pack_padded_sequence _pad_packed_sequence as_strided atleast_1d atleast_2d atleast_3d
    broadcast_to chunk clone contiguous cpu cuda detach diagonal expand expand_as flatten flip
    gather index_select masked_select moveaxis movedim narrow permute ravel repeat
    repeat_interleave requires_grad_ reshape reshape_as roll rot90 select split
    split_with_sizes squeeze swapaxes swapdims t take_along_dim tile transpose unbind unflatten
    unfold unsqueeze view view_as squeeze_ unsqueeze_ transpose_ t_ __getitem__ swapaxes_
    tensor_split hsplit vsplit dsplit float to
    """.split()
)

#: Functions whose result holds values of several tensors: a movement where these share a grid.
JOINS = frozenset(
    {"column_stack", "dstack", "hstack", "maximum", "minimum", "stack", "vstack", "where"}
)

#: Properties of a tensor that are views of it.
VIEW_PROPERTIES = frozenset({"T", "mT", "H", "mH", "data"})


def chooses_a_number(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a call of ``where`` takes a number that not every grid has."""
    numbers = [x for x in args[1:] if isinstance(x, (int, float))] if name == "where" else []
    return any(numbers)


def is_zero_padding(pad: Any, mode: str = "constant", value: float | None = None) -> bool:
    """Whether a call of ``F.pad`` fills with zeros (value ``None`` or 0) and so is a movement."""
    return mode == "constant" and not value
