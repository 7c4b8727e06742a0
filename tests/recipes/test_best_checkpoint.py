"""``checkpoints/best.ckpt`` holds what validation scored, of the network as it is deployed."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from recipes.evaluate import evaluate
from recipes.train import train
from tests.recipes.conftest import SMALL_NETWORK

Compose = Callable[..., DictConfig]


@pytest.fixture
def overrides(small_an4: Path, tmp_path: Path) -> list[str]:
    """A short run whose validation error changes, and not only falls."""
    return [
        *("experiment=an4_rnnt", *SMALL_NETWORK, f"data.root={small_an4}", "data.num_mels=8"),
        *(f"data.cache_dir={tmp_path / 'cache'}", "data.speeds=[1.0]", "data.batch_seconds=2"),
        *("data.spec_augment.frequency_width=2", "data.num_buckets=2", "data.num_workers=0"),
        *("data.validation_fraction=0.2", "trainer.accelerator=cpu", "callbacks.progress=null"),
        *("trainer.enable_progress_bar=false", "trainer.check_val_every_n_epoch=1"),
        *("trainer.log_every_n_steps=1", "test=false", "model.schedule=null"),
    ]


def _validations(run: Path) -> list[tuple[int, float, float]]:
    """Step, word error rate and loss of every validation of a run, in order."""
    rows: list[dict[str, str]] = []
    for log in sorted(run.glob("metrics/version_*/metrics.csv")):
        with log.open() as file:
            rows += [row for row in csv.DictReader(file) if row.get("val/wer")]
    names = ("val/wer", "val/loss_per_token")
    return [(int(row["step"]) + 1, *(float(row[name]) for name in names)) for row in rows]


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        # An average over a short time, so that it differs from the latest weights.
        (["callbacks.average.decay=0.7"], 0),
        (["compression=nna8", "callbacks.nna.calibration_steps=6"], 1),
        (["compression=codebook", "bits=3", "callbacks.nna.calibration_steps=2"], 0),
        (["compression=gmp", "sparsity=0.5", "callbacks.nna.calibration_steps=2"], 1),
    ],
    ids=["float", "nna8", "codebook", "gmp"],
)
def test_the_best_checkpoint_scores_as_its_validation_did(
    settings: list[str], first: int, compose_config: Compose, overrides: list[str], tmp_path: Path
) -> None:
    train(compose_config("train", *overrides, "trainer.max_epochs=3", *settings))
    run = tmp_path / "run"
    validations = _validations(run)
    assert len(validations) == 3
    best = run / "checkpoints" / "best.ckpt"
    step = torch.load(best, weights_only=True)["global_step"]
    steps = [each[0] for each in validations]
    counted = [each for each in validations if each[0] >= steps[first]]
    assert step in [each[0] for each in counted]
    (wer, loss) = next(each[1:] for each in validations if each[0] == step)
    assert wer == min(each[1] for each in counted)
    again = [f"ckpt='{best}'", "data.test_part=validation", f"run_dir={tmp_path / 'again'}"]
    emulated = [each for each in settings if each.startswith(("compression", "bits", "sparsity"))]
    scored = evaluate(compose_config("evaluate", *again, *emulated))
    assert scored["wer"] == pytest.approx(wer, rel=1e-6)
    assert scored["loss_per_token"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_keeps_the_best_of_both_parts(
    compose_config: Compose, overrides: list[str], tmp_path: Path
) -> None:
    settings = [*overrides, "callbacks.average.decay=0.7"]
    train(compose_config("train", *settings, "trainer.max_epochs=2"))
    run = tmp_path / "run"
    (run / "config.yaml").unlink()  # the shorter run's; a stopped run has the longer one's
    train(compose_config("train", *settings, "trainer.max_epochs=4"))
    validations = _validations(run)
    assert len(validations) == 4
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    lowest = min(wer for _, wer, _ in validations)
    assert dict((step, wer) for step, wer, _ in validations)[best["global_step"]] == lowest
    assert last["global_step"] == validations[-1][0]


def test_a_run_that_never_validates_has_no_best_checkpoint(
    compose_config: Compose, overrides: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    never = ["trainer.max_epochs=1", "trainer.check_val_every_n_epoch=5"]
    train(compose_config("train", *overrides, *never))
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "epoch=000.ckpt"}
    assert "there is no best.ckpt: no validation ran" in caplog.text


def test_a_metric_that_is_not_logged_is_a_warning(
    compose_config: Compose, overrides: list[str], tmp_path: Path
) -> None:
    config = compose_config("train", *overrides, "trainer.max_epochs=2", "monitor=val/accuracy")
    with pytest.warns(
        UserWarning, match="val/accuracy is not logged in validation; .*val/wer"
    ) as w:
        train(config)
    assert len([each for each in w if "best checkpoint" in str(each.message)]) == 1
    assert not (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_that_begins_anew_has_not_the_best_of_the_one_before(
    compose_config: Compose, overrides: list[str], tmp_path: Path
) -> None:
    settings = [*overrides, "trainer.max_epochs=1"]
    train(compose_config("train", *settings))
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    assert best.is_file()
    (tmp_path / "run" / "config.yaml").unlink()
    unscored = "trainer.limit_val_batches=0"
    train(compose_config("train", *settings, unscored, "resume=false"))
    assert not best.exists()
