"""Emulate a module, calibrate it, and make it a float module again.

A module has at most one emulator. It is stored here and not on the module. A copy or pickle of the
module has the emulator's state as plain values, from which an emulator of its own is built on
demand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lightning_nna.emulation.emulator import Emulator
from lightning_nna.emulation.forward_hooks import hooks_of, remove_copied_hooks
from lightning_nna.emulation.learned_scales import Learned
from lightning_nna.emulation.modes import Fidelity
from lightning_nna.emulation.observers import Observer
from lightning_nna.emulation.sites import ROOT
from lightning_nna.emulation.spec import DEFAULT_PRESET, NNASpec, resolve_spec

_ATTACHED: WeakKeyDictionary[nn.Module, Emulator] = WeakKeyDictionary()


# Two threads must not both attach an emulator to one module.
_LOCK = RLock()


def attached(module: nn.Module) -> Emulator | None:
    """Return the emulator of a module, or of the module that it is part of; None without one.

    A copy or pickle of a module with an emulator has an emulator with the same ranges.
    """
    module = uncompiled(module)
    with _LOCK:
        emulator = _ATTACHED.get(module)
        if emulator is None:
            emulator = _carried_or_outer(module)
    if emulator is not None:
        emulator.state.follow_tensors()
    return emulator


def _carried_or_outer(module: nn.Module) -> Emulator | None:
    """Return the emulator that a copy carries, or that of the module around this one."""
    carried = outer = None
    for hooks in hooks_of(module):
        if hooks.shared.dispatch is not None:
            root = hooks.shared.dispatch.state.module()
            outer = None if root is None else _ATTACHED.get(root)
        elif hooks.path == ROOT and hooks.shared.carried is not None:
            carried = hooks.shared.carried
    # A copy keeps its own ranges if the module around it has observed nothing yet.
    if carried is None or not (outer is None or outer.is_unused):
        return outer
    remove_copied_hooks(module)
    emulator = _ATTACHED[module] = Emulator.restored(module, carried)
    return emulator


def attach(
    module: nn.Module,
    spec: str | NNASpec | Mapping[str, Any] | None = None,
    *,
    targets: Sequence[str] | None = None,
    observer: Observer = "min_max",
) -> Emulator:
    """Give a module an emulator, or return the one that it has.

    Args:
        module: Any module. A part of a module with an emulator uses that emulator.
        spec: Accelerator, see :class:`Emulator`; None for the emulator's own, or for
            the default preset if the module has no emulator.
        targets: Globs of module names, see :class:`Emulator`; for a part of a module with an
            emulator, those of that module. None for the emulator's own, or for all modules.
        observer: Rule of the ranges, see :class:`Emulator`; existing ranges keep theirs.

    Raises:
        ValueError: If the module has an emulator for another accelerator or other targets.
    """
    module = uncompiled(module)
    with _LOCK:
        emulator = attached(module)
        if emulator is not None and emulator.is_unused and emulator.module is module:
            # Without ranges, as after a failed calibration, it may be replaced.
            emulator.detach()
            emulator = None
        if emulator is None:
            emulator = Emulator(
                module,
                DEFAULT_PRESET if spec is None else spec,
                targets=("*",) if targets is None else targets,
                observer=observer,
            )
            _ATTACHED[module] = emulator
    spec = emulator.spec if spec is None else spec
    targets = emulator.targets if targets is None else tuple(targets)
    owner = emulator.module
    if owner is not module and owner is not None:
        path = emulator.path_of(module)
        if path not in emulator.paths_in_scope:
            raise ValueError(
                f"{path!r} is part of a {type(owner).__name__} that is emulated with targets "
                f"{list(emulator.targets)}, which leave it out; call strip on the "
                f"{type(owner).__name__} first"
            )
        same_targets = targets in (("*",), emulator.targets)
    else:
        path, same_targets = None, targets == emulator.targets
    if emulator.spec != resolve_spec(spec) or not same_targets:
        subject = "the module" if path is None else f"the {type(owner).__name__} around {path!r}"
        raise ValueError(
            f"{subject} is emulated on {emulator.spec.name!r} with targets "
            f"{list(emulator.targets)} already; "
            f"call strip({'module' if path is None else 'the ' + type(owner).__name__}) before "
            f"another accelerator or other targets, or leave out spec and targets to use its own"
        )
    return emulator


def _own(module: nn.Module, action: str) -> Emulator | None:
    """Return the emulator that is attached to a module itself; None without one.

    Raises:
        ValueError: If the module is part of one with an emulator; the message says what to do.
    """
    emulator = attached(module)
    owner = None if emulator is None else emulator.module
    if emulator is not None and owner is not None and owner is not uncompiled(module):
        path = emulator.path_of(uncompiled(module))
        raise ValueError(
            f"the module is {path!r} of a {type(owner).__name__} that has an emulator: {action} "
            f"the {type(owner).__name__}, or strip it first"
        )
    return emulator


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module inside of a wrapper of ``torch.compile``."""
    return module._orig_mod if isinstance(module, torch._dynamo.OptimizedModule) else module


@contextmanager
def emulate(
    module: nn.Module,
    spec: str | NNASpec | Mapping[str, Any] | None = None,
    *,
    targets: Sequence[str] | None = None,
    fidelity: Fidelity = "exact",
    learned_scales: Learned = "none",
) -> Iterator[Emulator]:
    """Emulate a module inside a ``with`` block.

    The module, its copies and its pickles keep the ranges after the block; outside of the block the
    module runs in float. As with ``torch.no_grad``, a block belongs to the thread that enters it:
    other threads run the module in float, or in blocks of their own. Blocks nest.

    Args:
        module: Any module. A part of a module with an emulator uses that emulator.
        spec: Accelerator, see :class:`Emulator`; None for the emulator's own, or for
            the default preset if the module has no emulator.
        targets: Globs of module names, see :class:`Emulator`; None for the emulator's own, or for
            all modules.
        fidelity: ``"exact"``, or ``"fast"`` for float rounding in the requantization to 8 bits.
        learned_scales: Tensors whose scales get gradients: ``"weights"``, ``"all"`` (weights and
            outputs) or ``"none"``; see :mod:`.learned_scales` and :class:`.KeyedAdam`. Scales that
            were learned before are always used.

    Yields:
        The emulator. Observe ranges first: ``with emulator.observing(): module(batch)``.

    Raises:
        RuntimeError: At the first forward inside the block, if no ranges were observed.

    Example:
        >>> from lightning_nna.testing import SmallNet
        >>> net, x = SmallNet(), torch.randn(8, 4)
        >>> with emulate(net) as emulator:
        ...     with emulator.observing():
        ...         _ = net(x)
        ...     emulated = net(x)
        >>> bool((emulated - net(x)).abs().max() < 0.1)
        True
    """
    emulator = attach(module, spec, targets=targets)
    with emulator.running("emulate", fidelity=fidelity, learned_scales=learned_scales):
        yield emulator


def calibrate(
    module: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] = lambda module, batch: module(batch),
    spec: str | NNASpec | Mapping[str, Any] | None = None,
    *,
    targets: Sequence[str] | None = None,
    observer: Observer = "min_max",
) -> Emulator:
    """Observe ranges in float forwards, without training, and freeze them.

    The module runs in evaluation mode; afterwards all of its parts have the mode that they had
    before. Existing ranges are widened; if a batch raises, they are restored. Call ``strip`` first
    to start with empty ranges.

    Args:
        module: Any module.
        batches: Batches to run; the ranges cover all of them.
        forward: Function that runs a batch through the module, on every path that will be used.
        spec: Accelerator, see :class:`Emulator`; None for the emulator's own, or for
            the default preset if the module has no emulator.
        targets: Globs of module names, see :class:`Emulator`; None for the emulator's own, or for
            all modules.
        observer: Rule by which ranges follow from observed values, see :class:`Emulator`.

    Returns:
        The emulator, attached and calibrated: ``emulate(module)`` and ``NNAEmulation`` use it.

    Raises:
        RuntimeError: If nothing was observed, or another thread runs the module.
        TypeError: If ``forward`` is no function.
        ValueError: If the module is part of one with an emulator, or has an emulator for another
            accelerator or other targets.
    """
    if not callable(forward):
        raise TypeError(
            f"forward must be a function, got {forward!r}; pass the accelerator as spec=…"
        )
    _own(module, "calibrate")
    emulator = attach(module, spec, targets=targets, observer=observer)
    training = [(child, child.training) for child in module.modules()]
    outer = emulator.state.modes.enter(None)
    module.eval()
    try:
        with torch.no_grad(), emulator.observing():
            for batch in batches:
                forward(module, batch)
    finally:
        emulator.state.modes.enter(outer)
        for child, mode in training:
            child.training = mode
    return emulator


def strip(module: nn.Module) -> nn.Module:
    """Remove the emulator of a module, which then runs in float as before, bit for bit.

    Args:
        module: A module with or without an emulator.

    Returns:
        The same module.

    Raises:
        ValueError: If the module is part of one with an emulator.
    """
    emulator = _own(module, "strip")
    _ATTACHED.pop(uncompiled(module), None)
    if emulator is not None:
        emulator.detach()
    remove_copied_hooks(module)
    return module


def bake(module: nn.Module) -> nn.Module:
    """Replace weights by their quantized values, and remove the emulator of the module.

    A weight is replaced if an emulated operator has used it. Activations run in float again.

    Args:
        module: An emulated module that has run at least once.

    Returns:
        The same module.

    Raises:
        RuntimeError: If the module has no emulator or has not run emulated.
        ValueError: If the module is part of one with an emulator.
    """
    emulator = _own(module, "bake")
    if emulator is None:
        raise RuntimeError(
            "nothing to bake: the module has no emulator; call calibrate(module, batches), then "
            "run it once inside `with emulate(module)`"
        )
    if not emulator.state.used_weights:
        raise RuntimeError(
            "nothing to bake: the module has not run emulated; calibrate only observes it in "
            "float. Run it once inside `with emulate(module)`"
        )
    with torch.no_grad():
        for parameter in module.parameters():
            rows = emulator.state.rows_of(parameter)
            if rows is not None:
                parameter.copy_(emulator.state.weight(parameter, rows).values)
    return strip(module)
