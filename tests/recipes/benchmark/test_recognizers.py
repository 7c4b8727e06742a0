"""The grid of recognizers on runtimes: its commands, and its page."""

from __future__ import annotations

from typing import Any

from hydra import compose, initialize

from lightning_nna.emulation.spec import resolve_spec
from recipes.benchmark.recognizers import ELEMENTARY, METHODS, MODELS, SPECS, STUDY, runs
from recipes.settings import check_settings


def row(spec: str, model: str = "rnnt", equal: float = 1.0) -> dict[str, Any]:
    return {
        **{"model": model, "method": "codebook", "spec": spec, "bits": 4, "sparsity": 0.0},
        **dict.fromkeys(("wer_float", "wer_emulated", "wer", "wer_low", "wer_high"), 0.1),
        **{"tflite_bytes": 2_000_000, "runtime": "TFLite-Micro", "outputs": 1000},
        **{"equal_outputs": equal, "equal_transcripts": 1.0, "utterances": 130},
        **({"flash_bytes": 75, "plain_flash_bytes": 100} if spec == "tflm-int8" else {}),
        **dict.fromkeys(("plain_arena_bytes", "arena_bytes", "encoded_bytes"), 10),
        "command": f"python -m recipes.deploy nna={spec}",
    }


def test_the_grid_has_each_network_on_each_runtime() -> None:
    grid = runs()
    assert len(grid) == len(METHODS) * (len(MODELS) * len(SPECS) - 1)
    assert len({run.folder for run in grid}) == len(grid)
    assert len({run.trained_folder for run in grid}) == len(METHODS) * len(MODELS)


def test_every_command_composes() -> None:
    deployed, trained = set(), set()
    with initialize(version_base="1.3", config_path="../../../recipes/conf"):
        for run in runs():
            module, *overrides = run.command
            config = compose("deploy", [each for each in overrides if "hydra." not in each])
            spec = resolve_spec(config.nna.spec)
            deployed.add((module, config.recalibrate, spec.runtime, spec.lstm))
            module, *overrides = run.training_command
            config = compose("train", [each for each in overrides if "hydra." not in each])
            check_settings(config, "train")
            trained.add((module, config.nna.spec))
    assert trained == {("recipes.train", "tflm-int8")}
    assert {each[0] for each in deployed} == {"recipes.deploy"}
    recalibrated = {each[2:] for each in deployed if each[1]}
    assert recalibrated == {("tflm", "elementary"), ("tosa", "sequence"), ("litert", "sequence")}


def test_the_page_adds_up_what_is_equal() -> None:
    page = STUDY.render([row("tosa-int8", equal=0.999), row(ELEMENTARY), row("tflm-int8")])
    assert "bit by bit: 2,999 of 3,000 in all rows" in page
    lines = [each for each in page.splitlines() if "| `t" in each]
    assert [each.split("|")[5].strip() for each in lines] == [
        "`tflm-int8`",
        "`tflm-int8`, LSTM of elementary operators",
        "`tosa-int8`",
    ]
    assert "| RNN-T | fixed codebook | 4 | 0% | 100 | 75 | 25.0% | 10 | 10 | 10 |" in page
    assert "| 999 of 1,000 | 130 of 130 |" in lines[2]
