r"""Telemetry: clip rate, overflow rate and SQNR of every call site.

A sampled forward runs each operator a second time, in float, on the quantized operands of the
emulation. With :math:`f` the float result and :math:`y` the emulated one,

.. math:: \mathrm{SQNR} = 10 \log_{10} \frac{\sum f^2}{\sum (f - y)^2},

so the SQNR of a site has the error of its own weights, rounding and clipping, and not of the sites
before it. The clip rate is the fraction of float results outside of the output's range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.ranges import QParams


@dataclass
class SiteTelemetry:
    """Sum the sampled results of one site.

    Args:
        results: Number of results compared.
        clipped: Number of results whose float value was outside of the range.
        signal: Sum of the squared float results.
        noise: Sum of the squared differences.
        overflows: Number of sums outside of the accumulator's range.
        accumulated: Number of sums checked for overflow.
        coarser: Number of channels whose scale was raised so that their bias fits.
        channels: Number of channels with a bias.
    """

    results: int = 0
    clipped: int = 0
    signal: float = 0.0
    noise: float = 0.0
    overflows: int = 0
    accumulated: int = 0
    coarser: int = 0
    channels: int = 0

    @property
    def clip_rate(self) -> float:
        """Fraction of clipped results, 0 to 1."""
        return self.clipped / max(self.results, 1)

    @property
    def overflow_rate(self) -> float:
        """Fraction of overflowed accumulators, 0 to 1."""
        return self.overflows / max(self.accumulated, 1)

    @property
    def large_bias_rate(self) -> float:
        """Fraction of channels whose bias was too large for the scale of their weights, 0 to 1."""
        return self.coarser / max(self.channels, 1)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in decibels; infinite without noise."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(max(self.signal, 1e-300) / self.noise)


@dataclass
class Telemetry:
    """Hold metrics by call site.

    Example:
        >>> table = Telemetry()
        >>> table.compare("relu#0", torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0]),
        ...     QParams(2 / 127, 0))
        >>> table["relu#0"].clip_rate, table["relu#0"].sqnr_db
        (0.5, 10.0)
    """

    sites: dict[str, SiteTelemetry] = field(default_factory=dict)

    def __getitem__(self, site: str) -> SiteTelemetry:
        return self.sites[site]

    def compare(
        self, site: str, in_float: Tensor, emulated: Tensor, qparams: QParams | None
    ) -> None:
        """Include one result of a site.

        Args:
            site: Key of the site.
            in_float: Float result on the quantized operands, any shape.
            emulated: Emulated result, of the same shape.
            qparams: Quantization parameters of the result; None for one without clipping.
        """
        row = self.sites.setdefault(site, SiteTelemetry())
        exact, result = in_float.detach().double(), emulated.detach().double()
        # Minus infinity in a mask is no signal.
        finite = torch.isfinite(exact)
        exact, result = exact[finite], result[finite]
        row.results += exact.numel()
        row.signal += float(exact.square().sum())
        row.noise += float((exact - result).square().sum())
        if qparams is not None:
            low, high = (bound * qparams.scale for bound in qparams.bounds)
            half = qparams.scale / 2
            row.clipped += int(((exact < low - half) | (exact > high + half)).sum())

    def overflow(self, site: str, overflowed: int, accumulated: int) -> None:
        """Include the numbers of overflowed and of all sums, of a site or a part of one."""
        row = self._row(site)
        row.overflows += overflowed
        row.accumulated += accumulated

    def biases(self, site: str, coarser: int, channels: int) -> None:
        """Include the numbers of channels with a raised scale and of all, of a site or a part."""
        row = self._row(site)
        row.coarser += coarser
        row.channels += channels

    def _row(self, site: str) -> SiteTelemetry:
        """Return the row of a site; a part of a composite (``lstm#0/layer0``) has the site's."""
        path, _, rest = site.partition("#")
        return self.sites.setdefault(f"{path}#{rest.split('/')[0]}", SiteTelemetry())

    def rows(self) -> dict[str, dict[str, float]]:
        """Return rates and SQNR by site, in the order in which sites first ran."""
        return {
            site: {
                "clip_rate": row.clip_rate,
                "overflow_rate": row.overflow_rate,
                "large_bias_rate": row.large_bias_rate,
                "sqnr_db": row.sqnr_db,
            }
            for site, row in self.sites.items()
        }

    def __str__(self) -> str:
        width = max([len(site) for site in self.sites], default=4)
        lines = [f"{'site':{width}}  clipped  overflowed  SQNR dB  large biases"]
        for site, row in self.sites.items():
            lines.append(
                f"{site:{width}}  {row.clip_rate:7.2%}  {row.overflow_rate:10.2%}  "
                f"{row.sqnr_db:7.1f}  {row.large_bias_rate:12.2%}"
            )
        return "\n".join(lines)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain values by site."""
        return {site: dict(vars(row)) for site, row in self.sites.items()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Replace all metrics by those of a state."""
        self.sites = {site: SiteTelemetry(**row) for site, row in state.items()}


def in_float(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Run a torch function in float, without gradients and without advancing random numbers.

    Args:
        func: Torch function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The first float tensor of the result, of any shape; None if there is none.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        result = func(*args, **kwargs)
    first = result if isinstance(result, Tensor) else result[0]
    return first if isinstance(first, Tensor) and first.is_floating_point() else None
