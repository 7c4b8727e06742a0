r"""Telemetry: clip rate, overflow rate and SQNR of every call site.

A sampled forward runs each operator a second time, in float, on the very operands of the
emulation. With :math:`f` the float result and :math:`y` the emulated one,

.. math:: \mathrm{SQNR} = 10 \log_{10} \frac{\sum f^2}{\sum (f - y)^2},

so a site's figure has the error of its own weights, rounding and clipping, and not of those before
it. The clip rate is the share of float results outside of the output's grid.
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
    """Sums over the sampled results of one site.

    Args:
        results: Results compared.
        clipped: Those whose float value was outside of the grid.
        signal: Sum of the squared float results.
        noise: Sum of the squared differences.
        overflows: Sums that left the accumulator's range.
        accumulated: Sums that were looked at for it.
        coarser: Channels whose scale was raised, since their bias would have saturated.
        channels: Channels with a bias.
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
        """Share of clipped results, 0 to 1."""
        return self.clipped / max(self.results, 1)

    @property
    def overflow_rate(self) -> float:
        """Share of overflowed accumulators, 0 to 1."""
        return self.overflows / max(self.accumulated, 1)

    @property
    def large_bias_rate(self) -> float:
        """Share of channels whose bias was too large for the scale of their weights, 0 to 1."""
        return self.coarser / max(self.channels, 1)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in decibels; infinite without noise."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(max(self.signal, 1e-300) / self.noise)


@dataclass
class Telemetry:
    """Figures by call site.

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

    def compare(self, site: str, in_float: Tensor, emulated: Tensor, grid: QParams | None) -> None:
        """Take in one result of a site.

        Args:
            site: Key of the site.
            in_float: Float result on the quantized operands, any shape.
            emulated: Emulated result, of the same shape.
            grid: Its quantization parameters; None for a result without clipping.
        """
        row = self.sites.setdefault(site, SiteTelemetry())
        exact, result = in_float.detach().double(), emulated.detach().double()
        # A mask of minus infinity is no signal.
        finite = torch.isfinite(exact)
        exact, result = exact[finite], result[finite]
        row.results += exact.numel()
        row.signal += float(exact.square().sum())
        row.noise += float((exact - result).square().sum())
        if grid is not None:
            low, high = (bound * grid.scale for bound in grid.bounds)
            half = grid.scale / 2
            row.clipped += int(((exact < low - half) | (exact > high + half)).sum())

    def overflow(self, site: str, overflowed: int, accumulated: int) -> None:
        """Take in how many sums of a site, or of a part of one, left the accumulator's range."""
        row = self._whole(site)
        row.overflows += overflowed
        row.accumulated += accumulated

    def biases(self, site: str, coarser: int, channels: int) -> None:
        """Take in how many channels of a site, or of a part, got a larger scale for their bias."""
        row = self._whole(site)
        row.coarser += coarser
        row.channels += channels

    def _whole(self, site: str) -> SiteTelemetry:
        """The row of a site: parts of a composite (``lstm#0/layer0``) count for it."""
        path, _, rest = site.partition("#")
        return self.sites.setdefault(f"{path}#{rest.split('/')[0]}", SiteTelemetry())

    def rows(self) -> dict[str, dict[str, float]]:
        """Rates and SQNR by site, in the order in which sites first ran."""
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
        """Plain values by site."""
        return {site: dict(vars(row)) for site, row in self.sites.items()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Replace every figure by the saved one."""
        self.sites = {site: SiteTelemetry(**row) for site, row in state.items()}


def in_float(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Result of a torch function once more, without a trace: no gradient, no random number used.

    Returns:
        Its first float tensor; None if it has none.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        result = func(*args, **kwargs)
    first = result if isinstance(result, Tensor) else result[0]
    return first if isinstance(first, Tensor) and first.is_floating_point() else None
