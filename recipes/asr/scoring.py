r"""Word error rate with its confidence interval.

.. math:: \mathrm{WER} = \sum_i e_i \Big/ \sum_i n_i

with :math:`e_i` the word edits between hypothesis and reference of utterance :math:`i` and
:math:`n_i` the words of the reference. The interval is the percentile bootstrap over utterances:
words of one utterance err together, so utterances are drawn, not words.

Reference:
    Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation",
    ICASSP 2004.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import distributed
from torchaudio.functional import edit_distance

from lightning_nna.files import write_whole


@dataclass(frozen=True)
class WordErrors:
    """A word error rate with its interval; all rates are fractions, 0.15 is 15 %.

    Attributes:
        rate: Word errors over reference words.
        low: Lower end of the bootstrap interval.
        high: Upper end of the bootstrap interval.
        errors: Total number of word errors.
        words: Total number of reference words.
    """

    rate: float
    low: float
    high: float
    errors: int
    words: int

    def as_results(self, name: str) -> dict[str, float]:
        """Return the rate under a name, with its interval and counts, as summaries have them.

        Args:
            name: Name of the rate.

        Example:
            >>> WordErrors(0.5, 0.4, 0.6, 1, 2).as_results("wer")
            {'wer': 0.5, 'wer_low': 0.4, 'wer_high': 0.6, 'errors': 1, 'words': 2}
        """
        interval = {name: self.rate, f"{name}_low": self.low, f"{name}_high": self.high}
        return {**interval, "errors": self.errors, "words": self.words}


class Scored(NamedTuple):
    """Result of one scored utterance."""

    reference: str
    greedy: str
    """Transcript of the greedy search."""
    hypothesis: str
    """Transcript of the search that is scored."""
    loss: float
    """Negative log-likelihood of the reference, in nats."""
    labels: int
    """Number of labels of the reference."""


def gather_scored(scored: Mapping[str, Scored]) -> dict[str, Scored]:
    """Gather the utterances of all processes by id, each once, sorted by id.

    Args:
        scored: Utterances of this process by id. Processes may have the same utterance, since
            samplers pad their parts.

    Example:
        >>> list(gather_scored({"b": Scored("", "", "", 0.0, 0), "a": Scored("", "", "", 0.0, 0)}))
        ['a', 'b']
    """
    parts = [dict(scored)]
    if distributed.is_available() and distributed.is_initialized():
        parts = [{} for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(parts, dict(scored))
    merged = {id_: result for part in parts for id_, result in part.items()}
    return dict(sorted(merged.items()))


def write_transcripts(run_dir: Path, texts: Iterable[tuple[str, str, str]]) -> None:
    """Write ``transcripts.tsv``, a line for each utterance.

    The columns are ``utterance``, ``errors`` and ``words`` (numbers of words), ``reference`` and
    ``hypothesis``.

    Args:
        run_dir: Run folder.
        texts: Id, reference and recognized text of each utterance.
    """
    lines = ["utterance\terrors\twords\treference\thypothesis"]
    for id_, reference, hypothesis in texts:
        counts = utterance_errors(hypothesis, reference)
        columns = (id_, counts.errors, counts.words, reference, hypothesis)
        lines.append("\t".join(map(str, columns)))
    write_whole(run_dir / "transcripts.tsv", "\n".join(lines) + "\n")


def word_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Compute a word error rate without an interval; 0 errors of 0 words are a rate of 0.

    Args:
        hypotheses: Recognized texts, one per utterance.
        references: Reference texts, in the same order.

    Raises:
        ValueError: If the numbers of texts differ.

    Example:
        >>> word_rate(["one two", "three"], ["one two", "tree"])
        0.3333333333333333
    """
    counts = [utterance_errors(h, r) for h, r in zip(hypotheses, references, strict=True)]
    return sum(each.errors for each in counts) / max(sum(each.words for each in counts), 1)


def word_errors(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> WordErrors:
    """Score ``hypotheses`` against ``references``, word by word.

    Args:
        hypotheses: Recognized texts, one per utterance.
        references: Reference texts, in the same order.
        confidence: Fraction of resampled rates inside the interval, in (0, 1).
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling: the same texts give the same interval.

    Returns:
        The rate, its bootstrap interval and the counts behind it.

    Raises:
        ValueError: If the numbers of texts differ, if there is no reference word, or if
            ``confidence`` is not in (0, 1).

    Example:
        >>> score = word_errors(["one two", "three"], ["one two", "tree"])
        >>> score.errors, score.words, round(score.rate, 3)
        (1, 3, 0.333)

    Reference:
        Bisani and Ney, ICASSP 2004.
    """
    if len(hypotheses) != len(references):
        raise ValueError(
            f"got {len(hypotheses)} hypotheses for {len(references)} references; pass one of each "
            "per utterance, '' if nothing was recognized"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    counts = [utterance_errors(h, r) for h, r in zip(hypotheses, references, strict=True)]
    errors, words = (np.array(column) for column in zip(*counts, strict=True))
    if words.sum() == 0:
        raise ValueError("no reference has a word, so there is no word error rate")
    low, high = _bootstrap(errors, words, confidence=confidence, resamples=resamples, seed=seed)
    return WordErrors(
        rate=float(errors.sum() / words.sum()),
        low=low,
        high=high,
        errors=int(errors.sum()),
        words=int(words.sum()),
    )


class UtteranceErrors(NamedTuple):
    """Word errors of one utterance."""

    errors: int
    words: int
    """Number of words of the reference."""


def utterance_errors(hypothesis: str, reference: str) -> UtteranceErrors:
    """Count the word errors of one utterance.

    Example:
        >>> utterance_errors("one three", "one two three")
        UtteranceErrors(errors=1, words=3)
    """
    words = reference.split()
    return UtteranceErrors(int(edit_distance(hypothesis.split(), words)), len(words))


class RateDifference(NamedTuple):
    """Difference of two word error rates with its interval, as fractions."""

    mean: float
    low: float
    high: float

    @property
    def is_tied(self) -> bool:
        """Whether the interval contains zero."""
        return self.low <= 0 <= self.high


def paired_difference(
    errors: np.ndarray,
    others: np.ndarray,
    words: np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> RateDifference:
    r"""Compare two methods on the same utterances and seeds by a paired bootstrap.

    A sample draws seeds and utterances with replacement, the same for both methods, and has the
    difference of their word error rates

    .. math:: \frac{\sum_{s, i} (e_{s, i} - o_{s, i})}{S \sum_i n_i}.

    Args:
        errors: Word errors of the one method, shape ``(seeds, utterances)``.
        others: Word errors of the other method, in that shape: a row of each has the same seed.
        words: Words of the references, shape ``(utterances,)``.
        confidence: Fraction of the samples inside the interval, in (0, 1).
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        Difference of the rates, negative where the one method is better, and its percentile
        interval.

    Raises:
        ValueError: If shapes differ, or no reference has a word.

    Example:
        >>> errors = np.array([[0, 1, 0, 1], [0, 0, 1, 1]])
        >>> paired_difference(errors, errors + 1, np.full(4, 5))
        RateDifference(mean=-0.2, low=-0.2, high=-0.2)

    Reference:
        Bisani and Ney, ICASSP 2004.
    """
    if errors.shape != others.shape or errors.shape[1:] != words.shape:
        raise ValueError(
            f"expected errors of shape (seeds, utterances) twice and words of (utterances,), got "
            f"{errors.shape}, {others.shape} and {words.shape}"
        )
    if words.sum() == 0:
        raise ValueError("no reference has a word, so there is no word error rate")
    differences = errors - others
    seeds, count = differences.shape
    drawn, drawn_seeds = _draws(count, seeds, resamples, seed)
    # float32 holds these whole numbers, and its products are fast.
    often = drawn.astype(np.float32)
    sums = np.einsum("rs,rs->r", drawn_seeds, (often @ differences.T.astype(np.float32)))
    spoken = (often @ words.astype(np.float32)).astype(np.int64)
    rates = sums[spoken > 0] / (seeds * spoken[spoken > 0])
    tail = (1 - confidence) / 2
    low, high = np.quantile(rates, [tail, 1 - tail])
    return RateDifference(float(differences.sum() / (seeds * words.sum())), float(low), float(high))


@lru_cache(maxsize=8)
def _draws(count: int, seeds: int, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw how often each utterance and each seed is in each sample; the same for all methods."""
    random = np.random.default_rng(seed)
    drawn = random.multinomial(count, np.full(count, 1 / count), size=resamples)
    drawn_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    return drawn.astype(np.uint16), drawn_seeds


def _bootstrap(
    errors: np.ndarray, words: np.ndarray, *, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(words), np.full(len(words), 1 / len(words)), size=resamples)
    # A sample with empty references only has no rate, and is left out.
    spoken = drawn @ words
    rates = (drawn @ errors)[spoken > 0] / spoken[spoken > 0]
    tail = (1 - confidence) / 2
    low, high = np.quantile(rates, [tail, 1 - tail])
    return float(low), float(high)
