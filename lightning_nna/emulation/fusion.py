"""Fusion of layers with the batch norm or the ReLU that follows them.

While ranges are observed, a layer notes its result, and everything that takes it in is noted as a
reader. A layer folds if a batch norm is its only reader. From then on its result, on no grid yet,
waits with the layer's sums for that norm. A function out of scope and whoever gets what the root's
forward returns are readers, too.

An operator of any kind whose only reader is a ReLU needs no grid for what that ReLU takes away: its
range ends at 0 (and at 6), so that its own clipping is the ReLU, as the fused activation of a
reference kernel is, and the grid is twice as fine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.marks import Marks, Writes
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.spec import KernelRounding

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FusionCandidate:
    """A layer whose result waits for the batch norm that it folds.

    Args:
        sums: The layer's sums without its bias, whole numbers, channels along the second axis;
            empty where the result will do.
        bias: The layer's bias, or None.
        weight: The layer's quantized weight, with a scale for each channel.
        x: The layer's input.
        rounding: Of the layer's kernel.
        exact: Whether the sums are needed.
        sums_of: Forms the sums with another weight of the same shape.
        record: Reports the instruction, given the call, the folded weight and bias and the output.
        site: Key of the layer's call site.
    """

    sums: Tensor
    bias: Tensor | None
    weight: QuantizedWeight
    x: Activation
    rounding: KernelRounding
    exact: bool
    sums_of: Callable[[QuantizedWeight], Tensor]
    record: Callable[[Any, QuantizedWeight, Tensor, Activation], None]
    site: str


class Fusion:
    """Record of layers and the norms after them.

    Args:
        writes: What was written to in place, see :mod:`.marks`.
    """

    def __init__(self, writes: Writes) -> None:
        self._sites: set[str] = set()
        self._candidates: set[str] = set()
        self._readers: dict[str, set[str]] = {}
        self._producers = Marks(writes)
        self._outputs = Marks(writes)
        # Views and the like of what waits for its norm, by tensor.
        self._moved = Marks(writes)
        # Sites of results that end at 0 for their ReLU, by tensor.
        self._clamped = Marks(writes)
        self._warned: set[str] = set()
        #: Largest value that a ReLU leaves of an operator's results, by site.
        self.rectified: dict[str, float] = {}
        self._rectifiers: dict[str, float] = {}

    def observed(self, result: Tensor, by: str) -> None:
        """Note an operator's result by its site."""
        self._outputs[result] = by

    def copied(self, source: Tensor, copy: Tensor) -> None:
        """Another tensor holds the values of an operator's result now."""
        self.passed_on(source, copy)
        held = self._producers.get(source)
        if held is not None:
            self._producers[copy] = held

    def passed_on(self, source: Tensor, result: Tensor) -> None:
        """Another tensor stands for an operator's result now: some of its values, or dropout's."""
        for known in (self._outputs, self._clamped):
            held = known.get(source)
            if held is not None:
                known[result] = held

    def rectifies(self, x: Tensor, upper: float) -> None:
        """Note that a ReLU, with a largest value, takes a result in."""
        site = self._outputs.get(x)
        if site is not None:
            self._rectifiers[site] = upper

    def rectify(self, site: str, x: Tensor) -> Tensor:
        """Clamp values of any shape as the site's ReLU does, if it has one."""
        upper = self.rectified.get(site)
        return x if upper is None else x.clamp(0.0, upper)

    def produced(self, result: Tensor, by: str | FusionCandidate) -> Tensor:
        """Note a layer's result by its site, or the waiting layer itself; return the result."""
        self._producers[result] = by
        return result

    def reads(self, x: Tensor, reader: str) -> None:
        """Note who takes a result in."""
        producer = self._producers.get(x)
        if not isinstance(producer, str):
            producer = self._outputs.get(x)
        if producer is not None:
            self._readers.setdefault(producer, set()).add(reader)
        if len(self._clamped):
            self._check_reader(x, reader)

    def _check_reader(self, x: Tensor, reader: str) -> None:
        """Warn, once for each site, of who takes in what has been clamped for another."""
        site = self._clamped.get(x)
        if site is None or site in self._warned or reader in self._readers.get(site, ()):
            return
        self._warned.add(site)
        log.warning(
            "%s ends at 0, because in calibration a ReLU alone read its result; now %s reads it, "
            "too, and finds no value below 0: calibrate with batches that take this path",
            site,
            reader,
        )

    def clamped(self, result: Tensor, site: str) -> None:
        """Note a result that has been clamped for its ReLU."""
        self._clamped[result] = site

    def normalizes(self, x: Tensor) -> None:
        """Note that a batch norm takes a result in."""
        producer = self._producers.get(x)
        if isinstance(producer, str):
            self._candidates.add(producer)

    def freeze(self) -> None:
        """Fold from now on what has been seen to fold."""
        self._sites |= {site for site in self._candidates if len(self._readers[site]) == 1}
        for site, upper in self._rectifiers.items():
            if len(self._readers[site]) == 1 and site not in self._sites:
                self.rectified[site] = upper
        self._outputs.clear()

    def folds(self, site: str) -> bool:
        """Tell whether the layer at a site is folded."""
        return site in self._sites

    def waiting(self, x: Tensor) -> FusionCandidate | None:
        """The layer that waits with this result for its batch norm."""
        producer = self._producers.get(x)
        return producer if isinstance(producer, FusionCandidate) else None

    def moved(self, x: Tensor, result: Tensor) -> None:
        """Note what holds values of a result that waits for its batch norm."""
        waiting = self.waiting(x) or self._moved.get(x)
        if waiting is not None:
            self._moved[result] = waiting

    def check_finished(self, x: Tensor, reader: str) -> None:
        """Refuse to read what waits for its batch norm.

        Raises:
            RuntimeError: If ``x`` is such a result; names both sites.
        """
        waiting = self.waiting(x) or self._moved.get(x)
        if waiting is not None:
            raise RuntimeError(
                f"{reader} reads the result of {waiting.site}, which is folded into the batch norm "
                f"after it, since in calibration nobody else read it: calibrate with batches that "
                f"take this path"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "sites": sorted(self._sites),
            "candidates": sorted(self._candidates),
            "rectified": dict(sorted(self.rectified.items())),
            "rectifiers": dict(sorted(self._rectifiers.items())),
            "readers": {site: sorted(names) for site, names in sorted(self._readers.items())},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken."""
        self._sites, self._candidates = set(state["sites"]), set(state["candidates"])
        self.rectified, self._rectifiers = dict(state["rectified"]), dict(state["rectifiers"])
        self._readers = {site: set(names) for site, names in state["readers"].items()}
