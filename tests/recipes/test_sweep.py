"""A sweep of bits and methods on the embedded corpus: killed, resumed, and compared."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from optuna.trial import TrialState

from recipes.asr.adapter import TransducerAdapter
from recipes.program import CONF
from recipes.settings import check_settings
from recipes.sweep_table import FILES, as_csv, as_markdown, as_text, draw, main, read_runs, table
from tests.conftest import ROOT
from tests.recipes.conftest import SMALL_NETWORK


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_has_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_once = tmp_path / "killed_once"
    command = [
        *(sys.executable, "-m", "recipes.train", "sweep=optuna", "hydra.sweeper.n_trials=3"),
        *("compression=choice(ste,codebook)", "bits=choice(4,2)", "experiment=digits", "threads=1"),
        *("data.train_size=12", "data.validation_size=2", "data.test_size=4", "data.num_mels=8"),
        *("trainer.max_epochs=2", "++callbacks.nna.calibration_steps=1", "callbacks.progress=null"),
        *("trainer.enable_progress_bar=false", "trainer.limit_val_batches=0", *SMALL_NETWORK),
        *("data.batch_seconds=60", "data.scoring_batch_seconds=2", "trainer.limit_test_batches=1"),
        "+callbacks.killer._target_=tests.recipes.killer.Killer",
        *(f"+callbacks.killer.path={killed_once}", "+callbacks.killer.at=4"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    sweep = tmp_path / "runs" / "digits"
    assert run().returncode == -signal.SIGKILL
    finished = {path.parent for path in sweep.glob("*/summary.json")}
    (killed,) = {path.parents[1] for path in sweep.glob("*/checkpoints/last.ckpt")} - finished
    (first,) = finished
    done = run()
    assert done.returncode == 0, done.stderr

    # Three runs, each once: the one that was killed in its second epoch went on with it.
    summaries = {path.parent: json.loads(path.read_text()) for path in sweep.glob("*/summary.json")}
    starts = {run: len(list(run.glob("metrics/version_*"))) for run in summaries}
    assert starts == {**dict.fromkeys(summaries, 1), killed: 2}
    assert {first, killed} < summaries.keys()
    assert [summary["epochs"] for summary in summaries.values()] == [2, 2, 2]
    storage = f"sqlite:///{sweep / 'study.db'}"
    (name,) = optuna.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    complete = study.get_trials(states=[TrialState.COMPLETE])
    assert sorted(trial.value for trial in complete) == sorted(
        summary["wer"] for summary in summaries.values()
    )
    assert not study.get_trials(states=[TrialState.RUNNING])

    (sweep / "interrupted").mkdir()
    (sweep / "interrupted" / "config.yaml").write_text("seed: 1\n")
    main([str(sweep)])
    assert "unfinished" in capsys.readouterr().out
    assert all((sweep / name).stat().st_size > 0 for name in FILES)
    with (sweep / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows][-1] == "interrupted"
    assert {(row["setting compression"], row["setting bits"]) for row in rows[:3]} == {
        (trial.params["compression"], trial.params["bits"]) for trial in complete
    }
    assert [float(row["wer"]) for row in rows[:3]] == sorted(trial.value for trial in complete)


def test_commands_of_the_wandb_sweep_compose(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    sweep = yaml.safe_load((ROOT / "docs" / "tutorials" / "wandb_sweep.yaml").read_text())
    assert sweep["command"][:4] == ["${env}", "python", "-m", "recipes.train"]
    assert sweep["command"][-1] == "${args_no_hyphens}"
    fixed = sweep["command"][4:-1]
    ranges = [
        each.get("values") or [each["min"], each["max"]] for each in sweep["parameters"].values()
    ]
    samples = list(itertools.product(*ranges))
    for sample in samples[:: len(samples) // 3]:
        arguments = [
            f"{key}={value}" for key, value in zip(sweep["parameters"], sample, strict=True)
        ]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", [*fixed, *arguments], return_hydra_config=True)
        assert config.hydra.run.dir == "runs/wandb/abc"
        assert not config.logger.wandb.offline
        OmegaConf.set_readonly(config, False)
        OmegaConf.set_struct(config, False)
        config.pop("hydra")
        config.run_dir = str(tmp_path)
        check_settings(config, "train")
    # The metric is one that a run logs.
    assert sweep["metric"]["name"].removeprefix("test/") in TransducerAdapter.known_results


def _summary(folder: Path, **metrics: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(metrics))


def _example(folder: Path) -> None:
    """Three finished runs, one of them deployed, and one that is not finished."""
    for bits, wer, size in ((8, 0.10, 800), (4, 0.12, 400), (2, 0.5, 450)):
        _summary(
            folder / f"bits={bits}",
            overrides=["compression=gq", f"bits={bits}"],
            titles={"wer": "WER, %"},
            method="gq",
            bits=float(bits),
            packed_bytes=size,
            wer=wer,
            wer_low=wer - 0.01,
            wer_high=wer + 0.02,
            train_seconds=3.0,
        )
    system = {"cycles": 5.0e6}
    deployed = folder / "bits=4" / "deploy"
    _summary(deployed, ckpt="moved/last.ckpt", systems=[system], unit="word")
    _summary(folder / "evaluation", ckpt="a.ckpt", wer=0.3)
    (folder / "bits=1").mkdir()
    (folder / "bits=1" / "config.yaml").touch()


def test_a_table_has_a_row_a_run(tmp_path: Path) -> None:
    _example(tmp_path)
    cycles = [row.get("cycles") for row in table(read_runs(tmp_path)).rows]
    assert cycles == [None, 5.0e6, None, None]
    # A deployment elsewhere is known by its checkpoint.
    (tmp_path / "bits=4" / "deploy" / "summary.json").unlink()
    checkpoint = tmp_path / "bits=4" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    _summary(tmp_path / "other", ckpt=str(checkpoint), systems=[{"cycles": 5.0e6}])
    compared = table(read_runs(tmp_path))
    rows = compared.rows
    assert [row["run"] for row in rows] == ["bits=8", "bits=4", "bits=2", "bits=1"]
    assert [row.get("setting bits") for row in rows] == ["8", "4", "2", None]
    assert "setting compression" not in rows[0]
    assert [row.get("cycles") for row in rows] == [None, 5.0e6, None, None]
    assert rows[-1]["method"] == "unfinished"
    text = as_text(compared)
    assert "12.00 (11.00 - 14.00)" in text
    assert "WER, %" in text
    assert as_markdown(compared).count("\n") == 2 + len(rows)


def test_the_front_is_marked(tmp_path: Path) -> None:
    _example(tmp_path)
    (axes,) = draw(read_runs(tmp_path)).axes
    assert [text.get_text() for text in axes.texts] == ["4", "8"]
    (line,) = [line for line in axes.lines if line.get_label().startswith("no other")]
    assert line.get_xydata() == pytest.approx(np.array([[0.4, 12.0], [0.8, 10.0]]))


def test_a_folder_without_runs_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path)])
    assert end.value.code == 1
    assert f"{tmp_path} has no run: give the folder of a sweep" in capsys.readouterr().err


def test_results_of_any_module_are_compared(tmp_path: Path) -> None:
    for error in (0.25, 0.5):
        _summary(
            tmp_path / str(error),
            **{"overrides": [f"bits={error}"], "titles": {"error": "error"}, "error": error},
            **{"packed_bytes": 100, "train_seconds": 3.0},
        )
    runs = read_runs(tmp_path)
    assert as_csv(table(runs)) == (
        "run,setting bits,packed_bytes,error,train_seconds\n"
        "0.25,0.25,100,0.25,3.0\n0.5,0.5,100,0.5,3.0\n"
    )
    (axes,) = draw(runs).axes
    assert axes.get_ylabel() == "error"


def test_runs_without_a_number_or_a_setting_leave_the_figure_readable(tmp_path: Path) -> None:
    """A diverged run comes last and is not drawn; a run is labelled with the settings it has."""
    for name, error, overrides in (
        ("diverged", math.nan, ["compression=gq", "bits=2"]),
        ("float", 0.1, []),
        ("gq", 0.2, ["compression=gq", "bits=4"]),
        ("csp", 0.3, ["compression=csp"]),
    ):
        _summary(
            tmp_path / name,
            **{"overrides": overrides, "titles": {"error": "error"}, "error": error},
            **{"packed_bytes": int(100 / error) if error == error else 1, "train_seconds": 3.0},
        )
    runs = read_runs(tmp_path)
    assert [row["run"] for row in table(runs).rows] == ["float", "gq", "csp", "diverged"]
    (axes,) = draw(runs).axes
    assert [text.get_text() for text in axes.texts] == ["csp", "gq, 4", "float"]
