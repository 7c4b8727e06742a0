"""Two processes of ``python -m recipes.train`` score what one does."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from omegaconf import DictConfig

from recipes.evaluate import evaluate
from recipes.preparation import build
from recipes.weights import load_weights
from tests.recipes.asr.small_corpus import write_an4
from tests.recipes.conftest import SMALL_NETWORK

ROOT = Path(__file__).resolve().parents[2]


def test_processes_that_others_start_need_one_run_folder(tmp_path: Path) -> None:
    write_an4(tmp_path / "an4")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "recipes.train", "experiment=an4_rnnt", *SMALL_NETWORK, "trainer=ddp_cpu"),
            *("data.num_mels=8", "data.speeds=[1.0]", f"data.root={tmp_path / 'an4'}"),
            *(f"data.cache_dir={tmp_path / 'cache'}", "threads=1"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "2 processes were started from outside" in done.stderr
    assert "add hydra.run.dir=<folder> to the command" in done.stderr


def test_two_processes_score_every_utterance_once(
    compose_config: Callable[..., DictConfig], tmp_path: Path
) -> None:
    # Each utterance is a batch, and both parts have an odd number of them: one process gets an
    # utterance of the other, which must not count twice.
    write_an4(tmp_path / "an4")
    run = tmp_path / "shared"
    data = [f"data.root={tmp_path / 'an4'}", f"data.cache_dir={tmp_path / 'cache'}"]
    command = [
        *(sys.executable, "-m", "recipes.train", "experiment=an4_rnnt", *SMALL_NETWORK, *data),
        *("data.num_mels=8", "data.speeds=[1.0]", "data.batch_seconds=0.1", "data.num_buckets=1"),
        *(
            "trainer=ddp_cpu",
            "trainer.max_epochs=1",
            "trainer.enable_progress_bar=false",
            "callbacks.progress=null",
        ),
        *("callbacks.average=null", "threads=1", "beam_width=1", f"hydra.run.dir={run}"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"an4", "cache", "shared"}
    shared = json.loads((run / "summary.json").read_text())
    assert shared["words"] == 6  # Three utterances of two words.

    ckpt = f"ckpt={run / 'checkpoints' / 'last.ckpt'}"
    config = compose_config("evaluate", ckpt)
    alone = evaluate(config)
    for name in ("words", "errors", "wer", "wer_low", "wer_high", "wer_greedy"):
        assert shared[name] == alone[name], name
    assert shared["loss_per_token"] == pytest.approx(alone["loss_per_token"], rel=1e-6)

    weights = load_weights(run / "checkpoints" / "last.ckpt")
    recipe = DictConfig(weights.recipe)
    adapter = build(recipe, weights)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    [expected] = trainer.validate(adapter.module, adapter.datamodule, verbose=False)
    with (run / "metrics" / "version_0" / "metrics.csv").open() as file:
        logged = {k: float(v) for row in csv.DictReader(file) for k, v in row.items() if v}
    for name in ("val/loss", "val/loss_per_token", "val/wer"):
        assert logged[name] == pytest.approx(expected[name], rel=1e-6), name
