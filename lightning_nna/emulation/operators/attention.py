r"""Attention as a sequence of the chip's instructions.

.. math:: \mathrm{softmax}\Bigl(\frac{q k^\top}{\sqrt d} + b\Bigr) v

Projections are fully connected layers, each with a grid of its own; the two products are batch
matrix products. The factor :math:`1 / \sqrt d` goes into the query, since not every runtime has a
softmax with a factor: into the scales of its projection, or, where the query comes from elsewhere,
into a product with the integer 1 of that scale, onto a grid with that scale, which changes no
integer. Masks are those of :mod:`.attention_mask`.

Reference:
    Vaswani et al., "Attention is all you need", NeurIPS 2017, arXiv 1706.03762.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight, round_significands
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators import concatenation, elementwise
from lightning_nna.emulation.operators.activation import dropout
from lightning_nna.emulation.operators.attention_mask import Mask, SeenMasks, masked_scores
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.linear import fully_connected, linear
from lightning_nna.emulation.operators.matmul import matmul
from lightning_nna.emulation.operators.record import (
    Arguments,
    Form,
    Operator,
    register_operator,
)
from lightning_nna.emulation.operators.reduction import mean_onto
from lightning_nna.emulation.operators.softmax import softmax
from lightning_nna.emulation.program import Activation, Stored
from lightning_nna.emulation.ranges import PENDING, round_significand

# The rows of a weight that is one layer's alone.
_ALL = slice(None)


def scaled_dot_product_attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Emulate ``F.scaled_dot_product_attention``.

    Queries have the shape ``(..., n, k)``, keys ``(..., m, k)`` and values ``(..., m, v)``.
    """
    if is_causal:
        mask = Mask.causal(query.shape[-2], key.shape[-2], query.device)
    else:
        mask = Mask.of(
            [attn_mask], constant=call.state.constants.is_constant, seen=SeenMasks.at(call)
        )
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if factor < 0:
        query, factor = elementwise.neg(call.child("negative"), query), -factor
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        return _attend_in_groups(call, (query, key, value), mask, factor, dropout_p)
    return _attend(call, (query, key, value), mask, factor, dropout_p)[0]


def supports_scaled_dot_product_attention(
    query: Tensor, *args: Any, scale: float | None = None, **kwargs: Any
) -> bool:
    """Tell whether the factor is not 0, for queries of at most five axes."""
    return query.dim() <= 5 and scale != 0


def undropped_attention(*args: Any, **kwargs: Any) -> Arguments | None:
    """Return the arguments of ``F.scaled_dot_product_attention`` without dropout, if it has any."""
    return _undropped(scaled_dot_product_attention, args, kwargs)


def multi_head_attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Emulate ``F.multi_head_attention_forward``; ``is_causal`` only hints at the mask."""
    appended = int(bias_k is not None) + int(add_zero_attn)
    if appended:
        attn_mask, key_padding_mask = (
            None if x is None else call.viewed(F.pad(x, (0, appended)), x)
            for x in (attn_mask, key_padding_mask)
        )
    mask = Mask.of(
        [_over_heads(attn_mask, num_heads), _over_keys(key_padding_mask)],
        true_is_masked=True,
        constant=call.state.constants.is_constant,
        seen=SeenMasks.at(call),
    )
    weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    packed = None if use_separate_proj_weight else in_proj_weight
    factor = 1 / math.sqrt(query.shape[-1] // num_heads)
    projected_factor = factor if _changes_scales_alone(call, factor) else 1.0
    projected = _project(call, (query, key, value), packed, weights, in_proj_bias, projected_factor)
    rest = zip(("key", "value"), projected[1:], (bias_k, bias_v), strict=True)
    projected[1:] = [_appended(call, *each, add_zero_attn) for each in rest]
    heads = tuple(call.viewed(_split_heads(x, num_heads), x) for x in projected)
    joined, probabilities = _attend(
        call, heads, mask, factor / projected_factor, dropout_p if training else 0.0
    )
    joined = call.viewed(joined.permute(2, 0, 1, 3).flatten(2), joined)
    if query.dim() == 2:
        joined = call.viewed(joined.squeeze(1), joined)
    result = linear(call.child("out_projection"), joined, out_proj_weight, out_proj_bias)
    if not need_weights:
        return result, None
    if average_attn_weights:
        probabilities = _average(call.child("average"), probabilities)
    if query.dim() == 2:
        probabilities = call.viewed(probabilities.squeeze(0), probabilities)
    return result, probabilities


def supports_multi_head_attention(*args: Any, **kwargs: Any) -> bool:
    """Tell whether no keys and values come from outside."""
    return kwargs.get("static_k") is None and kwargs.get("static_v") is None


def undropped_multi_head_attention(*args: Any, **kwargs: Any) -> Arguments | None:
    """Return the arguments of ``F.multi_head_attention_forward`` without dropout, if it has any."""
    return _undropped(multi_head_attention, args, kwargs)


def _undropped(
    emulate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    """Set ``dropout_p`` to 0 where it stands, or by name; None where nothing is dropped."""
    signature = inspect.signature(emulate)
    values = signature.bind(None, *args, **kwargs).arguments
    if not values.get("dropout_p") or not values.get("training", True):
        return None
    # Arguments by name stay so: torch takes some of them in no other way.
    place = list(signature.parameters).index("dropout_p") - 1
    if place < len(args):
        return (*args[:place], 0.0, *args[place + 1 :]), kwargs
    return args, {**kwargs, "dropout_p": 0.0}


def _appended(call: Call, name: str, x: Tensor, bias: Tensor | None, zeros: bool) -> Tensor:
    """Keys or values ``(S, N, E)`` or ``(S, E)`` with a parameter, and zeros, at the end."""
    if bias is not None:
        last = call.viewed(bias.reshape(-1).expand(1, *x.shape[1:]), bias)
        x = concatenation.concatenate(call.child(f"{name}_bias"), [x, last])
    if not zeros:
        return x
    return call.viewed(F.pad(x, (*(0, 0) * (x.dim() - 1), 0, 1)), x)


def _attend_in_groups(
    call: Call,
    operands: tuple[Tensor, ...],
    mask: Mask,
    factor: float,
    dropout_p: float,
) -> Tensor:
    """Attention of several queries to one key: queries of a group are rows of one matrix.

    With 6 heads of queries ``(N, 6, T, d)`` and 2 of keys, the queries are ``(N, 2, 3 T, d)``.
    """
    query, key, value = operands
    heads = key.shape[-3]
    group = query.shape[-3] // heads
    if group * heads != query.shape[-3]:
        raise ValueError(f"{query.shape[-3]} heads of queries are no multiple of {heads} of keys")
    rows = query.unflatten(-3, (heads, group)).flatten(-3, -2)
    keep, bias = (
        None if x is None else call.viewed(_over_groups(x, heads, group), x)
        for x in (mask.keep, mask.bias)
    )
    grouped = Mask(keep, bias, mask.constant)
    several = call.viewed(rows, query), key, value
    joined, _ = _attend(call, several, grouped, factor, dropout_p)
    shaped = joined.unflatten(-2, (group, -1)).flatten(-4, -3)
    return call.viewed(shaped, joined)


def _over_groups(mask: Tensor, heads: int, group: int) -> Tensor:
    """A mask ``(..., T, S)`` of all heads of queries for the rows of groups, ``(..., g T, S)``."""
    if mask.dim() >= 3 and mask.shape[-3] == heads * group:
        return mask.unflatten(-3, (heads, group)).flatten(-3, -2)
    if mask.shape[-2] == 1:
        return mask
    several = mask.unsqueeze(-3)
    return several.expand(*several.shape[:-3], group, -1, -1).flatten(-3, -2)


def _attend(
    call: Call,
    operands: tuple[Tensor, ...],
    mask: Mask,
    factor: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The weighted values, and the weights: ``(*batch, T, d)`` and ``(*batch, T, S)``."""
    query, key, value = operands
    if factor != 1:
        query = _scaled(call.child("scale"), query, factor)
    scores = masked_scores(call, query, call.viewed(key.mT, key), mask)
    probabilities = softmax(call.child("softmax"), scores, -1)
    if dropout_p > 0:
        probabilities = dropout(call, probabilities, dropout_p)
    return matmul(call.child("values"), probabilities, value), probabilities


def _scaled(call: Call, query: Tensor, factor: float) -> Tensor:
    """The query on a grid ``factor`` times as fine, with the same integers where it has such one.

    The grid's scale is rounded to the significand of every activation's. In 8 bits that is the
    factor to 16 bits; in 16 bits it would be too coarse, except for powers of two.
    """
    if not _changes_scales_alone(call, factor, call.bits):
        return elementwise.mul(call, query, factor)
    x = call.operand(query, "input")
    if call.observing:
        return call.with_qparams(query * factor, PENDING)
    finer = replace(x.qparams, scale=round_significand(x.qparams.scale * factor, call.bits))
    with float32_arithmetic(query):
        # By a tensor: a GPU would multiply by the inverse of a number.
        integers = x.value / torch.full((), x.qparams.scale, device=query.device)
        result = integers * finer.scale
    if call.recording:
        y = Activation(result, finer).stored()
        unit = float(np.float32(finer.scale) / np.float32(x.qparams.scale))
        one = Stored(torch.ones((), dtype=torch.int64), y.dtype, unit, constant=True)
        call.record("MUL", [x.stored(), one], [y])
    return call.with_qparams(result, finer)


def _changes_scales_alone(call: Call, factor: float, bits: int = 8) -> bool:
    """Tell whether a factor can go into scales whose significands are those of a width."""
    is_power_of_two = math.frexp(factor)[0] == 0.5
    return is_power_of_two or (bits == 8 and not call.state.spec.power_of_two_scales)


def _project(
    call: Call,
    inputs: tuple[Tensor, ...],
    packed: Tensor | None,
    separate: tuple[Tensor | None, ...],
    bias: Tensor | None,
    factor: float,
) -> list[Tensor]:
    """Query, key and value of all heads, each by a fully connected layer.

    The query comes out multiplied by ``factor``.
    """
    names = ("query", "key", "value")
    # One that comes in several roles is quantized once.
    operands = {id(x): call.operand(x, name) for x, name in zip(inputs, names, strict=True)}
    weights = separate if packed is None else packed.chunk(3)
    trained = _trainable(call, separate, packed)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    projected = []
    for index, (x, weight, shift) in enumerate(zip(inputs, weights, biases, strict=True)):
        assert weight is not None, "torch asks for three weights or a packed one"
        part = call.child(f"{names[index]}_projection")
        shared = weight if packed is None else packed
        rows = slice(index * len(weight), (index + 1) * len(weight)) if packed is not None else _ALL
        layer = (weight, trained[index], shift)
        multiplied = 1.0 if index else factor
        projected.append(_projection(part, operands[id(x)], layer, shared, rows, multiplied))
    return projected


def _trainable(
    call: Call, separate: tuple[Tensor | None, ...], packed: Tensor | None
) -> Sequence[Tensor | None]:
    """Tensors that the gradients of the projections go to; a packed weight is asked for once."""
    per_channel = call.state.spec.weight_granularity == "per_channel"
    if call.observing:
        return separate
    if packed is not None:
        return call.state.trainable(packed, 1 if per_channel else len(packed) // 3).chunk(3)
    return [
        None if w is None else call.state.trainable(w, 1 if per_channel else len(w))
        for w in separate
    ]


def _projection(
    call: Call,
    x: Activation,
    layer: tuple[Tensor, Tensor | None, Tensor | None],
    shared: Tensor,
    rows: slice,
    factor: float,
) -> Tensor:
    """A layer whose weight is some rows of a parameter, with scales of its own.

    Its weight, what the weight's gradient goes to, and its bias come together. The result is
    multiplied by ``factor``, by way of the weight's scales.
    """
    weight, trained, bias = layer
    if factor != 1 and bias is not None:
        bias = bias * factor

    def in_float() -> Tensor:
        return F.linear(x.value, weight * factor, bias)

    if call.observing:
        return call.observed(in_float())
    per_channel = call.state.spec.weight_granularity == "per_channel"
    projection = call.state.weight(shared, 1 if per_channel else len(weight))
    quantized = QuantizedWeight(projection.stored[rows], projection.scales[rows])
    assert trained is not None, "what is emulated has a place for its gradient"
    if factor != 1:
        # A scale of 0.008 and 4 columns a head, whose factor is 0.5: the same integers at 0.004.
        quantized = QuantizedWeight(
            quantized.stored, round_significands(quantized.scales.double() * factor).float()
        )
        trained = trained * factor
    return fully_connected(call, x, trained, bias, quantized, call.output(in_float))


def _average(call: Call, probabilities: Tensor) -> Tensor:
    """Mean over the heads, on the grid of probabilities."""
    if call.observing:
        return call.with_qparams(probabilities.mean(1), PENDING)
    x = call.operand(probabilities, "input")
    return mean_onto(call, x, (1,), False, x.qparams)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """``(T, N, E)`` or ``(T, E)`` as ``(N, heads, T, E / heads)``."""
    batched = x.unsqueeze(1) if x.dim() == 2 else x
    return batched.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)


def _over_heads(mask: Tensor | None, heads: int) -> Tensor | None:
    """``(T, S)`` for all, or ``(N heads, T, S)``, as what broadcasts to ``(N, heads, T, S)``."""
    return mask if mask is None or mask.dim() == 2 else mask.unflatten(0, (-1, heads))


def _over_keys(mask: Tensor | None) -> Tensor | None:
    """``(N, S)`` or ``(S,)`` as ``(N, 1, 1, S)``."""
    return None if mask is None else mask.reshape(-1, 1, 1, mask.shape[-1])


register_operator(
    Operator(
        "attention",
        torch=("scaled_dot_product_attention",),
        emulate=scaled_dot_product_attention,
        supports=supports_scaled_dot_product_attention,
        without_dropout=undropped_attention,
        forms=(
            Form(
                ("multi_head_attention_forward",),
                multi_head_attention,
                supports_multi_head_attention,
                undropped_multi_head_attention,
            ),
        ),
        has_weights=True,
        arithmetic="projections, two batch matrix products and a softmax",
    )
)
