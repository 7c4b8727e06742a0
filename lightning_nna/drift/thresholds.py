r"""Thresholds that tell wavelet coefficients from noise.

Reference:
    Donoho, "De-noising by soft-thresholding", IEEE Trans. Inf. Theory 41(3), 1995.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

#: What becomes of a detail above the threshold.
Rule: TypeAlias = Literal["soft", "hard", "tree"]


def noise_quantile(n: Float[Tensor, "*any"], delta: float) -> Float[Tensor, "*any"]:
    r"""What none of the details of ``n`` values exceeds, in standard deviations.

    .. math:: \sqrt{2 \log(\max(\log_2 n, 1) / \delta)}

    Example:
        >>> noise_quantile(torch.tensor([1024.0]), 0.1)
        tensor([3.0349])
    """
    return (2 * (n.log2().clamp_min(1.0) / delta).log()).sqrt()


def threshold_details(
    x: Float[Tensor, "*any"], threshold: Float[Tensor, "*#any"], rule: Rule
) -> Float[Tensor, "*any"]:
    """Shrink every entry toward zero by its threshold, or drop what is not above it.

    The rule of the tree looks at all levels and is their caller's; here it is the hard one.

    Example:
        >>> threshold_details(torch.tensor([-3.0, 0.5, 2.0]), torch.ones(3), "soft")
        tensor([-2., 0., 1.])
    """
    if rule != "soft":
        return torch.where(x.abs() > threshold, x, 0.0)
    return torch.where(x.abs() > threshold, x - x.sign() * threshold, 0.0)
