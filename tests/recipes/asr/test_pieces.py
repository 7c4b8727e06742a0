"""Pieces of words as units, and data that has them."""

from __future__ import annotations

import json
import pickle

import pytest
import sentencepiece

from recipes.asr.pieces import PieceVocabulary, vocabulary_from_dict
from recipes.asr.vocabulary import BLANK, Vocabulary

TEXTS = ["TURN LEFT", "TURN RIGHT", "TURN IT LEFT", "GO ON", "GO LEFT AND RIGHT"]
PIECES = PieceVocabulary.from_texts(TEXTS, size=16)


def test_pieces_are_those_of_sentencepiece() -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=PIECES.model)
    assert len(PIECES) == processor.get_piece_size() == 16
    for text in TEXTS:
        assert PIECES.encode(text) == processor.encode(text)
        assert PIECES.decode([BLANK, *PIECES.encode(text), BLANK]) == processor.decode(
            PIECES.encode(text)
        )
        assert BLANK not in PIECES.encode(text)


def test_the_order_of_the_transcripts_does_not_count() -> None:
    assert PieceVocabulary.from_texts(reversed(TEXTS), size=16) == PIECES


@pytest.mark.parametrize(
    "copied",
    [
        pickle.loads(pickle.dumps(PIECES)),
        vocabulary_from_dict(json.loads(json.dumps(PIECES.to_dict()))),
    ],
)
def test_a_copy_has_the_same_pieces(copied: PieceVocabulary) -> None:
    assert copied == PIECES
    assert copied.units == PIECES.units
    assert copied.encode("go right") == PIECES.encode("GO RIGHT")


def test_other_kinds_are_read_as_well() -> None:
    words = Vocabulary(("ONE", "TWO"), "word")
    assert vocabulary_from_dict(words.to_dict()) == words
    assert words != PIECES


def test_unknown_characters_are_named() -> None:
    assert PIECES.unknown("TURN LEFT") == []
    assert PIECES.unknown("TURN 9 LÉFT") == ["9", "É"]
    with pytest.raises(ValueError, match=r"outside the vocabulary: \['9'\] in 'GO 9'"):
        PIECES.encode("GO 9")


def test_an_index_beyond_the_pieces_is_an_error() -> None:
    with pytest.raises(IndexError, match="from 0 to 15"):
        PIECES.decode([16])


@pytest.mark.parametrize(("size", "cause"), [(5, "smaller than required"), (500, "too high")])
def test_sizes_that_do_not_fit_are_refused(size: int, cause: str) -> None:
    with pytest.raises(ValueError, match=f"no {size} pieces fit .*{cause}.*data.num_pieces"):
        PieceVocabulary.from_texts(TEXTS, size=size)
