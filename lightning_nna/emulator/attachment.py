"""Put a module on the chip, calibrate it there, and take it off again.

A module has at most one emulator. It is remembered here and not on the module, so that nothing of
ours is copied, pickled or saved with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lightning_nna.emulator.engine import Emulator, Fidelity
from lightning_nna.emulator.learned_steps import Learned
from lightning_nna.emulator.observers import Observer
from lightning_nna.emulator.spec import NNASpec, resolve_spec

_ATTACHED: WeakKeyDictionary[nn.Module, Emulator] = WeakKeyDictionary()


def attached(module: nn.Module) -> Emulator | None:
    """The emulator of a module, if it has one."""
    return _ATTACHED.get(module)


def attach(
    module: nn.Module,
    spec: str | NNASpec | Mapping[str, Any] = "litert-int8",
    *,
    targets: Sequence[str] = ("*",),
    fidelity: Fidelity = "exact",
    observer: Observer = "min_max",
) -> Emulator:
    """Put a module on the chip, or return the emulator that it has.

    Args:
        module: Any module.
        spec: The chip, see :class:`Emulator`.
        targets: Modules that count, see :class:`Emulator`.
        fidelity: See :class:`Emulator`; set anew where an emulator is there already.
        observer: See :class:`Emulator`; ranges that are there already stay as they are.

    Raises:
        ValueError: If the module has an emulator for another chip or other targets.
    """
    held = _ATTACHED.get(module)
    if held is None:
        held = Emulator(module, spec, targets=targets, fidelity=fidelity, observer=observer)
        _ATTACHED[module] = held
    if held.spec != resolve_spec(spec) or held.targets != tuple(targets):
        raise ValueError(
            f"the module is on {held.spec.name!r} with targets {list(held.targets)} already; "
            f"call strip(module) before another chip or other targets"
        )
    held.fidelity = fidelity
    return held


@contextmanager
def emulate(
    module: nn.Module,
    spec: str | NNASpec | Mapping[str, Any] = "litert-int8",
    *,
    targets: Sequence[str] = ("*",),
    fidelity: Fidelity = "exact",
    learned_steps: Learned = "none",
) -> Iterator[Emulator]:
    """Run a module on the chip inside a ``with`` block, whatever loop drives it.

    Ranges stay with the module after the block; outside of it the module runs in float.

    Args:
        module: Any module.
        spec: The chip, see :class:`Emulator`.
        targets: Modules that count, see :class:`Emulator`.
        fidelity: See :class:`Emulator`.
        learned_steps: Steps that the block trains: of ``"weights"``, of ``"all"``, or ``"none"``;
            see :mod:`.learned_steps` and :class:`.KeyedAdam`. Steps that were learned before
            are used in any case.

    Yields:
        The emulator. Observe ranges first: ``with chip.observing(): module(batch)``.

    Example:
        >>> from lightning_nna.testing import SmallNet
        >>> net, x = SmallNet(), torch.randn(8, 4)
        >>> with emulate(net) as chip:
        ...     with chip.observing():
        ...         _ = net(x)
        ...     on_chip = net(x)
        >>> bool((on_chip - net(x)).abs().max() < 0.1)
        True
    """
    emulator = attach(module, spec, targets=targets, fidelity=fidelity)
    emulator.phase = "emulate" if emulator.calibrated else "float"
    emulator.learn(learned_steps)
    emulator.enter_scope()
    try:
        yield emulator
    finally:
        emulator.learn("none")
        emulator.leave_scope()
        emulator.phase = "float"


def calibrate(
    module: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] = lambda module, batch: module(batch),
    spec: str | NNASpec | Mapping[str, Any] = "litert-int8",
    *,
    targets: Sequence[str] = ("*",),
    observer: Observer = "min_max",
) -> Emulator:
    """Find ranges from float forwards, without training.

    Args:
        module: Any module.
        batches: What to run; the ranges cover all of it.
        forward: How a batch runs through the module, on every path that will be used.
        spec: The chip, see :class:`Emulator`.
        targets: Modules that count, see :class:`Emulator`.
        observer: How ranges follow from what is observed, see :class:`Emulator`.

    Returns:
        The emulator, attached and calibrated: ``emulate(module)`` and ``NNAEmulation`` use it.
    """
    emulator = attach(module, spec, targets=targets, observer=observer)
    training = module.training
    module.eval()
    with torch.no_grad(), emulator.observing():
        for batch in batches:
            forward(module, batch)
    module.train(training)
    emulator.phase = "float"
    return emulator


def strip(module: nn.Module) -> nn.Module:
    """Take a module off the chip: it is the float module it was, in every bit.

    Args:
        module: A module with or without an emulator.

    Returns:
        The same module.
    """
    held = _ATTACHED.pop(module, None)
    if held is not None:
        held.detach()
    return module


def bake(module: nn.Module) -> nn.Module:
    """Fold what the chip does to the weights into plain weights, and take the module off it.

    Every weight that an operator of the chip has used is replaced by the value that its integers
    stand for. Activations run in float again.

    Args:
        module: A module on the chip that has run at least once.

    Returns:
        The same module.

    Raises:
        RuntimeError: If the module is not on a chip, or has not run there.
    """
    held = _ATTACHED.get(module)
    if held is None or not held.used_weights:
        raise RuntimeError("nothing to bake: run the module on the chip first (emulate, calibrate)")
    with torch.no_grad():
        for parameter in module.parameters():
            rows = held.used_weights.get(id(parameter))
            if rows is not None:
                parameter.copy_(held.weight(parameter, rows).values)
    return strip(module)
