"""Text to labels and back."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st

from recipes.asr.vocabulary import BLANK, Vocabulary, normalize_text

LETTERS = Vocabulary(tuple(" ABCDEFGHIJKLMNOPQRSTUVWXYZ'"))
NUMBERS = Vocabulary(("ONE", "TWO", "THREE"), "word")


@given(st.text(alphabet=" abcdefghijklmnopqrstuvwxyz'\t"))
def test_characters_come_back_as_normalized_text(text: str) -> None:
    assert LETTERS.decode(LETTERS.encode(text)) == normalize_text(text)


@given(st.lists(st.sampled_from(["one", "TWO", "Three"])))
def test_words_come_back_as_normalized_text(words: list[str]) -> None:
    text = "  ".join(words)
    assert NUMBERS.decode(NUMBERS.encode(text)) == normalize_text(text)


@pytest.mark.parametrize("vocabulary", [LETTERS, NUMBERS])
def test_no_unit_has_the_index_of_the_blank(vocabulary: Vocabulary) -> None:
    separator = "" if vocabulary.kind == "character" else " "
    indices = [vocabulary.encode(unit) for unit in vocabulary.units if unit != " "]
    assert BLANK == 0
    assert all(BLANK < index < len(vocabulary) for [index] in indices)
    assert vocabulary.decode([BLANK, 1, BLANK, 2]) == separator.join(vocabulary.units[:2])


def test_units_outside_the_vocabulary_are_listed() -> None:
    with pytest.raises(ValueError, match=r"characters outside the vocabulary: \['1', '3'\]"):
        LETTERS.encode("31 a")
    with pytest.raises(ValueError, match=r"words outside the vocabulary: \['FOUR'\]"):
        NUMBERS.encode("one four")


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_the_vocabulary_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match="from 0 to 3"):
        NUMBERS.decode([1, index])


@pytest.mark.parametrize(
    ("units", "kind", "complaint"),
    [
        (("A", "A"), "character", "may occur once"),
        (("AB",), "character", "not a character"),
        (("A B",), "word", "not a word"),
        (("",), "word", "not a word"),
    ],
)
def test_impossible_units_are_an_error(units: tuple[str, ...], kind: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Vocabulary(units, kind)  # type: ignore[arg-type]


def test_it_survives_a_plain_dictionary() -> None:
    stored = json.dumps(NUMBERS.to_dict())
    assert Vocabulary.from_dict(json.loads(stored)) == NUMBERS
    assert Vocabulary.from_dict(json.loads(stored)) != LETTERS


def test_hydra_passes_it_unchanged() -> None:
    namespace = instantiate({"_target_": "types.SimpleNamespace"}, vocabulary=NUMBERS)
    assert isinstance(namespace, SimpleNamespace)
    assert namespace.vocabulary is NUMBERS


def test_units_of_texts_are_sorted() -> None:
    assert Vocabulary.from_texts(["two one", "one"], "word").units == ("ONE", "TWO")
    assert Vocabulary.from_texts(["b a"]).units == (" ", "A", "B")
