"""S8BQAT's centroids of one module: what its regularizer and its compressor share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_nna.non_finite import require_finite_weights
from lightning_nna.weights.codebook import Codebook, middles, relative_gap
from lightning_nna.weights.pipeline import WeightGrid
from lightning_nna.weights.selection import Granularity, groups_of


@dataclass(frozen=True)
class CentroidSettings:
    """How centroids are found.

    Args:
        granularity: A scale for the ``"tensor"``, or for each ``"channel"`` as far as the chip's
            operators can have them; values are those of the tensor in any case.
        grid_bits: Centroids lie on the chip's grid of that many bits; None for anywhere.
        power_of_two_scales: Whether the grid's steps are powers of two.
        pin_zero: Whether one centroid is zero.
        refresh_every_n_steps: Centroids are found anew every so many optimizer steps; 0 for never.
        max_entropy_bits: Greatest entropy of a tensor's indices, in bits a weight; None for any.

    Raises:
        ValueError: If a setting is out of range.
    """

    granularity: Granularity = "tensor"
    grid_bits: int | None = 8
    power_of_two_scales: bool = False
    pin_zero: bool = False
    refresh_every_n_steps: int = 0
    max_entropy_bits: float | None = None

    def __post_init__(self) -> None:
        if self.granularity not in ("tensor", "channel"):
            raise ValueError(f"granularity must be 'tensor' or 'channel', got {self.granularity!r}")
        if self.grid_bits is not None and not 2 <= self.grid_bits <= 8:
            raise ValueError(f"grid_bits must be 2 to 8, or None, got {self.grid_bits}")
        if self.refresh_every_n_steps < 0:
            raise ValueError(
                f"refresh_every_n_steps must be at least 0, got {self.refresh_every_n_steps}"
            )


class FixedCentroids:
    """The stage of one parameter: nothing in training, its nearest centroid when deployed.

    Args:
        module: That the parameter belongs to.
        name: Of the parameter.
        weight: The parameter.
        bits: 1 to 8.
        settings: How centroids are found.
    """

    method = "S8BQAT"
    place = 1

    def __init__(
        self, module: nn.Module, name: str, weight: Tensor, bits: int, settings: CentroidSettings
    ) -> None:
        self.name, self.bits, self.settings = name, bits, settings
        self._groups = groups_of(module, name, weight, settings.granularity)
        self.codebook = self._fit(weight)
        self._refreshed = 0

    @property
    def grid(self) -> WeightGrid | None:
        """Where hard weights lie."""
        return self.codebook.grid

    def transform(self, weight: Tensor, *, hard: bool) -> Tensor:
        """The nearest centroids, where that is what is deployed."""
        return self.codebook.project(weight) if hard else weight

    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The gradient as it is: weights are not transformed in training."""
        return grad

    def refresh(self, weight: Tensor, step: int) -> None:
        """Find the centroids anew if it is time; once a step, whoever asks."""
        every = self.settings.refresh_every_n_steps
        if every and step % every == 0 and step != self._refreshed:
            self.codebook, self._refreshed = self._fit(weight), step

    @torch.no_grad()
    def soft_hard_gap(self, weight: Tensor) -> float:
        """Distance of the weights from their centroids, relative to the weights."""
        return relative_gap(weight, weight - self.codebook.project(weight))

    def state_dict(self) -> dict[str, Any]:
        """Levels and steps."""
        return {"levels": self.codebook.levels.clone(), "steps": self.codebook.steps.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace levels and steps by saved ones."""
        device = self.codebook.levels.device
        levels, steps = state["levels"].to(device), state["steps"].to(device)
        self.codebook = Codebook(levels, middles(levels), steps, self.settings.grid_bits)

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
        )


_SHARED: WeakKeyDictionary[nn.Module, dict[str, FixedCentroids]] = WeakKeyDictionary()


@torch.no_grad()
def shared_centroids(
    module: nn.Module,
    name: str,
    weight: Tensor,
    bits: int,
    settings: CentroidSettings,
    *,
    known: FixedCentroids | None = None,
) -> FixedCentroids:
    """The centroids of a parameter, found now unless another callback has done so.

    Args:
        module: That the parameter belongs to.
        name: Of the parameter.
        weight: The parameter.
        bits: 1 to 8.
        settings: How centroids are found.
        known: Those of an earlier run, used where no other callback of this one has any.

    Raises:
        ValueError: If they were found with other bits or settings; says which.
        FloatingPointError: If a weight is not finite.
    """
    held = _SHARED.setdefault(module, {})
    if name not in held:
        held[name] = known or FixedCentroids(module, name, weight, bits, settings)
    found = held[name]
    mine, theirs = (
        {"bits": b, **asdict(s)} for b, s in ((bits, settings), (found.bits, found.settings))
    )
    differing = [
        f"{key} ({theirs[key]} and {mine[key]})" for key in mine if mine[key] != theirs[key]
    ]
    if differing:
        raise ValueError(
            f"callbacks that share the centroids of {name} differ in {', '.join(differing)}: "
            f"give them the same"
        )
    return found


def forget_centroids(module: nn.Module) -> None:
    """Let the centroids of a module be found anew."""
    _SHARED.pop(module, None)
