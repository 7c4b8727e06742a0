"""Which layers are folded into the batch norm that follows them.

While ranges are observed, a layer notes its result, and everything that takes it in is noted as a
reader. A layer folds if a batch norm is its only reader. From then on its result, on no grid yet,
waits with the layer's sums for that norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_nna.emulator.spec import KernelRounding
from lightning_nna.emulator.weights import QuantizedWeight

if TYPE_CHECKING:
    from lightning_nna.emulator.operators.call import Activation, Call


@dataclass(frozen=True)
class Foldable:
    """A layer whose result waits for the batch norm that it folds.

    Args:
        sums: The layer's sums without its bias, whole numbers, channels along the second axis;
            empty where the result will do.
        bias: The layer's bias, or None.
        weight: The layer's weight on the chip, with a scale for each channel.
        x: The layer's input.
        rounding: Of the layer's kernel.
        exact: Whether the sums are needed.
        record: Reports the instruction, given the call, the folded weight and bias and the output.
    """

    sums: Tensor
    bias: Tensor | None
    weight: QuantizedWeight
    x: Activation
    rounding: KernelRounding
    exact: bool
    record: Callable[[Call, QuantizedWeight, Tensor, Activation], None]


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
