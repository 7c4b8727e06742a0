"""``EmulationState``: the state of one emulated module.

Ranges and call sites, the quantization parameters of live tensors, quantized weights, fusion,
learned scales and the modes of threads. Operators read and write it through their call; the
dispatch keeps it up to date; the emulator saves and restores it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_nna.emulation.arguments import floats
from lightning_nna.emulation.arithmetic.deferred_checks import DEFERRED
from lightning_nna.emulation.arithmetic.on_host import in_memory
from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.constants import Constants, Kind
from lightning_nna.emulation.fusion import Fusion
from lightning_nna.emulation.learned_scales import LearnedScales
from lightning_nna.emulation.marks import Marks, Stamp, Writes
from lightning_nna.emulation.modes import Modes, Phase
from lightning_nna.emulation.observers import Observer
from lightning_nna.emulation.parameter_numbers import ParameterNumbers
from lightning_nna.emulation.ranges import MixedQParams, QParams, RangeTable
from lightning_nna.emulation.sites import SiteTable
from lightning_nna.emulation.spec import NNASpec
from lightning_nna.emulation.weight_grids import on_grid

log = logging.getLogger(__name__)
_REMEDY_OF_OVERFLOW = "scale the operator's input down, or calibrate with inputs of this size"


class EmulationState:
    """Hold the state of one module while it is observed or emulated.

    Args:
        module: Module; only a weak reference to it is kept.
        spec: Accelerator.
        observer: Rule by which ranges follow from observed values.

    Attributes:
        modes: The mode of every thread. Only :meth:`.Emulator.running` enters modes.
        calibrated: Whether ranges are frozen.
        ranges: Observed ranges by the key of a site's operand or result.
        sites: Call sites by key.
        constants: Which tensors belong to the program and not to the data.
        fusion: Layers that are folded into the batch norm or the ReLU after them.
        scales: Learned scales.
        numbers: Numbers of parameters on a device.
        used_weights: Rows per scale of the weights that operators have used, by name.
        names: Names of parameters and buffers by ``id``.
        observed_forward: Whether an observed forward has begun.
        qparams_of: Function that returns the quantization parameters of a tensor of any shape,
            until it is written to; None for a tensor without them.
        set_qparams: Function that attaches quantization parameters to a tensor of any shape.
        fallbacks: Sites of an observed forward that are no operators of the accelerator, each with
            what to write instead, if something is known.
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
        self.numbers = ParameterNumbers()
        self.observed_forward = False
        self.fallbacks: dict[str, str] = {}
        #: Forms of operators on this accelerator, see :func:`.driver.drive`.
        self.forms: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._qparams = Marks(self._writes)
        self.qparams_of: Callable[[Tensor], QParams | None] = self._qparams.get
        self.set_qparams: Callable[[Tensor, QParams], None] = self._qparams.__setitem__
        self._mixed_qparams = Marks(self._writes)
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
        """Look the module's parameters and buffers up again.

        ``load_state_dict(…, assign=True)`` and moving to another device replace the tensors.
        """
        module = self.module()
        if module is None:
            return
        self.names = _names_of(module)
        self.constants.rename(self.names)
        self.scales.follow(module)

    def require_ranges(self, fallback: str | None = None, remedy: str = "") -> None:
        """Raise if the module is emulated without ranges; note an observed forward.

        Args:
            fallback: Key of the site that runs, if its function is no operator of the accelerator.
            remedy: What to write instead of it.

        Raises:
            RuntimeError: If no ranges were observed.
        """
        phase = self.phase
        if phase == "observe":
            self.observed_forward = True
            if fallback is not None:
                self.fallbacks[fallback] = remedy
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

    def mixed_qparams_of(self, x: Tensor) -> MixedQParams | None:
        """Return the parameters of a tensor of any shape whose elements have different ones."""
        mixed: MixedQParams | None = self._mixed_qparams.get(x)
        return mixed

    def set_mixed_qparams(self, x: Tensor, mixed: MixedQParams) -> None:
        """Attach different parameters to the elements of a tensor of any shape."""
        self._mixed_qparams[x] = mixed

    def parameters_of_base(self, view: Tensor) -> MixedQParams | None:
        """Return the parameters of the tensor that a view, of any shape, is part of, if any."""
        base = view._base
        if base is None or base.layout is not torch.strided:
            return None
        qparams = self.qparams_of(base)
        if qparams is None:
            return self.mixed_qparams_of(base)
        index = torch.zeros(base.shape, dtype=torch.int64, device=base.device)
        return MixedQParams(index, (qparams,))

    def restore_base(self, view: Tensor, qparams: QParams, before: MixedQParams | None) -> None:
        """Attach parameters to a tensor part of which has been written through a view.

        While ranges are observed its consumers observe it, since parameters are not known yet.

        Args:
            view: View of any shape, after the write.
            qparams: Parameters of the values that were written.
            before: Parameters of the tensor before, see :meth:`parameters_of_base`.
        """
        base = view._base
        if before is None or base is None or self.phase == "observe":
            return
        memory = torch.zeros(
            base.untyped_storage().nbytes() // base.element_size(),
            dtype=torch.int64,
            device=base.device,
        )
        form = base.shape, base.stride(), base.storage_offset()
        memory.as_strided(*form).copy_(before.index)
        every = (*before.qparams, qparams)
        memory.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(len(every) - 1)
        mixed = MixedQParams(memory.as_strided(*form).clone(), every)
        used = {every[position] for position in mixed.index.unique().tolist()}
        single = used.pop() if len(used) == 1 else None
        if single is not None:
            self.set_qparams(base, single)
        else:
            self.set_mixed_qparams(base, mixed)

    def set_row_qparams(self, x: Tensor, qparams: Sequence[QParams | None]) -> None:
        """Attach quantization parameters to every row of a tensor.

        Args:
            x: Shape ``(rows, …)``.
            qparams: Parameters of each row; if one is None, nothing is attached.
        """
        if all(each is not None for each in qparams):
            positions = torch.arange(len(qparams), device=x.device)
            index = positions.reshape(-1, *[1] * (x.dim() - 1)).expand(x.shape)
            self._mixed_qparams[x] = MixedQParams(index.contiguous(), tuple(qparams))

    def forget_qparams(self) -> None:
        """Forget the quantization parameters of all live tensors."""
        self._qparams.clear()
        self._mixed_qparams.clear()

    def note_writes(self, targets: Iterable[Tensor], kind: Kind | None = None) -> None:
        """Forget the marks of tensors that have been written to.

        Args:
            targets: Tensors of any shape.
            kind: Kind of the values written; None for data.
        """
        for target in targets:
            self._writes.note(target)
            if kind is None:
                self.constants.note_write(target)

    def clone(self, x: Tensor) -> Tensor:
        """Copy a tensor of any shape, with its quantization parameters, kind and producer."""
        copy, qparams, mixed = x.clone(), self.qparams_of(x), self.mixed_qparams_of(x)
        if qparams is not None:
            self.set_qparams(copy, qparams)
        elif mixed is not None:
            self.set_mixed_qparams(copy, mixed)
        else:
            self.constants.mark(copy, self.constants.kind_of([x]))
        self.fusion.note_copy(x, copy)
        return copy

    def note_outside_consumers(self, values: Any) -> None:
        """Note that code that is not emulated consumes activations.

        Args:
            values: Tensors of any shape, nested.
        """
        if self.phase != "float":
            for x in floats(values):
                self.fusion.note_consumer(x, "code that is not emulated")

    # --- weights --------------------------------------------------------------------------------

    def weight(self, weight: Tensor, rows_per_scale: int) -> QuantizedWeight:
        """Return the quantized weight, after the weight pipeline.

        It is computed once in each outermost scope, and again after a write that is noted.

        Args:
            weight: Weight, float32, shape ``(rows, …)``.
            rows_per_scale: Number of rows that share a scale, which divides the number of rows, or
                :data:`.SECOND_AXIS`.
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

    def stamp(self, x: Tensor) -> Stamp:
        """Return a value that changes with a write to a tensor of any shape, see :class:`Writes`.

        Hooks of a backward write unseen: all weights are forgotten after it.
        """
        return self._writes.stamp(x)

    def forget_weights(self) -> None:
        """Quantize weights again when they are next used."""
        self._weights.clear()

    def scale_of_table(self, table: Tensor) -> float:
        """Return the one scale of a quantized table of embeddings, shape ``(rows, …)``."""
        if in_memory(table):
            return float(self.weight(table, table.shape[0]).scales[0])
        return self.numbers.read(table, self._scale_of_table)

    def _scale_of_table(self, table: Tensor) -> Tensor:
        return self.weight(table, table.shape[0]).scales[0]

    def rows_of(self, weight: Tensor) -> int | None:
        """Return the rows per scale of a weight that an operator has used; None for any other.

        Args:
            weight: Weight of any shape.
        """
        return self.used_weights.get(self.names.get(id(weight), ""))

    def trainable(self, weight: Tensor, rows_per_scale: int) -> Tensor:
        """Return the tensor that receives the gradient of a weight, of the weight's shape."""
        return self.scales.trainable(weight, rows_per_scale, self.weight)

    def quantized_operands(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments of a torch function with weights replaced by their quantized values."""

        def replaced(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            # The argument may be a view of a parameter, as in ``x @ w.T``.
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
        """Warn, once, of a site that first runs after the ranges were frozen."""
        if key not in self._warned:
            self._warned.add(key)
            log.warning(
                "%s first ran after the ranges were frozen: its range is that of its first call; "
                "calibrate with batches that take this path",
                key,
            )

    def watches_overflow(self, site: str) -> bool:
        """Tell whether a site's overflows are counted by a telemetry or not yet reported."""
        counted = self.modes.current.telemetry is not None
        return counted or f"{site} overflows" not in self._warned

    def count_overflow(
        self, site: str, lost: Tensor, sums: int, remedy: str = _REMEDY_OF_OVERFLOW
    ) -> None:
        """Count sums that overflow; warn once for each site.

        Args:
            site: Key of the call site.
            lost: Number of sums outside the range of the accumulator, integer, without axes.
            sums: Number of all sums.
            remedy: What keeps them inside.
        """
        # A device tells the number later, when another telemetry may listen.
        telemetry = self.modes.current.telemetry

        def report(number: int) -> None:
            if telemetry is not None:
                telemetry.overflow(site, number, sums)
            if number:
                self._warn_of_overflow(site, number, sums, remedy)

        DEFERRED.count(lost, report)

    def _warn_of_overflow(self, site: str, lost: int, sums: int, remedy: str) -> None:
        if f"{site} overflows" in self._warned:
            return
        self._warned.add(f"{site} overflows")
        log.warning(
            "%s: %d of %d sums do not fit the integers of %s: they %s, as in its kernels; %s",
            site,
            lost,
            sums,
            self.spec.name,
            "wrap around" if self.spec.accumulator_overflow == "wrap" else "saturate",
            remedy,
        )

    def count_biases(self, site: str, bias: Tensor, unit: float, scales: Tensor) -> None:
        """Count channels whose scale was raised for their bias.

        Args:
            site: Key of the call site.
            bias: Biases, float, shape ``(channels,)``.
            unit: Divisor of a bias that gives the smallest scale that holds it.
            scales: Scales of the weights, float, shape ``(channels,)``.
        """
        if (telemetry := self.modes.current.telemetry) is not None:
            number = (bias.detach().abs().double() / unit > scales).sum()
            DEFERRED.count(number, lambda raised: telemetry.biases(site, raised, len(scales)))


def _names_of(module: nn.Module) -> dict[int, str]:
    """Return the names of a module's parameters and buffers by ``id``; the first of several."""
    names: dict[int, str] = {}
    # In one pass, since it is made with every step.
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        for tensors in (child._parameters, child._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    names.setdefault(id(tensor), prefix + name)
    return names
