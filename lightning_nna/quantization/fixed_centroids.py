"""S8BQAT's centroids of one module, which its regularizer and its compressor share."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_nna.non_finite import require_finite_weights
from lightning_nna.weights.codebook import (
    Codebook,
    CodebookSettings,
    channels_of,
    midpoints,
    relative_gap,
)
from lightning_nna.weights.pipeline import WeightGrid
from lightning_nna.weights.selection import groups_of


class FixedCentroids:
    """Transform of one parameter: none in training, the nearest centroid when deployed.

    Args:
        module: Module that the parameter belongs to.
        name: Name of the parameter.
        weight: Parameter, shape ``(rows, …)``, finite.
        bits: Bits of an index, 1 to 8.
        settings: Settings of the codebook.
        refresh_every_n_steps: Number of optimizer steps from one fit of the centroids to the next;
            0 to fit them once.

    Raises:
        ValueError: As :func:`.channels_of` does.
    """

    method = "hard_compression"
    order = 1

    def __init__(
        self,
        module: nn.Module,
        name: str,
        weight: Tensor,
        bits: int,
        settings: CodebookSettings,
        *,
        refresh_every_n_steps: int = 0,
    ) -> None:
        self.name, self.bits, self.settings = name, bits, settings
        self.refresh_every_n_steps = refresh_every_n_steps
        self._groups = groups_of(module, name, weight, settings.granularity)
        self._channels = channels_of(module, name, weight, bits, settings.codebook)
        self.codebook = self._fit(weight)
        self._refreshed = 0

    @property
    def grid(self) -> WeightGrid | None:
        """Quantization parameters of hard weights."""
        return self.codebook.grid

    def apply(self, weight: Tensor, *, hard: bool) -> Tensor:
        """Move weights to their centroids if they are deployed."""
        return self.codebook.project(weight) if hard else weight

    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient unchanged: weights are not transformed in training."""
        return grad

    def refresh(self, weight: Tensor, step: int) -> None:
        """Fit the centroids again if it is time; once a step, whichever callback asks.

        Args:
            weight: Latent weight.
            step: Number of optimizer steps so far.
        """
        every = self.refresh_every_n_steps
        if every and step % every == 0 and step != self._refreshed:
            self.codebook, self._refreshed = self._fit(weight), step

    @torch.no_grad()
    def soft_hard_gap(self, weight: Tensor) -> float:
        """Distance of the weights from their centroids, relative to the weights."""
        return relative_gap(weight, weight - self.codebook.project(weight))

    def state_dict(self) -> dict[str, Any]:
        """Return copies of centroids and scales."""
        book = self.codebook
        return {"centroids": book.centroids.clone(), "scales": book.scales.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace centroids and scales by saved ones."""
        device = self.codebook.centroids.device
        centroids, scales = state["centroids"].to(device), state["scales"].to(device)
        self.codebook = Codebook(centroids, midpoints(centroids), scales, self.settings.grid_bits)

    def _fit(self, weight: Tensor) -> Codebook:
        require_finite_weights({self.name: weight})
        return Codebook.fit(
            weight.detach(),
            self.bits,
            groups=self._groups,
            grid_bits=self.settings.grid_bits,
            power_of_two_scales=self.settings.power_of_two_scales,
            pin_zero=self.settings.pin_zero and self.bits > 1,
            max_entropy_bits=self.settings.max_entropy_bits,
            channels=self._channels,
        )

    def differences(
        self, bits: int, settings: CodebookSettings, refresh_every_n_steps: int
    ) -> list[str]:
        """Describe the settings that differ from those of another callback.

        Args:
            bits: Bits of an index of the other callback.
            settings: Settings of the codebook of the other callback.
            refresh_every_n_steps: Steps between two fits of the other callback.
        """
        own = {"bits": self.bits, **asdict(self.settings)}
        own["refresh_every_n_steps"] = self.refresh_every_n_steps
        other = {"bits": bits, **asdict(settings), "refresh_every_n_steps": refresh_every_n_steps}
        return [f"{key} ({own[key]} and {other[key]})" for key in own if own[key] != other[key]]


_SHARED: WeakKeyDictionary[nn.Module, dict[str, FixedCentroids]] = WeakKeyDictionary()


@torch.no_grad()
def shared_centroids(
    module: nn.Module,
    name: str,
    weight: Tensor,
    bits: int,
    settings: CodebookSettings,
    *,
    refresh_every_n_steps: int = 0,
    known: FixedCentroids | None = None,
) -> FixedCentroids:
    """Return the centroids of a parameter; fit them unless another callback has done so.

    The arguments are those of :class:`FixedCentroids`, and ``known``: the centroids of an earlier
    run, which are used if no other callback of this run has any.

    Raises:
        ValueError: If the centroids have other bits or settings; names them.
        FloatingPointError: If a weight is not finite.
    """
    shared = _SHARED.setdefault(module, {})
    if name not in shared:
        shared[name] = known or FixedCentroids(
            module, name, weight, bits, settings, refresh_every_n_steps=refresh_every_n_steps
        )
    differing = shared[name].differences(bits, settings, refresh_every_n_steps)
    if differing:
        raise ValueError(
            f"callbacks that share the centroids of {name} differ in {', '.join(differing)}: "
            f"give them the same"
        )
    return shared[name]


def forget_centroids(module: nn.Module) -> None:
    """Drop the centroids of a module, so that the next run fits them again.

    Args:
        module: Module whose run has ended.
    """
    _SHARED.pop(module, None)
