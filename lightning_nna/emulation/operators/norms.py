r"""Norms of vectors, variances, and vectors of unit length.

With :math:`s = \sum_i x_i^2` (the squared deviations for a variance), in 16 bits,

.. math:: \lVert x \rVert = s \cdot s^{-1/2}, \qquad
          \frac{x}{\lVert x \rVert} = x \cdot s^{-1/2}

The inverse square root is the interpolated table of layer normalization, which cannot follow sums
below 1/128 of the largest. Where calibration has seen such, it is taken once more, of what should
be 1 (see :mod:`.normalization`). The cosine of two vectors is the product of their unit vectors.

Norms of order 1 and of infinite order are a sum, the largest and the smallest of magnitudes. A unit
vector of these is a quotient, whose reciprocal is a table of 8 bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.operators import (
    clamping,
    division,
    elementary_kernels,
    elementwise,
    reduction,
)
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.composition import compose
from lightning_nna.emulation.operators.driver import gives_float32
from lightning_nna.emulation.operators.fused_normalization import BLIND_STEPS, spreads_widely
from lightning_nna.emulation.operators.normalization import inverse_square_root
from lightning_nna.emulation.operators.record import Form, Operator, register_operator
from lightning_nna.emulation.program import Activation, activation
from lightning_nna.emulation.ranges import PENDING

Axes = int | tuple[int, ...] | list[int] | None
# Orders of norms that magnitudes alone decide.
_OF_MAGNITUDES = (1, math.inf, -math.inf)
_COUNT = "write (x != 0).float().sum(dim)"


def var(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Emulate ``torch.var`` over axes of any shape."""
    return _spread(call, torch.var, False, input, *_moments(*args, **kwargs))


def std(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Emulate ``torch.std`` over axes of any shape."""
    return _spread(call, torch.std, True, input, *_moments(*args, **kwargs))


def var_mean(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Emulate ``torch.var_mean`` over axes of any shape."""
    axes, correction, keepdim = _moments(*args, **kwargs)
    mean = reduction.mean(call.child("mean"), input, axes, keepdim)
    return _spread(call, torch.var, False, input, axes, correction, keepdim), mean


def std_mean(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Emulate ``torch.std_mean`` over axes of any shape."""
    axes, correction, keepdim = _moments(*args, **kwargs)
    mean = reduction.mean(call.child("mean"), input, axes, keepdim)
    return _spread(call, torch.std, True, input, axes, correction, keepdim), mean


def supports_moments(input: Any, *args: Any, **kwargs: Any) -> bool:
    """Tell whether there are more elements than the correction takes off."""
    if input.dim() == 0 or not input.numel() or kwargs.get("out") is not None:
        return False
    axes, correction, _ = _moments(*args, **kwargs)
    return _count(input, axes) > correction


def norm(
    call: Call,
    input: Tensor,
    p: Any = 2,
    dim: Axes = None,
    keepdim: bool = False,
    out: None = None,
    dtype: None = None,
) -> Tensor:
    """Emulate ``torch.norm`` and ``torch.linalg.vector_norm`` of any shape."""
    axes = _named(dim)
    if p in _OF_MAGNITUDES:
        return _of_magnitudes(call, input, p, axes, keepdim)

    def in_float(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, 2, axes, keepdim)

    def steps(wide: Call, x: Tensor) -> Tensor:
        square = elementwise.mul(wide.child("square"), x, x)
        return _root(wide, reduction.sum(wide.child("total"), square, axes, keepdim), "total")

    return compose(call, [call.operand(input, "input")], in_float, steps)


def vector_norm(call: Call, x: Tensor, ord: Any = 2, *args: Any, **kwargs: Any) -> Tensor:
    """Emulate ``torch.linalg.vector_norm`` of any shape."""
    return norm(call, x, ord, *args, **kwargs)


def linalg_norm(call: Call, *args: Any, **kwargs: Any) -> Tensor:
    """Emulate ``torch.linalg.norm`` of vectors of any shape."""
    return norm(call, *_of_linalg(*args, **kwargs))


def supports_norm(
    input: Any,
    p: Any = "fro",
    dim: Axes = None,
    keepdim: bool = False,
    out: Any = None,
    dtype: Any = None,
) -> bool | str:
    """Tell whether it is a norm of order 1, 2 or infinity of something, in float32."""
    if p == 0:
        return _COUNT
    plain = p in ("fro", 2, None, *_OF_MAGNITUDES) and out is None
    return plain and input.dim() > 0 and input.numel() > 0 and gives_float32(dtype)


def supports_vector_norm(x: Any, ord: Any = 2, *args: Any, **kwargs: Any) -> bool | str:
    """Tell whether it is a norm of order 1, 2 or infinity of something, in float32."""
    return supports_norm(x, ord, *args, **kwargs)


def supports_linalg_norm(*args: Any, **kwargs: Any) -> bool | str:
    """Tell whether it is a norm of vectors; of a matrix, the same order is another."""
    x, order, dim, *rest = _of_linalg(*args, **kwargs)
    axes = x.dim() if dim is None else 1 if isinstance(dim, int) else len(dim)
    is_vector = order in (None, "fro") or axes == 1
    return is_vector and supports_norm(x, order, dim, *rest)


def normalize(
    call: Call,
    input: Tensor,
    p: float = 2.0,
    dim: Axes = 1,
    eps: float = 1e-12,
    out: None = None,
) -> Tensor:
    """Emulate ``F.normalize`` of any shape."""
    if p in _OF_MAGNITUDES:
        return _divided_by_magnitudes(call, input, p, _named(dim), eps)
    x = call.operand(input, "input")

    def in_float(values: Tensor) -> Tensor:
        return F.normalize(values, 2.0, dim, eps)  # type: ignore[arg-type]

    def gradient(values: Tensor) -> Tensor:
        # A vector that is rounded to zeros has a gradient of 1 / eps in float.
        return F.normalize(values, 2.0, dim, max(eps, x.qparams.scale))  # type: ignore[arg-type]

    def steps(wide: Call, values: Tensor) -> Tensor:
        return _unit(wide, values, dim, eps)

    return compose(call, [x], in_float, steps, gradient=gradient)


def supports_normalize(
    input: Any, p: float = 2.0, dim: Axes = 1, eps: float = 1e-12, out: Any = None
) -> bool:
    """Tell whether vectors are divided by a norm of order 1, 2 or infinity."""
    has_norm = p == 2 or p in (1, math.inf)
    return has_norm and out is None and input.dim() > 0 and input.numel() > 0


def cosine_similarity(
    call: Call, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8
) -> Tensor:
    """Emulate ``F.cosine_similarity`` of shapes that broadcast."""
    operands = [call.operand(x1, "x1"), call.operand(x2, "x2")]

    def in_float(a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(a, b, dim, eps)

    def gradient(a: Tensor, b: Tensor) -> Tensor:
        coarser = max(eps, *(operand.qparams.scale for operand in operands))
        return F.cosine_similarity(a, b, dim, coarser)

    axes = max(x1.dim(), x2.dim())

    def steps(wide: Call, a: Tensor, b: Tensor) -> Tensor:
        # Axes count from the end: shapes that broadcast may have fewer.
        axis = dim - axes if dim >= 0 else dim
        units = [
            _unit(wide.child(f"unit{position}"), x, axis, eps) if -axis <= x.dim() else x
            for position, x in enumerate((a, b))
        ]
        product = elementwise.mul(wide.child("product"), *units)
        return reduction.sum(wide.child("cosine"), product, axis)

    return compose(call, operands, in_float, steps, gradient=gradient)


def supports_cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> bool:
    """Tell whether both have the axis of the vectors."""
    axes = max(x1.dim(), x2.dim())
    axis = dim - axes if dim >= 0 else dim
    same = axes > 0 and all(-axis <= x.dim() for x in (x1, x2)) and x1.shape[axis] == x2.shape[axis]
    return same and x1.numel() > 0 and x2.numel() > 0


def _of_magnitudes(call: Call, x: Tensor, order: float, axes: Axes, keepdim: bool) -> Tensor:
    """A norm of order 1 or infinity over axes of any shape."""
    every = tuple(range(x.dim())) if axes is None else axes
    magnitudes = elementary_kernels.absolute(call.child("absolute"), x)
    if order == 1:
        return reduction.sum(call, magnitudes, every, keepdim)
    extreme = reduction.amax if order > 0 else reduction.amin
    return extreme(call, magnitudes, every, keepdim)


def _divided_by_magnitudes(call: Call, x: Tensor, order: float, axes: Axes, eps: float) -> Tensor:
    """Vectors divided by their norm, or by 1/255 of the largest where they are shorter.

    The reciprocal of less would take the whole range of its table.
    """
    length = _of_magnitudes(call.child("length"), x, order, axes, True)
    qparams = call.state.qparams_of(length)
    if call.observing or qparams is None:
        largest = float(length.detach().max())
    else:
        largest = qparams.bounds[1] * qparams.scale
    bounded = clamping.clamp_min(call.child("shortest"), length, max(eps, largest / 255))
    return division.div(call, x, bounded)


def _of_linalg(
    *args: Any,
    ord: Any = None,
    dim: Axes = None,
    keepdim: bool = False,
    out: Any = None,
    dtype: Any = None,
    **named: Any,
) -> tuple[Any, ...]:
    """Arguments of ``torch.linalg.norm`` in the order of ``torch.norm``; its matrix is ``A``."""
    matrix, *rest = *named.values(), *args
    return matrix, *rest, *(ord, dim, keepdim)[len(rest) :], out, dtype


def _moments(
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
    axis: Axes = None,
    keepdims: bool = False,
    out: None = None,
) -> tuple[Axes, float, bool]:
    """Axes, correction and whether axes stay, from any signature of torch's.

    Example:
        >>> _moments(False), _moments(1, True), _moments((0, 1), correction=2)
        ((None, 0, False), (1, 1, False), ((0, 1), 2, False))
    """
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    if correction is None:
        correction = 1 if unbiased is None else int(unbiased)
    return _named(dim if axis is None else axis), correction, keepdim or keepdims


def _named(dim: Axes) -> Axes:
    """Axes by their numbers; None for all."""
    return dim if isinstance(dim, int) or dim else None


def _count(x: Tensor, axes: Axes) -> int:
    """Number of elements along axes."""
    named = (axes,) if isinstance(axes, int) else axes or range(x.dim())
    count = 1
    for axis in named:
        count *= x.shape[axis]
    return count


def _spread(
    call: Call,
    function: Any,
    is_root: bool,
    input: Tensor,
    axes: Axes,
    correction: float,
    keepdim: bool,
) -> Tensor:
    """A variance, or its root."""
    count = _count(input, axes)

    def in_float(x: Tensor) -> Tensor:
        result: Tensor = function(x, dim=axes, correction=correction, keepdim=keepdim)
        return result

    def steps(wide: Call, x: Tensor) -> Tensor:
        mean = reduction.mean(wide.child("mean"), x, axes, keepdim=True)
        deviation = elementwise.sub(wide.child("deviation"), x, mean)
        square = elementwise.mul(wide.child("square"), deviation, deviation)
        part = wide.child("variance")
        factor = count / (count - correction)
        variance = reduction.multiplied_mean(part, square, axes, keepdim, factor)
        return _root(wide, variance, "variance") if is_root else variance

    return compose(call, [call.operand(input, "input")], in_float, steps)


def _root(call: Call, total: Tensor, name: str) -> Tensor:
    """Square root of what is not negative, the output of the part ``name``."""
    # The root of 9 is 9 / 3. Where the table has 1/2 and not 1/3: 9 / 4 should be 1, and its root
    # is 3/2; so 9 * 1/2 is divided by that.
    inverse = inverse_square_root(call.child("inverse"), total)
    root = elementwise.mul(call.child("root"), total, inverse)
    if call.observing or spreads_widely(call.child(name)):
        unit = elementwise.mul(call.child("again/unit"), root, inverse)
        inverse = inverse_square_root(call.child("again/inverse"), unit)
        root = elementwise.mul(call.child("again/root"), root, inverse)
    return root


def _unit(call: Call, x: Tensor, axes: Axes, eps: float) -> Tensor:
    """Vectors along axes divided by their length, or by ``eps`` where they are shorter."""
    result, shortest = _divided(call, x, axes, eps)
    if call.observing or (not shortest and spreads_widely(call.child("total"))):
        result, _ = _divided(call.child("again"), result, axes, 0.0)
    return result


def _divided(call: Call, x: Tensor, axes: Axes, eps: float) -> tuple[Tensor, bool]:
    """Vectors divided by their length, and whether ``eps`` is what the table can follow."""
    square = elementwise.mul(call.child("square"), x, x)
    total = reduction.sum(call.child("total"), square, axes, keepdim=True)
    total, is_bounded = _at_least(call.child("shortest"), total, eps**2)
    inverse = inverse_square_root(call.child("inverse"), total)
    return elementwise.mul(call.child("unit"), x, inverse), is_bounded


def _at_least(call: Call, x: Tensor, bound: float) -> tuple[Tensor, bool]:
    """The maximum of a tensor and a number, unless the table takes such small ones for equal."""
    if call.observing:
        return call.with_qparams(x.clamp_min(bound), PENDING), False
    v = call.operand(x, "input")
    steps = min(round(bound / v.qparams.scale), v.qparams.bounds[1])
    if steps < BLIND_STEPS:
        return x, False
    smallest = torch.full((), steps * v.qparams.scale, device=x.device)
    result = torch.maximum(v.value, smallest)
    if call.recording:
        constant = activation(smallest, v.qparams, constant=True)
        call.record("MAXIMUM", [v.stored(), constant], [Activation(result, v.qparams).stored()])
    return call.with_qparams(result, v.qparams), True


register_operator(
    Operator(
        "norm",
        torch=("norm",),
        emulate=norm,
        supports=supports_norm,
        forms=(
            Form(("linalg_vector_norm",), vector_norm, supports_vector_norm),
            Form(("linalg_norm",), linalg_norm, supports_linalg_norm),
        ),
        arithmetic="products, a sum and an interpolated inverse square root in 16 bits; orders 1 "
        "and infinity: a sum or an extreme of magnitudes",
    )
)
register_operator(
    Operator(
        "normalize",
        torch=("normalize",),
        emulate=normalize,
        supports=supports_normalize,
        arithmetic="products, a sum and an interpolated inverse square root in 16 bits; orders 1 "
        "and infinity: a sum or an extreme of magnitudes",
    )
)
register_operator(
    Operator(
        "cosine_similarity",
        torch=("cosine_similarity",),
        emulate=cosine_similarity,
        supports=supports_cosine_similarity,
        arithmetic="both vectors normalized, a product and a sum, in 16 bits",
    )
)
for _name, _emulate, _with_mean in (("var", var, var_mean), ("std", std, std_mean)):
    register_operator(
        Operator(
            _name,
            torch=(_name,),
            emulate=_emulate,
            supports=supports_moments,
            forms=(Form((f"{_name}_mean",), _with_mean, supports_moments),),
            arithmetic="means, products and an interpolated inverse square root in 16 bits"
            if _name == "std"
            else "means and products in 16 bits",
        )
    )
