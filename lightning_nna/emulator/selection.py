"""Patterns that select modules or parameters by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def matches(pattern: str, name: str) -> bool:
    """Say whether a name fits a pattern.

    Args:
        pattern: A glob in which ``*`` also crosses dots, or ``re:`` and a regular expression
            that must match the whole name.
        name: A dotted module or parameter name.

    Raises:
        ValueError: If a regular expression does not compile.

    Example:
        >>> matches("encoder.*", "encoder.lstm.weight_ih_l0"), matches("re:.*bias", "a.weight")
        (True, False)
    """
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error


def select(patterns: Sequence[str], names: Iterable[str], *, what: str) -> list[str]:
    """Return the names that at least one pattern selects, in their own order.

    Args:
        patterns: Globs or ``re:`` expressions, see :func:`matches`.
        names: Candidates.
        what: What the names are, for the error ("module", "parameter").

    Raises:
        ValueError: If a pattern selects nothing; the message lists some candidates.
        TypeError: If ``patterns`` is one string, whose letters would be taken as patterns.

    Example:
        >>> select(["*.lstm"], ["encoder.lstm", "joint.output"], what="module")
        ['encoder.lstm']
    """
    if isinstance(patterns, str):
        raise TypeError(f"patterns must be a sequence of strings, got {patterns!r}: use [..]")
    candidates = list(names)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in candidates):
            shown = ", ".join(candidates[:8]) + (", …" if len(candidates) > 8 else "")
            raise ValueError(
                f"pattern {pattern!r} matches no {what}; there are: {shown or '(none)'}"
            )
    return [name for name in candidates if any(matches(p, name) for p in patterns)]
