"""Figures of a compression: weights and centroids over training, SQNR by tensor, soft-hard gap."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_nna.weights.report import Snapshot, TensorReport

_COLUMNS = 3
_WEIGHTS, _CENTROIDS = "tab:blue", "tab:red"


def draw(snapshots: Sequence[Snapshot], *, most_tensors: int) -> dict[str, Figure]:
    """Draw every figure, by its name.

    Args:
        snapshots: Snapshots in the order of training; at least one.
        most_tensors: Number of the largest tensors whose histograms are drawn.
    """
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 8.0}):
        return {
            "weights": histograms(snapshots, most_tensors=most_tensors),
            "sqnr": sqnr(snapshots[-1]),
            "soft_hard_gap": soft_hard_gap(snapshots),
        }


def histograms(snapshots: Sequence[Snapshot], *, most_tensors: int) -> Figure:
    """Weights of each tensor, one ridge a snapshot, with centroids as ticks below each."""
    newest = snapshots[-1].tensors
    largest = sorted(range(len(newest)), key=lambda index: -newest[index].weights)[:most_tensors]
    shown = sorted(largest)
    rows = -(-len(shown) // _COLUMNS)
    size = (3.2 * min(_COLUMNS, len(shown)), 0.7 + 2.2 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, min(_COLUMNS, len(shown)), squeeze=False).flatten()
    for panel, index in zip(axes, shown, strict=False):
        _ridges(panel, [(snapshot.step, snapshot.tensors[index]) for snapshot in snapshots])
    for panel in axes[len(shown) :]:
        panel.set_axis_off()
    left_out = len(newest) - len(shown)
    suffix = f"; the {left_out} smallest tensors are left out" if left_out else ""
    figure.suptitle(f"Weights (blue) and their centroids (red) by optimizer step{suffix}")
    return figure


def sqnr(snapshot: Snapshot) -> Figure:
    """Signal to quantization noise of every tensor, at the end."""
    tensors = snapshot.tensors[::-1]
    figure = Figure(figsize=(6.4, 0.9 + 0.24 * len(tensors)), layout="constrained")
    axes = figure.subplots()
    names = [f"{tensor.name} ({tensor.bits})" for tensor in tensors]
    finite = [t.sqnr_db if math.isfinite(t.sqnr_db) else 0.0 for t in tensors]
    bars = axes.barh(names, finite, color=_WEIGHTS, height=0.7)
    labels = [
        f"{t.sqnr_db:.1f}" if math.isfinite(t.sqnr_db) else "no error: at its centroids"
        for t in tensors
    ]
    axes.bar_label(bars, labels, padding=3)
    axes.margins(x=0.12)
    axes.set_xlabel("SQNR of the deployed weights in dB (bits in brackets)")
    return figure


def soft_hard_gap(snapshots: Sequence[Snapshot]) -> Figure:
    """Plot the distance of soft and hard weights over training: tensors thin, their mean bold."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    steps = [snapshot.step for snapshot in snapshots]
    gaps = np.array([[t.soft_hard_gap for t in snapshot.tensors] for snapshot in snapshots])
    axes.plot(steps, gaps, color=_WEIGHTS, lw=0.6, alpha=0.5)
    axes.plot(steps, gaps.mean(1), color="black", lw=2, marker="o", ms=4, label="mean of tensors")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("soft-hard gap, relative to the weights")
    axes.legend(frameon=False)
    return figure


def _ridges(axes: Axes, history: Sequence[tuple[int, TensorReport]]) -> None:
    for height, (_, tensor) in enumerate(history):
        reach = tensor.widest or 1.0
        edges = np.linspace(-reach, reach, len(tensor.histogram) + 1)
        # A few heaps would dwarf the rest: the root shows both.
        counts = np.sqrt(np.array(tensor.histogram, float))
        counts *= 0.75 / max(counts.max(), 1.0)
        axes.stairs(height + counts, edges, baseline=height, fill=True, color=_WEIGHTS, alpha=0.7)
        # Above 64 they run together.
        alpha = 0.9 if len(tensor.centroids) <= 64 else 0.3
        axes.vlines(
            tensor.centroids, height - 0.2, height - 0.04, color=_CENTROIDS, lw=0.9, alpha=alpha
        )
    newest = history[-1][1]
    axes.set_title(f"{newest.name}, {newest.bits} bits", fontsize=8)
    axes.set_yticks(range(len(history)), [str(step) for step, _ in history])
    axes.tick_params(left=False)
