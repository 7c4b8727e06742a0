"""Settings that a run cannot change once it has begun: ``require_same``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def require_same(owner: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise if settings differ from those that a checkpoint was written with.

    Args:
        owner: Name of the callback.
        saved: Settings of the checkpoint, plain values; a mapping holds some of each tensor.
        now: Settings of the callback. Those that the checkpoint does not name are not compared.

    Raises:
        ValueError: Names every setting that differs, and both values.

    Example:
        >>> require_same("GeneralQuantizer", {"bits": 4}, {"bits": 2})
        Traceback (most recent call last):
            ...
        ValueError: GeneralQuantizer cannot change what the checkpoint has fixed: bits is 4 there
        and 2 here; resume with the settings of the checkpoint, or begin a new run from its weights
        (lightning_nna.load_deployed)
    """
    differing = [
        f"{name} is {before!r} there and {after!r} here"
        for name, before, after in _both(saved, now)
    ]
    if differing:
        raise ValueError(
            f"{owner} cannot change what the checkpoint has fixed: {', '.join(differing)}; resume "
            f"with the settings of the checkpoint, or begin a new run from its weights "
            f"(lightning_nna.load_deployed)"
        )


def _both(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of all that differs."""
    for name, before in saved.items():
        if name not in now or before == now[name]:
            continue
        after = now[name]
        if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
            yield name, before, after
            continue
        for key in [*before, *(key for key in after if key not in before)]:
            if before.get(key) != after.get(key):
                yield f"{name}[{key!r}]", before.get(key), after.get(key)
