"""``EmulationState``: all that is known of one emulated module.

Ranges and call sites, the quantization parameters of live tensors, quantized weights, fusion,
learned scales and the modes of threads. Operators read and write it through their call; the
dispatch keeps it up to date; the emulator saves and restores it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_nna.emulation.arguments import floats
from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.constants import Constants, Kind
from lightning_nna.emulation.fusion import Fusion
from lightning_nna.emulation.learned_scales import LearnedScales
from lightning_nna.emulation.marks import Marks, Writes
from lightning_nna.emulation.modes import Modes, Phase
from lightning_nna.emulation.observers import Observer
from lightning_nna.emulation.ranges import Parts, QParams, RangeTable
from lightning_nna.emulation.sites import SiteTable
from lightning_nna.emulation.spec import NNASpec
from lightning_nna.emulation.weight_grids import on_grid

log = logging.getLogger(__name__)


class EmulationState:
    """Hold all that is known of one module while it is observed or emulated.

    Args:
        module: The module; only a weak reference to it is kept.
        spec: The accelerator.
        observer: How ranges follow from observed values.

    Attributes:
        modes: The mode of every thread. Only :meth:`.Emulator.running` enters modes.
        calibrated: Whether ranges are frozen.
        ranges: Observed ranges by the key of a site's operand or result.
        sites: Call sites by key.
        constants: Which tensors belong to the program and not to the data.
        fusion: Layers that are folded into the batch norm or the ReLU after them.
        scales: Learned scales.
        used_weights: Rows per scale of the weights that operators have used, by name.
        names: Names of parameters and buffers by ``id``.
        observed_forward: Whether an observed forward has begun.
        fallbacks: Sites of an observed forward that are no operators of the accelerator.
    """

    def __init__(self, module: nn.Module, spec: NNASpec, observer: Observer) -> None:
        self.module, self.spec = ref(module), spec
        self.modes = Modes()
        self.calibrated = False
        self.ranges = RangeTable(observer)
        self.sites = SiteTable()
        self.names = _names_of(module)
        self.constants = Constants(self.names)
        self._writes = Writes()
        self.fusion = Fusion(self._writes)
        self.scales = LearnedScales(module, spec, self._writes)
        self.used_weights: dict[str, int] = {}
        self.observed_forward = False
        self.fallbacks: set[str] = set()
        self._qparams = Marks(self._writes)
        self._parts = Marks(self._writes)
        self._weights: dict[tuple[int, int], tuple[Tensor, Any, QuantizedWeight]] = {}
        self._warned: set[str] = set()

    @property
    def phase(self) -> Phase:
        """Phase in which the module runs in this thread."""
        return self.modes.current.phase

    @property
    def module_name(self) -> str:
        """Class of the module, for messages."""
        module = self.module()
        return "the module" if module is None else type(module).__name__

    def follow_tensors(self) -> None:
        """Know parameters and buffers by their name, whichever tensors stand for them now.

        ``load_state_dict(…, assign=True)`` and moving to another device put others in their place.
        """
        module = self.module()
        if module is None:
            return
        self.names = _names_of(module)
        self.constants.rename(self.names)
        self.scales.follow(module)

    def require_ranges(self, fallback: str | None = None) -> None:
        """Make sure that a module that is to be emulated can be; note that an observed one has run.

        Args:
            fallback: Site that runs, of a function that is no operator of the accelerator.

        Raises:
            RuntimeError: If no ranges were observed.
        """
        phase = self.phase
        if phase == "observe":
            self.observed_forward = True
            if fallback is not None:
                self.fallbacks.add(fallback)
        if phase == "emulate" and not self.calibrated:
            raise RuntimeError(
                f"{self.module_name} is to be emulated and has no ranges: call calibrate(module, "
                f"batches) before `with emulate(module)`, or run a forward inside the block's "
                f"`with emulator.observing():`"
            )

    def require_own_thread(self) -> None:
        """Raise for a forward of ``nn.DataParallel`` while the module is observed or emulated.

        Raises:
            RuntimeError: If any thread observes or emulates the module.
        """
        if self.modes.others_run():
            raise RuntimeError(
                "nn.DataParallel runs replicas of the module in threads of its own, which would "
                "run in float: use DistributedDataParallel, or strategy='ddp' of the Trainer"
            )

    # --- live tensors ---------------------------------------------------------------------------

    def qparams_of(self, x: Tensor) -> QParams | None:
        """Return the quantization parameters of a tensor of any shape, until it is written to."""
        qparams: QParams | None = self._qparams.get(x)
        return qparams

    def set_qparams(self, x: Tensor, qparams: QParams) -> None:
        """Let quantization parameters travel with a tensor of any shape."""
        self._qparams[x] = qparams

    def parts_of(self, x: Tensor) -> Parts | None:
        """Return the parameters of a tensor of any shape whose elements have several."""
        parts: Parts | None = self._parts.get(x)
        return parts

    def set_parts(self, x: Tensor, parts: Parts) -> None:
        """Let every element of a tensor of any shape carry one of several parameters."""
        self._parts[x] = parts

    def set_rows(self, x: Tensor, grids: Sequence[QParams | None]) -> None:
        """Let each entry of the first axis carry its own quantization parameters.

        Args:
            x: Any shape.
            grids: One for each entry; if one is None, nothing is noted.
        """
        if all(grid is not None for grid in grids):
            numbers = torch.arange(len(grids), device=x.device)
            which = numbers.reshape(-1, *[1] * (x.dim() - 1)).expand(x.shape)
            self._parts[x] = Parts(which.contiguous(), tuple(grids))

    def forget_qparams(self) -> None:
        """Forget the quantization parameters of all live tensors."""
        self._qparams.clear()
        self._parts.clear()

    def wrote(self, targets: Iterable[Tensor], kind: Kind | None = None) -> None:
        """Forget what was known of tensors that something has written to.

        Args:
            targets: Tensors of any shape.
            kind: What was written: None for data.
        """
        for target in targets:
            self._writes.note(target)
            if kind is None:
                self.constants.wrote(target)

    def copied(self, x: Tensor) -> Tensor:
        """Copy a tensor of any shape, with all that is known of it."""
        twin, qparams = x.clone(), self.qparams_of(x)
        if qparams is not None:
            self.set_qparams(twin, qparams)
        self.fusion.copied(x, twin)
        return twin

    def consumed_outside(self, values: Any) -> None:
        """Note that something that is not emulated reads activations.

        Args:
            values: Tensors of any shape, nested.
        """
        if self.phase != "float":
            for x in floats(values):
                self.fusion.reads(x, "something else")

    # --- weights --------------------------------------------------------------------------------

    def weight(self, weight: Tensor, rows_per_scale: int) -> QuantizedWeight:
        """Return a weight after the weight pipeline, on the accelerator's integers.

        It is computed once in each outermost scope, and again after a write that can be seen.

        Args:
            weight: Shape ``(rows, …)``, float32.
            rows_per_scale: Rows that share a scale; divides the number of rows.
        """
        key, scale = (id(weight), rows_per_scale), self.scales.of_weight(weight, rows_per_scale)
        cached = self._weights.get(key)
        stamps = self.scales.stamps(weight, scale)
        if cached is None or cached[1] != stamps:
            if scale is not None:
                quantized = self.scales.quantized(weight, scale, rows_per_scale)
            else:
                quantized = on_grid(self.scales.pipeline, weight, rows_per_scale, self.spec)
            cached = self._weights[key] = (weight, stamps, quantized)
            if (name := self.names.get(id(weight))) is not None:
                self.used_weights[name] = rows_per_scale
        return cached[2]

    def forget_weights(self) -> None:
        """Quantize weights again when they are next used."""
        self._weights.clear()

    def rows_of(self, weight: Tensor) -> int | None:
        """Return the rows per scale of a weight that an operator has used; None for any other.

        Args:
            weight: Any shape.
        """
        return self.used_weights.get(self.names.get(id(weight), ""))

    def trainable(self, weight: Tensor, rows_per_scale: int) -> Tensor:
        """Return the tensor that the gradient of a weight goes to, of the weight's shape."""
        return self.scales.trainable(weight, rows_per_scale, self.weight)

    def quantized_operands(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments of a torch function with quantized weights in place of float ones."""

        def replaced(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            # It may be a view of a parameter, as in ``x @ w.T``.
            base = leaf if leaf._base is None else leaf._base
            rows = self.rows_of(base)
            if rows is None:
                return leaf
            values = self.weight(base, rows).values
            if leaf is base:
                return values
            return values.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())

        leaves, structure = tree_flatten((args, kwargs))
        operands: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(
            [replaced(leaf) for leaf in leaves], structure
        )
        return operands

    # --- warnings -------------------------------------------------------------------------------

    def first_run_after_freeze(self, key: str) -> None:
        """Warn, once, of a site that ran only after the ranges were frozen."""
        if key not in self._warned:
            self._warned.add(key)
            log.warning(
                "%s first ran after the ranges were frozen: its range is that of its first call; "
                "calibrate with batches that take this path",
                key,
            )

    def watches_overflow(self, site: str) -> bool:
        """Tell whether a site's overflows are counted, or none of them has been reported."""
        counted = self.modes.current.telemetry is not None
        return counted or f"{site} overflows" not in self._warned

    def count_overflow(self, site: str, lost: int, sums: int) -> None:
        """Note how many sums left the accumulator's range; warn, once, of a site."""
        if (telemetry := self.modes.current.telemetry) is not None:
            telemetry.overflow(site, lost, sums)
        if lost and f"{site} overflows" not in self._warned:
            self._warned.add(f"{site} overflows")
            log.warning(
                "%s: %d of %d sums do not fit the integers of %s: they %s, as in its kernels; "
                "scale the operator's input down, or calibrate with inputs of this size",
                site,
                lost,
                sums,
                self.spec.name,
                "wrap around" if self.spec.accumulator_overflow == "wrap" else "saturate",
            )

    def count_biases(self, site: str, smallest: Tensor, scales: Tensor) -> None:
        """Note how many channels need a larger scale for their bias.

        Args:
            site: Key of the call site.
            smallest: Smallest scale that holds each channel's bias, shape ``(channels,)``.
            scales: Scale of each channel's weights, shape ``(channels,)``.
        """
        if (telemetry := self.modes.current.telemetry) is not None:
            telemetry.biases(site, int((smallest > scales).sum()), len(scales))


def _names_of(module: nn.Module) -> dict[int, str]:
    """Return the names of a module's parameters and buffers by ``id``."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {id(tensor): name for name, tensor in tensors}
