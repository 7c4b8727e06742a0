"""``debug=true``: a short run that trains as the long one would, in a folder of its own."""

from __future__ import annotations

import csv
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from recipes.debug import shortened
from recipes.program import CONF, as_program
from recipes.settings import check_settings
from recipes.sweep_table import read_runs
from recipes.train import train
from tests.recipes.conftest import SMALL_NETWORK

Compose = Callable[..., DictConfig]
COMPRESSIONS = sorted(path.stem for path in (CONF / "compression").glob("*.yaml"))
EMULATED = [each for each in COMPRESSIONS if each != "none"]


@pytest.fixture
def overrides(small_an4: Path, tmp_path: Path) -> list[str]:
    """A command of a long run on a small corpus."""
    return [
        *("experiment=an4_rnnt", *SMALL_NETWORK, f"data.root={small_an4}", "data.num_mels=8"),
        *(f"data.cache_dir={tmp_path / 'cache'}", "data.speeds=[1.0]", "data.batch_seconds=1"),
        *("data.spec_augment.frequency_width=2", "data.num_buckets=2", "data.num_workers=0"),
        *("data.validation_fraction=0.2", "trainer.accelerator=cpu", "callbacks.progress=null"),
        "trainer.enable_progress_bar=false",
    ]


#: A package of the extra `bench`.
NEEDED = {
    "parq": pytest.mark.skipif(
        importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
    )
}


def _metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics" / "version_0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # In the source of torchao.
@pytest.mark.parametrize(
    "compression",
    [pytest.param(name, marks=NEEDED[name]) if name in NEEDED else name for name in EMULATED],
)
def test_a_debug_run_of_every_compression_ends_emulated(
    compression: str, compose_config: Compose, overrides: list[str], tmp_path: Path
) -> None:
    # Decoding with a network that has learned nothing takes longest.
    unscored = ["trainer.limit_val_batches=0", "test=false"]
    settings = [f"compression={compression}", "debug=true", *unscored]
    summary = train(compose_config("train", *overrides, *settings))
    assert (summary["epochs"], summary["method"], summary["debug"]) == (2, compression, True)
    run = tmp_path / "run"
    rows = _metrics(run)
    assert max(int(row["step"]) for row in rows if row["train/loss"]) == 11
    emulated = [row["nna/emulation/calibrated"] for row in rows]
    assert [float(one) for one in emulated if one] == [1.0, 1.0]
    assert summary["bits"] <= 8
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["NNAEmulation"]["emulator"]["calibrated"]


def test_a_debug_run_tells_in_one_line_what_it_shortens(
    compose_config: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "recipes.debug")
    config = compose_config("train", "compression=gq", "bits=4", "debug=true")
    shorter = shortened(config)
    (line,) = caplog.messages
    assert line.startswith("debug=true: 2 epochs of 6 training batches, 2 of validation and 2 of")
    assert "callbacks.nna.calibration_steps=2, not 32" in line
    assert shorter.callbacks.nna.calibration_steps == 2
    assert (shorter.data.train_size, config.data.train_size) == (64, 5000)
    assert config.callbacks.nna.calibration_steps == 32
    check_settings(shorter, "train")


def test_limits_of_the_command_stay(compose_config: Compose) -> None:
    command = ["trainer.limit_val_batches=0", "trainer.accumulate_grad_batches=3"]
    trainer = shortened(compose_config("train", *command, "debug=true")).trainer
    assert (trainer.limit_train_batches, trainer.limit_val_batches) == (18, 0)
    assert trainer.limit_test_batches == 2


def test_without_debug_nothing_changes(compose_config: Compose) -> None:
    config = compose_config("train", "compression=nna8")
    assert shortened(config) is config


def test_debug_is_true_or_false(compose_config: Compose) -> None:
    with pytest.raises(ValueError, match="debug must be true or false, got 'no'"):
        shortened(compose_config("train", "debug=no"))


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["debug=true"], "runs/digits/debug/*"),
        ([], "runs/digits/*"),
        (["hydra.run.dir=mine", "debug=true"], "mine/debug"),
        (["hydra.run.dir=mine"], "mine"),
        (["sweep=grid", "seed=1,2", "debug=true"], "runs/digits/debug/seed=[12]"),
        (["sweep=grid", "seed=1,2", "hydra.sweep.dir=a", "debug=true"], "a/seed=[12]/debug"),
    ],
    ids=lambda one: "-".join(one) if isinstance(one, list) else "",
)
def test_debug_runs_have_folders_of_their_own(
    arguments: list[str], folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders: list[Path] = []

    def task(config: DictConfig) -> None:
        folders.append(Path(config.run_dir).relative_to(tmp_path))

    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["recipes.train", *arguments, *quiet])
    as_program("train")(task)()
    assert folders
    assert all(PurePath(each).match(folder) for each in folders), folders
    assert {len(each.parts) for each in folders} == {len(PurePath(folder).parts)}


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_debug_run_is_never_resumed_and_takes_the_place_of_the_last(
    compose_config: Compose, overrides: list[str], tmp_path: Path
) -> None:
    def run(*settings: str, folder: str) -> dict[str, Any]:
        place = f"run_dir={tmp_path / folder}"
        return train(compose_config("train", *overrides, "test=false", *settings, place))

    run("debug=true", folder="mine/debug")
    again = run("debug=true", "model.optimizer.lr=0.01", folder="mine/debug")
    real = run("trainer.max_epochs=1", folder="mine")
    assert (again["epochs"], real["epochs"]) == (2, 1)
    assert "debug" not in real
    assert [each.name for each in read_runs(tmp_path / "mine")] == ["mine"]
    # Someone who asks for debug runs gets them.
    assert [each.name for each in read_runs(tmp_path / "mine" / "debug")] == ["debug"]
