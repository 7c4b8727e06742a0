"""Adapt a keyword spotter to the recipes: an error rate with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from recipes.adapter import Adapter
from recipes.asr.scoring import word_errors, write_transcripts
from recipes.keywords.spotter import KeywordSpotter


class KeywordAdapter(Adapter):
    """Adapter of a :class:`.KeywordSpotter`."""

    known_results: ClassVar[tuple[str, ...]] = (
        *("error_rate", "error_rate_low", "error_rate_high", "errors", "words", "loss"),
    )
    titles: ClassVar[Mapping[str, str]] = {"error_rate": "errors, %", "loss": "loss per word"}
    unit: ClassVar[str] = "word"

    @override
    def results(self, logged: Mapping[str, float]) -> dict[str, Any]:
        """Return ``error_rate`` with its bootstrap interval (fractions), counts, and the loss.

        Args:
            logged: What the spotter has logged in the test.
        """
        words, recognized = self._words()
        score = word_errors(recognized, words)
        return {**score.as_results("error_rate"), "loss": logged["test/loss"]}

    @override
    def write_results(self, run_dir: Path) -> None:
        """Write ``transcripts.tsv``: each word, and what was recognized."""
        words, recognized = self._words()
        positions = map(str, range(len(words)))
        write_transcripts(run_dir, zip(positions, words, recognized, strict=True))

    def _words(self) -> tuple[list[str], list[str]]:
        """Return the words of the last test, and what was recognized."""
        assert isinstance(self.module, KeywordSpotter)
        names, pairs = self.module.labels, self.module.recognized.values()
        return [names[label] for label, _ in pairs], [names[answer] for _, answer in pairs]
