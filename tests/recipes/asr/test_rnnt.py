"""The transducer: shapes, streaming, and the order of its layers."""

from __future__ import annotations

import pytest
import torch

from recipes.asr.rnnt import Encoder, FrameStacking, Transducer, transducer


def _small(**settings: object) -> Transducer:
    sizes = {"num_mels": 5, "num_labels": 7, "encoder_size": 12, "joint_size": 10}
    return transducer(**{**sizes, **settings}).eval()  # type: ignore[arg-type]


def test_stacking_equals_windows_of_the_padded_sequence() -> None:
    frames = torch.randn(2, 11, 3)
    stacked, past = FrameStacking(stack=6, stride=2)(frames)
    padded = torch.nn.functional.pad(frames, (0, 0, 4, 1))
    windows = padded.unfold(1, 6, 2).transpose(2, 3).reshape(2, 6, 18)
    assert torch.equal(stacked, windows)
    assert torch.equal(past, padded[:, -4:])


@pytest.mark.parametrize(("stack", "stride"), [(0, 0), (2, 3), (5, 2), (4, -1)])
def test_windows_of_incomplete_hops_are_an_error(stack: int, stride: int) -> None:
    with pytest.raises(ValueError, match=f"stack={stack}, stride={stride}"):
        FrameStacking(stack=stack, stride=stride)


@pytest.mark.parametrize("after", [0, 2])
def test_time_reduction_lies_between_layers(after: int) -> None:
    with pytest.raises(ValueError, match="reduction_after"):
        _small(time_reduction=2, reduction_after=after, encoder_layers=2)


def test_shapes_of_every_part() -> None:
    model = _small(frame_stack=4, frame_stride=2, time_reduction=2)
    features, lengths = torch.randn(3, 13, 5), torch.tensor([13, 8, 5])
    labels, label_lengths = torch.zeros(3, 4, dtype=torch.long), torch.tensor([4, 3, 2])
    logits, steps, label_lengths_out, state = model(features, lengths, labels, label_lengths)
    assert logits.shape == (3, 4, 4, 7)
    assert steps.tolist() == [4, 2, 2]
    assert label_lengths_out.tolist() == [4, 3, 2]
    assert [tensor.shape for tensor in state[0]] == [(3, 128), (3, 128)]


@pytest.mark.parametrize("time_reduction", [1, 2])
@pytest.mark.parametrize(("stack", "stride"), [(4, 4), (8, 4), (6, 2)])
@pytest.mark.parametrize("steps_per_chunk", [1, 3])
def test_streaming_in_chunks_equals_one_call(
    time_reduction: int, stack: int, stride: int, steps_per_chunk: int
) -> None:
    model = _small(frame_stack=stack, frame_stride=stride, time_reduction=time_reduction)
    features = torch.randn(2, 45, 5)
    expected, _ = model.transcribe(features, torch.tensor([45, 45]))
    encoder = model.encoder
    assert isinstance(encoder, Encoder)
    state, pieces = None, []
    for chunk in features.split(steps_per_chunk * encoder.frames_per_step, dim=1):
        lengths = torch.full((2,), chunk.shape[1])
        piece, _, state = model.transcribe_streaming(chunk, lengths, state)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-5, atol=1e-6)


def test_no_output_depends_on_later_sound() -> None:
    model = _small(frame_stack=8, frame_stride=4)
    features = torch.randn(1, 24, 5, requires_grad=True)
    encodings, _ = model.transcribe(features, torch.tensor([24]))
    (gradient,) = torch.autograd.grad(encodings[0, 2].sum(), features)
    assert bool((gradient[0, 12:] == 0).all())
    assert bool((gradient[0, :12] != 0).any())


def test_labels_one_by_one_equal_labels_at_once() -> None:
    model = _small()
    labels = torch.randint(0, 7, (2, 6))
    ones = torch.ones(2, dtype=torch.long)
    expected, _, _ = model.predict(labels, ones * 6, None)
    state, pieces = None, []
    for label in labels.split(1, dim=1):
        piece, _, state = model.predict(label, ones, state)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-5, atol=1e-6)


def test_padding_does_not_reach_valid_steps() -> None:
    model = _small(frame_stack=8, frame_stride=4)
    features = torch.randn(2, 24, 5)
    features[1, 10:] = 0
    together, steps = model.transcribe(features, torch.tensor([24, 10]))
    alone, _ = model.transcribe(features[1:, :10], torch.tensor([10]))
    torch.testing.assert_close(together[1, : int(steps[1])], alone[0], rtol=1e-5, atol=1e-6)


def test_forget_gates_start_open() -> None:
    lstm = _small().predictor.lstm
    assert bool((lstm.get_parameter("bias_ih_l0")[128:256] == 1).all())
