"""Adapt recognizers of speech to the recipes: words, beams, and three programs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm
from typing_extensions import override

from lightning_nna import emulate
from lightning_nna.emulation.attachment import attached
from recipes.adapter import FAST_RUNTIME, Adapter, DeployedResults, Part, Speed
from recipes.asr.batches import Batch
from recipes.asr.beam import decode
from recipes.asr.data import SpeechDataModule
from recipes.asr.decoding import Decodable, greedy_decode
from recipes.asr.deployed import DeployedTransducer, run_utterance, transducer_parts
from recipes.asr.recognizer import TransducerRecognizer, score_references, transducer_losses
from recipes.asr.rnnt import Encoder
from recipes.asr.scored_recognizer import ScoredRecognizer
from recipes.asr.scoring import word_errors, write_transcripts


@dataclass
class Comparison:
    """A deployed recognizer compared with the emulated one, on the same utterances.

    Args:
        outputs: Number of activations that the programs returned.
        equal_outputs: Number of them that equal the emulation in every bit.
        loss: Negative log-likelihood of all references through the programs, in nats.
        labels: Number of labels of the references.
        hypotheses: Recognized texts, by utterance id.
        references: Reference texts, by utterance id.
    """

    outputs: int
    equal_outputs: int
    loss: float
    labels: int
    hypotheses: dict[str, str]
    references: dict[str, str]


class RecognizerAdapter(Adapter):
    """Adapter of a :class:`.ScoredRecognizer`."""

    known_results: ClassVar[tuple[str, ...]] = (
        *("wer", "wer_low", "wer_high", "errors", "words", "wer_greedy", "loss_per_token"),
    )
    titles: ClassVar[Mapping[str, str]] = {"wer": "WER, %", "loss_per_token": "loss per token"}
    unit: ClassVar[str] = "utterance"

    @override
    def results(self, logged: Mapping[str, float]) -> dict[str, Any]:
        """Return ``wer`` with its interval (fractions), counts, and the loss.

        Args:
            logged: What the recognizer has logged in the test.
        """
        assert isinstance(self.module, ScoredRecognizer)
        score = self.module.score
        assert score is not None, "a test run sets a score"
        return {
            **score.as_results("wer"),
            "wer_greedy": logged["test/wer_greedy"],
            "loss_per_token": logged["test/loss_per_token"],
        }

    @override
    def write_results(self, run_dir: Path) -> None:
        """Write ``transcripts.tsv``: what the recognizer understood, a line for each utterance."""
        assert isinstance(self.module, ScoredRecognizer)
        results = self.module.tested.items()
        write_transcripts(run_dir, ((id_, r.reference, r.hypothesis) for id_, r in results))


class TransducerAdapter(RecognizerAdapter):
    """Adapter of a :class:`.TransducerRecognizer`."""

    known_results: ClassVar[tuple[str, ...]] = (*RecognizerAdapter.known_results, "beam_width")
    unit: ClassVar[str] = "second of speech"

    @property
    def recognizer(self) -> TransducerRecognizer:
        """The module."""
        assert isinstance(self.module, TransducerRecognizer)
        return self.module

    @property
    def speech(self) -> SpeechDataModule:
        """The data."""
        assert isinstance(self.datamodule, SpeechDataModule)
        return self.datamodule

    @override
    def configure(self, config: DictConfig) -> None:
        if config.get("beam_width") is not None:
            self.recognizer.set_beam_width(config.beam_width)

    @override
    def results(self, logged: Mapping[str, float]) -> dict[str, Any]:
        """Return ``wer`` with its interval (fractions), counts, beam width, and the loss.

        Args:
            logged: What the recognizer has logged in the test.
        """
        return {**super().results(logged), "beam_width": self.recognizer.beam_width}

    @override
    def run(self, batch: Batch) -> None:
        """Score and decode a batch: decoding calls predictor and joint label by label."""
        self.recognizer.losses(batch)
        self.recognizer.decode(batch)

    @override
    def loss(self, batches: Sequence[Batch]) -> float:
        """Return the transducer's loss per token of all batches together, in nats."""
        total = sum(float(self.recognizer.losses(batch)[0]) for batch in batches)
        return total / sum(int(batch.target_lengths.sum()) for batch in batches)

    @override
    def priced(self, batches: Sequence[Batch], config: DictConfig) -> Part:
        """Return the sound of a mean utterance, and a function that decodes it greedily."""
        utterances = sum(len(batch.ids) for batch in batches)
        frames = sum(int(batch.feature_lengths.sum()) for batch in batches) // utterances
        labels = sum(int(batch.target_lengths.sum()) for batch in batches) // utterances
        sound = batches[0].features[:1, :1].expand(1, frames, -1)
        steps = config.chunk_steps or 1
        return [sound], lambda module, sound: run_utterance(module, sound, labels, steps)

    @override
    def programs(self, config: DictConfig) -> dict[str, Part]:
        """Return encoder, predictor and joint network; see :func:`.transducer_parts`."""
        frames = utterance_frames(self.recognizer, self.speech, config.get("utterance_frames"))
        return transducer_parts(self.recognizer, config.get("chunk_steps") or 1, frames)

    @override
    def test_deployed(
        self, folder: Path, callbacks: Sequence[Callback], *, batches: int | None = None
    ) -> DeployedResults:
        """Decode the test set through the programs, and compare with the last test.

        Args:
            folder: Folder of the programs.
            callbacks: Emulation and weight methods.
            batches: Number of the first batches that are decoded; None for all.
        """
        emulated = {id_: each.hypothesis for id_, each in self.recognizer.tested.items()}
        deployed = DeployedTransducer(folder)
        comparison = compare(self.recognizer, deployed, self._test_batches(batches))
        hypotheses, references = comparison.hypotheses, comparison.references
        ids = sorted(hypotheses)
        score = word_errors([hypotheses[k] for k in ids], [references[k] for k in ids])
        results = {
            **score.as_results("wer"),
            "loss_per_token": comparison.loss / comparison.labels,
            "utterances": len(ids),
            "equal_transcripts": sum(hypotheses[k] == emulated[k] for k in ids) / len(ids),
        }
        return DeployedResults(comparison.outputs, comparison.equal_outputs, len(ids), results)

    @override
    def speed(self, folder: Path, *, batches: int | None = None) -> Speed:
        """Measure the time of LiteRT's fast kernels in greedy decoding of the test set.

        Args:
            folder: Folder of the programs.
            batches: Number of the first batches that are decoded; None for all.

        Returns:
            Calls per second of speech; ``speech_seconds`` and ``real_time_factor`` (seconds of
            computation per second of speech).
        """
        fast = DeployedTransducer(folder, runtime=FAST_RUNTIME)
        seconds = spent = 0.0
        for batch in self._test_batches(batches):
            began = time.perf_counter()
            features, lengths = batch.features, batch.feature_lengths
            limit = self.recognizer.max_labels_per_step
            greedy_decode(fast, features, lengths, max_labels_per_step=limit)
            spent += time.perf_counter() - began
            seconds += float(batch.feature_lengths.sum()) * self.speech.log_mel.hop_ms / 1000
        return Speed(
            {part: count / seconds for part, count in fast.calls.items()},
            {"speech_seconds": seconds, "real_time_factor": spent / seconds},
            f"real-time factor on this CPU {spent / seconds:.4f}",
        )

    def _test_batches(self, number: int | None) -> Iterable[Batch]:
        """Return the first batches of the test set; all of them without a number."""
        batches = self.speech.test_dataloader()
        return batches if number is None else list(itertools.islice(batches, number))


def utterance_frames(
    recognizer: TransducerRecognizer, datamodule: SpeechDataModule, frames: int | None
) -> int | None:
    """Return the frames of the longest utterance that is encoded; None for a recurrent encoder.

    Args:
        recognizer: Recognizer that is exported.
        datamodule: Data module with the test set.
        frames: Number of frames that the configuration names; None for the longest utterance of
            the test set.
    """
    if isinstance(recognizer.model.encoder, Encoder) or frames is not None:
        return frames
    return max(int(batch.feature_lengths.max()) for batch in datamodule.test_dataloader())


def compare(
    recognizer: TransducerRecognizer, deployed: DeployedTransducer, batches: Any
) -> Comparison:
    """Score and decode batches through the programs, and compare every output.

    Args:
        recognizer: Emulated recognizer.
        deployed: Programs of the recognizer.
        batches: Batches of the test set.
    """
    comparison = Comparison(0, 0, 0.0, 0, {}, {})
    for batch in tqdm(batches, desc="through the programs", delay=2):
        emulated = _emulated_scores(recognizer, batch)
        encodings, predictions, logits, steps = _reference_scores(deployed, batch)
        valid = _valid(batch, steps)
        for actual, expected, mask in zip(
            (encodings, predictions, logits), emulated[:3], valid, strict=True
        ):
            comparison.outputs += int(mask.expand(actual.shape).sum())
            equal = (actual == expected[:, : actual.shape[1]]) & mask
            comparison.equal_outputs += int(equal.sum())
        losses = transducer_losses(logits, batch.targets, steps, batch.target_lengths)
        comparison.loss += float(losses.sum())
        comparison.labels += int(batch.target_lengths.sum())
        labels = decode(
            _Encoded(deployed, encodings, steps),
            batch.features,
            batch.feature_lengths,
            beam_width=recognizer.beam_width,
            max_labels_per_step=recognizer.max_labels_per_step,
        )
        texts = [recognizer.vocabulary.decode(sequence) for sequence in labels]
        comparison.hypotheses.update(zip(batch.ids, texts, strict=True))
        comparison.references.update(zip(batch.ids, batch.texts, strict=True))
    return comparison


class _Encoded:
    """A deployed recognizer and a batch that its encoder has encoded: decoding it runs the others.

    Args:
        deployed: Programs of the recognizer.
        encodings: Encodings of the batch.
        steps: Number of steps of each utterance.
    """

    def __init__(self, deployed: DeployedTransducer, encodings: Tensor, steps: Tensor) -> None:
        self._encoded = encodings, steps
        self.predict, self.join = deployed.predict, deployed.join

    def transcribe(self, sources: Tensor, source_lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self._encoded


def _emulated_scores(
    recognizer: TransducerRecognizer, batch: Batch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score the references of a batch with the emulated network."""
    emulator = attached(recognizer)
    assert emulator is not None
    with emulate(recognizer, emulator.spec, targets=emulator.targets):
        return _reference_scores(recognizer.model, batch)


@torch.no_grad()
def _reference_scores(model: Decodable, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score the references of a batch without gradients; see :func:`.score_references`."""
    return score_references(model, batch)


def _valid(batch: Batch, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mask the padding of encodings, predictions and logits; True where an entry is valid."""
    sounds = torch.arange(int(steps.max())) < steps[:, None]
    labels = torch.arange(batch.targets.shape[1] + 1) <= batch.target_lengths[:, None]
    pairs = sounds[:, :, None] & labels[:, None, :]
    return sounds[..., None], labels[..., None], pairs[..., None]
