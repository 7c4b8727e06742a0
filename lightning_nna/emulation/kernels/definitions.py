r"""Fused kernels as operators of PyTorch, one call each for what every operator does.

On a GPU each function of PyTorch is a launch of some microseconds, whatever it computes. The
operators here are one launch each: Triton kernels on CUDA (:mod:`.triton_kernels`), elsewhere plain
PyTorch (:mod:`.reference`), with the same bits. On a processor each is a pass over memory, if Numba
is there to compile it (:mod:`.compiled`). They are ``torch.ops.lightning_nna.*``; the
functions of this module call them.

They have no gradients: :class:`torch.autograd.Function` calls them forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_nna.emulation.kernels import reference
from lightning_nna.emulation.kernels.library import call, define

#: Roundings of :func:`requantize` by their names in :mod:`.arithmetic.rescaling`.
ROUNDINGS = {
    "real": reference.REAL,
    "reference": reference.REAL,
    "double": reference.DOUBLE,
    "reduced": reference.REDUCED,
    "single": reference.SINGLE,
    "shift": reference.SHIFT,
}

#: Weights that share a scale up to which a program of :func:`quantize_rows` looks at them all.
_ONE_PROGRAM = 2**15

_SCHEMAS = (
    "requantize(Tensor sums, Tensor? scales, Tensor? bias, Tensor? offset, float scale_before, "
    "float scale_after, float out_scale, int rounding, int accumulator_bits, bool saturates, "
    "int bias_bits, int zero_point, int low, int high, bool fused_relu, int inner, bool wide) "
    "-> (Tensor values, Tensor clipped)",
    "quantize(Tensor x, float scale, int low, int high, bool fused_relu) "
    "-> (Tensor values, Tensor clipped, Tensor finite)",
    "largest_of_groups(Tensor weight, int groups) -> Tensor",
    "quantize_rows(Tensor weight, Tensor? largest, int rows_per_scale, int maximum, "
    "bool power_of_two) -> (Tensor stored, Tensor scales, Tensor finite)",
    "raise_scales(Tensor stored, Tensor scales, Tensor bias, float unit, int rows_per_scale, "
    "bool power_of_two) -> (Tensor stored, Tensor scales, Tensor finite)",
    "fold_batch_norm(Tensor stored, Tensor scales, Tensor? layer_bias, Tensor mean, "
    "Tensor variance, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor stored, Tensor scales, Tensor shift, Tensor inverse)",
    "softmax_rows(Tensor x, Tensor table, float scale) -> Tensor",
    "whole_numbers(Tensor x, float scale) -> Tensor",
    "dequantize(Tensor sums, Tensor scales, Tensor? bias, float scale, int inner) -> Tensor",
    "normalize_rows(Tensor x, Tensor? gain, Tensor? shift, Tensor[] tables, float scale, "
    "float[] of_center, float[] of_normalize, float[] of_epsilon, float[] of_gain, "
    "float[] of_shift, float[] of_output, int[] means, int rounding, int groups, int channels, "
    "int low, int high, float out_scale, bool fused_relu) -> (Tensor values, Tensor clipped)",
    "look_up(Tensor x, Tensor table, Tensor? mask_table, float scale, int first) "
    "-> (Tensor values, Tensor clipped)",
    "look_up_pair(Tensor a, Tensor b, Tensor table, Tensor? mask_table, float scale_a, "
    "int first_a, float scale_b, int first_b) -> (Tensor values, Tensor clipped)",
    "centered_integers(Tensor x, float scale, int zero_point) -> Tensor",
)


def requantize(
    sums: Tensor,
    *,
    scale_before: float,
    scale_after: float,
    out_scale: float,
    rounding: str,
    zero_point: int,
    low: int,
    high: int,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
    inner: int = 1,
    accumulator_bits: int = 64,
    saturates: bool = False,
    bias_bits: int = 32,
    fused_relu: bool = False,
    wide: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""Requantize accumulators to the integers of an output, as a kernel rounds and wraps.

    .. math:: y = s\,\mathrm{clip}\Bigl(\mathrm{round}\Bigl((a + o + \mathrm{round}(b / s_c s_b))
              \frac{s_c s_b}{s_a}\Bigr)\Bigr)

    Args:
        sums: Accumulators a, whole numbers below 2^53, int32, int64, float32 or float64, shape
            ``(..., channels, *)`` with ``inner`` elements after the axis of the channels.
        scale_before: Factor :math:`s_b` before the division, most often the input's scale.
        scale_after: Divisor :math:`s_a`, most often the output's scale.
        out_scale: Scale s of the values that are returned.
        rounding: Name among :data:`ROUNDINGS`.
        zero_point: Zero point of the output, which the kernel adds in 32 bits.
        low: Smallest integer less the zero point.
        high: Largest integer less the zero point.
        scales: Factors :math:`s_c`, float32, shape ``(channels,)``; None for 1.
        bias: Real values b, float32, shape ``(channels,)``, or None.
        offset: Whole numbers o, float64 or int64, shape ``(channels,)``, or None.
        inner: Elements after the axis of the channels, 1 for a linear layer.
        accumulator_bits: Width of the accumulator, 16 to 64.
        saturates: Whether a sum beyond that width saturates; otherwise it wraps.
        bias_bits: Width of the integers of the bias, which saturate.
        fused_relu: Whether a ReLU follows, whose backward handles what is clipped at ``low``.
        wide: Whether sums may pass 32 bits where ``rounding`` is ``"double"``: then nothing wraps
            around in the multiplication.

    Returns:
        Real values, float32, and a mask of the clipped elements, bool, both of the shape of
        ``sums``; None for the mask where Python may know that nothing was clipped.

    Example:
        >>> values, clipped = requantize(
        ...     torch.tensor([8.0, 24.0, 9999.0]), scale_before=0.125, scale_after=2.0,
        ...     out_scale=2.0, rounding="double", zero_point=0, low=-128, high=127,
        ... )
        >>> values, clipped
        (tensor([  2.,   4., 254.]), tensor([False, False,  True]))
    """
    return call(
        "requantize",
        sums,
        scales,
        bias,
        offset,
        scale_before,
        scale_after,
        out_scale,
        ROUNDINGS[rounding],
        accumulator_bits,
        saturates,
        bias_bits,
        zero_point,
        low,
        high,
        fused_relu,
        inner,
        wide,
    )


def quantize(
    x: Tensor, *, scale: float, low: int, high: int, fused_relu: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | bool]:
    """Quantize real values: divide in float32, round ties away from zero, clip.

    Args:
        x: Real values, any float dtype and shape; what is not finite counts as 0.
        scale: Step between two integers, positive.
        low: Smallest integer less the zero point.
        high: Largest integer less the zero point.
        fused_relu: Whether a ReLU follows, whose backward handles what is clipped at ``low``.

    Returns:
        Integers times the scale, float32, and a mask of the clipped elements, bool, both of the
        shape of ``x``, or None where Python may know that nothing was clipped; and whether all
        quotients are finite, bool: every element tells of some.

    Example:
        >>> values, clipped, is_finite = quantize(
        ...     torch.tensor([0.75, -1.25, 99.0]), scale=0.5, low=-10, high=10
        ... )
        >>> values, clipped, bool(is_finite)
        (tensor([ 1.0000, -1.5000,  5.0000]), tensor([False, False,  True]), True)
    """
    return call("quantize", x, scale, low, high, fused_relu)


def quantize_rows(
    weight: Tensor, *, rows_per_scale: int, maximum: int, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight by the largest of its values; see :func:`.quantize_weight`.

    Args:
        weight: Real values, any float dtype, shape ``(rows, ...)``; not empty. What is not finite
            counts as 0.
        rows_per_scale: Number of rows that share a scale; divides ``rows``.
        maximum: Largest integer, 127 for 8 bits.
        power_of_two: Whether scales are rounded up to powers of two.

    Returns:
        Integers, int8, of the shape of the weight; scales, float32, shape ``(rows,)``; and whether
        all weights are finite, bool: every element tells of some.

    Example:
        >>> stored, scales, finite = quantize_rows(
        ...     torch.tensor([[127.0, -63.6]]), rows_per_scale=1, maximum=127
        ... )
        >>> stored, scales, finite
        (tensor([[127, -64]], dtype=torch.int8), tensor([1.]), tensor(True))
    """
    groups, largest = weight.shape[0] // rows_per_scale, None
    if weight.numel() > _ONE_PROGRAM * groups:
        largest = call("largest_of_groups", weight, groups)
    return call("quantize_rows", weight, largest, rows_per_scale, maximum, power_of_two)


def raise_scales(
    stored: Tensor,
    scales: Tensor,
    bias: Tensor,
    *,
    unit: float,
    rows_per_scale: int,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Raise the scales of a weight that cannot hold a bias; see :func:`.with_scales_of_at_least`.

    Args:
        stored: Integers of the weight, int8, shape ``(rows, ...)``; not empty.
        scales: Scales of the rows, float32, shape ``(rows,)``.
        bias: Real values, any float dtype, shape ``(rows,)``; what is not finite counts as 0.
        unit: Divisor of the bias that gives the smallest scale.
        rows_per_scale: Number of rows that share a scale; divides ``rows``.
        power_of_two: Whether scales are rounded up to powers of two.

    Returns:
        Integers and scales of the raised weight, and whether all biases are finite, bool, shape
        ``()``.

    Example:
        >>> stored, scales, finite = raise_scales(
        ...     torch.tensor([[100], [7]], dtype=torch.int8), torch.ones(2),
        ...     torch.tensor([1.0, 4096.0]), unit=512.0, rows_per_scale=1,
        ... )
        >>> stored.flatten(), scales, finite
        (tensor([100,   0], dtype=torch.int8), tensor([1., 8.]), tensor(True))
    """
    return call("raise_scales", stored, scales, bias, unit, rows_per_scale, power_of_two)


def fold_batch_norm(
    stored: Tensor,
    scales: Tensor,
    layer_bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fold a batch norm into the weight of the layer before it; see :mod:`.batch_norm`.

    Args:
        stored: Integers of the weight, int8, shape ``(channels, ...)``; not empty.
        scales: Scales of the weight, float32, shape ``(channels,)``, as all that follow.
        layer_bias: Bias of the layer, or None.
        mean: Mean of the layer's result.
        variance: Its variance.
        weight: Gain of the norm, or None.
        bias: Shift of the norm, or None.
        eps: Added to the variance.

    Returns:
        Integers with the sign of the norm's factor; scales with its size, at least 2^-60; the
        shift, which is the bias of the folded layer; and one over the root of the variance.

    Example:
        >>> one = torch.ones(1)
        >>> fold_batch_norm(
        ...     torch.tensor([[5]], dtype=torch.int8), one, None, 3 * one, 4 * one, -one, None,
        ...     eps=0.0,
        ... )
        (tensor([[-5]], dtype=torch.int8), tensor([0.5000]), tensor([1.5000]), tensor([0.5000]))
    """
    return call("fold_batch_norm", stored, scales, layer_bias, mean, variance, weight, bias, eps)


def softmax_rows(x: Tensor, table: Tensor, *, scale: float) -> Tensor:
    """Compute the softmax of 8-bit rows as the fixed-point kernel does.

    Args:
        x: Integers times their scale, float32, shape ``(rows, columns)``.
        table: Exponentials of the differences 0 to -255, int64, see :func:`.exp_table`.
        scale: Scale of ``x``.

    Returns:
        Probabilities in steps of 1/256, float32, of the shape of ``x``.
    """
    return call("softmax_rows", x, table, scale)


def whole_numbers(x: Tensor, *, scale: float) -> Tensor:
    """Return the integers of an activation, less the zero point.

    Args:
        x: Integers times their scale, float32, any shape.
        scale: Scale of ``x``.

    Returns:
        float32, of the shape of ``x``.

    Example:
        >>> whole_numbers(torch.tensor([0.5, 64.0]), scale=0.5)
        tensor([  1., 128.])
    """
    return call("whole_numbers", x, scale)


def dequantize(
    sums: Tensor, scales: Tensor, bias: Tensor | None, *, scale: float, inner: int
) -> Tensor:
    """Return the real values that the sums of a layer stand for.

    Args:
        sums: Accumulators, whole numbers, float32 or float64, shape ``(..., channels, *)`` with
            ``inner`` elements after the axis of the channels.
        scales: Scales of the weight, float32, shape ``(channels,)``.
        bias: Real values that are added, float32, shape ``(channels,)``, or None.
        scale: Scale of the input.
        inner: Elements after the axis of the channels.

    Returns:
        float32, of the shape of ``sums``.

    Example:
        >>> dequantize(torch.tensor([[3.0], [5.0]]), torch.ones(2), None, scale=0.5, inner=1)
        tensor([[1.5000],
                [2.5000]])
    """
    return call("dequantize", sums, scales, bias, scale, inner)


@dataclass(frozen=True)
class Normalization:
    """Factors of the 16-bit instructions that a row goes through in a normalization.

    Args:
        scale: Scale of the rows.
        rounding: Name among :data:`ROUNDINGS`, of all instructions.
        normalize: Factors of square, variance (by the number of columns) and product; six of them
            where rows are normalized twice.
        means: Mantissa and exponent of each mean in their order, where the rounding is
            ``"double"``: these have the number of columns in the multiplier.
        center: Factor of the mean, then those of the row, the mean and their difference; empty
            where no mean is taken off.
        epsilon: The integer that is added to the first variance, then the factors of the variance,
            the integer and their sum; empty for none.
        gain: Scale of the gain and the factor of the product; empty for none.
        shift: Scale of the shift, then the factors of the row, the shift and their sum; empty for
            none.
        output: Factor to the output's scale; empty for the same scale.
    """

    scale: float
    rounding: str
    normalize: Sequence[float]
    means: Sequence[int]
    center: Sequence[float] = ()
    epsilon: Sequence[float] = ()
    gain: Sequence[float] = ()
    shift: Sequence[float] = ()
    output: Sequence[float] = ()


def normalize_rows(
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    tables: list[Tensor],
    factors: Normalization,
    *,
    groups: int,
    channels: int,
    low: int,
    high: int,
    out_scale: float,
    fused_relu: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Normalize rows as the sequence of 16-bit instructions does; see :mod:`.fused_normalization`.

    Args:
        x: Integers times their scale, float32, shape ``(rows, columns)``; at most 65,535 columns.
        gain: Real values of the gains, float32, ``groups * channels`` of them, or None.
        shift: Real values of the shifts, likewise.
        tables: The inverse square root of each variance: integers for all that are not negative,
            float32, or those at the ends of segments, int64, with straight lines between.
        factors: Factors of the instructions.
        groups: Rows after which gains and shifts repeat themselves.
        channels: Channels of a row, which have one gain each; divides the columns.
        low: Smallest integer of the output, less the zero point.
        high: Largest integer less the zero point.
        out_scale: Scale of the output.
        fused_relu: Whether a ReLU follows, whose backward handles what is clipped at ``low``.

    Returns:
        Real values, float32, and a mask of the clipped elements, bool, both of the shape of ``x``.
    """
    return call(
        "normalize_rows",
        x,
        gain,
        shift,
        tables,
        factors.scale,
        factors.center,
        factors.normalize,
        factors.epsilon,
        factors.gain,
        factors.shift,
        factors.output,
        factors.means,
        ROUNDINGS[factors.rounding],
        groups,
        channels,
        low,
        high,
        out_scale,
        fused_relu,
    )


def look_up(
    x: Tensor, table: Tensor, mask_table: Tensor | None = None, *, scale: float, first: int
) -> tuple[Tensor, Tensor]:
    """Look up the entries of a table for the integers of an activation.

    Args:
        x: Integers times their scale, float32, any shape.
        table: Entries, float32, one axis.
        mask_table: Whether entries were clipped, bool, one axis; or None.
        scale: Scale of ``x``.
        first: Integer, less the zero point, of the first entry.

    Returns:
        Entries, float32, of the shape of ``x``; and those of the mask, bool, of the same shape, or
        an empty tensor where there is none.

    Example:
        >>> look_up(torch.tensor([0.5, -0.5]), torch.arange(3.0), scale=0.5, first=-1)
        (tensor([2., 0.]), tensor([], dtype=torch.bool))
    """
    return call("look_up", x, table, mask_table, scale, first)


def look_up_pair(
    a: Tensor,
    b: Tensor,
    table: Tensor,
    mask_table: Tensor | None = None,
    *,
    scale_a: float,
    first_a: int,
    scale_b: float,
    first_b: int,
) -> tuple[Tensor, Tensor]:
    """Look up the entries of a table for pairs of 8-bit integers.

    Args:
        a: Integers times their scale, float32; of 256 entries each integer has its own.
        b: Integers times their scale, float32, of a shape that broadcasts with that of ``a``.
        table: Entries, float32, shape ``(65536,)``.
        mask_table: Whether entries were clipped, bool, one axis; or None.
        scale_a: Scale of ``a``.
        first_a: Integer of ``a``, less the zero point, of the first entry.
        scale_b: Scale of ``b``.
        first_b: Integer of ``b``, less the zero point, of the first entry.

    Returns:
        Entries, float32, of the shape that both broadcast to; and those of the mask, bool, of the
        same shape, or an empty tensor where there is none.

    Example:
        >>> look_up_pair(
        ...     torch.tensor([[1.0], [0.0]]), torch.tensor([1.0, 2.0]), torch.arange(65536.0),
        ...     scale_a=1.0, first_a=0, scale_b=0.5, first_b=-1,
        ... )
        (tensor([[259., 261.],
                [  3.,   5.]]), tensor([], dtype=torch.bool))
    """
    return call("look_up_pair", a, b, table, mask_table, scale_a, first_a, scale_b, first_b)


def centered_integers(x: Tensor, *, scale: float, zero_point: int) -> Tensor:
    """Return the bytes of an activation: its integers with their zero point.

    Args:
        x: Integers less the zero point times their scale, float32, any shape.
        scale: Scale of ``x``.
        zero_point: Number that is added.

    Returns:
        int8, of the shape of ``x``.

    Example:
        >>> centered_integers(torch.tensor([0.5, 64.0]), scale=0.5, zero_point=-1)
        tensor([  0, 127], dtype=torch.int8)
    """
    return call("centered_integers", x, scale, zero_point)


# Modules of the Triton kernels that are not in ``triton_kernels``.
_MODULES = {
    "normalize_rows": "triton_normalization",
    "fold_batch_norm": "triton_layers",
    "softmax_rows": "triton_layers",
    "dequantize": "triton_layers",
    "whole_numbers": "triton_layers",
}
for _schema in _SCHEMAS:
    define(_schema, reference, _MODULES.get(_schema.partition("(")[0], "triton_kernels"))
