"""What S8BQAT's two callbacks share: fixed centroids, and their state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_nna.quantization.fixed_centroids import (
    CentroidSettings,
    FixedCentroids,
    forget_centroids,
    shared_centroids,
)
from lightning_nna.weights.method import BitsMethod, require_levels


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
        super().__init__(
            bits, targets=targets, overrides=overrides, max_entropy_bits=settings.max_entropy_bits
        )
        self.centroid_settings = settings
        #: Centroids by the name of the parameter, once a run has started.
        self.centroids: dict[str, FixedCentroids] = {}
        self._saved: dict[str, Any] = {}

    @override
    def settings(self) -> dict[str, Any]:
        found = asdict(self.centroid_settings)
        del found["refresh_every_n_steps"], found["max_entropy_bits"]
        return {**super().settings(), **found}

    @override
    def prepare(self) -> None:
        self.centroids = {}
        self.rejoin()

    @override
    def rejoin(self) -> None:
        assert self._module is not None, "a run has started"
        for name, parameter in self._parameters.items():
            settings = replace(self.centroid_settings, max_entropy_bits=self.rate_of(name))
            self.centroids[name] = shared_centroids(
                self._module,
                name,
                parameter,
                self.bits[name],
                settings,
                known=self.centroids.get(name),
            )
        for name, state in self._saved.items():
            if name in self.centroids:
                require_levels(name, len(state["levels"]), self.bits[name])
                self.centroids[name].load_state_dict(state)
        self._saved = {}

    @override
    def forget(self) -> None:
        super().forget()
        self.centroids, self._saved = {}, {}

    @override
    def _end(self) -> None:
        super()._end()
        if self._module is not None:
            forget_centroids(self._module)

    def refresh(self) -> None:
        """Find centroids anew where it is time."""
        for name, centroids in self.centroids.items():
            centroids.refresh(self._parameters[name], self.steps)

    @override
    def state_dict(self) -> dict[str, Any]:
        found = {name: centroids.state_dict() for name, centroids in self.centroids.items()}
        return {**super().state_dict(), "centroids": self._saved or found}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = dict(state_dict["centroids"])

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle has the values, not what is shared with others."""
        saved = self.state_dict()["centroids"]
        return {**super().__getstate__(), "centroids": {}, "_saved": saved}
