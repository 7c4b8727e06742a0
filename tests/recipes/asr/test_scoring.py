"""Word errors against torchmetrics and SciPy."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.stats import bootstrap
from torchmetrics.functional.text import word_error_rate

from recipes.asr.scoring import paired_difference, utterance_errors, word_errors


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


def test_errors_by_utterance_add_up(texts: tuple[list[str], list[str]]) -> None:
    counts = [utterance_errors(h, r) for h, r in zip(*texts, strict=True)]
    score = word_errors(*texts)
    assert sum(each.errors for each in counts) == score.errors
    assert sum(each.words for each in counts) == score.words


def test_paired_interval_is_that_of_scipy() -> None:
    random = np.random.default_rng(0)
    words = random.integers(1, 9, size=300)
    errors, others = random.binomial(words, 0.12), random.binomial(words, 0.10)
    expected = bootstrap(
        (errors - others, words),
        lambda changes, words, axis: changes.sum(axis) / words.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=100_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    found = paired_difference(errors[None], others[None], words, resamples=100_000)
    assert found.mean == pytest.approx((errors - others).sum() / words.sum())
    # Two independent bootstraps; the interval is 0.047 wide.
    assert found.low == pytest.approx(expected.low, abs=0.001)
    assert found.high == pytest.approx(expected.high, abs=0.001)


def test_seeds_that_disagree_widen_the_interval() -> None:
    random = np.random.default_rng(0)
    words = np.full(300, 5)
    changes = random.integers(-1, 2, size=(1, 300)).repeat(3, axis=0)
    apart = changes + np.array([[-1], [0], [1]])
    alike = paired_difference(changes, np.zeros_like(changes), words)
    differing = paired_difference(apart, np.zeros_like(apart), words)
    assert differing.mean == pytest.approx(alike.mean)
    # The variance of the mean of three seeds, 2/3 of an error in 5 words and 1/3 of it, is added.
    expected = np.hypot(alike.high - alike.low, 2 * 1.96 * np.sqrt(2 / 9) / 5)
    assert differing.high - differing.low == pytest.approx(expected, rel=0.1)


def test_the_interval_contains_no_difference_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    words = random.integers(1, 6, size=400)
    tied = 0
    for trial in range(200):
        errors, others = random.binomial(words, 0.1), random.binomial(words, 0.1)
        found = paired_difference(errors[None], others[None], words, resamples=1000, seed=trial)
        tied += found.is_tied
    # 95 % of 200 are 190, with a standard deviation of 3.
    assert 180 <= tied <= 199


def test_errors_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 4\), \(1, 4\) and \(4,\)"):
        paired_difference(np.zeros((2, 4)), np.zeros((1, 4)), np.ones(4))
    with pytest.raises(ValueError, match="no reference has a word"):
        paired_difference(np.zeros((1, 4)), np.zeros((1, 4)), np.zeros(4))
