"""Conversion of text to label indices and back.

A transducer emits labels from a finite set and, between them, a *blank*. The blank has index 0
everywhere in the recipes; the units of the vocabulary follow it from 1 on. A unit is a character
(the space is one of them) or a whole word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

BLANK = 0
"""Index of the blank, which is also the padding of target batches."""

UnitKind = Literal["character", "word"]


def normalize_text(text: str) -> str:
    r"""Convert a transcript to upper case with single spaces between words.

    Example:
        >>> normalize_text("  turn  left\t")
        'TURN LEFT'
    """
    return " ".join(text.upper().split())


class Vocabulary:
    """The units of a recognizer's output and their indices, immutable.

    Not a dataclass: Hydra would treat a dataclass argument as a configuration.

    Args:
        units: Units without the blank, each once; unit ``i`` has index ``i + 1``.
        kind: Kind of the units: ``"character"``, spaces included, or ``"word"``.

    Raises:
        ValueError: If ``kind`` is neither, if a unit occurs twice, or if a unit is not of the
            kind (a word with a space, a character of length other than one).

    Example:
        >>> vocabulary = Vocabulary(("ONE", "TWO"), "word")
        >>> len(vocabulary), vocabulary.encode("two one one")
        (3, [2, 1, 1])
        >>> vocabulary.decode([2, 1, 1])
        'TWO ONE ONE'
    """

    def __init__(self, units: Sequence[str], kind: UnitKind = "character") -> None:
        if kind not in get_args(UnitKind):
            raise ValueError(
                f"a vocabulary's kind is 'character' or 'word', not {kind!r}; set data.units"
            )
        for unit in units:
            if not _is_unit(unit, kind):
                raise ValueError(f"{unit!r} is not a {kind}: it cannot be a unit")
        self.units: tuple[str, ...] = tuple(units)
        self.kind: UnitKind = kind
        self._index = {unit: index for index, unit in enumerate(self.units, start=BLANK + 1)}
        if len(self._index) != len(self.units):
            repeated = sorted({unit for unit in self.units if self.units.count(unit) > 1})
            raise ValueError(f"each unit may occur once, these occur again: {repeated}")

    def __repr__(self) -> str:
        return f"Vocabulary({self.units!r}, {self.kind!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return (self.units, self.kind) == (other.units, other.kind)

    def __hash__(self) -> int:
        return hash((self.units, self.kind))

    def __len__(self) -> int:
        """Return the number of label indices, blank included."""
        return len(self.units) + 1

    def split(self, text: str) -> list[str]:
        """Split a transcript into units, in the vocabulary or not."""
        normalized = normalize_text(text)
        return list(normalized) if self.kind == "character" else normalized.split()

    def unknown(self, text: str) -> list[str]:
        """Return the units of ``text`` that this vocabulary lacks, sorted.

        Example:
            >>> Vocabulary(("A", "B")).unknown("a?b!")
            ['!', '?']
        """
        return sorted({unit for unit in self.split(text) if unit not in self._index})

    def encode(self, text: str) -> list[int]:
        """Return the indices of the units of ``text``.

        Raises:
            ValueError: If ``text`` has units outside the vocabulary; the message lists them.
        """
        if unknown := self.unknown(text):
            raise ValueError(f"{self.kind}s outside the vocabulary: {unknown} in {text!r}")
        return [self._index[unit] for unit in self.split(text)]

    def decode(self, indices: Sequence[int]) -> str:
        """Return the text of label indices, without blanks.

        Raises:
            IndexError: If an index is negative or not below ``len(self)``.
        """
        if any(not 0 <= index < len(self) for index in indices):
            raise IndexError(f"label indices go from 0 to {len(self) - 1}, got {list(indices)}")
        units = [self.units[index - 1] for index in indices if index != BLANK]
        return "".join(units) if self.kind == "character" else " ".join(units)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for YAML, JSON and checkpoints."""
        return {"kind": self.kind, "units": list(self.units)}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Vocabulary:
        """Build the vocabulary from the dictionary of `to_dict`.

        Example:
            >>> vocabulary = Vocabulary((" ", "A"))
            >>> Vocabulary.from_dict(vocabulary.to_dict()) == vocabulary
            True
        """
        return cls(state["units"], state["kind"])

    @classmethod
    def from_texts(cls, texts: Iterable[str], kind: UnitKind = "character") -> Vocabulary:
        """Build the vocabulary of all units in ``texts``, sorted.

        Example:
            >>> Vocabulary.from_texts(["go", "no go"]).units
            (' ', 'G', 'N', 'O')
        """
        splitter = cls((), kind)
        return cls(sorted({unit for text in texts for unit in splitter.split(text)}), kind)


def _is_unit(unit: str, kind: UnitKind) -> bool:
    if kind == "character":
        return len(unit) == 1
    return bool(unit) and not any(character.isspace() for character in unit)
