"""The recipes' transducers emulated: coverage, equality with LiteRT, and streaming."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nna import coverage, emulate
from lightning_nna.emulation.program import Instruction
from lightning_nna.testing.replay import check_instructions
from recipes.asr.conformer import conformer_transducer
from recipes.asr.rnnt import Transducer, transducer

SIZES: dict[str, Any] = {
    "num_mels": 4,
    "num_labels": 6,
    "encoder_size": 8,
    "embedding_size": 8,
    "predictor_size": 8,
    "joint_size": 8,
    "encoder_dropout": 0.1,
    "predictor_dropout": 0.1,
}
FRAMES = 32


def recurrent() -> Transducer:
    return transducer(time_reduction=2, **SIZES)


def conformer(chunk_size: int) -> Transducer:
    torch.manual_seed(chunk_size)
    return conformer_transducer(
        feed_forward_size=16,
        encoder_layers=2,
        num_heads=2,
        kernel_size=3,
        left_context=3,
        chunk_size=chunk_size,
        **SIZES,
    )


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Padded features and labels, and their lengths."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, FRAMES, SIZES["num_mels"], generator=generator)
    labels = torch.randint(0, SIZES["num_labels"], (3, 4), generator=generator)
    return features, torch.tensor([32, 24, 9]), labels, torch.tensor([4, 2, 3])


def streamed(model: Transducer, features: Tensor, frames: int) -> Tensor:
    """Encodings, chunk by chunk."""
    state, parts = None, []
    for chunk in features.split(frames, dim=1):
        lengths = torch.full((len(chunk),), chunk.shape[1])
        encoded, _, state = model.transcribe_streaming(chunk, lengths, state)
        parts.append(encoded)
    return torch.cat(parts, dim=1)


def every_way(
    model: Transducer, features: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor
) -> None:
    """Training's forward, and all that decoders call, state included."""
    model(features, lengths, labels, label_lengths)
    encodings = streamed(model, features, FRAMES // 2)
    model.transcribe(features, lengths)
    _, _, state = model.predict(labels[:, :1], torch.ones_like(label_lengths), None)
    predicted, ones, _ = model.predict(labels[:, 1:2], torch.ones_like(label_lengths), state)
    logits, _, _ = model.join(encodings[:, :1], ones, predicted, ones)
    logits.argmax(dim=-1)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8", "ethos-u", "shift"])
@pytest.mark.parametrize(
    "build",
    [recurrent, lambda: conformer(1), lambda: conformer(2)],
    ids=["rnnt", "conformer", "conformer in chunks"],
)
def test_nothing_falls_back_to_the_cpu(build: Any, spec: str, train: bool) -> None:
    report = coverage(build().train(train), *batch(), spec=spec, forward=every_way)
    assert {row.operator for row in report.rows} >= {"fully_connected", "lstm", "tanh", "embedding"}
    assert [row.site for row in report.fallbacks] == []


KERNELS = {
    "ADD", "BATCH_MATMUL", "CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "GATHER", "LOGISTIC",
    "MEAN", "MUL", "RSQRT", "SELECT_V2", "SOFTMAX", "SUB", "TANH", "UNIDIRECTIONAL_SEQUENCE_LSTM",
}  # fmt: skip


@pytest.mark.exactness
@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_every_instruction_of_a_trained_conformer_equals_litert(chunk_size: int, spec: str) -> None:
    model, example = conformer(chunk_size), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    with emulate(model, spec) as chip:
        with chip.observing(), torch.no_grad():
            model(*example)
        for _ in range(4):
            logits, *_ = model(*example)
            optimizer.zero_grad()
            (logits.logsumexp(-1) - logits[..., 1]).mean().backward()
            optimizer.step()
        for training in (True, False):
            recorded: list[Instruction] = []
            with chip.running(recorder=recorded.append), torch.no_grad():
                model.train(training)(*example)
            compared = check_instructions(recorded)
            assert set(compared) - {"QUANTIZE"} == KERNELS


def at_once_and_streamed(chunk_size: int, chunks: int, spec: str) -> tuple[Tensor, Tensor]:
    """Emulated encodings of unpadded utterances, at once and in pieces of some chunks."""
    model = conformer(chunk_size).eval()
    features = batch()[0]
    with torch.no_grad(), emulate(model, spec) as chip:
        with chip.observing():
            model(*batch())
        at_once, _ = model.transcribe(features, torch.full((3,), FRAMES))
        step = model.encoder.stacking.stride
        return at_once, streamed(model, features, chunks * chunk_size * step)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_emulated_streaming_equals_one_call(chunk_size: int, chunks: int) -> None:
    assert torch.equal(*at_once_and_streamed(chunk_size, chunks, "litert-int8"))


def test_streaming_in_16_bits_differs_by_the_softmax_of_masked_keys() -> None:
    """Its exponential ends at -10: each masked key has two units of 2^-15, in LiteRT too."""
    at_once, parts = at_once_and_streamed(1, 1, "litert-int16x8")
    assert not torch.equal(at_once, parts)
    assert float((at_once - parts).abs().max()) < 1e-3 * float(at_once.abs().max())
