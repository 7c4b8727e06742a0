"""Networks that others wrote: they train emulated, and their programs compute the same bits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.callbacks import (
    CompressedSensingPruning,
    GeneralQuantizer,
    HardCompression,
    MRACosRegularization,
    NNAEmulation,
)
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.weights.method import WeightMethod
from recipes.benchmark.foreign import INSTALLED, fit
from recipes.benchmark.foreign_module import ForeignProgram

pytest.importorskip("peft")
pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("transformers")

# Libraries of others announce what they will change; small loaders and short runs are meant.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]

SPECS = ("litert-int8", "litert-int16x8")


def run(program: ForeignProgram, task: Any, *arguments: Any) -> Any:
    return program.run(task.network, *arguments)


@pytest.mark.exactness
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", INSTALLED)
def test_it_trains_emulated_and_every_program_is_equal(
    name: str, spec: str, tmp_path: Path
) -> None:
    foreign = INSTALLED[name]
    task = foreign.task()
    batch, optimizer = task.batch(), torch.optim.Adam(trained(task), lr=1e-3)
    assert not coverage(task, *batch, spec=spec).fallbacks
    with emulate(task, spec) as emulator:
        with emulator.observing():
            expected = foreign.loss(task(*batch))
        losses = []
        for fidelity in ("exact", "fast"):
            with emulator.running(fidelity=fidelity):
                optimizer.zero_grad()
                loss = foreign.loss(task(*batch))
                loss.backward()
                optimizer.step()
            losses.append(float(loss))
    assert math.isclose(losses[0], float(expected), rel_tol=0.2)
    assert math.isfinite(losses[1])
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in task.parameters())
    assert sum(p.grad is not None and bool(p.grad.any()) for p in task.parameters())
    task.eval()
    for program in foreign.exported:
        arguments = list(program.arguments(task.network, *batch))
        forward = partial(run, program)
        calibrate(task, [arguments], lambda task, batch, forward=forward: forward(task, *batch))
        model = export_tflite(task, arguments, tmp_path / "net.tflite", forward=forward)
        assert verify(task, model.path, arguments, forward=forward, random_inputs=2) == 1.0


def trained(task: Any) -> list[torch.nn.Parameter]:
    return [each for each in task.parameters() if each.requires_grad]


COMPRESSED = ["bert_lora", "gan", "mobilenet_v2", "unet"]


def compressed_by(name: str, *methods: WeightMethod) -> list[Tensor]:
    task = INSTALLED[name].task()
    fit(task, 8, NNAEmulation(calibration_steps=2, telemetry_every_n_steps=0), *methods)
    weights = [task.get_parameter(each) for each in methods[-1].selected]
    assert weights
    return weights


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize(
    "methods",
    [lambda: [GeneralQuantizer(4)], lambda: [MRACosRegularization(4), HardCompression(4)]],
    ids=["gq", "s8bqat"],
)
def test_its_weights_take_few_values(name: str, methods: Callable[[], list[WeightMethod]]) -> None:
    assert all(len(weight.unique()) <= 16 for weight in compressed_by(name, *methods()))


@pytest.mark.parametrize("name", COMPRESSED)
def test_its_weights_are_pruned(name: str) -> None:
    weights = compressed_by(name, CompressedSensingPruning(0.7))
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros >= 0.69 * sum(weight.numel() for weight in weights)


def test_lora_leaves_frozen_weights_alone() -> None:
    task = INSTALLED["bert_lora"].task()
    before = copy.deepcopy(task.state_dict())
    fit(task, 4, NNAEmulation(calibration_steps=2, telemetry_every_n_steps=0), GeneralQuantizer(4))
    frozen = [name for name, each in task.named_parameters() if not each.requires_grad]
    assert len(frozen) > 20
    assert all(torch.equal(task.state_dict()[name], before[name]) for name in frozen)
