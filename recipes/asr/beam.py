"""Beam search over many utterances at once.

Search and results equal those of ``torchaudio.models.RNNTBeamSearch``. There, the network is called
for every list of hypotheses of every utterance; here, all utterances take each step of the sound
together, with one call of the joint network and one of the predictor.

Reference:
    Graves, "Sequence transduction with recurrent neural networks", arXiv 1211.3711, 2012.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recipes.asr.decoding import Decodable, greedy_decode
from recipes.asr.rnnt import State
from recipes.asr.vocabulary import BLANK


@dataclass(frozen=True)
class Hypothesis:
    """A label sequence with the output and the state of the predictor after it.

    Attributes:
        labels: Labels without blanks.
        score: Log-probability of all its alignments so far, in nats.
        prediction: Output of the predictor after the labels.
        state: State of the predictor after the labels.
    """

    labels: tuple[int, ...]
    score: float
    prediction: Float[Tensor, "labels dim"]
    state: list[list[Float[Tensor, " hidden"]]]

    @property
    def rank(self) -> float:
        """Normalize the score by the length, so that longer sequences are not worse."""
        return self.score / (len(self.labels) + 2)


class _Beam:
    """The hypotheses of one utterance during one step of the sound."""

    def __init__(self, hypotheses: list[Hypothesis], width: int) -> None:
        self.open = hypotheses
        self.width = width
        self.closed: dict[tuple[int, ...], Hypothesis] = {}

    def close(self, blank: Sequence[float]) -> None:
        """Move every open hypothesis to the next step; equal label sequences add up.

        Args:
            blank: Log-probability of blank for every open hypothesis, in nats.
        """
        for hypothesis, logarithm in zip(self.open, blank, strict=True):
            score = hypothesis.score + logarithm
            equal = self.closed.get(hypothesis.labels)
            if equal is not None:
                score = _add_logarithms(equal.score, score)
            self.closed[hypothesis.labels] = _with_score(hypothesis, score)

    def expansions(
        self, labels: Float[Tensor, "hypotheses labels"]
    ) -> list[tuple[int, int, float]]:
        """Return the best extensions that can still be among the closed hypotheses.

        Args:
            labels: Log-probability of every label but blank for every open hypothesis, in nats.

        Returns:
            Index of the open hypothesis, label, and score of each extension.
        """
        scores = labels + torch.tensor([hypothesis.score for hypothesis in self.open])[:, None]
        best, positions = scores.flatten().topk(min(self.width, scores.numel()))
        closed = sorted((hypothesis.score for hypothesis in self.closed.values()), reverse=True)
        worst = closed[self.width - 1] if len(closed) >= self.width else -math.inf
        return [
            (position // labels.shape[1], position % labels.shape[1] + 1, score)
            for score, position in zip(best.tolist(), positions.tolist(), strict=True)
            if score > worst
        ]

    def finish(self) -> list[Hypothesis]:
        """Return the best hypotheses at the end of the step."""
        ranked = sorted(self.closed.values(), key=lambda closed: closed.rank, reverse=True)
        return ranked[: self.width]


def decode(
    model: Decodable,
    features: Float[Tensor, "batch frames mels"],
    lengths: Int[Tensor, " batch"],
    *,
    beam_width: int,
    max_labels_per_step: int,
) -> list[list[int]]:
    """Search greedily or with a beam; see :func:`.greedy_decode` and :func:`beam_decode`.

    Args:
        model: Transducer, or its programs.
        features: Features, padded with zeros.
        lengths: Number of valid frames of each utterance.
        beam_width: Number of hypotheses; 1 decodes greedily.
        max_labels_per_step: Largest number of labels per step, positive.
    """
    if beam_width == 1:
        return greedy_decode(model, features, lengths, max_labels_per_step=max_labels_per_step)
    settings = {"beam_width": beam_width, "max_labels_per_step": max_labels_per_step}
    return beam_decode(model, features, lengths, **settings)


@torch.no_grad()
def beam_decode(
    model: Decodable,
    features: Float[Tensor, "batch frames mels"],
    lengths: Int[Tensor, " batch"],
    *,
    beam_width: int,
    max_labels_per_step: int = 10,
) -> list[list[int]]:
    """Search for the most likely labels of every utterance.

    Args:
        model: Transducer, or its programs.
        features: Features, padded with zeros.
        lengths: Number of valid frames of each utterance.
        beam_width: Number of hypotheses per utterance after each step, positive.
        max_labels_per_step: Largest number of labels between two steps of the sound.

    Returns:
        Labels of the best hypothesis of each utterance, without blanks.

    Raises:
        ValueError: If ``beam_width`` is not positive.
    """
    if beam_width < 1:
        raise ValueError(f"beam_width must be at least 1, got {beam_width}")
    encodings, steps = model.transcribe(features, lengths)
    hypotheses = [[start] for start in _start(model, len(steps), steps)]
    for step in range(int(steps.max())):
        running = [index for index, count in enumerate(steps.tolist()) if step < count]
        beams = {index: _Beam(hypotheses[index], beam_width) for index in running}
        for labels_so_far in range(max_labels_per_step + 1):
            open_beams = {index: beam for index, beam in beams.items() if beam.open}
            if not open_beams:
                break
            scores = _score(model, encodings[:, step], open_beams)
            for beam, table in zip(open_beams.values(), scores, strict=True):
                beam.close(table[:, BLANK].tolist())
            _expand(model, open_beams, scores, last=labels_so_far == max_labels_per_step)
        for index, beam in beams.items():
            hypotheses[index] = beam.finish()
    return [list(ranked[0].labels) for ranked in hypotheses]


def _start(model: Decodable, count: int, like: Tensor) -> list[Hypothesis]:
    """Return the empty hypothesis, once per utterance."""
    label = torch.full((1, 1), BLANK, dtype=torch.long, device=like.device)
    prediction, _, state = model.predict(label, torch.ones_like(label[0]), None)
    return [Hypothesis((), 0.0, prediction[0], _row(state, 0))] * count


def _score(
    model: Decodable, encodings: Float[Tensor, "batch dim"], beams: dict[int, _Beam]
) -> list[Tensor]:
    """Score the next label: one table of log-probabilities per beam, a row per open hypothesis."""
    counts = [len(beam.open) for beam in beams.values()]
    rows = torch.tensor([i for i, n in zip(beams, counts, strict=True) for _ in range(n)])
    predictions = torch.stack([h.prediction for beam in beams.values() for h in beam.open])
    ones = torch.ones_like(rows)
    now = encodings[rows.to(encodings.device)].unsqueeze(1)
    logits, _, _ = model.join(now, ones, predictions, ones)
    # The rest is scalar work: it runs on the CPU, whatever the device of the network.
    return list(logits[:, 0, 0].log_softmax(dim=-1).cpu().split(counts))


def _expand(model: Decodable, beams: dict[int, _Beam], scores: list[Tensor], *, last: bool) -> None:
    """Replace the open hypotheses by their best extensions; by none after the ``last`` round."""
    selected: list[tuple[_Beam, Hypothesis, int, float]] = []
    for beam, table in zip(beams.values(), scores, strict=True):
        if not last:
            extensions = beam.expansions(table[:, BLANK + 1 :])
            selected += [(beam, beam.open[index], label, s) for index, label, s in extensions]
        beam.open = []
    if not selected:
        return
    parents = [parent for _, parent, _, _ in selected]
    device = parents[0].prediction.device
    labels = torch.tensor([[label] for _, _, label, _ in selected], device=device)
    after = _stack([parent.state for parent in parents])
    predictions, _, states = model.predict(labels, torch.ones_like(labels[:, 0]), after)
    for row, (beam, parent, label, score) in enumerate(selected):
        extended = (*parent.labels, label)
        beam.open.append(Hypothesis(extended, score, predictions[row], _row(states, row)))


def _stack(states: list[State]) -> State:
    return [
        [torch.stack(rows) for rows in zip(*layers, strict=True)]
        for layers in zip(*states, strict=True)
    ]


def _row(state: State, row: int) -> State:
    return [[tensor[row] for tensor in layer] for layer in state]


def _with_score(hypothesis: Hypothesis, score: float) -> Hypothesis:
    return Hypothesis(hypothesis.labels, score, hypothesis.prediction, hypothesis.state)


def _add_logarithms(first: float, second: float) -> float:
    """Return the logarithm of the sum of two numbers, from their logarithms."""
    high, low = max(first, second), min(first, second)
    return high + math.log1p(math.exp(low - high))
