r"""Sums of products of two tensors: matrix products, products of elements, and sums.

An axis of both operands is one of the result (a batch) or is summed over; an axis of one operand is
one of the result, or is summed over before. So two operands are, after their axes have moved,

.. math:: y_{bmn} = \sum_k u_{bmk}\, v_{bkn},

a ``BATCH_MATMUL``, or a fully connected layer where one is a parameter without a batch axis. Where
nothing is summed they are a ``MUL``. More than two operands go from left to right.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.operators import elementwise, reduction
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.linear import fully_connected
from lightning_nna.emulation.operators.matmul import by_parameter, matmul
from lightning_nna.emulation.operators.record import Form, Operator, register_operator

# Axes that kernels take at most.
_MOST_AXES = 5


def einsum(call: Call, equation: str, *operands: Any) -> Tensor:
    """Emulate ``torch.einsum`` of tensors of any shapes."""
    tensors = list(operands[0]) if isinstance(operands[0], (list, tuple)) else list(operands)
    labels, result = _labels(equation, [x.dim() for x in tensors])
    for position, each in enumerate(tensors):
        tensors[position], labels[position] = _diagonal(call, each, labels[position])
    product, names = tensors[0], labels[0]
    for position in range(1, len(tensors)):
        later = set("".join(labels[position + 1 :])) | set(result)
        is_last = position == len(tensors) - 1
        part = call if is_last else call.child(f"product{position}")
        wanted = "".join(dict.fromkeys(x for x in names + labels[position] if x in later))
        wanted = result if is_last else wanted
        product = _product(part, product, tensors[position], (names, labels[position], wanted))
        names = wanted
    return product if names == result else _summed(call, product, names, result)


def supports_einsum(equation: Any, *operands: Any, **kwargs: Any) -> bool:
    """Tell whether the equation has tensors of few axes."""
    if not isinstance(equation, str) or not operands or kwargs:
        return False
    tensors = list(operands[0]) if isinstance(operands[0], (list, tuple)) else list(operands)
    labels, result = _labels(equation, [x.dim() for x in tensors])
    sizes = [x.dim() for x in tensors]
    return (
        all(len(names) == size for names, size in zip(labels, sizes, strict=True))
        and all(x.dim() <= _MOST_AXES and x.numel() > 0 for x in tensors)
        and len(result) <= _MOST_AXES
    )


def bilinear(
    call: Call, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Emulate ``F.bilinear``: a linear layer of the products of both inputs' elements.

    Inputs have the shapes ``(..., n)`` and ``(..., m)``, the weight ``(out, n, m)``.
    """
    first = call.viewed(input1.unsqueeze(-1), input1)
    second = call.viewed(input2.unsqueeze(-2), input2)
    products = elementwise.mul(call.child("products"), first, second)
    x = call.operand(call.viewed(products.flatten(-2), products), "input")

    def in_float() -> Tensor:
        return F.linear(x.value, weight.flatten(1), bias)

    if call.observing:
        return call.observed(in_float())
    rows_per_scale = 1 if call.state.spec.weight_granularity == "per_channel" else len(weight)
    quantized = call.state.weight(weight, rows_per_scale)
    trained = call.state.trainable(weight, rows_per_scale)
    flat = QuantizedWeight(quantized.stored.flatten(1), quantized.scales)
    return fully_connected(call, x, trained.flatten(1), bias, flat, call.output(in_float))


def tensordot(call: Call, a: Tensor, b: Tensor, dims: Any = 2, out: None = None) -> Tensor:
    """Emulate ``torch.tensordot`` of tensors of any shapes."""
    return einsum(call, _contraction(a, b, dims), a, b)


def supports_tensordot(a: Any, b: Any, dims: Any = 2, out: Any = None) -> bool:
    """Tell whether kernels have so many axes."""
    return out is None and supports_einsum(_contraction(a, b, dims), a, b)


def outer(call: Call, input: Tensor, vec2: Tensor) -> Tensor:
    """Emulate ``torch.outer`` of two vectors."""
    return einsum(call, "i,j->ij", input, vec2)


def inner(call: Call, input: Tensor, other: Tensor) -> Tensor:
    """Emulate ``torch.inner``: sums over the last axes, of any shapes."""
    return einsum(call, _of_last_axes(input, other), input, other)


def supports_inner(input: Any, other: Any) -> bool:
    """Tell whether there is an axis to sum over."""
    has_axes = input.dim() > 0 and other.dim() > 0
    return has_axes and supports_einsum(_of_last_axes(input, other), input, other)


def vecdot(call: Call, x: Tensor, y: Tensor, *, dim: int = -1) -> Tensor:
    """Emulate ``torch.linalg.vecdot`` of shapes that broadcast: products and their sum."""
    return reduction.sum(call, elementwise.mul(call.child("products"), x, y), dim)


def chain(call: Call, *matrices: Any) -> Tensor:
    """Emulate ``torch.linalg.multi_dot``, from left to right."""
    several = list(matrices[0]) if isinstance(matrices[0], (list, tuple)) else list(matrices)
    product = several[0]
    for position, matrix in enumerate(several[1:]):
        is_last = position == len(several) - 2
        product = matmul(call if is_last else call.child(f"product{position}"), product, matrix)
    return product


def kronecker(call: Call, input: Tensor, other: Tensor) -> Tensor:
    """Emulate ``torch.kron``: every element of the first times all of the second, any shapes."""
    axes = max(input.dim(), other.dim())
    parts = [x.reshape((1,) * (axes - x.dim()) + x.shape) for x in (input, other)]
    shape = [n * m for n, m in zip(parts[0].shape, parts[1].shape, strict=True)]
    first = parts[0].reshape([size for n in parts[0].shape for size in (n, 1)])
    second = parts[1].reshape([size for n in parts[1].shape for size in (1, n)])
    product = elementwise.mul(call, call.viewed(first, input), call.viewed(second, other))
    return call.viewed(product.reshape(shape), product)


def supports_kronecker(input: Any, other: Any) -> bool:
    """Tell whether kernels have so many axes."""
    return max(input.dim(), other.dim()) <= _MOST_AXES // 2


def addmm(
    call: Call, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """Emulate ``beta * input + alpha * (mat1 @ mat2)``, of a bias and matrices.

    A bias and a matrix that are parameters make one fully connected layer.
    """
    constants = call.state.constants
    is_layer = constants.is_constant(mat2) and constants.is_constant(input) and alpha == 1
    columns = mat2.shape[-1] if mat2.dim() == 2 else 0
    if is_layer and columns and beta and input.numel() == columns:
        bias = input.reshape(-1) if beta == 1 else beta * input.reshape(-1)
        return by_parameter(call, mat1, mat2, lambda weight: weight, (1,), bias)
    return _added(call, matmul, (input, mat1, mat2), beta, alpha)


def addmv(
    call: Call, input: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """Emulate ``beta * input + alpha * (mat @ vec)``, of vectors and a matrix."""
    return _added(call, matmul, (input, mat, vec), beta, alpha)


def baddbmm(
    call: Call, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """Emulate ``beta * input + alpha * (batch1 @ batch2)``, of batches of matrices."""
    return _added(call, matmul, (input, batch1, batch2), beta, alpha)


def addbmm(
    call: Call, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """Emulate ``beta * input + alpha * (batch1 @ batch2).sum(0)``: one matrix product."""

    def product(part: Call, a: Tensor, b: Tensor) -> Tensor:
        return einsum(part, "bij,bjk->ik", a, b)

    return _added(call, product, (input, batch1, batch2), beta, alpha)


def addr(
    call: Call, input: Tensor, vec1: Tensor, vec2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """Emulate ``beta * input + alpha * outer(vec1, vec2)``, of a matrix and vectors."""
    return _added(call, outer, (input, vec1, vec2), beta, alpha)


def supports_addition(input: Any, first: Any, second: Any, **kwargs: Any) -> bool:
    """Tell whether there are three tensors and something to add up."""
    tensors = (input, first, second)
    return all(isinstance(x, Tensor) and x.numel() > 0 for x in tensors) and (
        kwargs.get("alpha", 1) != 0 and not set(kwargs) - {"alpha", "beta"}
    )


def _added(
    call: Call, product: Any, tensors: tuple[Tensor, Tensor, Tensor], beta: float, alpha: float
) -> Tensor:
    """A product of tensors, times ``alpha``, plus ``beta`` times the first tensor."""
    addend, first, second = tensors
    if not beta and alpha == 1:
        return product(call, first, second)
    result = product(call.child("product"), first, second)
    if not beta:
        return elementwise.mul(call, result, alpha)
    if alpha != 1:
        result = elementwise.mul(call.child("alpha"), result, alpha)
    if beta != 1:
        addend = elementwise.mul(call.child("beta"), addend, beta)
    return elementwise.add(call, result, addend)


def trace(call: Call, input: Tensor) -> Tensor:
    """Emulate ``torch.trace`` of a matrix."""
    return einsum(call, "ii->", input)


def _diagonal(call: Call, x: Tensor, names: str) -> tuple[Tensor, str]:
    """A view of an operand with one axis for each name: the diagonal of those that have one."""
    for name in dict.fromkeys(names):
        while names.count(name) > 1:
            first, second = names.index(name), names.rindex(name)
            x = call.viewed(x.diagonal(dim1=first, dim2=second), x)
            names = names[:first] + names[first + 1 : second] + names[second + 1 :] + name
    return x, names


def _product(call: Call, a: Tensor, b: Tensor, names: tuple[str, str, str]) -> Tensor:
    """The sum of products of two operands whose axes have names."""
    first, second, result = names
    a, first = _without(call.child("first"), a, first, second + result)
    b, second = _without(call.child("second"), b, second, first + result)
    summed = [x for x in first if x in second and x not in result]
    if not summed:
        factors = [_aligned(call, x, own, result) for x, own in ((a, first), (b, second))]
        return elementwise.mul(call, *factors)
    if call.state.constants.is_constant(a) and not call.state.constants.is_constant(b):
        a, b, first, second = b, a, second, first
    sizes = dict(zip(second, b.shape, strict=True))
    for name, size in zip(first, a.shape, strict=True):
        sizes[name] = max(size, sizes.get(name, 1))
    batch = [x for x in result if x in first and x in second]
    rows = [x for x in result if x in first and x not in second]
    columns = [x for x in result if x in second and x not in first]
    left = _grouped(call, a, first, (batch, rows, summed), sizes)
    if not batch and call.state.constants.is_constant(b):
        order = [second.index(x) for x in (*summed, *columns)]
        shape, outputs = (left.shape[-1], -1), order[len(summed) :]
        product = by_parameter(call, left[0], b, lambda w: w.permute(order).reshape(shape), outputs)
    else:
        right = _grouped(call, b, second, (batch, summed, columns), sizes)
        product = matmul(call, left, right)
    axes = [*batch, *rows, *columns]
    shaped = product.reshape([sizes[x] for x in axes])
    return call.viewed(shaped.permute([axes.index(x) for x in result]), product)


def _without(call: Call, x: Tensor, names: str, others: str) -> tuple[Tensor, str]:
    """An operand without the axes that nothing else has: their sum; and its names."""
    alone = [position for position, name in enumerate(names) if name not in others]
    if not alone:
        return x, names
    kept_names = "".join(name for name in names if name in others)
    if not call.state.constants.in_program(x):
        return reduction.sum(call, x, tuple(alone)), kept_names
    total = x.sum(tuple(alone))
    return call.viewed(total, x), kept_names


def _aligned(call: Call, x: Tensor, names: str, result: str) -> Tensor:
    """A view of an operand that broadcasts against the result."""
    order = [names.index(name) for name in result if name in names]
    shape = [x.shape[names.index(name)] if name in names else 1 for name in result]
    return call.viewed(x.permute(order).reshape(shape), x)


def _grouped(
    call: Call,
    x: Tensor,
    names: str,
    groups: tuple[Sequence[str], Sequence[str], Sequence[str]],
    sizes: dict[str, int],
) -> Tensor:
    """A view of an operand with one axis for every group of names, three in all."""
    order = [names.index(name) for group in groups for name in group]
    moved = x.permute(order).expand([sizes[name] for group in groups for name in group])
    shape = [prod(sizes[name] for name in group) for group in groups]
    return call.viewed(moved.reshape(shape), x)


def _summed(call: Call, x: Tensor, names: str, result: str) -> Tensor:
    """The sum over the axes of one operand that the result has not, in the result's order."""
    alone = tuple(position for position, name in enumerate(names) if name not in result)
    left = [name for name in names if name in result]
    total = reduction.sum(call, x, alone) if alone else x
    return call.viewed(total.permute([left.index(name) for name in result]), total)


def _labels(equation: str, axes: Sequence[int]) -> tuple[list[str], str]:
    """Names of the axes of the operands and of the result.

    Example:
        >>> _labels("b...i, ij -> b...j", [4, 2])
        (['bABi', 'ij'], 'bABj')
        >>> _labels("ki,jk", [2, 2])
        (['ki', 'jk'], 'ij')
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    free = [x for x in string.ascii_uppercase + string.ascii_lowercase if x not in equation]
    counts = [
        count - len(term.replace("...", "")) if "..." in term else 0
        for term, count in zip(terms, axes, strict=True)
    ]
    names = "".join(free[: max(counts)])
    labels = [
        term.replace("...", names[len(names) - count :])
        for term, count in zip(terms, counts, strict=True)
    ]
    if not arrow:
        once = [x for x in sorted(set(left) - set(".,")) if left.count(x) == 1]
        return labels, names + "".join(once)
    return labels, result.replace("...", names)


def _contraction(a: Tensor, b: Tensor, dims: Any) -> str:
    """The equation of a product over axes that are named, or over as many of the last and first."""
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        dims = (range(a.dim() - dims, a.dim()), range(dims))
    first = list(string.ascii_lowercase[: a.dim()])
    second = list(string.ascii_uppercase[: b.dim()])
    for x, y in zip(*dims, strict=True):
        second[y] = first[x]
    summed = {first[x] for x in dims[0]}
    result = [x for x in (*first, *second) if x not in summed]
    return f"{''.join(first)},{''.join(second)}->{''.join(result)}"


def _of_last_axes(a: Tensor, b: Tensor) -> str:
    """The equation of a product over the last axes."""
    return _contraction(a, b, ([a.dim() - 1], [b.dim() - 1]))


register_operator(
    Operator(
        "einsum",
        torch=("einsum",),
        emulate=einsum,
        supports=supports_einsum,
        forms=(
            Form(("tensordot",), tensordot, supports_tensordot),
            Form(("outer", "ger"), outer),
            Form(("inner",), inner, supports_inner),
            Form(("trace",), trace),
            Form(("dot", "vdot"), matmul),
            Form(("linalg_vecdot",), vecdot),
            Form(("chain_matmul", "linalg_multi_dot"), chain),
            Form(("kron",), kronecker, supports_kronecker),
        ),
        arithmetic="sums, products and matrix products of its operands, from left to right",
    )
)
register_operator(
    Operator(
        "bilinear",
        torch=("bilinear",),
        emulate=bilinear,
        has_weights=True,
        arithmetic="products of both inputs, and a fully connected layer",
    )
)
register_operator(
    Operator(
        "addmm",
        torch=("addmm", "addmm_"),
        emulate=addmm,
        supports=supports_addition,
        forms=(
            Form(("addmv", "addmv_"), addmv, supports_addition),
            Form(("baddbmm", "baddbmm_"), baddbmm, supports_addition),
            Form(("addbmm", "addbmm_"), addbmm, supports_addition),
            Form(("addr", "addr_"), addr, supports_addition),
        ),
        arithmetic="a matrix product and a sum; with parameters one fully connected layer",
    )
)
