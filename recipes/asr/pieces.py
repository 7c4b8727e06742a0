r"""Subword units: the pieces of words that SentencePiece finds in the training transcripts.

A piece that begins a word begins with ``▁``. The unigram model keeps the pieces that give the
transcripts the greatest likelihood

.. math:: \sum_s \log \sum_{x \in S(s)} \prod_{p \in x} P(p)

over all segmentations :math:`S(s)` of each transcript :math:`s`.

Reference:
    Kudo, "Subword regularization: improving neural network translation models with multiple subword
    candidates", ACL 2018, arXiv 1804.10959.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import sentencepiece

from recipes.asr.vocabulary import BLANK, Vocabulary, normalize_text

_WORD_BEGINS = "▁"


class PieceVocabulary:
    """The pieces of a recognizer's output and their indices, immutable.

    The blank has the index that SentencePiece gives to what it does not know.

    Args:
        model: Model of SentencePiece, as :meth:`from_texts` makes it.

    Attributes:
        kind: ``"piece"``.

    Raises:
        ValueError: If the model's unknown piece is not at the blank's index.

    Example:
        >>> vocabulary = PieceVocabulary.from_texts(["TURN LEFT", "TURN RIGHT", "LEFT"], size=12)
        >>> len(vocabulary)
        12
        >>> vocabulary.decode(vocabulary.encode("left turn"))
        'LEFT TURN'
    """

    kind = "piece"

    def __init__(self, model: bytes) -> None:
        self.model = bytes(model)
        unknown = self._processor.unk_id()
        if unknown != BLANK:
            raise ValueError(
                f"this model of SentencePiece has what it does not know at {unknown}, and the "
                f"blank is {BLANK}: make it with PieceVocabulary.from_texts, or with unk_id={BLANK}"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: the model alone."""
        return {"model": self.model}

    @cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    def __repr__(self) -> str:
        return f"PieceVocabulary({len(self)} pieces)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PieceVocabulary):
            return NotImplemented
        return self.model == other.model

    def __hash__(self) -> int:
        return hash(self.model)

    def __len__(self) -> int:
        """Return the number of label indices, blank included."""
        return int(self._processor.get_piece_size())

    @property
    def units(self) -> tuple[str, ...]:
        """Pieces without the blank; unit ``i`` has index ``i + 1``."""
        return tuple(self._processor.id_to_piece(i) for i in range(BLANK + 1, len(self)))

    def split(self, text: str) -> list[str]:
        """Split a transcript into pieces, in the vocabulary or not."""
        return list(self._processor.encode(normalize_text(text), out_type=str))

    def unknown(self, text: str) -> list[str]:
        """Return the parts of ``text`` that no piece has, sorted."""
        unknown = {p for p in self.split(text) if self._processor.piece_to_id(p) == BLANK}
        return sorted({piece.strip(_WORD_BEGINS) for piece in unknown})

    def encode(self, text: str) -> list[int]:
        """Return the indices of the pieces of ``text``.

        Raises:
            ValueError: If ``text`` has parts that no piece has; the message lists them.
        """
        indices = [int(i) for i in self._processor.encode(normalize_text(text))]
        if BLANK in indices:
            raise ValueError(f"pieces outside the vocabulary: {self.unknown(text)} in {text!r}")
        return indices

    def decode(self, indices: Sequence[int]) -> str:
        """Return the text of label indices, without blanks.

        Raises:
            IndexError: If an index is negative or not below ``len(self)``.
        """
        if any(not 0 <= index < len(self) for index in indices):
            raise IndexError(f"label indices go from 0 to {len(self) - 1}, got {list(indices)}")
        pieces = "".join(self._processor.id_to_piece(i) for i in indices if i != BLANK)
        return normalize_text(pieces.replace(_WORD_BEGINS, " "))

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for YAML, JSON and checkpoints."""
        return {"kind": self.kind, "model": base64.b64encode(self.model).decode()}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> PieceVocabulary:
        """Build the vocabulary from the dictionary of :meth:`to_dict`."""
        return cls(base64.b64decode(state["model"]))

    @classmethod
    def from_texts(cls, texts: Iterable[str], *, size: int) -> PieceVocabulary:
        """Train a unigram model of SentencePiece on transcripts; the same texts give the same one.

        Args:
            texts: Transcripts of the training part.
            size: Number of label indices, blank included.

        Raises:
            ValueError: If the transcripts have no room for so many pieces, or more characters.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sorted(normalize_text(text) for text in texts)),
                model_writer=model,
                vocab_size=size,
                model_type="unigram",
                character_coverage=1.0,
                # One sentence of a long recording is a whole paragraph.
                max_sentence_length=1 << 20,
                unk_id=BLANK,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(
                f"no {size} pieces fit the transcripts ({str(error).split('] ')[-1]}); set another "
                "data.num_pieces"
            ) from error
        return cls(model.getvalue())


#: Units of a recognizer's output.
AnyVocabulary = Vocabulary | PieceVocabulary


def vocabulary_from_dict(state: dict[str, Any]) -> AnyVocabulary:
    """Build a vocabulary of any kind from the dictionary of its ``to_dict``.

    Example:
        >>> vocabulary_from_dict({"kind": "word", "units": ["ONE"]})
        Vocabulary(('ONE',), 'word')
    """
    if state["kind"] == PieceVocabulary.kind:
        return PieceVocabulary.from_dict(state)
    return Vocabulary.from_dict(state)
