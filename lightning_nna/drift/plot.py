"""Plot a monitored metric: raw and denoised values, the band of the radius, drifts."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from lightning_nna.drift.detector import DriftReading

_RAW, _LEVEL, _DRIFT = "0.6", "tab:blue", "tab:red"


def draw(
    readings: Sequence[DriftReading], times: Sequence[float], *, title: str, xlabel: str
) -> Figure:
    """Plot the readings of one metric.

    Args:
        readings: Readings, in the order of time.
        times: Time of each reading, in the unit of ``xlabel``.
        title: Name of the metric, for the axis of values.
        xlabel: Unit of time, as ``"optimizer step"``.
    """
    x = np.array(times, dtype=float)
    level = np.array([each.value for each in readings])
    # An estimate of infinite radius is drawn without a band.
    radius = np.array([each.radius for each in readings])
    radius[~np.isfinite(radius)] = np.nan
    reference = np.array([each.reference for each in readings])
    drift = np.array([each.drift for each in readings], dtype=bool)
    raw = np.array([each.raw for each in readings])
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 8.0}):
        figure = Figure(figsize=(6.4, 3.0), layout="constrained")
        axes = figure.subplots()
        axes.plot(x, raw, ".", color=_RAW, markersize=4, label="raw")
        axes.fill_between(x, level - radius, level + radius, color=_LEVEL, alpha=0.2, linewidth=0)
        axes.plot(x, level, color=_LEVEL, label="denoised")
        axes.plot(x, reference, "--", color="0.3", linewidth=0.8, label="best level before")
        if drift.any():
            axes.plot(x[drift], raw[drift], "o", color=_DRIFT, markersize=4, label="drift")
        # The first estimates, of infinite radius, must not blow up the axis.
        shown = np.concatenate([raw, level])
        margin = 0.1 * (np.ptp(shown) or 1.0)
        axes.set_ylim(shown.min() - margin, shown.max() + margin)
        axes.set(xlabel=xlabel, ylabel=title)
        axes.legend(frameon=False)
    return figure
