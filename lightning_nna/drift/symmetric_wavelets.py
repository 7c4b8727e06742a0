r"""The newest value with any wavelet of PyWavelets: ``SymmetricWaveletEstimator``.

The series is mirrored at both ends (:math:`\dots y_2 y_1 | y_1 y_2 \dots`) and transformed with the
filters of the line, as ``pywt.wavedec(mode="symmetric")`` does; details are thresholded, and the
inverse transform ends with the estimate. Mirroring keeps the newest value in the middle of smooth
ground; a periodic extension would put the oldest value beside it. Details at the edges are not
orthonormal: a mirrored value counts twice.

Both transforms are linear and only few details :math:`k` reach the newest value, so that

.. math:: \hat\theta = \varphi \cdot y + \sum_k \psi_k\, S_\lambda(w_k \cdot y),

with :math:`w_k` what gives a detail, :math:`\psi_k` what it adds at the newest value, and
:math:`\varphi` what is left without details: rows of numbers that depend on the length alone.
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

from lightning_nna.drift.estimate import Estimate, LatestEstimator, require_settings
from lightning_nna.drift.thresholds import Rule, noise_quantile, threshold_details


@dataclass(frozen=True, kw_only=True)
class SymmetricWaveletEstimator(LatestEstimator):
    """Any discrete wavelet with symmetric extension; see the module.

    A series that is too short for one level is its own estimate. Every prefix is a transform of its
    own: :math:`O(n^2)` for all of them.

    Args:
        wavelet: A name that ``pywt.wavelist(kind="discrete")`` has.
        sigma: Standard deviation of the noise; None to measure it.
        constant: Of the threshold.
        delta: Probability that noise passes the threshold, for a constant of 1.
        rule: ``"soft"`` or ``"hard"`` thresholding.

    Raises:
        ValueError: If there is no such wavelet, or a setting is out of range.

    Example:
        >>> found = SymmetricWaveletEstimator(wavelet="sym4", sigma=1.0).latest(torch.ones(40))
        >>> round(float(found.value), 3)
        1.0
    """

    wavelet: str = "db8"
    sigma: float | None = None
    constant: float = 1.0
    delta: float = 0.1
    rule: Rule = "soft"

    def __post_init__(self) -> None:
        require_settings(sigma=self.sigma, delta=self.delta, constant=self.constant, rule=self.rule)
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
    def at(
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
    """What makes the newest of ``n`` values; without thresholds ``rows[0] + at_newest @ rows[1:]``.

    Args:
        wavelet: Of PyWavelets.
        n: Values of the series.

    Returns:
        Rows that give the smooth part and each detail that reaches the newest value, the coarsest
        first; and what such a detail adds there.

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
        found = weights.nonzero()[:, 0]
        at_newest.append(weights[found])
        details = _units(found, len(weights))
        rows = torch.cat(
            [
                _analysis_adjoint(rows, filters.dec_lo, length),
                _analysis_adjoint(details, filters.dec_hi, length),
            ]
        )
    # Not tensors: one that was made in inference mode would have no gradient later.
    return rows.numpy(), torch.cat([*at_newest, smooth.new_zeros(0)]).numpy()


def _units(places: Tensor, n: int) -> Tensor:
    """Rows that are 1 at a place and 0 elsewhere."""
    return F.one_hot(places, n).double()


def _synthesis_adjoint(rows: Tensor, taps: list[float], count: int) -> Tensor:
    """Rows over values, as rows over the coefficients from which a filter makes the values."""
    width = len(taps)
    # Filters end where the last value is made, even if a last pair of values is cut in two.
    padded = F.pad(rows, (width - 2, 2 * count - rows.shape[-1]))
    return padded.unfold(-1, width, 2)[..., :count, :] @ torch.tensor(taps, dtype=rows.dtype)


def _analysis_adjoint(rows: Tensor, taps: list[float], n: int) -> Tensor:
    """Rows over what a filter gives at every second place of the mirrored values, as over these."""
    kernel = torch.tensor(taps[::-1], dtype=rows.dtype)
    spread = F.conv_transpose1d(rows[:, None], kernel[None, None], stride=2)[:, 0]
    at = torch.arange(2 - len(taps), 2 - len(taps) + spread.shape[-1]).remainder(2 * n)
    mirrored = torch.minimum(at, 2 * n - 1 - at)
    return torch.zeros(len(rows), n, dtype=rows.dtype).index_add(1, mirrored, spread)
