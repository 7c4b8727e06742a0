"""``S8BQATMethod``: the base of S8BQAT's two callbacks, which share fixed centroids."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack, override

from lightning_nna.quantization.codebook_method import CodebookArguments, CodebookMethod
from lightning_nna.quantization.fixed_centroids import (
    FixedCentroids,
    forget_centroids,
    shared_centroids,
)
from lightning_nna.weights.method import require_codebook_size


class S8BQATArguments(CodebookArguments, total=False):
    """Keyword arguments of :class:`S8BQATMethod`, for the signatures of its subclasses."""

    refresh_every_n_steps: int


class S8BQATMethod(CodebookMethod):
    """Base of a callback that works with a module's Lloyd-Max centroids.

    Args:
        bits: See :class:`.CodebookMethod`.
        refresh_every_n_steps: Number of optimizer steps from one fit of the centroids to the next;
            0 to fit them only when the run starts.
        settings: Other arguments of :class:`.CodebookMethod`.
    """

    def __init__(
        self, bits: int, *, refresh_every_n_steps: int = 0, **settings: Unpack[CodebookArguments]
    ) -> None:
        super().__init__(bits, **settings)
        if refresh_every_n_steps < 0:
            raise ValueError(
                f"refresh_every_n_steps must be at least 0, got {refresh_every_n_steps}"
            )
        self.refresh_every_n_steps = refresh_every_n_steps
        #: Centroids by the name of the parameter, once a run has started.
        self.centroids: dict[str, FixedCentroids] = {}
        self._saved: dict[str, Any] = {}

    @override
    def prepare(self) -> None:
        self.centroids = {}
        self.rejoin()

    @override
    def rejoin(self) -> None:
        assert self._module is not None, "a run has started"
        for name, parameter in self._parameters.items():
            self.centroids[name] = shared_centroids(
                self._module,
                name,
                parameter,
                self.bits[name],
                self.settings_of(name),
                refresh_every_n_steps=self.refresh_every_n_steps,
                known=self.centroids.get(name),
            )
        for name, state in self._saved.items():
            if name in self.centroids:
                own = self.centroids[name]
                require_codebook_size(name, state["centroids"], own.codebook.centroids)
                own.load_state_dict(state)
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
        """Fit centroids again if it is time."""
        for name, centroids in self.centroids.items():
            centroids.refresh(self._parameters[name], self.steps)

    @override
    def state_dict(self) -> dict[str, Any]:
        states = {name: centroids.state_dict() for name, centroids in self.centroids.items()}
        return {**super().state_dict(), "centroids": self._saved or states}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = dict(state_dict["centroids"])

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: with plain centroids, which nobody else shares."""
        saved = self.state_dict()["centroids"]
        return {**super().__getstate__(), "centroids": {}, "_saved": saved}
