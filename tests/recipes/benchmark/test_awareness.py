"""The study of accelerator-aware training: its runs, their commands, and its page."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize
from omegaconf import DictConfig

from lightning_nna import calibrate
from lightning_nna.deploy import CaptureError, export_tflite
from lightning_nna.emulation.spec import resolve_spec
from recipes.benchmark.awareness import OPERATORS, STUDY, TRAINED, difference, runs, verdict
from recipes.benchmark.awareness_runs import CHIPS, MODELS, RecognizerRun, built
from recipes.benchmark.recipe_runs import commands_words
from recipes.keywords.network import KeywordNetwork
from recipes.settings import check_settings


def row(model: str, chip: str, method: str, seed: int, every: int) -> dict[str, Any]:
    """A row whose every ``every``-th utterance has a word error."""
    utterances = 400 if model == "keywords" else len(commands_words())
    errors = np.arange(utterances) % every == 0
    packed = base64.b64encode(zlib.compress(errors.astype(np.uint8).tobytes())).decode()
    return {
        **{"model": model, "chip": chip, "method": method, "seed": seed},
        **{"wer": float(errors.mean()), "loss_per_token": 0.1, "utterance_errors": packed},
        "train_seconds": 30.0 if method in ("control", "trained") else None,
        **{"cpu_seconds": 60.0, "command": "python -m recipes.benchmark.awareness"},
    }


def test_the_grid_trains_with_three_seeds_where_an_accelerator_hurts() -> None:
    grid = [run for run in runs() if hasattr(run, "chip")]
    assert len({run.folder for run in grid}) == len(grid)
    for model, chips in TRAINED.items():
        trained = [r for r in grid if (r.model, r.method) == (model, "trained")]
        assert {(run.chip, run.seed) for run in trained} == {
            (c, s) for c in chips for s in (1, 2, 3)
        }
        untrained = [run.chip for run in grid if (run.model, run.method) == (model, "untrained")]
        assert untrained == list(CHIPS)


RECOGNIZERS = [run for run in runs(seeds=[1]) if isinstance(run, RecognizerRun)]
SCORED = [run for run in RECOGNIZERS if run.method not in ("trained", "averaged")]


def composed(name: str, command: list[str]) -> DictConfig:
    settings = [each for each in command[1:] if "hydra." not in each]
    with initialize(version_base="1.3", config_path="../../../recipes/conf"):
        config = compose(name, [*settings, "run_dir=somewhere"])
    check_settings(config, name)
    return config


@pytest.mark.parametrize("run", SCORED, ids=lambda run: f"{run.model}-{run.chip}-{run.method}")
def test_recognizers_are_scored_on_their_accelerator(run: RecognizerRun) -> None:
    scored = composed("evaluate", run.command)
    specs = [resolve_spec(node.spec) for node in scored.callbacks.values()]
    assert specs == ([] if run.chip == "none" else [run.accelerator.spec])


def test_recognizers_are_trained_on_their_accelerator_or_in_float() -> None:
    trained = [run for run in RECOGNIZERS if run.method in ("trained", "control", "averaged")]
    configs = [composed("train", run.training_command) for run in trained]
    assert [config.method for config in configs] == [
        "float" if run.method == "control" else "nna8" for run in trained
    ]
    assert [config.callbacks.average is not None for config in configs] == [
        run.method == "averaged" for run in trained
    ]
    assert [
        resolve_spec(node.spec)
        for config in configs
        for key, node in config.callbacks.items()
        if key == "nna"
    ] == [run.accelerator.spec for run in trained if run.method != "control"]


def calibrated(chip: str) -> tuple[KeywordNetwork, list[torch.Tensor]]:
    network, sound = KeywordNetwork(3, channels=4, widths=(4,)).eval(), torch.randn(1, 1, 16, 8)
    calibrate(network, [sound], spec=CHIPS[chip].spec)
    return network, [sound]


@pytest.mark.parametrize("chip", [name for name, chip in CHIPS.items() if chip.has_program])
def test_an_accelerator_has_programs(chip: str, tmp_path: Path) -> None:
    assert export_tflite(*calibrated(chip), tmp_path / "network.tflite").size_bytes


@pytest.mark.parametrize("chip", [name for name, chip in CHIPS.items() if not chip.has_program])
def test_an_accelerator_without_programs_is_an_error(chip: str, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="accumulator_bits is"):
        export_tflite(*calibrated(chip), tmp_path / "network.tflite")


def test_the_pretrained_recognizers_are_built_again_for_their_operators_and_outliers() -> None:
    starts = {run.model: run.start for run in RECOGNIZERS if run.start.weights.is_file()}
    assert {"rnnt", "conformer"} <= set(starts)
    for start in starts.values():
        assert built(start).recognizer.vocabulary.kind == "word"


def test_a_difference_is_of_words() -> None:
    rare, often = (row("keywords", "shift", "trained", 1, every) for every in (4, 2))
    change = difference([rare], [often])
    assert change is not None
    assert (change.mean, change.is_tied) == (-0.25, False)
    assert difference([], [often]) is None


def test_a_verdict_tells_what_is_won_back() -> None:
    rows = [
        row("keywords", "none", "float", 1, 40),
        row("keywords", "shift", "untrained", 1, 8),
        *(row("keywords", "shift", "trained", seed, 20) for seed in (1, 2, 3)),
        *(row("keywords", "shift", "control", seed, 8) for seed in (1, 2, 3)),
    ]
    text = verdict(rows, "keywords", "shift")
    assert text is not None
    assert "costs +10.0" in text
    assert "training wins -7.5" in text
    assert "75% of the cost" in text
    assert "(3 seeds)" in text
    assert verdict(rows, "keywords", "int8") is None
    tied = verdict(
        [*rows[:2], {**rows[1], "method": "trained", "train_seconds": 1.0}], "keywords", "shift"
    )
    assert tied is not None
    assert "training is tied with none" in tied


def test_the_page_has_every_part() -> None:
    program = {"runtime": "TFLite-Micro", "outputs": 100, "equal_outputs": 100, "utterances": 64}
    rows = [
        {**row("keywords", "none", "float", 1, 40), "channel_ratios": [2.0, 5.0]},
        row("keywords", "int8", "untrained", 1, 40),
        {**row("keywords", "int8", "trained", 1, 40), **program, "tflite_bytes": 45_000},
        {
            **{"model": "rnnt", "operators": next(iter(OPERATORS)), "sites": 14, "cpu_sites": 3},
            **{"cpu_calls_per_second": 20.4, "crossing_bytes_per_second": 12_345.6},
            **{
                "cpu_operators": ["lstm", "tanh"],
                "command": "python -m recipes.benchmark.awareness",
            },
        },
    ]
    rows.append({**row("conformer", "weights4", "averaged", 1, 20), "train_seconds": 9.0})
    rows[0]["outliers"] = {"weights": [5.0, 3.0, 7.0], "inputs": [2.0, 4.0, 9.0]}
    page = STUDY.render(rows)
    assert (
        "| keyword spotter | 8 bits, `tflm-int8` | TFLite-Micro | 100 of 100 | 64 | 45,000 |"
        in page
    )
    assert "convolution by convolution: 2.0, 5.0." in page
    assert "| 14 | 3 | 20 | 12,346 | lstm, tanh |" in page
    assert "+0.0 (+0.0 to +0.0, tied)" in page
    assert "- RNN-T, `shift`, emulated, untrained: seed 1." in page
    assert "- keyword spotter, 8 bits, `tflm-int8`, emulated, untrained" not in page
    assert "| keyword spotter | 3 | 5.0 | 7.0 | 4.0 | 9.0 |" in page
    assert "| Conformer | 4-bit weights | - | 5.0 % | 1 | - | - | - |" in page
    assert set(MODELS) == set(TRAINED)
