"""Training, resuming, fine-tuning and scoring on a corpus that is made in a moment."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from recipes.evaluate import evaluate
from recipes.train import train
from recipes.weights import load_weights, save_weights
from tests.recipes.conftest import SMALL_NETWORK
from tests.recipes.test_conf import EXPERIMENTS

OTHERS = ("digits_ctc", "keywords", "keywords_finetune")  # Tested beside their modules.
TRANSDUCERS = [name for name in EXPERIMENTS if name not in OTHERS]
Compose = Callable[..., DictConfig]

SUMMARY = {
    *("experiment", "method", "command", "commit", "seed", "versions", "parameters", "size_bytes"),
    *("epochs", "train_seconds", "threads", "wer", "wer_low", "wer_high", "errors", "words"),
    *("loss_per_token", "beam_width", "wer_greedy", "bits", "sparsity", "packed_bytes"),
    *("overrides", "titles"),
}


@pytest.fixture
def overrides(small_an4: Path, tmp_path: Path) -> list[str]:
    """Settings that make any experiment run on the small corpus within a second or two."""
    return [
        *SMALL_NETWORK,
        "data=an4",
        f"data.root={small_an4}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.num_mels=8",
        "data.speeds=[1.0]",
        "data.validation_fraction=0.2",
        "data.spec_augment.frequency_width=2",
        "data.batch_seconds=2",
        "data.num_buckets=2",
        "data.num_workers=0",
        "trainer.max_epochs=2",
        "trainer.check_val_every_n_epoch=1",
        "trainer.accelerator=cpu",
        "trainer.log_every_n_steps=1",
        "callbacks.progress=null",
        "trainer.enable_progress_bar=false",
    ]


def _weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_weights(folder / "checkpoints" / "last.ckpt").network


def test_a_run_writes_config_metrics_checkpoints_and_summary(
    compose_config: Compose, overrides: list[str], tmp_path: Path
) -> None:
    config = compose_config("train", "experiment=an4_rnnt", *overrides)
    summary = train(config)
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text()) == summary
    assert summary.keys() == SUMMARY
    assert summary["wer_low"] <= summary["wer"] <= summary["wer_high"]
    assert (summary["epochs"], summary["method"], summary["words"]) == (2, "float", 8)
    assert summary["size_bytes"] == summary["packed_bytes"] == 4 * summary["parameters"]
    assert (summary["bits"], summary["sparsity"]) == (32.0, 0.0)
    with (run / "metrics" / "version_0" / "metrics.csv").open() as file:
        columns = set(next(csv.reader(file)))
    assert columns >= {"train/loss", "val/loss_per_token", "val/wer", "test/wer"}
    assert (run / "config.yaml").is_file()


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_stopped_run_resumes_to_the_same_weights(
    compose_config: Compose, overrides: list[str], tmp_path: Path
) -> None:
    common = ["experiment=an4_rnnt", *overrides, "model.schedule=null", "test=false"]
    uninterrupted, parts = tmp_path / "uninterrupted", tmp_path / "parts"
    train(compose_config("train", *common, f"run_dir={uninterrupted}"))
    train(compose_config("train", *common, f"run_dir={parts}", "trainer.max_epochs=1"))
    (parts / "config.yaml").unlink()  # the shorter run's; a stopped run has the longer one's
    train(compose_config("train", *common, f"run_dir={parts}"))
    expected = _weights_of(uninterrupted)
    resumed = _weights_of(parts)
    assert expected.keys() == resumed.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)


def test_a_run_ends_when_its_time_is_over(compose_config: Compose, overrides: list[str]) -> None:
    limits = ["trainer.max_epochs=100000", "trainer.max_time='00:00:00:02'", "test=false"]
    unscored = ["trainer.limit_val_batches=0"]
    summary = train(compose_config("train", "experiment=an4_rnnt", *overrides, *limits, *unscored))
    assert summary["epochs"] < 100000
    assert summary["train_seconds"] >= 2


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_that_is_finished_is_not_run_again(
    compose_config: Compose, overrides: list[str], tmp_path: Path
) -> None:
    settings = ["experiment=an4_rnnt", *overrides, "trainer.max_epochs=1"]
    summary = train(compose_config("train", *settings))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    saved = last.stat().st_mtime_ns
    assert train(compose_config("train", *settings, "threads=1", "objective=[bits]")) == summary
    assert last.stat().st_mtime_ns == saved
    assert not (tmp_path / "run" / "metrics" / "version_1").exists()
    # How it is scored makes another result, of the same weights.
    again = train(compose_config("train", *settings, "test=false"))
    assert "wer" not in again
    assert last.stat().st_mtime_ns == saved
    anew = train(compose_config("train", *settings, "test=false", "resume=false"))
    assert anew["commit"] == summary["commit"]
    assert last.stat().st_mtime_ns > saved


def test_the_folder_of_another_run_is_an_error(
    compose_config: Compose, overrides: list[str]
) -> None:
    settings = ["experiment=an4_rnnt", *overrides, "test=false", "trainer.max_epochs=1"]
    train(compose_config("train", *settings))
    with pytest.raises(ValueError, match="other settings of seed; resume it"):
        train(compose_config("train", *settings, "seed=5", "data.seed=1", "model.seed=1"))


@pytest.mark.filterwarnings("ignore:NNAEmulation. 0 of")  # Shorter than its calibration.
@pytest.mark.parametrize("experiment", TRANSDUCERS)
def test_every_experiment_of_a_transducer_runs(
    experiment: str, compose_config: Compose, overrides: list[str], tmp_path: Path
) -> None:
    characters = ("data.units=character", "data.num_pieces=null", "data.alphabet=' ABEGINOPSTY'")
    settings = [*overrides, *characters]
    start: list[str] = []
    if "finetune" in experiment:
        first = experiment.removesuffix("_finetune")
        start = [f"init_from={_small_weights(compose_config, settings, tmp_path, first)}"]
    fast = [*settings, "trainer.fast_dev_run=2", *start]
    config = compose_config("train", f"experiment={experiment}", *fast)
    summary = train(config)
    assert summary["wer"] >= 0
    assert summary["experiment"] == experiment


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_loggers_work_offline(
    logger: str, compose_config: Compose, overrides: list[str], tmp_path: Path
) -> None:
    settings = [*overrides, "test=false", "trainer.max_epochs=1", f"logger={logger}"]
    train(compose_config("train", "experiment=an4_rnnt", *settings))
    assert (tmp_path / "run" / "metrics" / "version_0" / "metrics.csv").is_file()
    assert (tmp_path / "run" / logger).is_dir()


@pytest.fixture
def small_weights(compose_config: Compose, overrides: list[str], tmp_path: Path) -> Path:
    """A ``.safetensors`` file of an RNN-T trained for one epoch."""
    return _small_weights(compose_config, overrides, tmp_path, "an4_rnnt")


def _small_weights(
    compose_config: Compose, overrides: list[str], tmp_path: Path, experiment: str
) -> Path:
    run = tmp_path / "first"
    settings = [*overrides, "trainer.max_epochs=1", "test=false", f"run_dir={run}"]
    train(compose_config("train", f"experiment={experiment}", *settings))
    path = tmp_path / "small.safetensors"
    weights = load_weights(run / "checkpoints" / "last.ckpt")
    # So little trained, it would emit as many labels per step as it may.
    weights.network["model.joint.output.bias"][0] += 3
    save_weights(path, weights, command="a test")
    return path


def test_a_checkpoint_scores_as_its_run_did(
    compose_config: Compose, overrides: list[str], tmp_path: Path
) -> None:
    trained = train(compose_config("train", "experiment=an4_rnnt", *overrides))
    ckpt = tmp_path / "run" / "checkpoints" / "last.ckpt"
    config = compose_config("evaluate", f"ckpt='{ckpt}'", f"run_dir={tmp_path / 'evaluation'}")
    scored = evaluate(config)
    assert scored["wer"] == trained["wer"]
    assert scored["loss_per_token"] == pytest.approx(trained["loss_per_token"], rel=1e-6)
    assert (tmp_path / "evaluation" / "summary.json").is_file()
    heard = [run / "transcripts.tsv" for run in (tmp_path / "run", tmp_path / "evaluation")]
    assert heard[0].read_text() == heard[1].read_text()
    counts = [line.split("\t") for line in heard[0].read_text().splitlines()]
    assert counts[0] == ["utterance", "errors", "words", "reference", "hypothesis"]
    assert sum(int(line[1]) for line in counts[1:]) == scored["errors"]
    assert sum(int(line[2]) for line in counts[1:]) == scored["words"]


def test_settings_can_be_chosen_on_the_validation_part(
    compose_config: Compose, overrides: list[str], tmp_path: Path
) -> None:
    settings = [*overrides, "data.test_part=validation", "trainer.max_epochs=1"]
    train(compose_config("train", "experiment=an4_rnnt", *settings))
    lines = (tmp_path / "run" / "transcripts.tsv").read_text().splitlines()[1:]
    config = compose_config("train", "experiment=an4_rnnt", *settings)
    data = instantiate(config.data)
    data.setup()
    batches = list(data.val_dataloader())
    assert [line.split("\t")[0] for line in lines] == sorted(i for b in batches for i in b.ids)
    # A checkpoint that was chosen so is scored on the test part all the same.
    ckpt = tmp_path / "run" / "checkpoints" / "last.ckpt"
    evaluate(compose_config("evaluate", f"ckpt='{ckpt}'", f"run_dir={tmp_path / 'evaluation'}"))
    scored = (tmp_path / "evaluation" / "transcripts.tsv").read_text().splitlines()[1:]
    assert not {line.split("\t")[0] for line in lines} & {line.split("\t")[0] for line in scored}


def test_saving_half_precision_weights_again_changes_nothing(
    compose_config: Compose, small_weights: Path, tmp_path: Path
) -> None:
    half = load_weights(small_weights)
    scored = _loss(compose_config, small_weights)
    again = tmp_path / "again.safetensors"
    save_weights(again, half, command="a test")
    assert _loss(compose_config, again) == scored


def _loss(compose_config: Compose, path: Path) -> Any:
    return evaluate(compose_config("evaluate", f"ckpt='{path}'"))["loss_per_token"]


def test_beam_search_is_a_setting(compose_config: Compose, small_weights: Path) -> None:
    config = compose_config("evaluate", f"ckpt={small_weights}", "beam_width=3")
    assert evaluate(config)["words"] == 8


def test_a_float_checkpoint_is_emulated(
    compose_config: Compose, small_weights: Path, tmp_path: Path
) -> None:
    settings = [f"ckpt={small_weights}", "compression=nna8", "calibration_batches=2"]
    summary = evaluate(compose_config("evaluate", *settings))
    assert summary["method"] == "chip"
    # Eight bits are near float, but not float.
    float_loss = _loss(compose_config, small_weights)
    assert summary["loss_per_token"] == pytest.approx(float_loss, rel=0.2)
    assert summary["loss_per_token"] != float_loss


def test_an_emulated_run_scores_again_as_it_did(
    compose_config: Compose, overrides: list[str], small_weights: Path, tmp_path: Path
) -> None:
    start = [f"init_from={small_weights}", "callbacks.nna.calibration_steps=2"]
    settings = ["experiment=an4_rnnt_finetune", *overrides, *start]
    trained = train(compose_config("train", *settings, "compression=nna8"))
    ckpt = tmp_path / "run" / "checkpoints" / "last.ckpt"
    again = compose_config("evaluate", f"ckpt='{ckpt}'", "compression=nna8")
    again.run_dir = str(tmp_path / "again")
    scored = evaluate(again)
    assert (trained["method"], scored["method"]) == ("nna8", "nna8")
    assert scored["wer"] == trained["wer"]
    assert scored["loss_per_token"] == trained["loss_per_token"]


def test_the_start_of_a_run_teaches_its_low_bit_network(
    compose_config: Compose, overrides: list[str], small_weights: Path, tmp_path: Path
) -> None:
    start = [f"init_from={small_weights}", "callbacks.nna.calibration_steps=2"]
    settings = ["experiment=an4_rnnt_finetune", "compression=gq", "bits=2", "test=false"]
    config = compose_config("train", *settings, "callbacks=distillation", *overrides, *start)
    train(config)
    run = tmp_path / "run"
    with (run / "metrics" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for child in ("encoder", "predictor"):
        column = f"nna/distillation/model.{child}"
        assert [float(row[column]) for row in rows if row.get(column)][-1] > 0
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    (state,) = (s for key, s in saved["callbacks"].items() if key.startswith("Distillation{"))
    weights = load_weights(small_weights).network
    for child, tensors in state["copies"].items():
        own = {f"{child}.{name}": one for name, one in tensors.items()}
        assert own.keys() <= weights.keys()
        assert all(torch.equal(one, weights[name]) for name, one in own.items())
