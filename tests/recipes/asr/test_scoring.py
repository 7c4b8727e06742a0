"""Word errors against torchmetrics and SciPy."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.stats import bootstrap
from torchmetrics.functional.text import word_error_rate

from recipes.asr.scoring import word_errors


@pytest.fixture
def texts() -> tuple[list[str], list[str]]:
    """Eighty references, and hypotheses with some words dropped, doubled or replaced."""
    draw = random.Random(3)
    references = [" ".join(draw.choices("abcdef", k=draw.randint(1, 9))) for _ in range(80)]
    hypotheses = []
    for reference in references:
        words = [draw.choice([w, w, w, w, "x", f"{w} {w}", ""]) for w in reference.split()]
        hypotheses.append(" ".join(" ".join(words).split()))
    return hypotheses, references


def test_rate_is_that_of_torchmetrics(texts: tuple[list[str], list[str]]) -> None:
    score = word_errors(*texts)
    assert score.rate == pytest.approx(float(word_error_rate(*texts)), abs=1e-6)
    assert score.rate == score.errors / score.words


def test_interval_is_that_of_scipy(texts: tuple[list[str], list[str]]) -> None:
    hypotheses, references = texts
    pairs = zip(hypotheses, references, strict=True)
    words = np.array([len(reference.split()) for reference in references])
    rates = np.array([float(word_error_rate(h, r)) for h, r in pairs])
    expected = bootstrap(
        (np.rint(rates * words), words),
        lambda errors, words, axis: errors.sum(axis) / words.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    score = word_errors(hypotheses, references)
    # Two independent bootstraps of 10 000 samples: their ends differ by under 1 % of the rate.
    assert score.low == pytest.approx(expected.low, abs=0.005)
    assert score.high == pytest.approx(expected.high, abs=0.005)
    assert score.low < score.rate < score.high


def test_same_texts_same_interval_another_seed_another(
    texts: tuple[list[str], list[str]],
) -> None:
    assert word_errors(*texts) == word_errors(*texts)
    assert word_errors(*texts).low != word_errors(*texts, seed=1).low


def test_more_confidence_is_a_wider_interval(texts: tuple[list[str], list[str]]) -> None:
    narrow, wide = (word_errors(*texts, confidence=share) for share in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_nothing_recognized_is_every_word_deleted() -> None:
    score = word_errors(["", ""], ["one two", "three"])
    assert (score.rate, score.low, score.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [(["a"], [], "1 hypotheses for 0 references"), (["a"], [""], "no reference has a word")],
)
def test_texts_without_a_rate_are_an_error(
    hypotheses: list[str], references: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        word_errors(hypotheses, references)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_confidence_is_a_fraction(confidence: float) -> None:
    with pytest.raises(ValueError, match=f"got {confidence}"):
        word_errors(["a"], ["a"], confidence=confidence)
