r"""Size and error of each compressed tensor, over training.

With a latent weight :math:`w` and the deployed one, :math:`\hat w`,

.. math:: \mathrm{SQNR} = 10 \log_{10} \frac{\sum w^2}{\sum (w - \hat w)^2}.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.telemetry import SiteTelemetry
from lightning_nna.weights.codebook import CodebookTransform
from lightning_nna.weights.layers import LayerMetrics, entropy_bits
from lightning_nna.weights.pipeline import WeightPipeline, unseen

_BINS = 101


@dataclass(frozen=True)
class TensorReport:
    """One tensor at one time.

    Args:
        name: Name of the parameter.
        method: Name of the method of its centroids.
        bits: Bits of an index.
        weights: Number of weights.
        values: Number of distinct deployed weights.
        sqnr_db: SQNR of the deployed weight in decibels; infinite without error.
        soft_hard_gap: Root of the mean square of the distance between the weight in training and
            the deployed one, relative to the weights.
        packed_bytes: Size in bytes: indices, centroids (a byte each), scales (four bytes each).
        widest: Largest absolute weight.
        histogram: Numbers of weights in equal bins from ``-widest`` to ``widest``.
        centroids: Centroids of the first group of rows, or channel, in the unit of the weights.
        zeros: Fraction of deployed weights that are zero.
        entropy_bits: Entropy of the deployed weight, in bits a weight.
    """

    name: str
    method: str
    bits: int
    weights: int
    values: int
    sqnr_db: float
    soft_hard_gap: float
    packed_bytes: int
    widest: float
    histogram: list[int]
    centroids: list[float]
    zeros: float = 0.0
    entropy_bits: float = 0.0

    @classmethod
    def of(
        cls, name: str, weight: Tensor, hard: Tensor, transform: CodebookTransform
    ) -> TensorReport:
        """Measure a weight.

        Args:
            name: Name of the parameter.
            weight: Latent weight.
            hard: Deployed weight, in its shape.
            transform: Transform with the codebook.
        """
        w = weight.detach().float()
        widest = float(w.abs().max())
        reach = widest or 1.0
        histogram = torch.histc(w, _BINS, -reach, reach)
        return cls(
            name=name,
            method=transform.method,
            bits=transform.bits,
            weights=w.numel(),
            values=len(hard.unique()),
            sqnr_db=_sqnr_db(w, hard),
            soft_hard_gap=transform.soft_hard_gap(weight),
            packed_bytes=transform.codebook.packed_bytes(weight, transform.bits),
            widest=widest,
            histogram=[int(count) for count in histogram.tolist()],
            centroids=transform.codebook.scaled_centroids[0].tolist(),
            zeros=float((hard == 0).float().mean()),
            entropy_bits=entropy_bits(hard),
        )

    def row(self) -> LayerMetrics:
        """Return the line of the table of all layers."""
        return LayerMetrics(
            self.name,
            self.method,
            self.bits,
            self.weights,
            self.values,
            self.zeros,
            self.entropy_bits,
            self.packed_bytes,
            self.sqnr_db,
            histogram=tuple(self.histogram),
        )


@dataclass(frozen=True)
class Snapshot:
    """All tensors at one time.

    Args:
        step: Number of optimizer steps so far.
        tensors: Reports of the tensors, in the module's order.
    """

    step: int
    tensors: list[TensorReport]

    @classmethod
    @unseen
    def of(cls, step: int, pipeline: WeightPipeline) -> Snapshot:
        """Measure every tensor that has a codebook."""
        return cls(step, [TensorReport.of(*found) for found in codebook_transforms(pipeline)])

    @property
    def packed_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.packed_bytes for tensor in self.tensors)

    @property
    def mean_bits(self) -> float:
        """Mean width of a weight's index."""
        return sum(t.bits * t.weights for t in self.tensors) / sum(t.weights for t in self.tensors)

    @property
    def entropy_bits(self) -> float:
        """Mean entropy of a weight."""
        weights = sum(t.weights for t in self.tensors)
        return sum(t.entropy_bits * t.weights for t in self.tensors) / weights

    def metrics(self) -> dict[str, float]:
        """Compute the metrics to log, by name; a weight without error has no SQNR."""
        weights = sum(t.weights for t in self.tensors)
        finite = {t.name: t.sqnr_db for t in self.tensors if math.isfinite(t.sqnr_db)}
        return {
            "packed_bytes": float(self.packed_bytes),
            "mean_bits": self.mean_bits,
            "entropy_bits": self.entropy_bits,
            "zeros": sum(t.zeros * t.weights for t in self.tensors) / weights,
            "soft_hard_gap": sum(t.soft_hard_gap for t in self.tensors) / len(self.tensors),
            **{f"sqnr_db/{name}": ratio for name, ratio in finite.items()},
        }

    def __str__(self) -> str:
        """A table of all tensors, and of the whole."""
        width = max(len("tensor"), *(len(tensor.name) for tensor in self.tensors))
        lines = [
            f"{'tensor':{width}}  {'weights':>9}  bits  values  zeros  entropy  SQNR dB  "
            f"{'bytes':>9}  of float"
        ]
        for t in self.tensors:
            share = t.packed_bytes / (4 * t.weights)
            lines.append(
                f"{t.name:{width}}  {t.weights:9}  {t.bits:4}  {t.values:6}  {t.zeros:5.1%}  "
                f"{t.entropy_bits:7.2f}  {t.sqnr_db:7.1f}  "
                f"{t.packed_bytes:9}  {share:8.1%}"
            )
        weights = sum(tensor.weights for tensor in self.tensors)
        share = self.packed_bytes / (4 * weights)
        lines.append(
            f"{'all':{width}}  {weights:9}  {self.mean_bits:4.2f}  {'':6}  {'':5}  "
            f"{self.entropy_bits:7.2f}  {'':7}  "
            f"{self.packed_bytes:9}  {share:8.1%}"
        )
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Snapshot:
        """Restore a snapshot from :meth:`state_dict`."""
        return cls(state["step"], [TensorReport(**tensor) for tensor in state["tensors"]])


def codebook_transforms(
    pipeline: WeightPipeline,
) -> Iterator[tuple[str, Tensor, Tensor, CodebookTransform]]:
    """Yield name, latent weight, deployed weight and transform of tensors with a codebook."""
    for name, _, transforms in pipeline.claims():
        transform = transforms[-1]
        if isinstance(transform, CodebookTransform):
            yield name, pipeline.latent(name), pipeline.hard_latent(name), transform


def as_json(snapshots: Sequence[Snapshot]) -> dict[str, Any]:
    """The newest table and the history, in what JSON has: an infinite SQNR is null."""
    history = [snapshot.state_dict() for snapshot in snapshots]
    for snapshot in history:
        for tensor in snapshot["tensors"]:
            if not math.isfinite(tensor["sqnr_db"]):
                tensor["sqnr_db"] = None
    newest = snapshots[-1]
    return {
        "packed_bytes": newest.packed_bytes,
        "mean_bits": newest.mean_bits,
        "snapshots": history,
    }


def _sqnr_db(weight: Tensor, hard: Tensor) -> float:
    noise = (weight.double() - hard.double()).square().sum()
    return SiteTelemetry(signal=float(weight.double().square().sum()), noise=float(noise)).sqnr_db
