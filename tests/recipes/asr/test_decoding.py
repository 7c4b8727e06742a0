"""Greedy search in batches and one by one, and torchaudio's beam search on the same model."""

from __future__ import annotations

import copy

import pytest
import torch

from recipes.asr.beam import beam_decode
from recipes.asr.decoding import BlankLast, greedy_decode, greedy_search, torchaudio_decode
from recipes.asr.rnnt import Transducer, transducer


@pytest.fixture
def model() -> Transducer:
    """An untrained transducer that emits now and then: blank is favored a little."""
    model = transducer(
        num_mels=5,
        num_labels=6,
        frame_stack=4,
        frame_stride=2,
        encoder_size=16,
        predictor_size=16,
        joint_size=16,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        model.joint.output.bias[0] += 0.5
    return model


LENGTHS = torch.tensor([31, 24, 9, 2])


@pytest.fixture
def features() -> torch.Tensor:
    features = torch.randn(4, 31, 5)
    for utterance, length in zip(features, LENGTHS, strict=True):
        utterance[int(length) :] = 0
    return features


def _plain_greedy(model: Transducer, features: torch.Tensor, limit: int) -> list[int]:
    """One utterance, one label at a time, with the predictor over all labels each time."""
    length = torch.tensor([len(features)])
    encodings, _ = model.transcribe(features[None], length)
    labels = [0]
    for encoding in encodings[0]:
        for _ in range(limit):
            predictions, _, _ = model.predict(torch.tensor([labels]), length, None)
            scores = model.joint(encoding[None, None], predictions[:, -1:])
            best = int(scores.argmax())
            if best == 0:
                break
            labels.append(best)
    return labels[1:]


@pytest.mark.parametrize("limit", [1, 3, 10])
def test_batched_greedy_equals_plain_greedy(
    model: Transducer, features: torch.Tensor, limit: int
) -> None:
    together = greedy_decode(model, features, LENGTHS, max_labels_per_step=limit)
    alone = [
        _plain_greedy(model, utterance[: int(length)], limit)
        for utterance, length in zip(features, LENGTHS, strict=True)
    ]
    assert together == alone
    assert 0 < sum(len(labels) for labels in together) < LENGTHS.sum() // 2 * limit


def test_the_search_tells_which_utterances_it_has_cut(
    model: Transducer, features: torch.Tensor
) -> None:
    encodings, steps = model.transcribe(features, LENGTHS)
    for limit in (1, 3):
        result = greedy_search(model, encodings, steps, max_labels_per_step=limit)
        longer = greedy_search(model, encodings, steps, max_labels_per_step=limit + 1)
        differ = [one != other for one, other in zip(result.labels, longer.labels, strict=True)]
        assert result.is_cut == differ
        assert any(differ)
    blank = copy.deepcopy(model)
    blank.joint.output.bias.data[0] += 100
    assert not any(greedy_search(blank, encodings, steps, max_labels_per_step=1).is_cut)


def test_beam_search_finds_nothing_less_likely_than_greedy(
    model: Transducer, features: torch.Tensor
) -> None:
    greedy = greedy_decode(model, features, LENGTHS)
    beam = beam_decode(model, features, LENGTHS, beam_width=4)
    assert all(0 < label < 6 for labels in beam for label in labels)
    likelihoods = [_log_likelihood(model, features, labels) for labels in (beam, greedy)]
    # Per label, since that is how torchaudio ranks its hypotheses.
    sizes = [[len(labels) + 1 for labels in hypotheses] for hypotheses in (beam, greedy)]
    ranks = [
        [value / size for value, size in zip(values, counts, strict=True)]
        for values, counts in zip(likelihoods, sizes, strict=True)
    ]
    assert sum(ranks[0]) >= sum(ranks[1])


@torch.no_grad()
def _log_likelihood(
    model: Transducer, features: torch.Tensor, hypotheses: list[list[int]]
) -> list[float]:
    """Forward algorithm over all alignments, in plain Python."""
    values = []
    for utterance, length, labels in zip(features, LENGTHS, hypotheses, strict=True):
        one = torch.tensor([1])
        encodings, _ = model.transcribe(utterance[None, : int(length)], length[None])
        predictions, _, _ = model.predict(torch.tensor([[0, *labels]]), one, None)
        scores = model.joint(encodings, predictions).log_softmax(-1)[0]
        alpha = torch.full(scores.shape[:2], float("-inf"))
        alpha[0, 0] = 0.0
        for step in range(len(scores)):
            for count in range(len(labels) + 1):
                if step > 0:
                    stay = alpha[step - 1, count] + scores[step - 1, count, 0]
                    alpha[step, count] = torch.logaddexp(alpha[step, count], stay)
                if count > 0:
                    emit = alpha[step, count - 1] + scores[step, count - 1, labels[count - 1]]
                    alpha[step, count] = torch.logaddexp(alpha[step, count], emit)
        values.append(float(alpha[-1, -1] + scores[-1, -1, 0]))
    return values


@torch.no_grad()
def test_beam_search_streams(model: Transducer, features: torch.Tensor) -> None:
    from torchaudio.models import RNNTBeamSearch

    view = BlankLast(model)
    search = RNNTBeamSearch(view, blank=view.blank)
    expected = search(features[0], torch.tensor(31), 3)[0][0]
    state = hypotheses = None
    for chunk in features[0].split(8):
        hypotheses, state = search.infer(
            chunk, torch.tensor(len(chunk)), 3, state=state, hypothesis=hypotheses
        )
    assert hypotheses is not None
    assert hypotheses[0][0] == expected


@pytest.mark.parametrize("beam_width", [1, 2, 4])
@pytest.mark.parametrize("limit", [1, 2, 10])
def test_the_batched_beam_equals_that_of_torchaudio(
    model: Transducer, features: torch.Tensor, beam_width: int, limit: int
) -> None:
    settings = {"beam_width": beam_width, "max_labels_per_step": limit}
    expected = torchaudio_decode(model, features, LENGTHS, **settings)
    assert beam_decode(model, features, LENGTHS, **settings) == expected
    assert any(expected)


@pytest.mark.parametrize("decode", [greedy_decode, beam_decode, torchaudio_decode])
def test_limits_below_one_are_an_error(
    decode: object, model: Transducer, features: torch.Tensor
) -> None:
    name = "max_labels_per_step" if decode is greedy_decode else "beam_width"
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        decode(model, features, LENGTHS, **{name: 0})  # type: ignore[operator]
