r"""The newest value with any wavelet of PyWavelets: ``SymmetricWaveletEstimator``.

The series is mirrored at both ends (:math:`\dots y_2 y_1 | y_1 y_2 \dots`) and transformed with the
filters of the line, as ``pywt.wavedec(mode="symmetric")`` does; details are thresholded, and the
inverse transform ends with the estimate. Mirroring keeps the newest value in the middle of smooth
ground; a periodic extension would put the oldest value beside it. Details at the edges are not
orthonormal: a mirrored value counts twice.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import pywt
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from lightning_nna.functional.estimate import Estimate, LatestEstimator, require_settings
from lightning_nna.functional.thresholds import Rule, noise_quantile, threshold_details


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
        threshold = (self.constant * quantile * sigma)[..., None]
        value, kept = self._denoised(y, threshold)
        with torch.enable_grad():
            # The weights of the values in the estimate, a piecewise linear function of them.
            free = y.detach().requires_grad_()
            (weights,) = torch.autograd.grad(self._denoised(free, threshold)[0].sum(), free)
        variance = weights.square().sum(-1)
        radius = quantile * sigma * variance.sqrt()
        return Estimate(value, radius, sigma, 1 / variance, kept)

    def _denoised(self, y: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """The newest value, and how many details were kept."""
        wavelet = pywt.Wavelet(self.wavelet)
        lengths, details, kept = [], [], torch.zeros_like(y[..., 0])
        for _ in range(pywt.dwt_max_level(y.shape[-1], wavelet.dec_len)):
            lengths.append(y.shape[-1])
            found = threshold_details(_analyse(y, wavelet.dec_hi), threshold, self.rule)
            details.append(found)
            kept = kept + (found != 0).sum(-1)
            y = _analyse(y, wavelet.dec_lo)
        for length, detail in zip(reversed(lengths), reversed(details), strict=True):
            both = _synthesise(y, wavelet.rec_lo) + _synthesise(detail, wavelet.rec_hi)
            y = both[..., :length]
        return y[..., -1], kept


def _analyse(y: Tensor, taps: list[float]) -> Tensor:
    """One filter over the mirrored series, at every second place."""
    n, width = y.shape[-1], len(taps)
    at = torch.arange(2 - width, n + width - 1, device=y.device).remainder(2 * n)
    mirrored = y[..., torch.minimum(at, 2 * n - 1 - at)].reshape(-1, 1, len(at))
    kernel = torch.tensor(taps[::-1], dtype=y.dtype, device=y.device)
    return F.conv1d(mirrored, kernel[None, None], stride=2).reshape(*y.shape[:-1], -1)


def _synthesise(x: Tensor, taps: list[float]) -> Tensor:
    """The transpose of a filter, without what belongs to the mirrored ends."""
    kernel = torch.tensor(taps, dtype=x.dtype, device=x.device)
    flat = F.conv_transpose1d(x.reshape(-1, 1, x.shape[-1]), kernel[None, None], stride=2)
    cut = len(taps) - 2
    return flat[..., cut : flat.shape[-1] - cut].reshape(*x.shape[:-1], -1)
