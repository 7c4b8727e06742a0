"""Which layers are folded into the batch norm that follows them.

While ranges are observed, a layer notes its result, and everything that takes it in is noted as a
reader. A layer folds if a batch norm is its only reader. From then on its result is the float one
and waits, with the layer's instruction, for that norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_nna.emulator.ranges import QParams
from lightning_nna.emulator.weights import QuantizedWeight

if TYPE_CHECKING:
    from lightning_nna.emulator.operators.call import Call


@dataclass(frozen=True)
class Foldable:
    """A layer whose float result waits for the batch norm that it folds.

    Args:
        run: The layer's instruction, given a call, weight, bias, the weight on the chip, and the
            grid of the output.
        weight: The layer's weight; output channels along the first axis.
        bias: The layer's bias, or None.
    """

    run: Callable[[Call, Tensor, Tensor | None, QuantizedWeight, QParams], Tensor]
    weight: Tensor
    bias: Tensor | None


class Folding:
    """What is known of layers and the norms after them."""

    def __init__(self) -> None:
        self._sites: set[str] = set()
        self._candidates: set[str] = set()
        self._readers: dict[str, set[str]] = {}
        self._producers = WeakTensorKeyDictionary()

    def produced(self, result: Tensor, by: str | Foldable) -> Tensor:
        """Note a layer's result by its site, or the waiting layer itself; return the result."""
        self._producers[result] = by
        return result

    def reads(self, x: Tensor, reader: str) -> None:
        """Note who takes a result in."""
        producer = self._producers.get(x)
        if isinstance(producer, str):
            self._readers.setdefault(producer, set()).add(reader)

    def normalises(self, x: Tensor) -> None:
        """Note that a batch norm takes a result in."""
        producer = self._producers.get(x)
        if isinstance(producer, str):
            self._candidates.add(producer)

    def freeze(self) -> None:
        """Fold from now on what has been seen to fold."""
        self._sites |= {site for site in self._candidates if len(self._readers[site]) == 1}

    def folds(self, site: str) -> bool:
        """Whether the layer at a site is folded."""
        return site in self._sites

    def waiting(self, x: Tensor) -> Foldable | None:
        """The layer that waits with this result for its batch norm."""
        producer = self._producers.get(x)
        return producer if isinstance(producer, Foldable) else None

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "sites": sorted(self._sites),
            "candidates": sorted(self._candidates),
            "readers": {site: sorted(names) for site, names in sorted(self._readers.items())},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken."""
        self._sites, self._candidates = set(state["sites"]), set(state["candidates"])
        self._readers = {site: set(names) for site, names in state["readers"].items()}
