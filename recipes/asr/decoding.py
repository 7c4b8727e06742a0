"""From transducer scores to labels: batched greedy search, and torchaudio's beam search.

Both call the model through its four methods only (``transcribe``, ``predict``, ``join`` and the
streaming form of the first), so they decode the float model, the emulated one and its programs
alike. For a beam search over a batch see :mod:`recipes.asr.beam`.

Reference:
    Graves, "Sequence transduction with recurrent neural networks", arXiv 1211.3711, 2012.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchaudio.models import RNNTBeamSearch

from recipes.asr.rnnt import State, Transducer
from recipes.asr.vocabulary import BLANK


class Decodable(Protocol):
    """A transducer or its programs, as decoders call it."""

    def transcribe(self, sources: Tensor, source_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode utterances, and return encodings and their lengths."""

    def predict(
        self, targets: Tensor, target_lengths: Tensor, state: State | None
    ) -> tuple[Tensor, Tensor, State]:
        """Encode labels, the continuation of those before ``state`` was returned."""

    def join(
        self,
        source_encodings: Tensor,
        source_lengths: Tensor,
        target_encodings: Tensor,
        target_lengths: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score the next label for every pair; lengths are returned unchanged."""


@torch.no_grad()
def greedy_decode(
    model: Decodable,
    features: Float[Tensor, "batch frames mels"],
    lengths: Int[Tensor, " batch"],
    *,
    max_labels_per_step: int = 10,
) -> list[list[int]]:
    """Decode the best label of every step, all utterances of the batch together.

    Every utterance has its own clock: if the best label is blank (or the step has had
    ``max_labels_per_step`` labels) the clock advances, otherwise the label is appended. The result
    of an utterance is the same in any batch.

    Args:
        model: Transducer, or its programs.
        features: Features, padded with zeros.
        lengths: Number of valid frames of each utterance.
        max_labels_per_step: Largest number of labels per step, positive; an untrained model might
            never output blank.

    Returns:
        Labels of each utterance, without blanks.

    Raises:
        ValueError: If ``max_labels_per_step`` is not positive.
    """
    return greedy_search(
        model, *model.transcribe(features, lengths), max_labels_per_step=max_labels_per_step
    ).labels


class GreedyResult(NamedTuple):
    """Result of a greedy search."""

    labels: list[list[int]]
    """Labels of each utterance, without blanks."""
    is_cut: list[bool]
    """True for an utterance with a step that had more labels than the search takes."""


@torch.no_grad()
def greedy_search(
    model: Decodable,
    encodings: Float[Tensor, "batch steps dim"],
    steps: Int[Tensor, " batch"],
    *,
    max_labels_per_step: int = 10,
) -> GreedyResult:
    """Decode encodings that are there already; see :func:`greedy_decode`.

    Args:
        model: Transducer, or its programs.
        encodings: Encodings of the utterances, padded.
        steps: Number of valid steps of each utterance.
        max_labels_per_step: See :func:`greedy_decode`.

    Raises:
        ValueError: If ``max_labels_per_step`` is not positive.
    """
    if max_labels_per_step < 1:
        raise ValueError(f"max_labels_per_step must be at least 1, got {max_labels_per_step}")
    batch = torch.arange(len(steps), device=steps.device)
    ones = torch.ones_like(steps)
    prediction, _, state = model.predict(torch.full_like(steps, BLANK).unsqueeze(1), ones, None)
    clock, emitted = torch.zeros_like(steps), torch.zeros_like(steps)
    hypotheses: list[list[int]] = [[] for _ in steps]
    is_cut = torch.zeros_like(steps, dtype=torch.bool)
    while bool((clock < steps).any()):
        now = encodings[batch, clock.clamp(max=encodings.shape[1] - 1)].unsqueeze(1)
        logits, _, _ = model.join(now, ones, prediction, ones)
        label = logits[:, 0, 0].argmax(dim=-1)
        wants = (clock < steps) & (label != BLANK)
        emits = wants & (emitted < max_labels_per_step)
        is_cut |= wants & ~emits
        clock = torch.where(emits, clock, clock + 1)
        emitted = torch.where(emits, emitted + 1, 0)
        emitting = emits.nonzero()[:, 0].tolist()
        if emitting:
            following, _, after = model.predict(label.unsqueeze(1), ones, state)
            prediction = torch.where(emits[:, None, None], following, prediction)
            state = _select(emits, after, state)
            labels = label.tolist()
            for index in emitting:
                hypotheses[index].append(labels[index])
    return GreedyResult(hypotheses, is_cut.tolist())


def _select(mask: Tensor, after: State, before: State) -> State:
    """Select the state ``after`` where ``mask`` is True, ``before`` for the other utterances."""
    return [
        [torch.where(mask[:, None], new, old) for new, old in zip(layer, former, strict=True)]
        for layer, former in zip(after, before, strict=True)
    ]


@torch.no_grad()
def torchaudio_decode(
    model: Transducer,
    features: Float[Tensor, "batch frames mels"],
    lengths: Int[Tensor, " batch"],
    *,
    beam_width: int,
    max_labels_per_step: int = 10,
) -> list[list[int]]:
    """Decode with ``torchaudio.models.RNNTBeamSearch``, one utterance after the other.

    Args:
        model: Transducer.
        features: Features, padded with zeros.
        lengths: Number of valid frames of each utterance.
        beam_width: Number of hypotheses after each step, less than the number of labels.
        max_labels_per_step: Largest number of labels between two steps of the sound.

    Returns:
        Labels of the best hypothesis of each utterance, without blanks.

    Raises:
        ValueError: If ``beam_width`` is not positive.
    """
    if beam_width < 1:
        raise ValueError(f"beam_width must be at least 1, got {beam_width}")
    adapter = BlankLast(model)
    search = RNNTBeamSearch(adapter, blank=adapter.blank, step_max_tokens=max_labels_per_step)
    hypotheses = []
    for frames, length in zip(features, lengths, strict=True):
        best = search(frames[: int(length)], length, beam_width)[0]
        hypotheses.append([label + 1 for label in best[0][1:]])
    return hypotheses


class BlankLast(torch.nn.Module):
    """A view of a transducer in which blank is the last label instead of the first.

    torchaudio's beam search reads the score of blank from the last entry, whatever index it gets;
    the transducer loss and CTC put it first by convention. Every other label moves down by one.

    Args:
        model: Transducer whose blank is label 0.
    """

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.model = model
        self.num_labels = model.joint.output.out_features

    @property
    def blank(self) -> int:
        """Index of blank in this view."""
        return self.num_labels - 1

    def transcribe(self, sources: Tensor, source_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode utterances, as the transducer does."""
        return self.model.transcribe(sources, source_lengths)

    def transcribe_streaming(
        self, sources: Tensor, source_lengths: Tensor, state: State | None
    ) -> tuple[Tensor, Tensor, State]:
        """Encode the next chunk, as the transducer does."""
        return self.model.transcribe_streaming(sources, source_lengths, state)

    def predict(
        self, targets: Tensor, target_lengths: Tensor, state: State | None
    ) -> tuple[Tensor, Tensor, State]:
        """Encode labels of this view."""
        return self.model.predict((targets + 1) % self.num_labels, target_lengths, state)

    def join(
        self,
        source_encodings: Tensor,
        source_lengths: Tensor,
        target_encodings: Tensor,
        target_lengths: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score the labels of this view; one encoding serves every hypothesis."""
        hypotheses = target_encodings.shape[0]
        logits, steps, labels = self.model.join(
            source_encodings.expand(hypotheses, -1, -1),
            source_lengths.expand(hypotheses),
            target_encodings,
            target_lengths,
        )
        return logits.roll(-1, dims=-1), steps, labels
