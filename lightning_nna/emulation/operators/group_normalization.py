r"""Group and instance normalization: rows of channels and positions, normalized as a layer's.

A row has the channels of one group at all positions; gain and shift belong to channels:

.. math:: y_c = \frac{x_c - \mathrm{mean}_g(x)}{\sqrt{\mathrm{var}_g(x) + \epsilon}}\, \gamma_c
          + \beta_c, \qquad c \in g

Instance normalization has one channel a group. With running statistics, which it has in evaluation
where it follows them in training, it is a factor and a shift for every channel, as batch
normalization is.

Reference:
    Wu and He, "Group normalization", ECCV 2018; Ulyanov, Vedaldi and Lempitsky, "Instance
    normalization: the missing ingredient for fast stylization", arXiv 1607.08022, 2016.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.operators.batch_norm import with_statistics
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.composition import derivative
from lightning_nna.emulation.operators.fused_normalization import Gains
from lightning_nna.emulation.operators.normalization import normalize
from lightning_nna.emulation.operators.record import Operator, register_operator


def group_norm(
    call: Call,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Emulate ``F.group_norm`` of shape ``(batch, channels, ...)``."""
    shape = input.shape
    channels = shape[1] // num_groups

    def in_float(rows: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        return F.group_norm(rows.reshape(shape), num_groups, gain, shift, eps).reshape(rows.shape)

    rows = call.viewed(input.reshape(shape[0], num_groups, -1), input)
    result = normalize(
        call,
        rows,
        weight,
        bias,
        (-1,),
        eps,
        in_float,
        derivative(in_float),
        centered=True,
        gains=Gains(num_groups, channels),
    )
    return call.viewed(result.reshape(shape), result)


def supports_group_norm(input: Any, *args: Any, **kwargs: Any) -> bool:
    """Tell whether there is something to normalize."""
    return bool(input.numel() > 0)


def instance_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Emulate ``F.instance_norm`` of shape ``(batch, channels, ...)``."""
    if not use_input_stats:
        assert running_mean is not None, "torch asks for statistics where the input's are not used"
        assert running_var is not None, "torch asks for statistics where the input's are not used"
        return with_statistics(call, input, running_mean, running_var, weight, bias, eps)
    if input.shape[2:].numel() <= 1:
        F.instance_norm(input, eps=eps)  # Raises what torch raises.
    if running_mean is not None and running_var is not None:
        _follow(input, running_mean, running_var, momentum)
    return group_norm(call, input, input.shape[1], weight, bias, eps)


@torch.no_grad()
def _follow(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> None:
    """Let running statistics follow those of the instances, averaged over the batch."""
    variance, mean = torch.var_mean(x.detach().flatten(2), -1)
    running_mean.lerp_(mean.mean(0).to(running_mean.dtype), momentum)
    running_var.lerp_(variance.mean(0).to(running_var.dtype), momentum)


register_operator(
    Operator(
        "group_norm",
        torch=("group_norm",),
        emulate=group_norm,
        supports=supports_group_norm,
        arithmetic="that of layer normalization, over the channels of a group and all positions",
    )
)
register_operator(
    Operator(
        "instance_norm",
        torch=("instance_norm",),
        emulate=instance_norm,
        supports=supports_group_norm,
        arithmetic="that of layer normalization, over all positions of a channel; with running "
        "statistics a depthwise convolution with one tap",
    )
)
