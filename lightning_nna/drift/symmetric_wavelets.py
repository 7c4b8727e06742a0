r"""Estimate the newest value with any wavelet of PyWavelets: ``SymmetricWaveletEstimator``.

The series is mirrored at both ends (:math:`\dots y_2 y_1 | y_1 y_2 \dots`) and transformed with the
filters of the line, as ``pywt.wavedec(mode="symmetric")`` does; details are thresholded, and the
inverse transform ends with the estimate. Mirroring keeps the newest value in the middle of smooth
ground; a periodic extension would put the oldest value next to it. Details at the edges are not
orthonormal: a mirrored value counts twice.

Both transforms are linear and only few details :math:`k` reach the newest value, so that

.. math:: \hat\theta = \varphi \cdot y + \sum_k \psi_k\, S_\lambda(w_k \cdot y),

with :math:`w_k` the row that computes a detail, :math:`\psi_k` its weight in the newest value, and
:math:`\varphi` the row of the smooth part: numbers that depend on the length alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import pywt
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from lightning_nna.drift.estimators import (
    Estimate,
    ThresholdEstimator,
    noise_quantile,
    threshold_details,
)


@dataclass(frozen=True, kw_only=True)
class SymmetricWaveletEstimator(ThresholdEstimator):
    """Any discrete wavelet with symmetric extension; see the module.

    A series that is too short for one level is its own estimate. Every prefix is a transform of its
    own: :math:`O(n^2)` for all of them.

    Args:
        wavelet: Name among ``pywt.wavelist(kind="discrete")``.
        sigma: Standard deviation of the noise, in the unit of the series; None to measure it.
        constant: Factor :math:`c` of the threshold, at least 0.
        delta: Probability that noise passes the threshold, for a constant of 1.
        rule: Treatment of the details above the threshold, ``"soft"`` or ``"hard"``.

    Raises:
        ValueError: If there is no such wavelet, or a setting is out of range.

    Example:
        >>> estimator = SymmetricWaveletEstimator(wavelet="sym4", sigma=1.0)
        >>> round(float(estimator.latest(torch.ones(40)).value), 3)
        1.0
    """

    wavelet: str = "db8"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule == "tree":
            raise ValueError(
                "rule 'tree' needs levels that nest: take 'soft', 'hard' or an interval"
            )
        if self.wavelet not in pywt.wavelist(kind="discrete"):
            raise ValueError(
                f"PyWavelets has no discrete wavelet {self.wavelet!r}; "
                "pywt.wavelist(kind='discrete') lists those it has"
            )

    @override
    def estimate_at(
        self,
        y: Float[Tensor, "*batch n"],
        times: Int[Tensor, " times"],
        sigma: Float[Tensor, "*batch times"],
    ) -> Estimate:
        each = [
            self._newest(y[..., : time + 1], sigma[..., number])
            for number, time in enumerate(times.tolist())
        ]
        joined = {
            field.name: torch.stack([getattr(one, field.name) for one in each], -1)
            for field in fields(Estimate)
        }
        return Estimate(**joined)

    def _newest(self, y: Tensor, sigma: Tensor) -> Estimate:
        quantile = noise_quantile(torch.tensor(float(y.shape[-1])).to(y), self.delta)
        rows, at_newest = (
            torch.from_numpy(part).to(y) for part in newest_rows(self.wavelet, y.shape[-1])
        )
        smooth, *_ = products = (y @ rows.T).movedim(-1, 0)
        threshold = (self.constant * quantile * sigma)[..., None]
        details = threshold_details(products[1:].movedim(0, -1), threshold, self.rule)
        # The weights of the values in the estimate, a piecewise linear function of them.
        weights = rows[0] + ((details != 0) * at_newest) @ rows[1:]
        variance = weights.square().sum(-1)
        radius = quantile * sigma * variance.sqrt()
        value = smooth + details @ at_newest
        return Estimate(value, radius, sigma, 1 / variance, (details != 0).sum(-1).to(y))


@lru_cache(maxsize=8)
def newest_rows(
    wavelet: str, n: int
) -> tuple[Float[np.ndarray, "rows n"], Float[np.ndarray, " details"]]:
    """Compute the rows of the newest of ``n`` values: ``rows[0] + at_newest @ rows[1:]``.

    Args:
        wavelet: Name of a discrete wavelet of PyWavelets.
        n: Number of values of the series.

    Returns:
        Rows of the smooth part and of each detail that reaches the newest value, the coarsest
        first, shape ``(1 + details, n)``; and the weights of these details in the newest value,
        shape ``(details,)``.

    Example:
        >>> rows, at_newest = newest_rows("db2", 50)
        >>> np.abs(rows[0] + at_newest @ rows[1:])[-3:].round(3)
        array([0., 0., 1.])
    """
    filters = pywt.Wavelet(wavelet)
    lengths, reaching = [n], []
    smooth = _units(torch.tensor([n - 1]), n)
    for _ in range(pywt.dwt_max_level(n, filters.dec_len)):
        lengths.append((lengths[-1] + filters.dec_len - 1) // 2)
        reaching.append(_synthesis_adjoint(smooth, filters.rec_hi, lengths[-1])[0])
        smooth = _synthesis_adjoint(smooth, filters.rec_lo, lengths[-1])
    rows, at_newest = smooth, []
    for length, weights in zip(reversed(lengths[:-1]), reversed(reaching), strict=True):
        index = weights.nonzero()[:, 0]
        at_newest.append(weights[index])
        details = _units(index, len(weights))
        rows = torch.cat(
            [
                _analysis_adjoint(rows, filters.dec_lo, length),
                _analysis_adjoint(details, filters.dec_hi, length),
            ]
        )
    # Not tensors: one that was made in inference mode would have no gradient later.
    return rows.numpy(), torch.cat([*at_newest, smooth.new_zeros(0)]).numpy()


def _units(index: Tensor, n: int) -> Tensor:
    """Return rows that are 1 at an index and 0 elsewhere."""
    return F.one_hot(index, n).double()


def _synthesis_adjoint(rows: Tensor, taps: list[float], count: int) -> Tensor:
    """Map rows over values to rows over the coefficients that a filter synthesizes them from."""
    width = len(taps)
    # Filters end at the last value, even if a last pair of values is cut in two.
    padded = F.pad(rows, (width - 2, 2 * count - rows.shape[-1]))
    return padded.unfold(-1, width, 2)[..., :count, :] @ torch.tensor(taps, dtype=rows.dtype)


def _analysis_adjoint(rows: Tensor, taps: list[float], n: int) -> Tensor:
    """Map rows over coefficients to rows over the values that a filter analyzes.

    The coefficients are those at every second index of the mirrored values.
    """
    kernel = torch.tensor(taps[::-1], dtype=rows.dtype)
    spread = F.conv_transpose1d(rows[:, None], kernel[None, None], stride=2)[:, 0]
    index = torch.arange(2 - len(taps), 2 - len(taps) + spread.shape[-1]).remainder(2 * n)
    mirrored = torch.minimum(index, 2 * n - 1 - index)
    return torch.zeros(len(rows), n, dtype=rows.dtype).index_add(1, mirrored, spread)
