"""The recipe of the keyword spotter: every group of compression, resuming, a microcontroller."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from recipes.allocate import allocate
from recipes.deploy import deploy, table
from recipes.evaluate import evaluate
from recipes.keywords.adapter import KeywordAdapter
from recipes.keywords.data import COMMANDS, KeywordData
from recipes.objective import check_objective
from recipes.train import deployed_metrics, train
from recipes.weights import load_weights
from tests.recipes.conftest import CONF, compose_config

__all__ = ["compose_config"]
Compose = Callable[..., DictConfig]
GROUPS = sorted(path.stem for path in (CONF / "compression").glob("*.yaml"))
#: Settings of so few steps.
NEEDED = {"parq": ["parq_steps=6"], "s8bqat": ["callbacks.hard.every_n_steps=2"]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keywords")


@pytest.fixture
def small(cache: Path) -> list[str]:
    """Settings of a spotter that is trained in a second."""
    return [
        "experiment=keywords",
        *("data.vocabulary=digits", "data.train_size=12", "data.validation_size=2"),
        *("data.test_size=5", "data.batch_size=4", f"data.cache_dir={cache}"),
        *("model.network.channels=8", "model.network.widths=[8]"),
        *("trainer.max_epochs=2", "trainer.check_val_every_n_epoch=2", "trainer.accelerator=cpu"),
        *(
            "callbacks.progress=null",
            "callbacks.average=null",
        ),
        *("trainer.log_every_n_steps=1", "+trainer.enable_progress_bar=false"),
    ]


def _compression(group: str) -> list[str]:
    emulated = [] if group in ("none",) else ["callbacks.nna.calibration_steps=2"]
    return [f"compression={group}", *emulated, *NEEDED.get(group, [])]


@pytest.mark.filterwarnings("ignore:NNAEmulation. 0 of")
@pytest.mark.parametrize("group", GROUPS)
def test_every_group_of_compression_trains_a_keyword_spotter(
    group: str, small: list[str], compose_config: Compose, tmp_path: Path
) -> None:
    if group == "parq":
        pytest.importorskip("torchao")
    summary = train(compose_config("train", *small, *_compression(group)))
    assert summary["words"] == 5
    assert summary["error_rate"] == summary["errors"] / 5
    assert len((tmp_path / "run" / "transcripts.tsv").read_text().splitlines()) == 6
    is_float = group in ("none",)
    assert (summary["bits"] == 32) == is_float


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_ends_as_the_uninterrupted_one(
    small: list[str], compose_config: Compose, tmp_path: Path
) -> None:
    common = [*small, *_compression("codebook"), "bits=4", "model.schedule=null"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(compose_config("train", *common, f"run_dir={whole}"))
    train(compose_config("train", *common, f"run_dir={parts}", "trainer.max_epochs=1"))
    (parts / "config.yaml").unlink()  # The shorter run's; a stopped run has the longer one's.
    train(compose_config("train", *common, f"run_dir={parts}"))
    weights = [load_weights(each / "checkpoints" / "last.ckpt").network for each in (whole, parts)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=0)
    summaries = [json.loads((each / "summary.json").read_text()) for each in (whole, parts)]
    assert summaries[0]["loss"] == summaries[1]["loss"]


@pytest.mark.slow
@pytest.mark.exactness
def test_it_ends_on_a_microcontroller(
    small: list[str], compose_config: Compose, tmp_path: Path
) -> None:
    pytest.importorskip("ethosu")
    trained = tmp_path / "trained"
    summary = train(
        compose_config("train", *small, *_compression("gq"), "bits=4", f"run_dir={trained}")
    )
    ckpt = f"ckpt={trained / 'checkpoints' / 'last.ckpt'}"
    scored = evaluate(compose_config("evaluate", ckpt, "compression=gq", "bits=4"))
    assert {scored[key] for key in ("error_rate", "loss")} == {
        summary[key] for key in ("error_rate", "loss")
    }
    deployed = deploy(compose_config("deploy", ckpt, "target=tflm", "score_float=false"))
    assert (deployed["equal_outputs"], deployed["examples"]) == (1.0, 5)
    assert deployed["outputs"] == 5 * 10
    assert deployed["error_rate"] == deployed["emulated"]["error_rate"] == summary["error_rate"]
    assert list(deployed["firmware"]) == ["network"]
    assert deployed["firmware"]["network"]["equal_outputs"] == 1.0
    assert {system["cycles"] > 0 for system in deployed["systems"]} == {True}
    assert "per word" in table(deployed)
    with pytest.raises(ValueError, match="chunk_steps=2 is not used: KeywordSpotter is no trans"):
        deploy(compose_config("deploy", ckpt, "chunk_steps=2"))
    with pytest.raises(ValueError, match="beam_width=4 is not used: KeywordSpotter is no transd"):
        evaluate(compose_config("evaluate", ckpt, "beam_width=4"))


@pytest.mark.slow
def test_cycles_of_a_run_are_those_of_its_deployment(
    small: list[str], compose_config: Compose, tmp_path: Path
) -> None:
    pytest.importorskip("ethosu")
    check_objective(["error_rate", "cycles"], KeywordAdapter.known_results)
    train(compose_config("train", *small, *_compression("codebook"), "bits=4"))
    metrics = deployed_metrics(tmp_path / "run")
    deployed = tmp_path / "run" / "deploy" / "summary.json"
    assert metrics["cycles"] == json.loads(deployed.read_text())["systems"][0]["cycles"] > 0
    written = deployed.stat().st_mtime_ns
    assert deployed_metrics(tmp_path / "run") == metrics
    assert deployed.stat().st_mtime_ns == written


def test_bits_are_allocated_by_its_training_loss(
    small: list[str], compose_config: Compose, tmp_path: Path
) -> None:
    train(compose_config("train", *small, "trainer.max_epochs=1", f"run_dir={tmp_path / 'float'}"))
    ckpt = f"ckpt={tmp_path / 'float' / 'checkpoints' / 'last.ckpt'}"
    allocation = allocate(compose_config("allocate", ckpt, "target_mean_bits=4", "batches=1"))
    assert set(allocation.bits) == {
        *("network.first.0.weight", "network.head.weight"),
        *("network.blocks.0.0.0.weight", "network.blocks.0.1.0.weight"),
    }


def test_its_configuration_makes_the_data() -> None:
    data = instantiate(OmegaConf.load(CONF / "data" / "keywords.yaml"))
    assert isinstance(data, KeywordData)
    assert data.corpus == COMMANDS


def test_its_trained_weights_fit_the_code(compose_config: Compose) -> None:
    weights = load_weights("recipes/pretrained/keywords.safetensors")
    config: Any = compose_config("train", "experiment=keywords_finetune")
    assert config.init_from == "recipes/pretrained/keywords.safetensors"
    assert weights.recipe["targets"] == list(config.targets) == ["network"]
    assert weights.network["network.head.weight"].shape == (50, 64)
    assert weights.network["network.first.1.num_batches_tracked"].dtype == torch.int64
