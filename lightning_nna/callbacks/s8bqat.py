"""What S8BQAT's two callbacks share: fixed centroids, and their state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_nna.callbacks.weight_method import BitsMethod
from lightning_nna.compression.fixed_centroids import (
    CentroidSettings,
    FixedCentroids,
    shared_centroids,
)


class S8BQATMethod(BitsMethod):
    """A callback that works with a module's Lloyd-Max centroids.

    Args:
        bits: See :class:`.BitsMethod`.
        settings: How centroids are found.
        targets: See :class:`.BitsMethod`.
        overrides: See :class:`.BitsMethod`.
    """

    def __init__(
        self,
        bits: int,
        *,
        settings: CentroidSettings,
        targets: Sequence[str],
        overrides: Mapping[str, int] | str | Path,
    ) -> None:
        super().__init__(bits, targets=targets, overrides=overrides, rate_bits=settings.rate_bits)
        self.settings = settings
        #: Centroids by the name of the parameter, once a run has started.
        self.centroids: dict[str, FixedCentroids] = {}
        self._saved: dict[str, Any] = {}

    @override
    def prepare(self) -> None:
        assert self._module is not None, "a run has started"
        self.centroids = {
            name: shared_centroids(
                self._module,
                name,
                parameter,
                self.bits[name],
                replace(self.settings, rate_bits=self.rate_of(name)),
            )
            for name, parameter in self._parameters.items()
        }
        self._restore_centroids()

    def refresh(self) -> None:
        """Find centroids anew where it is time."""
        for name, centroids in self.centroids.items():
            centroids.refresh(self._parameters[name], self.steps)

    @override
    def state_dict(self) -> dict[str, Any]:
        found = {name: centroids.state_dict() for name, centroids in self.centroids.items()}
        return {**super().state_dict(), "centroids": found or self._saved}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = dict(state_dict["centroids"])
        self._restore_centroids()

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle has the values, not what is shared with others."""
        saved = self.state_dict()["centroids"]
        return {**super().__getstate__(), "centroids": {}, "_saved": saved}

    def _restore_centroids(self) -> None:
        if self.centroids and self._saved:
            for name, centroids in self.centroids.items():
                if name in self._saved:
                    centroids.load_state_dict(self._saved[name])
            self._saved = {}
