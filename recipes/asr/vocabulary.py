"""Text to label indices and back.

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
    r"""Bring a transcript to upper case with single spaces between words.

    Example:
        >>> normalize_text("  turn  left\t")
        'TURN LEFT'
    """
    return " ".join(text.upper().split())


class Vocabulary:
    """The units that a recognizer writes, and their indices. It does not change.

    Not a dataclass: Hydra would take one that it is given for a configuration.

    Args:
        units: The units without the blank, each once; unit ``i`` has index ``i + 1``.
        kind: ``"character"``: a transcript is cut into its characters, spaces included;
            ``"word"``: into its words.

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
            twice = sorted({unit for unit in self.units if self.units.count(unit) > 1})
            raise ValueError(f"each unit may occur once, these occur again: {twice}")

    def __repr__(self) -> str:
        return f"Vocabulary({self.units!r}, {self.kind!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return (self.units, self.kind) == (other.units, other.kind)

    def __hash__(self) -> int:
        return hash((self.units, self.kind))

    def __len__(self) -> int:
        """Number of label indices, the blank among them."""
        return len(self.units) + 1

    def split(self, text: str) -> list[str]:
        """Cut a transcript into units, whether they are in the vocabulary or not."""
        normalized = normalize_text(text)
        return list(normalized) if self.kind == "character" else normalized.split()

    def unknown(self, text: str) -> list[str]:
        """The units of ``text`` that this vocabulary lacks, sorted.

        Example:
            >>> Vocabulary(("A", "B")).unknown("a?b!")
            ['!', '?']
        """
        return sorted({unit for unit in self.split(text) if unit not in self._index})

    def encode(self, text: str) -> list[int]:
        """Indices of the units of ``text``.

        Raises:
            ValueError: If ``text`` holds units outside the vocabulary; the message lists them.
        """
        if unknown := self.unknown(text):
            raise ValueError(f"{self.kind}s outside the vocabulary: {unknown} in {text!r}")
        return [self._index[unit] for unit in self.split(text)]

    def decode(self, indices: Sequence[int]) -> str:
        """The text of label indices; blanks are left out.

        Raises:
            IndexError: If an index is negative or not below ``len(self)``.
        """
        if any(not 0 <= index < len(self) for index in indices):
            raise IndexError(f"label indices go from 0 to {len(self) - 1}, got {list(indices)}")
        units = [self.units[index - 1] for index in indices if index != BLANK]
        return "".join(units) if self.kind == "character" else " ".join(units)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary for YAML, JSON and checkpoints."""
        return {"kind": self.kind, "units": list(self.units)}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Vocabulary:
        """The vocabulary that `to_dict` described.

        Example:
            >>> vocabulary = Vocabulary((" ", "A"))
            >>> Vocabulary.from_dict(vocabulary.to_dict()) == vocabulary
            True
        """
        return cls(state["units"], state["kind"])

    @classmethod
    def from_texts(cls, texts: Iterable[str], kind: UnitKind = "character") -> Vocabulary:
        """The vocabulary of every unit in ``texts``, sorted.

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
