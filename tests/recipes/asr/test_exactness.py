"""The emulated transducer of the recipes: its logits equal LiteRT's kernels in every bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_nna import emulate
from lightning_nna.emulation.emulator import Emulator
from lightning_nna.emulation.ranges import TANH_OUTPUT, QParams
from recipes.asr.rnnt import Transducer, transducer
from tests import litert
from tests.emulation.oracle import fully_connected_program, grid, integers, lstm_program, spec

pytestmark = pytest.mark.exactness


@pytest.mark.parametrize("seed", range(3))
def test_every_logit_of_a_trained_transducer_equals_litert(seed: int) -> None:
    torch.manual_seed(seed)
    model = transducer(
        num_mels=8,
        num_labels=7,
        frame_stack=6,
        frame_stride=3,
        encoder_size=24,
        embedding_size=8,
        predictor_size=16,
        joint_size=12,
    )
    features, lengths = torch.randn(5, 30, 8), torch.full((5,), 30)
    labels, label_lengths = torch.randint(0, 7, (5, 9)), torch.full((5,), 9)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with emulate(model, "litert-int8", fidelity="fast") as chip:
        with chip.observing():
            model(features, lengths, labels, label_lengths)
        for _ in range(5):
            logits, *_ = model(features, lengths, labels, label_lengths)
            optimizer.zero_grad()
            (logits.logsumexp(-1) - logits[..., 1]).mean().backward()
            optimizer.step()
        with chip.running(fidelity="exact"):
            with torch.no_grad():
                logits, *_ = model(features, lengths, labels, label_lengths)
                stacked, _ = model.encoder.stacking(features)
                expected = deployed(chip, model, stacked.numpy(), labels.numpy())
            y = grid(chip, "joint.output/fully_connected#0/output")
            np.testing.assert_array_equal(integers(logits, y), expected)


def deployed(
    chip: Emulator, model: Transducer, stacked: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Logits of the same integer weights from LiteRT alone, operator after operator."""
    x = grid(chip, "encoder.layers.0/lstm#0/layer0/input")
    program = litert.unary_model(
        "QUANTIZE", litert.TensorSpec(stacked.shape, "float32"), spec(stacked.shape, x)
    )
    (hidden,) = litert.run_model(program, [stacked])
    for index, layer in enumerate(model.encoder.layers):
        site = f"encoder.layers.{index}/lstm#0"
        (hidden,) = litert.run_model(lstm_program(chip, layer, hidden.shape, x, site), [hidden])
        x = grid(chip, f"{site}/layer0/output")
    encoded, q_e = projected(chip, model.encoder.projection, "encoder.projection", hidden, x)

    table = chip.state.weight(model.predictor.embedding.weight, 7)
    q_t = QParams(float(table.scales[0]), 0, -127, 127)
    embedded = table.integers.numpy().astype(np.int8)[labels]
    program = lstm_program(chip, model.predictor.lstm, embedded.shape, q_t, "predictor.lstm/lstm#0")
    (hidden,) = litert.run_model(program, [embedded])
    x = grid(chip, "predictor.lstm/lstm#0/layer0/output")
    predicted, q_p = projected(chip, model.predictor.projection, "predictor.projection", hidden, x)

    left, right = encoded[:, :, None], predicted[:, None]
    q_s = grid(chip, "joint/add#0/output")
    shape = (*encoded.shape[:2], predicted.shape[1], encoded.shape[2])
    program = litert.binary_model(
        "ADD", spec(left.shape, q_e), spec(right.shape, q_p), spec(shape, q_s)
    )
    (total,) = litert.run_model(program, [left, right])
    program = litert.unary_model("TANH", spec(shape, q_s), spec(shape, TANH_OUTPUT))
    (total,) = litert.run_model(program, [total])
    logits, _ = projected(chip, model.joint.output, "joint.output", total, TANH_OUTPUT)
    return logits


def projected(
    chip: Emulator, layer: torch.nn.Linear, path: str, x: np.ndarray, q_x: QParams
) -> tuple[np.ndarray, QParams]:
    """A linear layer over the last axis."""
    y = grid(chip, f"{path}/fully_connected#0/output")
    rows = x.reshape(-1, x.shape[-1])
    program = fully_connected_program(chip, layer, rows.shape, q_x, y)
    (result,) = litert.run_model(program, [rows])
    return result.reshape(*x.shape[:-1], -1), y
