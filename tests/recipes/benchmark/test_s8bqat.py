"""The grid of S8BQAT: its runs, what they log, its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize

from recipes.benchmark import recipe_runs
from recipes.benchmark.deployment import SYSTEMS
from recipes.benchmark.s8bqat import (
    CHOSEN,
    SIZES,
    STUDY,
    SettingRun,
    SizeRun,
    logged,
    runs,
    size_runs,
)
from recipes.settings import check_settings

PACKED = "eNpjYGBgAAAABAAB"  # Four utterances without errors.


def of_setting(run: SettingRun, wer: float = 0.1, **more: Any) -> dict[str, Any]:
    figures = {"wer": wer, "wer_low": wer, "wer_high": wer, "loss_per_token": 2 * wer}
    return {
        **run.keys[0],
        **figures,
        "command": f"python {run.folder}",
        "train_seconds": None if run.strength is None else 1.0,
        "distance": 0.2,
        "pull": 0.5,
        "changed": None,
        "utterance_errors": PACKED,
        **more,
    }


def of_size(run: SizeRun, wer: float, milliseconds: float) -> list[dict[str, Any]]:
    estimates = {"inference_ms": milliseconds, "memory_bytes": 2048, "encoded_bytes": 1024}
    return [
        {
            **key,
            **estimates,
            "wer": wer,
            "command": "python",
            "train_seconds": 1.0,
            "equal_outputs": 1.0,
            "utterance_errors": str(wer),
        }
        for key in run.keys
    ]


def test_every_command_composes() -> None:
    with initialize(version_base="1.3", config_path="../../../recipes/conf"):
        for run in {run.folder: run for run in runs(seeds=(1,))}.values():
            module, *overrides = run.command
            name = module.removeprefix("recipes.")
            config = compose(name, overrides=[o for o in overrides if "hydra." not in o])
            check_settings(config, name)


def test_a_setting_is_that_of_the_callbacks() -> None:
    run = SettingRun(3, 1e-2, scaled=False, schedule="off", hard="late", rate=1e-3)
    with initialize(version_base="1.3", config_path="../../../recipes/conf"):
        config = compose("train", [o for o in run.command[1:] if "hydra." not in o])
    mracos, hard = config.callbacks.mracos, config.callbacks.hard
    assert (mracos.strength, mracos.scaled, mracos.bits, hard.bits) == (1e-2, False, 3, 3)
    assert dict(mracos.schedule)["shape"] == "step"
    assert (hard.every_n_steps, hard.start_step) == (25, 0.8)
    assert config.callbacks.nna is None
    assert config.model.optimizer.lr == 1e-3
    assert config.data.test_part == "validation"


def test_sizes_have_the_chosen_settings_of_their_width() -> None:
    with initialize(version_base="1.3", config_path="../../../recipes/conf"):
        for run in size_runs((2,)):
            config = compose("train", [o for o in run.command[1:] if "hydra." not in o])
            assert config.seed == 2
            assert config.model.network.encoder_size == SIZES[run.network]
            assert config.callbacks.nna is not None
            strength = None if run.bits == 8 else CHOSEN[run.bits].strength
            assert config.callbacks.get("mracos", {}).get("strength") == strength


def test_what_was_logged_is_read(tmp_path: Path) -> None:
    names = (
        "nna/hard_compression/distance",
        "nna/mracos_regularization/pull",
        "nna/hard_compression/changed",
        "nna/hard_compression/compressions",
    )
    path = tmp_path / "metrics" / "version_0" / "metrics.csv"
    path.parent.mkdir(parents=True)
    lines = ["0.5,1.0,0.0,1.0", ",,,", "0.4,3.0,0.02,2.0", "0.3,2.0,0.04,3.0", "0.0,9.0,0.04,3.0"]
    path.write_text("\n".join([",".join(names), *lines]), encoding="utf-8")
    found = logged(tmp_path)
    assert found == {"distance": 0.3, "pull": 2.5, "changed": pytest.approx(0.03)}
    assert logged(tmp_path / "none") == {"distance": None, "pull": None, "changed": None}


def test_the_report_has_every_table(monkeypatch: pytest.MonkeyPatch) -> None:
    difference = recipe_runs.RateDifference(-0.02, -0.03, -0.01)
    monkeypatch.setattr("recipes.benchmark.s8bqat.wer_difference", lambda *_: difference)
    settings = [of_setting(run) for run in runs(seeds=(1,)) if isinstance(run, SettingRun)]
    small, five, four = size_runs((1,))
    sizes = [*of_size(small, 0.2, 10.0), *of_size(five, 0.18, 9.4), *of_size(four, 0.18, 9.6)]
    text = STUDY.render([*settings, *sizes])
    assert "| 2 | 10.0 %, 0.200 |" in text
    assert "-2.0 (-3.0 to -1.0)" in text
    assert text.count("met.") == 1 + len(SYSTEMS)
    assert text.count("missed.") == len(SYSTEMS)
    assert "-6.0%" in text


def test_the_report_of_a_part_has_no_empty_tables() -> None:
    text = STUDY.render([of_setting(SettingRun(2, 0.0)), of_setting(SettingRun(2, None))])
    assert "Three seeds" not in text
    assert "A larger network" not in text
