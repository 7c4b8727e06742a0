"""``Emulator``: observe the ranges of a module, freeze them, and emulate it.

An emulator is attached to a module once. It observes ranges while the network runs in float and
freezes them; from then on every operator in scope computes what the accelerator computes. It adds
hooks to the module, which ``strip`` removes, and changes nothing else of it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_nna.distributed import is_distributed, is_first_process
from lightning_nna.emulation.arithmetic.deferred_checks import DEFERRED
from lightning_nna.emulation.dispatch import Dispatch
from lightning_nna.emulation.forward_hooks import ForwardHooks, SharedHooks
from lightning_nna.emulation.learned_scales import Learned, LearnedScales
from lightning_nna.emulation.modes import FIDELITIES, Fidelity, Listener, Mode, Phase, Recorder
from lightning_nna.emulation.observers import Observer
from lightning_nna.emulation.ranges import RangeTable
from lightning_nna.emulation.scope import (
    compiled_modules,
    forward_codes,
    lightning_classes,
    modules_in_scope,
    named_modules,
    require_float32,
)
from lightning_nna.emulation.sites import ROOT, CallSites, SiteTable
from lightning_nna.emulation.spec import DEFAULT_PRESET, NNASpec, resolve_spec
from lightning_nna.emulation.state import EmulationState
from lightning_nna.emulation.telemetry import Telemetry
from lightning_nna.name_lists import listed

#: Entries that a saved state must have.
_STATE = frozenset({"calibrated", "fusion", "locations", "observer", "ranges"})

log = logging.getLogger(__name__)


class Emulator:
    """Emulate a module on an accelerator.

    Args:
        module: Any module; a LightningModule's own ``*_step`` methods stay in float.
        spec: The accelerator: a preset's name, an ``NNASpec``, its keys, or a YAML file.
        targets: Globs or ``re:…`` on module names; a selected module counts with all it contains.
        observer: How ranges follow from what is observed: ``"min_max"``, ``"moving_average"``,
            ``"percentile"`` or ``"mse"``.

    Attributes:
        state: All that is known of the module.
        dispatch: Runs its torch functions.
        scripted: Paths of scripted modules, which run in float.

    Raises:
        ValueError: If a target selects nothing, or a parameter is not float32.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: str | NNASpec | Mapping[str, Any] = DEFAULT_PRESET,
        *,
        targets: Sequence[str] = ("*",),
        observer: Observer = "min_max",
    ) -> None:
        require_float32(module)
        self.targets = tuple(targets)
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
            log.warning("torch.compile is disabled while emulated: %s", ", ".join(compiled))
        self.state = EmulationState(module, resolve_spec(spec), observer)
        call_sites = CallSites(
            self.state.sites,
            {id(child): name for name, child in named.items()},
            allowed,
            [code for child in named.values() for code in forward_codes(child)],
            {id(child) for child in named.values() if isinstance(child, classes)},
            {type(child) for child in named.values()},
        )
        self.dispatch = Dispatch(self.state, call_sites)
        self._handles: list[Any] = []
        shared = SharedHooks(self.dispatch, self.carried)
        for name, child in named.items():
            if isinstance(child, torch.jit.ScriptModule):
                continue
            hooks = ForwardHooks(shared, name)
            self._handles.append(child.register_forward_pre_hook(hooks.before))
            self._handles.append(child.register_forward_hook(hooks.after, always_call=True))
        log.debug("emulating %d modules: %s", len(allowed), ", ".join(sorted(allowed)))

    def detach(self) -> None:
        """Take every hook off the module."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # --- properties ----------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module | None:
        """Emulated module; None if it has been deleted."""
        return self.state.module()

    @property
    def spec(self) -> NNASpec:
        """The accelerator."""
        return self.state.spec

    @property
    def calibrated(self) -> bool:
        """Tell whether ranges are frozen."""
        return self.state.calibrated

    @property
    def ranges(self) -> RangeTable:
        """Observed ranges by the key of a site's operand or result."""
        return self.state.ranges

    @property
    def sites(self) -> SiteTable:
        """Call sites by key."""
        return self.state.sites

    @property
    def scales(self) -> LearnedScales:
        """Learned scales of weights and outputs."""
        return self.state.scales

    @property
    def paths_in_scope(self) -> set[str]:
        """Paths of the modules that are emulated."""
        return self.dispatch.call_sites.allowed

    def path_of(self, module: nn.Module) -> str:
        """Return the path of a part of the module, ``"?"`` for any other."""
        return self.dispatch.call_sites.paths.get(id(module), "?")

    @property
    def is_unused(self) -> bool:
        """Tell whether no range was observed and no thread runs the module."""
        return not self.calibrated and not self.ranges.ranges and self.state.modes.idle

    # --- phases -------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """Mode in which the module runs in this thread."""
        return self.state.modes.current

    @contextmanager
    def running(
        self,
        phase: Phase | None = None,
        *,
        fidelity: Fidelity | None = None,
        learned_scales: Learned | None = None,
        telemetry: Telemetry | None = None,
        recorder: Recorder | None = None,
        listener: Listener | None = None,
    ) -> Iterator[Emulator]:
        """Run the module in a mode in this thread; restore the mode before on exit.

        Blocks nest: an argument that is None has the value of the block around this one. Outside of
        all blocks a module runs in float, exact, without learned scales, telemetry, recorder and
        listener.

        Args:
            phase: ``"float"``, ``"observe"`` or ``"emulate"``.
            fidelity: ``"exact"``, or ``"fast"`` for float rounding in the requantization to 8 bits.
            learned_scales: Tensors whose scales are learned, see :meth:`learn`.
            telemetry: Receiver of the metrics of every emulated site.
            recorder: Receiver of every instruction that runs in exact fidelity.
            listener: Receiver of every site: its key, location, operands and result.

        Yields:
            This emulator.

        Raises:
            ValueError: If ``fidelity`` is unknown; see :meth:`learn`.
            FloatingPointError: At the end of the outermost block, if a value of a device was not
                finite; on the host, the operator raises.
        """
        if fidelity not in (None, *FIDELITIES):
            raise ValueError(f"fidelity must be 'exact' or 'fast', got {fidelity!r}")
        around, scope, learning = self.mode, self.dispatch.scope, self.scales.learning
        entered, depth = scope.entered, len(scope.stack)
        mode = Mode(
            around.phase if phase is None else phase,
            around.fidelity if fidelity is None else fidelity,
            around.telemetry if telemetry is None else telemetry,
            around.recorder if recorder is None else recorder,
            around.listener if listener is None else listener,
        )
        before = self.state.modes.enter(mode)
        try:
            self.learn(learning if learned_scales is None else learned_scales)
            if mode.phase != "float":
                self.dispatch.enter()
            yield self
        except BaseException:
            DEFERRED.forget()
            raise
        finally:
            self.dispatch.unwind(entered, depth)
            self.learn(learning)
            self.state.modes.enter(before)
        if before is None:
            DEFERRED.read()

    @contextmanager
    def observing(self) -> Iterator[Emulator]:
        """Observe ranges in float forwards, and freeze them at the end of the block.

        Yields:
            This emulator.

        Raises:
            RuntimeError: If another thread runs the module, or see :meth:`freeze`.
        """
        state = self.state
        if state.modes.others_run():
            raise RuntimeError(
                "another thread runs this module, so its ranges cannot be observed: calibrate it "
                "before other threads emulate it"
            )
        ranges, fusion = state.ranges.state_dict(), state.fusion.state_dict()
        before = copy.deepcopy((ranges, fusion, state.sites.locations))
        try:
            with self.running("observe"):
                yield self
            self.freeze()
        except BaseException:
            # A failed calibration must not change the ranges.
            ranges, fusion, state.sites.locations = before
            state.ranges.load_state_dict(ranges)
            state.fusion.load_state_dict(fusion)
            self.dispatch.call_sites.forget_keys()
            raise

    def reduce_ranges(self) -> None:
        """Merge the sites and ranges of all ranks of a distributed run."""
        if not is_distributed():
            return
        state = self.state
        own = {"locations": state.sites.locations, "fusion": state.fusion.state_dict()}
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, own)
        tables = [rank["locations"] for rank in ranks]
        fusions = [
            _renamed(rank["fusion"], SiteTable(rank["locations"]).unite(tables)) for rank in ranks
        ]
        state.ranges.rename(state.sites.unite(tables))
        self.dispatch.call_sites.forget_keys()
        state.fusion.load_state_dict(_union(fusions))
        state.ranges.share()

    def freeze(self, margin: float = 0.0) -> None:
        """Fix the ranges, reduced over the ranks of a distributed run.

        Args:
            margin: Fraction by which the ranges are wider than what was observed.

        Raises:
            RuntimeError: If no forward was observed, or none of its operators can be emulated.
        """
        self.reduce_ranges()
        state = self.state
        if not state.ranges.ranges:
            raise RuntimeError(self._why_no_ranges())
        if state.fallbacks and is_first_process():
            log.warning("%s", self._what_falls_back())
        state.fallbacks = {}
        state.calibrated = True
        state.fusion.freeze()
        state.ranges.widen(margin)
        state.ranges.clamp(state.fusion.fused_relu)
        self.learn(state.scales.learning)
        # Activations of observed forwards are marked as pending.
        state.forget_qparams()

    def _what_falls_back(self) -> str:
        fallbacks = sorted(self.state.fallbacks.items())
        sites = [f"{site} ({remedy})" if remedy else site for site, remedy in fallbacks]
        return (
            f"{self.spec.name!r} has no operator for these sites, which run in float on the CPU: "
            f"{listed(sites)}; coverage(module, x) prints all sites"
        )

    def _why_no_ranges(self) -> str:
        state = self.state
        if state.fallbacks:
            sites = listed(sorted(state.fallbacks))
            return (
                f"forwards were observed, but {self.spec.name!r} has no operator for any of their "
                f"functions: {sites} run in float on the CPU, so there is "
                f"nothing to emulate; coverage(module, x) prints all sites"
            )
        if state.observed_forward:
            return (
                f"forwards were observed, but no function with a float tensor ran in the modules "
                f"in scope ({', '.join(sorted(self.paths_in_scope))}): check the targets"
            )
        return "no forward was observed: run at least one batch before freezing"

    def learn(self, scales: Learned) -> None:
        """Set which scales are learned from now on; those of outputs once ranges are frozen.

        Args:
            scales: ``"none"``, ``"weights"``, or ``"all"`` for weights and outputs.

        Raises:
            ValueError: If ``scales`` is not ``"none"``, ``"weights"`` or ``"all"``.
        """
        self.scales.learn(scales, self.ranges if self.calibrated else None)

    # --- state and copies ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return ranges, call sites, fusion and learned scales as plain values."""
        state = self.state
        return {
            "calibrated": state.calibrated,
            "spec": self.spec.name,
            "arithmetic": self.spec.arithmetic,
            "targets": list(self.targets),
            "observer": state.ranges.observer,
            "ranges": state.ranges.state_dict(),
            "fusion": state.fusion.state_dict(),
            "learned_scales": state.scales.state_dict(),
            "locations": {key: list(value) for key, value in state.sites.locations.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` has returned.

        Raises:
            ValueError: If the state lacks an entry, as one of an older version does, or was
                observed for another spec or other targets.
        """
        missing = sorted(_STATE - set(state))
        if missing:
            raise ValueError(
                f"the state of the emulation lacks {', '.join(missing)}: it was saved by another "
                f"version of lightning-nna; calibrate the module again (calibrate(module, "
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
        restored = self.state
        restored.ranges = RangeTable(state["observer"])
        restored.ranges.load_state_dict(state["ranges"])
        restored.fusion.load_state_dict(state["fusion"])
        restored.scales.load_state_dict(state.get("learned_scales", {}))
        restored.sites.locations = {k: list(value) for k, value in state["locations"].items()}
        self.dispatch.call_sites.forget_keys()
        restored.calibrated = bool(state["calibrated"])

    def carried(self) -> dict[str, Any]:
        """Return plain values from which :meth:`restored` builds the emulator of a copy."""
        return {
            "spec": self.spec,
            "targets": self.targets,
            "state": self.state_dict(),
            "transforms": self.scales.pipeline.carried(),
            "used_weights": dict(self.state.used_weights),
        }

    @classmethod
    def restored(cls, module: nn.Module, carried: Mapping[str, Any]) -> Emulator:
        """Build the emulator of a copied module.

        Args:
            module: Copy of a module with an emulator.
            carried: Plain values that :meth:`carried` of that emulator has returned.
        """
        state = carried["state"]
        emulator = cls(
            module, carried["spec"], targets=carried["targets"], observer=state["observer"]
        )
        emulator.load_state_dict(state)
        emulator.scales.pipeline.adopt(carried.get("transforms", {}))
        emulator.state.used_weights = dict(carried["used_weights"])
        return emulator


def _renamed(value: Any, sites: Mapping[str, str]) -> Any:
    """Return nested plain values with keys of sites replaced.

    Args:
        value: Plain values.
        sites: New keys by old keys.
    """
    if isinstance(value, dict):
        return {_renamed(key, sites): _renamed(entry, sites) for key, entry in value.items()}
    if isinstance(value, list):
        return [_renamed(entry, sites) for entry in value]
    return sites.get(value, value) if isinstance(value, str) else value


def _union(states: Sequence[Any]) -> Any:
    """Merge plain states: the union of keys and list entries; numbers are those of the first."""
    if isinstance(states[0], dict):
        keys = dict.fromkeys(key for state in states for key in state)
        return {key: _union([state[key] for state in states if key in state]) for key in keys}
    if isinstance(states[0], list):
        return sorted({entry for state in states for entry in state})
    return states[0]
