"""Which torch function becomes which operator of the chip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_nna.emulation.operators import (
    activation,
    attention,
    batch_norm,
    convolution,
    elementwise,
    linear,
    log_softmax,
    masking,
    matmul,
    normalization,
    recurrent,
    reduction,
    softmax,
)


@dataclass(frozen=True)
class Operator:
    """An entry of the table.

    Args:
        name: Name in :data:`lightning_nna.emulation.spec.OPERATORS` and in call sites; the empty
            name is for functions that are no instruction, as dropout.
        emulate: Takes a ``Call`` and the torch function's own arguments.
        supports: Whether the chip has this form of it; receives the function's arguments.
        widths: Widths of activations in which the chip has it.
    """

    name: str
    emulate: Callable[..., Any]
    supports: Callable[..., bool] = lambda *args, **kwargs: True
    widths: tuple[int, ...] = (8, 16)


_ADD = Operator("add", masking.add)
_CONCATENATION = Operator("concatenation", elementwise.concatenate)
_CONVOLUTION = Operator("convolution", convolution.convolution, convolution.supports_convolution)
_DIV = Operator("mul", elementwise.div, elementwise.supports_div)
_MASKED_FILL = Operator("select", masking.masked_fill, masking.supports_masked_fill)
_MATMUL = Operator("batch_matmul", matmul.matmul, matmul.supports_matmul)
_MAXIMUM = Operator("reduce_max", reduction.maximum_over, reduction.supports_extreme)
_MINIMUM = Operator("reduce_min", reduction.minimum_over, reduction.supports_extreme)
_MUL = Operator("mul", elementwise.mul)
_RELU = Operator("relu", activation.relu)
_SIGMOID = Operator("sigmoid", activation.sigmoid)
_SUB = Operator("sub", elementwise.sub)
_RSUB = Operator("sub", elementwise.reversed_sub)
_TANH = Operator("tanh", activation.tanh)
_DROPOUT = Operator("", activation.dropout)
_ELU = Operator("elu", activation.elu, activation.supports_elu, widths=(8,))
_HARD_SIGMOID = Operator("hard_sigmoid", activation.hard_sigmoid)
_HARD_SWISH = Operator("hard_swish", activation.hard_swish, widths=(8,))
_HARDTANH = Operator("relu6", activation.hardtanh, activation.supports_hardtanh)
_LEAKY_RELU = Operator("leaky_relu", activation.leaky_relu)
_LOG_SOFTMAX = Operator(
    "log_softmax", log_softmax.log_softmax, log_softmax.supports_log_softmax, widths=(8,)
)
_SILU = Operator("silu", activation.silu)
_SOFTMAX = Operator("softmax", softmax.softmax)

#: By the name of the torch function or method; a trailing underscore is the in-place form.
TABLE: dict[str, Operator] = {
    "add": _ADD,
    "add_": _ADD,
    "batch_norm": Operator("batch_norm", batch_norm.batch_norm),
    "cat": _CONCATENATION,
    "stack": Operator("concatenation", elementwise.stack),
    "div": _DIV,
    "div_": _DIV,
    "divide": _DIV,
    "divide_": _DIV,
    "true_divide": _DIV,
    "neg": Operator("mul", elementwise.neg),
    "negative": Operator("mul", elementwise.neg),
    "concat": _CONCATENATION,
    "concatenate": _CONCATENATION,
    "conv1d": _CONVOLUTION,
    "conv2d": _CONVOLUTION,
    "dropout": _DROPOUT,
    "embedding": Operator("embedding", linear.embedding, linear.supports_embedding),
    "elu": _ELU,
    "elu_": _ELU,
    "dropout1d": Operator("", activation.feature_dropout, activation.has_batch(3)),
    "dropout2d": Operator("", activation.feature_dropout, activation.has_batch(3, 4)),
    "dropout3d": Operator("", activation.feature_dropout, activation.has_batch(5)),
    "feature_dropout": Operator("", activation.feature_dropout),
    "gelu": Operator("gelu", activation.gelu, widths=(8,)),
    "glu": Operator("glu", activation.glu),
    "hardsigmoid": _HARD_SIGMOID,
    "hardswish": _HARD_SWISH,
    "hardtanh": _HARDTANH,
    "hardtanh_": _HARDTANH,
    "leaky_relu": _LEAKY_RELU,
    "leaky_relu_": _LEAKY_RELU,
    "log_softmax": _LOG_SOFTMAX,
    "relu6": Operator("relu6", activation.relu6),
    "silu": _SILU,
    "softmax": _SOFTMAX,
    "layer_norm": Operator("layer_norm", normalization.layer_norm),
    "linear": Operator("fully_connected", linear.linear),
    "gru": Operator("gru", recurrent.gru),
    "gru_cell": Operator("gru", recurrent.gru_cell),
    "lstm": Operator("lstm", recurrent.lstm),
    "lstm_cell": Operator("lstm", recurrent.lstm_cell),
    "__matmul__": _MATMUL,
    "amax": Operator("reduce_max", reduction.amax, reduction.supports_extreme),
    "multi_head_attention_forward": Operator(
        "attention", attention.multi_head_attention, attention.supports_multi_head_attention
    ),
    "scaled_dot_product_attention": Operator(
        "attention",
        attention.scaled_dot_product_attention,
        attention.supports_scaled_dot_product_attention,
    ),
    "amin": Operator("reduce_min", reduction.amin, reduction.supports_extreme),
    "bmm": _MATMUL,
    "masked_fill": _MASKED_FILL,
    "masked_fill_": _MASKED_FILL,
    "matmul": _MATMUL,
    "max": _MAXIMUM,
    "mean": Operator("mean", reduction.mean, reduction.supports_average),
    "min": _MINIMUM,
    "mm": _MATMUL,
    "mv": _MATMUL,
    "mul": _MUL,
    "mul_": _MUL,
    "multiply": _MUL,
    "multiply_": _MUL,
    "relu": _RELU,
    "relu_": _RELU,
    "rms_norm": Operator("rms_norm", normalization.rms_norm),
    "rsub": _RSUB,
    "__rsub__": _RSUB,
    "sigmoid": _SIGMOID,
    "sigmoid_": _SIGMOID,
    "sub": _SUB,
    "sub_": _SUB,
    "subtract": _SUB,
    "subtract_": _SUB,
    "sum": Operator("sum", reduction.sum, reduction.supports_average),
    "tanh": _TANH,
    "tanh_": _TANH,
    "where": Operator("select", masking.where, masking.supports_where),
}
