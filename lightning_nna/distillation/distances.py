r"""Distances of a student's outputs to a teacher's: mean square, and Kullback-Leibler divergence.

.. math::
    D_\mathrm{mse} = \frac{1}{N} \sum_i (s_i - t_i)^2, \qquad
    D_\mathrm{kl} = \frac{T^2}{P} \sum_{p} \sum_k q_{pk} (\ln q_{pk} - \ln r_{pk}), \quad
    q_p = \mathrm{softmax}(t_p / T), \; r_p = \mathrm{softmax}(s_p / T)

over all :math:`N` elements, or the :math:`P` rows of logits of the last axis, with the temperature
:math:`T`; its square keeps the size of the gradient the same for every temperature.

Reference:
    Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531,
    2015.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves

Distance = Literal["mse", "kl"]
#: A student's output and the teacher's, of one shape.
Pair = tuple[Tensor, Tensor]


def floating_tensors(output: object) -> list[Tensor]:
    """Return the floating tensors of an output, in their order; of a packed sequence its data.

    Args:
        output: Tensor, or tuples, lists and dicts of tensors and other values, nested.

    Example:
        >>> output = (torch.ones(2, 3), {"lengths": torch.tensor([3, 2]), "state": torch.ones(2)})
        >>> sum(tensor.numel() for tensor in floating_tensors(output))
        8
    """
    leaves = [
        leaf.data if isinstance(leaf, torch.nn.utils.rnn.PackedSequence) else leaf
        for leaf in tree_leaves(output)
    ]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def distance_of(
    pairs: Sequence[Pair], distance: Distance = "mse", *, temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Compute the distance of all pairs together, in float32 or wider.

    Args:
        pairs: Outputs of student and teacher, each pair of one shape; for ``"kl"`` logits, shape
            ``(…, classes)``. At least one.
        distance: ``"mse"`` or ``"kl"``.
        temperature: Positive; of ``"kl"`` alone.

    Returns:
        Mean over the elements, or the rows of logits, of all pairs; the gradient is that of the
        students.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> distance_of([(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))])
        tensor(2.)
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> round(float(distance_of([(logits, 0 * logits)], "kl")), 4)
        0.4338
    """
    require_distance(distance, temperature)
    sums, count = [], 0
    for student, teacher in pairs:
        wide = torch.promote_types(student.dtype, torch.float32)
        s, t = student.to(wide), teacher.detach().to(wide)
        if distance == "mse":
            sums.append((s - t).square().sum())
            count += s.numel()
        else:
            # T = 2 halves the logits, so that the gradient of the sum is a quarter: times 4.
            s, t = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
            sums.append((t.exp() * (t - s)).sum() * temperature**2)
            count += s.numel() // s.shape[-1]
    return torch.stack(sums).sum() / count


def require_distance(distance: str, temperature: float) -> None:
    """Raise unless a distance has a name of this module and a positive, finite temperature.

    Raises:
        ValueError: Shows the value.
    """
    if distance not in get_args(Distance):
        raise ValueError(f"distance must be one of {list(get_args(Distance))}, got {distance!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
