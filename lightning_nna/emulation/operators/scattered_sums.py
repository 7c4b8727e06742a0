r"""Values added up where indices say: ``scatter_add`` and ``index_add``.

They are products with one-hot vectors, whose ones and zeros are exact,

.. math:: y_{bjm} = x_{bjm} + \sum_i [k_{bi} = j]\, u_{bim},

a ``BATCH_MATMUL`` and, unless :math:`x` is zeros, an ``ADD``. Of indices that the program fixes the
vectors are a constant; of computed ones they are a ``ONE_HOT`` and a ``CAST``.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.operators import elementwise
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.index_arithmetic import one_hot
from lightning_nna.emulation.operators.matmul import batch_matmul
from lightning_nna.emulation.operators.record import Form, Operator, register_operator
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import QParams

_COVERED = "expand the index over the other axes, or use index_add"


def scatter_add(call: Call, input: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """Emulate ``torch.scatter_add`` of any shape.

    Args:
        call: The call.
        input: Tensor that the sums are added to; of zeros there is no addition.
        dim: Axis of the indices.
        index: Indices from 0 on, as long as ``input`` along the other axes.
        src: Values, at least as long as ``index``.
    """
    axis = dim % input.dim()
    source = call.viewed(src[tuple(slice(size) for size in index.shape)], src)
    others = [k for k in range(input.dim()) if k != axis]
    # Axes along which the index repeats are columns of one product.
    columns = [k for k in others if index.stride(k) == 0 and index.shape[k] > 1]
    batch = [k for k in others if k not in columns]
    order = (*batch, axis, *columns)
    once: tuple[Any, ...] = (..., *(0 for _ in columns))
    count, terms = prod(index.shape[k] for k in batch), index.shape[axis]
    numbers = index.permute(order)[once].reshape(count, terms)
    values = call.viewed(source.permute(order).reshape(count, terms, -1), source)
    is_zero = call.state.constants.in_program(input) and not bool(input.any())
    part = call if is_zero else call.child("product")
    sums = _product(part, index, numbers, values, input.shape[axis])
    shaped = sums.reshape([input.shape[k] for k in order])
    result = call.viewed(shaped.permute([order.index(k) for k in range(input.dim())]), sums)
    return result if is_zero else elementwise.add(call, input, result)


def index_add(
    call: Call, input: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1
) -> Tensor:
    """Emulate ``torch.index_add`` of any shape.

    Args:
        call: The call.
        input: Tensor that the sums are added to.
        dim: Axis of the indices.
        index: Indices from 0 on, one for each element of the axis of ``source``.
        source: Values, of the shape of ``input`` except along the axis.
        alpha: Factor of the values.
    """
    if alpha != 1:
        source = elementwise.mul(call.child("alpha"), source, alpha)
    form = [-1 if k == dim % input.dim() else 1 for k in range(input.dim())]
    expanded = index.reshape(form).expand(source.shape)
    call.state.constants.mark(expanded, call.state.constants.kind_of([index]))
    return scatter_add(call, input, dim, expanded, source)


def supports_scatter_add(
    input: Tensor, dim: int, index: Tensor, src: Any, **kwargs: Any
) -> bool | str:
    """Tell whether the indices cover the other axes."""
    axes = range(input.dim())
    covered = all(index.shape[k] == input.shape[k] for k in axes if k != dim % input.dim())
    if not axes or not index.numel() or kwargs:
        return False
    return covered or _COVERED


def supports_index_add(input: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Tell whether there are axes."""
    return input.dim() > 0 and not set(kwargs) - {"dim", "index", "source", "alpha"}


def _product(call: Call, index: Tensor, numbers: Tensor, values: Tensor, size: int) -> Tensor:
    """Products of one-hot vectors and values.

    Args:
        call: The call.
        index: Tensor of any shape that tells whether the data decide.
        numbers: Indices, shape ``(batch, terms)``.
        values: Values, shape ``(batch, terms, columns)``.
        size: Number of sums.

    Returns:
        Sums, shape ``(batch, size, columns)``.
    """
    if call.state.constants.kind_of([index]) is None:
        places = one_hot(call, numbers, size).mT
        call.state.constants.mark(places, None)
        vectors = call.operand(places, "places")
    else:
        unit = QParams(1.0, 0) if call.bits == 8 else QParams(1.0, 0, -(2**15), 2**15 - 1)
        vectors = Activation(F.one_hot(numbers, size).mT.float(), unit, constant=True)
    x = call.operand(values, "source")

    def in_float() -> Tensor:
        return torch.matmul(vectors.value, x.value)

    if call.observing:
        return call.observed(in_float())
    return batch_matmul(call, vectors, x, call.output(in_float))


register_operator(
    Operator(
        "scatter_add",
        torch=("scatter_add", "scatter_add_"),
        emulate=scatter_add,
        supports=supports_scatter_add,
        forms=(Form(("index_add", "index_add_"), index_add, supports_index_add),),
        arithmetic="a matrix product with one-hot vectors, and a sum",
    )
)
