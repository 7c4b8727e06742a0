"""Find what a mistyped word may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Return the word that a mistyped one is nearest to; None if none is near.

    Args:
        word: A word, or the key of a setting with its groups, as ``data.batch_seconds``.
        words: Words that exist.

    Example:
        >>> keys = ["bits", "seed", "data.batch_seconds", "model.optimizer.lr"]
        >>> [nearest(key, keys) for key in ("bist", "data.batch_second", "lr", "optimizer.lr")]
        ['bits', 'data.batch_seconds', 'model.optimizer.lr', 'model.optimizer.lr']
        >>> nearest("an_own_setting", keys)
    """
    candidates = sorted(set(words))
    # Nothing is mistyped, and only a group is wrong or missing.
    parts = word.split(".")
    same_end = [each for each in candidates if each.split(".")[-1] == parts[-1]]
    for group in (same_end, candidates):
        if close := difflib.get_close_matches(word, group, n=1, cutoff=0.7):
            return close[0]
    if same_end:
        return max(same_end, key=lambda each: difflib.SequenceMatcher(a=word, b=each).ratio())
    ends = {each.split(".")[-1]: each for each in reversed(candidates)}
    close = difflib.get_close_matches(parts[-1], ends, n=1, cutoff=0.75)
    return ends[close[0]] if close else None


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return the end of a message that suggests the nearest word; empty if none is near.

    Args:
        word: Mistyped word or key.
        words: Words that exist.

    Example:
        >>> did_you_mean("gqq", ["codebook", "gq"])
        '; did you mean gq?'
    """
    suggestion = nearest(word, words)
    return "" if suggestion is None else f"; did you mean {suggestion}?"
