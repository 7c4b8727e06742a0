from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_nna import calibrate
from lightning_nna.callbacks import NNAEmulation
from lightning_nna.testing import SmallRecurrentModule
from lightning_nna.testing.contract import CHECKS, assert_same, module, trainer


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[..., None], tmp_path: Path) -> None:
    check(lambda: NNAEmulation(calibration_steps=2, learned_scales="all"), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learned_scales": "biases"}, "learned_scales must be one of .*, got 'biases'"),
        ({"scale_lr": -0.1}, r"scale_lr must be positive, got -0\.1"),
    ],
)
def test_wrong_arguments_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NNAEmulation(**settings)


def test_steps_of_selected_modules_alone_are_learned() -> None:
    recognizer = module()
    recognizer.head.second.weight.requires_grad_(False)
    frozen = recognizer.head.second.weight.clone()
    chip = NNAEmulation(targets=["head"], calibration_steps=1, learned_scales="all")
    trainer(chip, steps=4).fit(recognizer)
    steps = chip.emulator.scales
    assert sorted(steps.weights) == ["head.first.weight:1", "head.third.weight:1"]
    assert all(key.startswith("head") for key in steps.activations)
    assert torch.equal(frozen, recognizer.head.second.weight)
    parameters = sum(len(group["params"]) for group in chip_optimizer(recognizer).param_groups)
    assert parameters == len(list(recognizer.parameters()))


def chip_optimizer(recognizer: SmallRecurrentModule) -> torch.optim.Optimizer:
    assert recognizer.trainer is not None
    return recognizer.trainer.optimizers[0]


def test_a_run_without_learning_keeps_what_was_learned() -> None:
    recognizer, chip = module(), NNAEmulation(calibration_steps=1, learned_scales="all")
    trainer(chip, steps=4).fit(recognizer)
    learned = chip.emulator.scales.state_dict()
    without = NNAEmulation(calibration_steps=0)
    trainer(without, steps=8).fit(recognizer)
    assert_same(without.emulator.scales.state_dict(), learned)


def test_a_gradient_scaler_changes_no_step() -> None:
    states = []
    for scale in (1.0, 1024.0):
        recognizer = module()
        calibrate(recognizer, recognizer.train_dataloader(), lambda net, batch: net(batch[0]))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        # Without telemetry: torch's own LSTM has no fp16 on every CPU.
        chip = NNAEmulation(calibration_steps=0, learned_scales="all", telemetry_every_n_steps=0)
        trainer(chip, steps=4, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(recognizer)
        states.append(chip.emulator.scales.state_dict())
    assert_same(*states)
    assert float(states[0]["weights"]["head.first.weight:1"].abs().sum()) > 0
