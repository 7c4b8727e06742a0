r"""Batch normalisation, folded into the convolution or linear layer before it.

On the chip there is no batch norm: its factor and shift are part of the weight and bias of the
layer that it follows, per output channel,

.. math:: w' = w \frac{\gamma}{\sqrt{v + \epsilon}}, \qquad
          b' = (b - m) \frac{\gamma}{\sqrt{v + \epsilon}} + \beta.

In training, :math:`m` and :math:`v` are those of the batch, as the layer computes it in float from
the chip's own inputs; the running statistics follow them as ever, and evaluation folds those. So
the layer runs twice, once in float for the statistics and once on the chip. The gradient passes
through the folded weight into the weight, the factor, the shift and the batch's statistics.

Which layers fold is seen while ranges are observed: those whose result goes straight into a batch
norm. Any other batch norm is a depthwise convolution with one tap.

Reference:
    Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-
    only inference", CVPR 2018, arXiv 1712.05877, section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulator.operators.call import Activation, Call, float32_arithmetic
from lightning_nna.emulator.operators.convolution import Geometry, convolve
from lightning_nna.emulator.ranges import QParams


def batch_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm`` on the chip."""
    if call.observing:
        call.host.folding.normalises(input)
        given = call.operand(input, "input").value
        arguments = (running_mean, running_var, weight, bias, training, momentum, eps)
        return call.observed(F.batch_norm(given, *arguments))
    folded = call.host.folding.waiting(input)
    x = None if folded is not None else call.operand(input, "input")
    values = input if x is None else x.value
    with float32_arithmetic(values):
        mean, variance = _statistics(values, running_mean, running_var, training, momentum)
        factor = torch.rsqrt(variance + eps)
        factor = factor if weight is None else factor * weight
        y = call.output(lambda: _normalised(values.detach(), mean, factor, bias))
        if folded is None:
            shift = -mean * factor if bias is None else bias - mean * factor
            new = factor
        else:
            offset = -mean if folded.bias is None else folded.bias - mean
            shift = offset * factor if bias is None else offset * factor + bias
            new = folded.weight * factor.view(-1, *[1] * (folded.weight.dim() - 1))
    if folded is not None:
        return folded.run(call, new, shift, call.quantized(new), y)
    assert x is not None, "either the layer before folds, or there is an operand"
    return _as_convolution(call, x, factor, shift, y)


def _statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel (second axis); the running ones follow in training."""
    if not training:
        assert running_mean is not None, "torch asks for statistics outside of training"
        assert running_var is not None, "torch asks for statistics outside of training"
        return running_mean, running_var
    axes = [axis for axis in range(x.dim()) if axis != 1]
    variance, mean = torch.var_mean(x, axes, correction=0)
    if running_mean is not None and running_var is not None:
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            running_mean.lerp_(mean.detach(), momentum)
            running_var.lerp_(variance.detach() * (count / max(count - 1, 1)), momentum)
    return mean, variance


def _normalised(x: Tensor, mean: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    shape = (-1, *[1] * (x.dim() - 2))
    result = (x - mean.view(shape)) * factor.view(shape)
    return result if bias is None else result + bias.view(shape)


def _as_convolution(call: Call, x: Activation, factor: Tensor, shift: Tensor, y: QParams) -> Tensor:
    """A factor and a shift per channel: a depthwise convolution with one tap."""
    flat = x.value.dim() == 2
    value = x.value.unsqueeze(2) if flat else x.value
    axes = min(value.dim() - 2, 2)
    # More than two axes in space are one to this layer.
    shaped = value.flatten(3) if value.dim() > 4 else value
    weight = factor.view(-1, *[1] * (axes + 1))
    geometry = Geometry.of(weight, groups=len(factor))
    operand = Activation(shaped, x.qparams)
    result = convolve(call, operand, weight, shift, call.quantized(weight), geometry, y)
    return call.tagged(result.reshape(x.value.shape), y)
