"""Fusion of layers with the batch norm or the ReLU that follows them.

While ranges are observed, a layer notes its result, and every operator that takes the result is
noted as a consumer. A layer is folded into a batch norm that is its only consumer: from then on its
result has no quantization parameters and is deferred, with the layer's sums, until that norm runs.
A function out of scope and the caller of the root's forward are consumers, too.

ReLU fusion: an operator of any kind whose only consumer is a ReLU needs no integers for values that
the ReLU removes. Its range ends at 0 (and at 6 for a ReLU6), so that its own clipping is the ReLU,
as with the fused activation of a reference kernel, and its scale is smaller.
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
    """Describe a layer whose result is deferred until the batch norm after it runs.

    Args:
        sums: Sums of the layer without its bias, whole numbers, shape ``(batch, channels, …)``;
            empty if the backward and the norm need the result alone.
        bias: Bias of the layer, shape ``(channels,)``, or None.
        weight: Quantized weight of the layer, with a scale for each channel.
        x: Input of the layer.
        rounding: Rounding of the layer's kernel.
        exact: Whether the sums are needed.
        sums_of: Function that computes the sums for another weight of the same shape.
        record: Function that records the instruction, given the call, the folded weight and bias
            and the output.
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
    """Record producers and consumers of results, and which of them are fused.

    Args:
        writes: Writes to tensors, see :mod:`.marks`.

    Attributes:
        fused_relu: Largest value of the ReLU that is fused into a site, by site; infinite for none.
    """

    def __init__(self, writes: Writes) -> None:
        self.fused_relu: dict[str, float] = {}
        self._folded: set[str] = set()
        self._batch_norm_producers: set[str] = set()
        self._relu_producers: dict[str, float] = {}
        self._consumers: dict[str, set[str]] = {}
        # By tensor: the site of the layer that has produced it, or the deferred layer.
        self._producers = Marks(writes)
        # By tensor: the site of the operator, of any kind, that has produced it.
        self._outputs = Marks(writes)
        # By tensor: the deferred layer some of whose values a layout operator has put there.
        self._deferred_layouts = Marks(writes)
        # By tensor: the site of the operator whose output has a fused ReLU.
        self._fused_outputs = Marks(writes)
        self._warned: set[str] = set()

    def note_output(self, result: Tensor, site: str) -> None:
        """Note the site of an operator's result, of any shape."""
        self._outputs[result] = site

    def note_copy(self, source: Tensor, copy: Tensor) -> None:
        """Note that ``copy`` has the values and the shape of an operator's result ``source``."""
        self.note_alias(source, copy)
        producer = self._producers.get(source)
        if producer is not None:
            self._producers[copy] = producer

    def note_alias(self, source: Tensor, result: Tensor) -> None:
        """Note that ``result``, of any shape, counts as the output of ``source``'s site.

        It has some of the values of ``source``, or all of them after a dropout.
        """
        for sites in (self._outputs, self._fused_outputs):
            site = sites.get(source)
            if site is not None:
                sites[result] = site

    def note_relu(self, x: Tensor, upper: float) -> None:
        """Note that a ReLU with the largest value ``upper`` consumes ``x``, of any shape."""
        site = self._outputs.get(x)
        if site is not None:
            self._relu_producers[site] = upper

    def note_batch_norm(self, x: Tensor) -> None:
        """Note that a batch norm consumes ``x``, shape ``(batch, channels, …)``."""
        producer = self._producers.get(x)
        if isinstance(producer, str):
            self._batch_norm_producers.add(producer)

    def apply_relu(self, site: str, x: Tensor) -> Tensor:
        """Clamp values of any shape as the ReLU that is fused into a site does, if there is one."""
        upper = self.fused_relu.get(site)
        return x if upper is None else x.clamp(0.0, upper)

    def note_producer(self, result: Tensor, producer: str | FusionCandidate) -> Tensor:
        """Note the layer that has produced a result.

        Args:
            result: Result of a layer, shape ``(batch, channels, …)``.
            producer: Key of the layer's call site, or the layer itself if its result is deferred.

        Returns:
            ``result``.
        """
        self._producers[result] = producer
        return result

    def note_consumer(self, x: Tensor, consumer: str) -> None:
        """Note a site, or any other name, that consumes ``x``, of any shape."""
        if not (self._producers.entries or self._outputs.entries or self._fused_outputs.entries):
            return
        producer = self._producers.get(x)
        if not isinstance(producer, str):
            producer = self._outputs.get(x)
        if producer is not None:
            self._consumers.setdefault(producer, set()).add(consumer)
        if self._fused_outputs.entries:
            self._warn_of_new_consumer(x, consumer)

    def _warn_of_new_consumer(self, x: Tensor, consumer: str) -> None:
        """Warn, once for each site, of a consumer that meets the output of a fused ReLU."""
        site = self._fused_outputs.get(x)
        if site is None or site in self._warned or consumer in self._consumers.get(site, ()):
            return
        self._warned.add(site)
        log.warning(
            "%s ends at 0, because in calibration a ReLU was the only consumer of its result; now "
            "%s consumes it, too, and gets no value below 0: calibrate with batches that take this "
            "path",
            site,
            consumer,
        )

    def note_fused_output(self, result: Tensor, site: str) -> None:
        """Note a result, of any shape, that has been clamped by the ReLU fused into its site."""
        self._fused_outputs[result] = site

    def freeze(self) -> None:
        """Fuse from now on what has had a batch norm or a ReLU as its only consumer."""
        self._folded |= {
            site for site in self._batch_norm_producers if len(self._consumers[site]) == 1
        }
        for site, upper in self._relu_producers.items():
            if len(self._consumers[site]) == 1 and site not in self._folded:
                self.fused_relu[site] = upper
        self._outputs.clear()

    def is_folded(self, site: str) -> bool:
        """Tell whether the layer at a site is folded into the batch norm after it."""
        return site in self._folded

    def deferred(self, x: Tensor) -> FusionCandidate | None:
        """Return the layer whose deferred result is ``x``, shape ``(batch, channels, …)``."""
        producer = self._producers.get(x)
        return producer if isinstance(producer, FusionCandidate) else None

    def note_layout(self, x: Tensor, result: Tensor) -> None:
        """Note that a layout operator has put values of ``x`` in ``result``; both of any shape."""
        if not (self._producers.entries or self._deferred_layouts.entries):
            return
        candidate = self.deferred(x) or self._deferred_layouts.get(x)
        if candidate is not None:
            self._deferred_layouts[result] = candidate

    def require_computed(self, x: Tensor, consumer: str) -> None:
        """Raise if a result is deferred until a batch norm runs.

        Args:
            x: Operand of any shape.
            consumer: Key of the site that consumes it.

        Raises:
            RuntimeError: If ``x`` is such a result; names both sites.
        """
        if not (self._producers.entries or self._deferred_layouts.entries):
            return
        candidate = self.deferred(x) or self._deferred_layouts.get(x)
        if candidate is not None:
            raise RuntimeError(
                f"{consumer} consumes the result of {candidate.site}, which is folded into the "
                f"batch norm after it, because in calibration that norm was its only consumer: "
                f"calibrate with batches that take this path"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the noted sites as plain values."""
        return {
            "folded": sorted(self._folded),
            "batch_norm_producers": sorted(self._batch_norm_producers),
            "fused_relu": dict(sorted(self.fused_relu.items())),
            "relu_producers": dict(sorted(self._relu_producers.items())),
            "consumers": {site: sorted(names) for site, names in sorted(self._consumers.items())},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._folded = set(state["folded"])
        self._batch_norm_producers = set(state["batch_norm_producers"])
        self.fused_relu = dict(state["fused_relu"])
        self._relu_producers = dict(state["relu_producers"])
        self._consumers = {site: set(names) for site, names in state["consumers"].items()}
