"""Lists of names for messages: the first ones, and how many more there are."""

from __future__ import annotations

from collections.abc import Iterable

_MOST_SHOWN = 8


def listed(names: Iterable[str], most: int = _MOST_SHOWN) -> str:
    """List the first of many names.

    Args:
        names: Names in the order to list them in.
        most: Number of names to list, positive.

    Example:
        >>> listed(["encoder", "decoder"]), listed("abcdefgh", most=3)
        ('encoder, decoder', 'a, b, c and 5 more')
    """
    all_names = list(names)
    more = f" and {len(all_names) - most} more" if len(all_names) > most else ""
    return ", ".join(all_names[:most]) + more
