"""Functions that move values and do not change them: the parameters of the tensor go along."""

from __future__ import annotations

from typing import Any

from lightning_nna.emulation.operators.record import Kernel, register_kernel

#: Names of torch functions and methods whose float result holds values of their first tensor
#: (and, where they pad, zeros, which every grid has).
MOVEMENTS = frozenset(
    """
    _pack_padded_sequence _pad_packed_sequence adjoint as_strided atleast_1d atleast_2d atleast_3d
    broadcast_tensors broadcast_to channel_shuffle chunk clone conj contiguous cpu cuda detach diag
    diag_embed diagflat diagonal double expand expand_as flatten flip fliplr flipud gather
    index_select masked_select meshgrid moveaxis movedim narrow native_channel_shuffle permute
    pin_memory pixel_shuffle pixel_unshuffle positive ravel real repeat repeat_interleave
    requires_grad_ reshape reshape_as resolve_conj resolve_neg roll rot90 select split
    split_with_sizes squeeze swapaxes swapdims t take take_along_dim tile transpose type type_as
    unbind unflatten unfold unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze view view_as
    squeeze_ unsqueeze_ transpose_ t_ __getitem__ __reversed__ swapaxes_ swapdims_ tensor_split
    hsplit vsplit dsplit float to
    """.split()
)

#: Movements whose result takes its shape or type from a second tensor, and none of its values.
LIKE = frozenset({"expand_as", "reshape_as", "to", "type_as", "view_as"})

#: Movements that return one result for each of several tensors.
EACH = frozenset({"atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "meshgrid"})

#: Functions whose result holds values of several tensors: a movement where these share a grid.
JOINS = frozenset({"column_stack", "dstack", "hstack", "row_stack", "stack", "vstack"})

#: Properties of a tensor that are views of it.
VIEW_PROPERTIES = frozenset({"T", "mT", "H", "mH", "data"})


def is_movement(pad: Any, mode: str = "constant", value: float | None = None) -> bool:
    """Tell whether ``F.pad`` moves data alone, as with zeros (value ``None`` or 0) or mirrored."""
    return mode != "constant" or not value


def _version_of_quantize(version: int, operator: Any, tensors: Any) -> int:
    """Version 2 where the result has 16 bits."""
    return 2 if tensors[operator.outputs[0]].dtype == "int16" else 1


_EXTREMES = {"int8": 2, "int16": 4}
for _kernel in (
    # No runtime knows a version of it below 2.
    Kernel(
        "BROADCAST_TO",
        versions={"bool": 2, "float32": 2, "int32": 2, "int64": 2, "int8": 3, "int16": 3},
    ),
    Kernel("DEQUANTIZE", order="elements", versions={"int8": 2, "int16": 3}),
    Kernel(
        "MAXIMUM",
        order="elements",
        options="MaximumMinimumOptions",
        versions=_EXTREMES,
        versions_by_rank=((4, 3),),
    ),
    Kernel(
        "MINIMUM",
        order="elements",
        options="MaximumMinimumOptions",
        versions=_EXTREMES,
        versions_by_rank=((4, 3),),
    ),
    Kernel(
        "PAD",
        versions={"bool": 5, "int8": 2, "int16": 3},
        versions_by_rank=((4, 4),),
    ),
    Kernel("QUANTIZE", order="elements", version=_version_of_quantize),
    Kernel("RESHAPE"),
    Kernel("REVERSE_V2", options="ReverseV2Options", versions={"bool": 2, "int8": 3}),
    Kernel("STRIDED_SLICE", versions={"bool": 3, "int8": 2}, versions_by_rank=((4, 4),)),
    Kernel(
        "TRANSPOSE",
        versions={"bool": 3, "int8": 2, "int16": 5},
        versions_by_rank=((4, 4), (5, 6), (6, 8)),
    ),
):
    register_kernel(_kernel)
