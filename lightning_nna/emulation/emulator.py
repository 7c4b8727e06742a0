"""``Emulator``: a module on the chip.

An emulator is attached to a module once. It observes ranges while the network runs in float,
freezes them, and from then on every operator in scope computes what the chip computes. It touches
nothing of the module but hooks, which ``strip`` takes away.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_nna.distributed import is_distributed
from lightning_nna.emulation.arguments import first_of, floats, written
from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.constants import Constants, Kind
from lightning_nna.emulation.dispatch import ROOT, Dispatch, SiteTable
from lightning_nna.emulation.forward_hooks import Emulation, ForwardHooks
from lightning_nna.emulation.fusion import Fusion
from lightning_nna.emulation.learned_scales import Learned, LearnedScales, quantized_operands
from lightning_nna.emulation.marks import Marks, Writes
from lightning_nna.emulation.modes import Fidelity, Mode, Modes, Phase
from lightning_nna.emulation.non_finite import with_cause
from lightning_nna.emulation.observers import Observer
from lightning_nna.emulation.operators import driver
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.record import Operator
from lightning_nna.emulation.program import Instruction, choice
from lightning_nna.emulation.ranges import Parts, QParams, RangeTable
from lightning_nna.emulation.scope import (
    compiled_modules,
    forward_codes,
    lightning_classes,
    modules_in_scope,
    named_modules,
    refuse,
)
from lightning_nna.emulation.spec import NNASpec, resolve_spec
from lightning_nna.emulation.telemetry import Telemetry, in_float
from lightning_nna.emulation.weight_grids import on_grid

#: Where a site runs: on the accelerator, on the CPU, or nowhere, being a constant of the program.
Place = Literal["chip", "cpu", "constant"]
#: What a saved state must have.
_STATE = frozenset({"calibrated", "fusion", "locations", "observer", "ranges"})

log = logging.getLogger(__name__)


class Emulator:
    """A module on the chip.

    Args:
        module: Any module; a LightningModule's own ``*_step`` methods stay in float.
        spec: The chip: a preset's name, an ``NNASpec``, its keys, or a YAML file.
        targets: Globs or ``re:…`` on module names; a selected module counts with all it contains.
        fidelity: ``"exact"``, or ``"fast"`` for float rounding in the requantization to 8 bits.
        observer: How ranges follow from what is observed: ``"min_max"``, ``"moving_average"``,
            ``"percentile"`` or ``"mse"``.

    Raises:
        ValueError: If a target selects nothing, a parameter is not float32, or ``fidelity`` is
            unknown.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: str | NNASpec | Mapping[str, Any] = "litert-int8",
        *,
        targets: Sequence[str] = ("*",),
        fidelity: Fidelity = "exact",
        observer: Observer = "min_max",
    ) -> None:
        refuse(module)
        if fidelity not in ("exact", "fast"):
            raise ValueError(f"fidelity must be 'exact' or 'fast', got {fidelity!r}")
        self.spec = resolve_spec(spec)
        self.targets, self.module = tuple(targets), ref(module)
        self.modes = Modes(fidelity)
        self.calibrated = False
        self.ranges = RangeTable(observer)
        self.sites = SiteTable()
        #: Called with ``(key, where it runs, operands, result)`` for every site, while coverage
        #: listens.
        self.listener: Callable[[str, Place, Any, Any], None] | None = None
        #: Called with every instruction that runs in exact fidelity, while somebody listens.
        self.recorder: Callable[[Instruction], None] | None = None
        #: Figures of every site, gathered while it is there.
        self.telemetry: Telemetry | None = None
        #: Rows per scale of the weights that operators of the chip have used, by name.
        self.used_weights: dict[str, int] = {}
        self._writes = Writes()
        self._tags = Marks(self._writes)
        self.fusion = Fusion(self._writes)
        self.scales = LearnedScales(module, self.spec, self._writes)
        self._parts = Marks(self._writes)
        self._weights: dict[tuple[int, int], tuple[Tensor, Any, QuantizedWeight]] = {}
        self._handles: list[Any] = []
        self._warned: set[str] = set()
        # What an observed forward ran that no operator of the chip is, and whether one ran at all.
        self._fallbacks: set[str] = set()
        self._observed = False
        self._attach(module)

    def _attach(self, module: nn.Module) -> None:
        """Choose the modules in scope and hook their forward."""
        named = {name or ROOT: child for name, child in named_modules(module)}
        classes = lightning_classes()
        allowed = modules_in_scope(named, self.targets)
        self.scripted = [n for n, m in named.items() if isinstance(m, torch.jit.ScriptModule)]
        if self.scripted:
            log.warning(
                "scripted modules run in float, their operators cannot be seen: %s",
                ", ".join(self.scripted),
            )
        if compiled := compiled_modules(module):
            log.warning("torch.compile is set aside while on the chip: %s", ", ".join(compiled))
        self._constants = _names_of(module)
        self.constants = Constants(self._constants)
        self.dispatch = Dispatch(
            {id(child): name for name, child in named.items()},
            allowed,
            [code for child in named.values() for code in forward_codes(child)],
            {id(child) for child in named.values() if isinstance(child, classes)},
            sites=self.sites,
            run=self._run,
            move=self._move,
            joins=self._share_a_grid,
            read=self.read,
            fallback=self._fall_back,
            in_backward=self.modes.in_backward,
            constants=self.constants,
            fold=self._fold,
            wrote=self.wrote,
            # Hooks of a backward are not seen: they may have written to weights through ``.data``.
            after_backward=self._weights.clear,
        )
        emulation = Emulation(self)
        for name, child in named.items():
            if isinstance(child, torch.jit.ScriptModule):
                continue
            hooks = ForwardHooks(emulation, name)
            self._handles.append(child.register_forward_pre_hook(hooks.before))
            self._handles.append(child.register_forward_hook(hooks.after, always_call=True))
        log.info("emulating %d modules: %s", len(allowed), ", ".join(sorted(allowed)))

    def detach(self) -> None:
        """Take every hook off the module."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # --- phases -------------------------------------------------------------------------------

    def enter_scope(self) -> None:
        """Start intercepting; weights are transformed anew for each outermost scope."""
        if self.dispatch.scope.entered == 0:
            self._weights.clear()
            self.follow_tensors()
        self.dispatch.enter()

    def follow_tensors(self) -> None:
        """Know parameters and buffers by their name, whichever tensors stand for them now.

        ``load_state_dict(…, assign=True)`` and moving to another device put others in their place.
        """
        module = self.module()
        if module is None:
            return
        self._constants = _names_of(module)
        self.constants.rename(self._constants)
        self.scales.follow(module)

    def leave_scope(self) -> None:
        """Undo one :meth:`enter_scope`."""
        self.dispatch.leave()

    @property
    def phase(self) -> Phase:
        """Mode in which the module runs in this thread."""
        return self.modes.phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self.modes.set(None if phase == "float" else Mode(phase, self.fidelity))

    @property
    def fidelity(self) -> Fidelity:
        """Fidelity of the emulation in this thread."""
        return self.modes.current.fidelity

    @fidelity.setter
    def fidelity(self, fidelity: Fidelity) -> None:
        phase = self.phase
        if phase == "float":
            self.modes.fidelity = fidelity
        else:
            self.modes.set(Mode(phase, fidelity))

    @contextmanager
    def running(
        self, phase: Phase, *, fidelity: Fidelity = "exact", learned_scales: Learned = "none"
    ) -> Iterator[Emulator]:
        """Run the module in a phase; afterwards this thread runs it as before, whatever happens.

        Args:
            phase: In float, observed, or emulated.
            fidelity: Of the emulation.
            learned_scales: See :meth:`learn`.
        """
        scope, learning = self.dispatch.scope, self.scales.learning
        entered, depth = scope.entered, len(scope.stack)
        before = self.modes.set(Mode(phase, fidelity))
        try:
            self.learn(learned_scales)
            if phase != "float":
                self.enter_scope()
            yield self
        finally:
            self.dispatch.unwind(entered, depth)
            self.learn(learning)
            self.modes.set(before)

    @contextmanager
    def observing(self) -> Iterator[Emulator]:
        """Run forwards in float and note ranges; freeze them at the end.

        Raises:
            RuntimeError: If another thread runs the module, or see :meth:`freeze`.
        """
        if self.modes.others_run():
            raise RuntimeError(
                "another thread runs this module while its ranges are to be observed: calibrate it "
                "before other threads emulate it"
            )
        ranges, fusion = self.ranges.state_dict(), self.fusion.state_dict()
        before = copy.deepcopy((ranges, fusion, self.sites.locations))
        try:
            with self.running(
                "observe", fidelity=self.fidelity, learned_scales=self.scales.learning
            ):
                yield self
            self.freeze()
        except BaseException:
            # What a failed calibration has seen must not stay in the ranges.
            ranges, fusion, self.sites.locations = before
            self.ranges.load_state_dict(ranges)
            self.fusion.load_state_dict(fusion)
            self.dispatch.forget_keys()
            raise
        self.phase = "emulate"

    @property
    def is_unused(self) -> bool:
        """Tell whether nothing was observed yet, and no thread is about to."""
        return not self.calibrated and not self.ranges.ranges and self.modes.idle

    def require_ranges(self, fallback: str | None = None) -> None:
        """Make sure that a module that is to be emulated can be; note that an observed one has run.

        Args:
            fallback: Site that runs, of a function that is no operator of the chip.

        Raises:
            RuntimeError: If no ranges were observed.
        """
        phase = self.phase
        if phase == "observe":
            self._observed = True
            if fallback is not None:
                self._fallbacks.add(fallback)
        if phase == "emulate" and not self.calibrated:
            raise RuntimeError(
                f"{self._name} is to be emulated and has no ranges: call calibrate(module, "
                f"batches) before `with emulate(module)`, or run a forward inside the block's "
                f"`with emulator.observing():`"
            )

    def refuse_replica(self) -> None:
        """Raise for a forward of ``nn.DataParallel`` while the module is observed or emulated.

        Raises:
            RuntimeError: If any thread observes or emulates the module.
        """
        if self.modes.others_run():
            raise RuntimeError(
                "nn.DataParallel runs replicas of the module in threads of its own, which would "
                "run in float: use DistributedDataParallel, or strategy='ddp' of the Trainer"
            )

    @property
    def _name(self) -> str:
        module = self.module()
        return "the module" if module is None else type(module).__name__

    def reduce_ranges(self) -> None:
        """Let every rank of a distributed run know the sites and ranges that any has seen."""
        if not is_distributed():
            return
        own = {"locations": self.sites.locations, "fusion": self.fusion.state_dict()}
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, own)
        tables = [rank["locations"] for rank in ranks]
        seen = [
            _renamed(rank["fusion"], SiteTable(rank["locations"]).unite(tables)) for rank in ranks
        ]
        self.ranges.rename(self.sites.unite(tables))
        self.dispatch.forget_keys()
        self.fusion.load_state_dict(_union(seen))
        self.ranges.share()

    def freeze(self) -> None:
        """Fix the ranges, reduced over the ranks of a distributed run.

        Raises:
            RuntimeError: If no forward was observed, or none of its operators can be emulated.
        """
        self.reduce_ranges()
        if not self.ranges.ranges:
            raise RuntimeError(self._why_no_ranges())
        self.calibrated = True
        self.fusion.freeze()
        self.ranges.clamp(self.fusion.rectified)
        self.learn(self.scales.learning)
        # An activation kept from an observed forward has no grid yet, whatever its mark says.
        self._tags.clear()
        self._parts.clear()

    def _why_no_ranges(self) -> str:
        if self._fallbacks:
            sites = sorted(self._fallbacks)
            more = f" and {len(sites) - 8} more" if len(sites) > 8 else ""
            return (
                f"forwards were observed, but {self.spec.name!r} has no operator for any of their "
                f"functions: {', '.join(sites[:8])}{more} run in float on the CPU, so there is "
                f"nothing to emulate; coverage(module, x) shows this table"
            )
        if self._observed:
            return (
                f"forwards were observed, but no function with a float tensor ran in the modules "
                f"in scope ({', '.join(sorted(self.dispatch.allowed))}): check the targets"
            )
        return "no forward was observed: run at least one batch before freezing"

    def learn(self, steps: Learned) -> None:
        """Learn the steps of weights, or of activations too, once ranges are frozen.

        Raises:
            ValueError: If ``steps`` is not ``"none"``, ``"weights"`` or ``"all"``.
        """
        self.scales.learn(steps, self.ranges if self.calibrated else None)

    def state_dict(self) -> dict[str, Any]:
        """Ranges, call sites and learned steps as plain values."""
        return {
            "calibrated": self.calibrated,
            "spec": self.spec.name,
            "arithmetic": self.spec.arithmetic,
            "targets": list(self.targets),
            "observer": self.ranges.observer,
            "ranges": self.ranges.state_dict(),
            "fusion": self.fusion.state_dict(),
            "learned_scales": self.scales.state_dict(),
            "locations": {key: list(value) for key, value in self.sites.locations.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; a calibrated state is never calibrated again.

        Raises:
            ValueError: If the state lacks an entry, as one of an older version does, or was
                observed for another spec or other targets.
        """
        missing = sorted(_STATE - set(state))
        if missing:
            raise ValueError(
                f"the state of the emulation lacks {', '.join(missing)}: another version of "
                f"lightning-nna has saved it; calibrate the module again (calibrate(module, "
                f"batches), or a fit with calibration_steps)"
            )
        own = {**self.spec.arithmetic, "targets": list(self.targets)}
        saved = {**state.get("arithmetic", {}), "targets": state.get("targets", own["targets"])}
        if self.spec.runs_alike(saved.get("operators", ()), state["locations"]):
            saved.pop("operators", None)
        differing = [
            f"{entry} is {value!r} there and {own.get(entry)!r} here"
            for entry, value in saved.items()
            if value != own.get(entry)
        ]
        if differing:
            raise ValueError(
                f"the state was saved with spec {state.get('spec')!r}, the emulator has "
                f"{self.spec.name!r}: {', '.join(differing)}; ranges do not carry over: use the "
                f"same, or calibrate again"
            )
        self.ranges = RangeTable(state["observer"])
        self.ranges.load_state_dict(state["ranges"])
        self.fusion.load_state_dict(state["fusion"])
        self.scales.load_state_dict(state.get("learned_scales", {}))
        self.sites.locations = {key: list(value) for key, value in state["locations"].items()}
        self.dispatch.forget_keys()
        self.calibrated = bool(state["calibrated"])

    def carried(self) -> dict[str, Any]:
        """Plain values from which :meth:`restored` builds the emulator of a copied module."""
        return {
            "spec": self.spec,
            "targets": self.targets,
            "fidelity": self.modes.fidelity,
            "state": self.state_dict(),
            "stages": self.scales.pipeline.carried(),
            "used_weights": dict(self.used_weights),
        }

    @classmethod
    def restored(cls, module: nn.Module, carried: Mapping[str, Any]) -> Emulator:
        """Build the emulator of a copied module.

        Args:
            module: Copy of a module with an emulator.
            carried: From :meth:`carried` of that emulator.
        """
        state = carried["state"]
        emulator = cls(
            module,
            carried["spec"],
            targets=carried["targets"],
            fidelity=carried["fidelity"],
            observer=state["observer"],
        )
        emulator.load_state_dict(state)
        emulator.scales.pipeline.adopt(carried.get("stages", {}))
        emulator.used_weights = dict(carried["used_weights"])
        return emulator

    # --- what operators ask for (``Host``) -----------------------------------------------------

    def qparams_of(self, x: Tensor) -> QParams | None:
        """Quantization parameters that travel with a tensor, until something is written to it."""
        tag: QParams | None = self._tags.get(x)
        return tag

    def set_qparams(self, x: Tensor, qparams: QParams) -> None:
        """Let parameters travel with a tensor."""
        self._tags[x] = qparams

    def set_parts(self, x: Tensor, grids: Sequence[QParams | None]) -> None:
        """Let parts of a tensor along its first axis carry parameters of their own."""
        if all(grid is not None for grid in grids):
            numbers = torch.arange(len(grids), device=x.device)
            which = numbers.reshape(-1, *[1] * (x.dim() - 1)).expand(x.shape)
            self._parts[x] = Parts(which.contiguous(), tuple(grids))

    def parts_of(self, x: Tensor) -> Parts | None:
        """Parameters of a tensor whose parts lie on several grids."""
        parts: Parts | None = self._parts.get(x)
        return parts

    def is_constant(self, x: Tensor) -> bool:
        """Tell whether a tensor is a parameter or buffer, or computed of these alone."""
        return self.constants.is_constant(x)

    def is_own(self, x: Tensor) -> bool:
        """Tell whether a tensor is itself a parameter or buffer of the module."""
        return self.constants.is_own(x)

    def in_program(self, x: Tensor) -> bool:
        """Tell whether a tensor is a constant, or computed of integers: no activation."""
        return self.constants.in_program(x)

    def weight(self, weight: Tensor, rows_per_scale: int) -> QuantizedWeight:
        """Return a weight after the weight pipeline.

        It is computed once in each outermost scope, and again after a write that can be seen.
        """
        key, step = (id(weight), rows_per_scale), self.scales.of_weight(weight, rows_per_scale)
        cached = self._weights.get(key)
        stamps = self.scales.stamps(weight, step)
        if cached is None or cached[1] != stamps:
            if step is not None:
                quantized = self.scales.quantized(weight, step, rows_per_scale)
            else:
                quantized = on_grid(self.scales.pipeline, weight, rows_per_scale, self.spec)
            cached = self._weights[key] = (weight, stamps, quantized)
            if (name := self._constants.get(id(weight))) is not None:
                self.used_weights[name] = rows_per_scale
        return cached[2]

    def rows_of(self, weight: Tensor) -> int | None:
        """Return the rows per scale of a weight that an operator has used; None for any other."""
        return self.used_weights.get(self._constants.get(id(weight), ""))

    def trainable(self, weight: Tensor, rows_per_scale: int) -> Tensor:
        """What the gradient of a weight goes to."""
        return self.scales.trainable(weight, rows_per_scale, self.weight)

    def learned_grid(self, key: str, observed: QParams) -> QParams:
        """The grid of an output."""
        return self.scales.grid(key, observed)

    @property
    def moving_grids(self) -> bool:
        """Whether grids of activations change with every step of an optimizer."""
        return self.scales.learning == "all"

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
        return self.telemetry is not None or f"{site} overflows" not in self._warned

    def count_overflow(self, site: str, lost: int, sums: int) -> None:
        """Note how many sums left the chip's range; warn, once, of a site."""
        if self.telemetry is not None:
            self.telemetry.overflow(site, lost, sums)
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
        """Note how many channels need a larger scale for their bias."""
        if self.telemetry is not None:
            self.telemetry.biases(site, int((smallest > scales).sum()), len(scales))

    # --- what the dispatch calls -----------------------------------------------------------

    def _run(
        self,
        operator: Operator,
        key: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """An operator of the chip, if this spec has it in this form."""
        phase = self.phase
        if phase == "float":
            return func(*args, **kwargs)
        if not self.calibrated:
            self.require_ranges()
        known = not operator.name or self.spec.has_operator(operator.name)
        known = known and self.spec.activation_bits in operator.widths
        if not known or not operator.supports(*args, **kwargs):
            return self._fall_back(key, func, args, kwargs)
        call = Call(
            self,
            key,
            phase == "observe",
            # Beside 16 bits float32 has no room for a rounding that is nearly always right.
            self.fidelity == "exact" or self.spec.activation_bits == 16,
            self.spec.activation_bits,
            recorder=self.recorder,
        )
        targets = written(func, args, kwargs)
        if targets:
            return self._run_writing(targets, operator, call, func, args, kwargs)
        result = self._emulate(operator, call, func, args, kwargs)
        if not isinstance(result, Tensor):  # Indices of extremes, say.
            self.constants.mark(result, None)
        if self.listener is not None and operator.name:
            self.listener(key, "chip", (args, kwargs), result)
        return result

    def _emulate(
        self,
        operator: Operator,
        call: Call,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The operator's result, a new tensor; ``func`` is the same in float."""
        key = call.site
        sampled = self.telemetry is not None and operator.name and self.phase == "emulate"
        # Batch statistics in training would be counted twice.
        sampled = sampled and operator.name != "batch_norm"
        try:
            result = driver.run(operator, call, args, kwargs)
        except FloatingPointError as error:
            raise with_cause(error, key, (args, kwargs), self._constants) from error
        if sampled and self.telemetry is not None:
            exact = in_float(func, args, kwargs)
            first = result if isinstance(result, Tensor) else result[0]
            if exact is not None:
                exact = self.fusion.rectify(key, exact)
                self.telemetry.compare(key, exact, first, self.qparams_of(first))
        if self.scales.learning == "all" and f"{key}/output" in self.scales.activations:
            result = self._learn_output(key, result, func, args, kwargs)
        return result

    def _learn_output(
        self, key: str, result: Tensor, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        """Let the gradient reach the step, if the result lies on its grid."""
        tag = self.qparams_of(result)
        if tag is None or not result.requires_grad or not self.scales.made(f"{key}/output", tag):
            return result
        operands = quantized_operands(self, args, kwargs)
        learned = self.scales.learn_output(f"{key}/output", result, tag, func, operands)
        self.set_qparams(learned, tag)
        self.fusion.copied(result, learned)
        return learned

    # --- what is written in place ---------------------------------------------------------------

    def _run_writing(
        self,
        targets: list[Tensor],
        operator: Operator,
        call: Call,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """An operator whose result goes into a tensor that is there already.

        The operator gives a new tensor, as any other call, which is then copied: what autograd
        has kept of the operands must stay as it was, so that an operand which is overwritten is
        copied first, where there will be a backward.
        """
        if kwargs.get("out") is not None:
            return self._run_into(targets, operator, call, func, args, kwargs)
        target = targets[0]
        if not args:
            args, kwargs = (target,), {k: v for k, v in kwargs.items() if k != "input"}
        has_backward = torch.is_grad_enabled() and any(
            x.requires_grad for x in floats((args, kwargs))
        )
        operand = self._copied(target) if has_backward else target
        args, kwargs = tree_map(lambda x: operand if x is target else x, (args, kwargs))
        result = self._emulate(operator, call, partial(_on_a_copy, func), args, kwargs)
        self._store(target, result)
        if self.listener is not None and operator.name:
            self.listener(call.site, "chip", (args, kwargs), target)
        return target

    def _run_into(
        self,
        targets: list[Tensor],
        operator: Operator,
        call: Call,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """An operator with ``out=``, as torch has it: without gradients, and of any shape."""
        others = {key: value for key, value in kwargs.items() if key != "out"}
        if torch.is_grad_enabled() and any(x.requires_grad for x in floats((args, others))):
            return func(*args, **kwargs)  # Raises what torch raises.
        result = self._emulate(operator, call, func, args, others)
        results = [result] if isinstance(result, Tensor) else list(result)
        for target, each in zip(targets, results, strict=True):
            if target.shape != each.shape:
                target.resize_(each.shape)
            self._store(target, each)
        if self.listener is not None and operator.name:
            self.listener(call.site, "chip", (args, others), kwargs["out"])
        return kwargs["out"]

    def _copied(self, x: Tensor) -> Tensor:
        """A copy of a tensor of which all is known that is known of the tensor."""
        twin, tag = x.clone(), self.qparams_of(x)
        if tag is not None:
            self.set_qparams(twin, tag)
        self.fusion.copied(x, twin)
        return twin

    def _store(self, target: Tensor, result: Tensor) -> None:
        """Write an operator's result, and what is known of it, to another tensor.

        What was known of the target, and of every tensor that shares its memory, is forgotten.
        """
        tag = self.qparams_of(result)
        target.copy_(result)
        self.wrote([target])
        self.fusion.copied(result, target)
        # Other types cannot hold every integer.
        if tag is not None and target.dtype == torch.float32:
            self.set_qparams(target, tag)

    def wrote(self, targets: Iterable[Tensor], kind: Kind | None = None) -> None:
        """Data, or what is none, were written to tensors: forget what was known of them."""
        for target in targets:
            self._writes.note(target)
            if kind is None:
                self.constants.wrote(target)

    def _move(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A movement: parameters of the first tensor (not a condition) go to float results.

        Those of the second where it is copied into the first.
        """
        copies = func.__name__ == "copy_"
        first = args[1] if copies else first_of(args, kwargs)
        given = first if copies else (args, kwargs)
        holds = isinstance(first, Tensor) and first.is_floating_point()
        source = next(iter(floats(first if holds else args)), None)
        identity = _is_identity(func, args)
        if source is not None and not identity:
            self.fusion.reads(source, "a movement")
        tag = None if source is None else self.qparams_of(source)
        kind = None if tag is not None else self.constants.kind_of(given)
        result = func(*args, **kwargs)
        self.wrote(written(func, args, kwargs), kind)
        if kind is None or self.dispatch.in_scope():
            self.constants.mark(result, kind)
        parts = self._parts.get(source) if tag is None and source is not None else None
        if parts is not None and source is not None and not copies:
            self._move_parts(parts, source, (func, args, kwargs), result)
        if source is not None and tag is None and kind is None:
            for leaf in floats(result):
                self.fusion.moved(source, leaf)
        if source is not None and identity:
            self.fusion.copied(source, result)
        if tag is not None:
            for leaf in floats(result):
                if leaf.dtype == torch.float32:  # Other types cannot hold every integer.
                    self.set_qparams(leaf, tag)
            if self.recorder is not None and self.phase == "emulate" and self.fidelity == "exact":
                path, name = (self.dispatch.scope.stack or [ROOT])[-1], func.__name__
                if (chosen := choice(name, path, args, result, self.qparams_of)) is not None:
                    self.recorder(chosen)
        return result

    def _move_parts(
        self,
        parts: Parts,
        source: Tensor,
        call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]],
        result: Any,
    ) -> None:
        """Follow which grid every element of a result lies on, by the same movement of numbers."""
        func, args, kwargs = call
        moved = func(*(parts.which if x is source else x for x in args), **kwargs)
        leaves = moved if isinstance(moved, (tuple, list)) else [moved]
        for leaf, which in zip(floats(result), leaves, strict=True):
            moved_parts = Parts(which, parts.grids)
            grid = moved_parts.one_grid() if which.numel() else None
            if grid is not None:
                self.set_qparams(leaf, grid)
            elif leaf is not source:
                self._parts[leaf] = moved_parts

    def read(self, values: Any) -> None:
        """Note that something that is not on the chip reads activations, nested."""
        if self.phase != "float":
            for x in floats(values):
                self.fusion.reads(x, "something else")

    def _share_a_grid(self, name: str, args: tuple[Any, ...]) -> bool:
        """Tell whether every float tensor among arguments carries the same parameters.

        While ranges are observed nobody knows: what can join different grids notes its range then.
        """
        if name == "stack" and self.phase == "observe":
            return False
        tags = [self.qparams_of(leaf) for leaf in floats(args)]
        return bool(tags) and tags[0] is not None and all(tag == tags[0] for tag in tags)

    def _fold(
        self,
        key: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kind: Kind,
    ) -> Any:
        """Run in float a function of no activation: its result is a constant of the program."""
        result = func(*args, **kwargs)
        targets = written(func, args, kwargs)
        self.wrote(targets, kind)
        self.constants.mark((result, targets), kind)
        if self.listener is not None:
            self.listener(key, "constant", (args, kwargs), result)
        return result

    def _fall_back(
        self, key: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Whatever the chip does not have, in float; what it writes in place leaves the grid."""
        if not self.calibrated:
            self.require_ranges(key)
        for operand in floats((args, kwargs)):
            self.fusion.reads(operand, key)
            self.fusion.check_finished(operand, key)
        result = func(*args, **kwargs)
        self.wrote(written(func, args, kwargs))
        self.constants.mark(result, None)
        if self.listener is not None:
            self.listener(key, "cpu", (args, kwargs), result)
        return result


def _renamed(value: Any, sites: Mapping[str, str]) -> Any:
    """Nested plain values with other keys of sites."""
    if isinstance(value, dict):
        return {_renamed(key, sites): _renamed(entry, sites) for key, entry in value.items()}
    if isinstance(value, list):
        return [_renamed(entry, sites) for entry in value]
    return sites.get(value, value) if isinstance(value, str) else value


def _union(states: Sequence[Any]) -> Any:
    """Merge plain states: all that any of them has, and of numbers those of the first."""
    if isinstance(states[0], dict):
        keys = dict.fromkeys(key for state in states for key in state)
        return {key: _union([state[key] for state in states if key in state]) for key in keys}
    if isinstance(states[0], list):
        return sorted({entry for state in states for entry in state})
    return states[0]


def _on_a_copy(func: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Compute what an in-place function writes to a tensor, and leave the tensor unchanged."""
    return func(x.clone(), *args, **kwargs)


def _is_identity(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Return whether a movement returns its tensor unchanged.

    PyTorch calls ``x.view_as(x)`` on what an ``autograd.Function`` returns as it came in, which is
    how the backward hooks of modules begin.
    """
    return func.__name__ == "view_as" and len(args) == 2 and args[0] is args[1]


def _names_of(module: nn.Module) -> dict[int, str]:
    """Names of a module's parameters and buffers by ``id``."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {id(tensor): name for name, tensor in tensors}
