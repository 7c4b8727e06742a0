"""The files of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from recipes.program import as_program
from recipes.run_folder import (
    git_commit,
    provenance,
    record_config,
    size_of,
    sole_run,
    write_summary,
    write_whole,
)
from tests.conftest import ROOT


def _begin(run_dir: Path) -> None:
    """Leave what a run leaves that was stopped after an epoch."""
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "last.ckpt").touch()


def test_a_run_that_has_not_begun_gives_way_to_other_settings(tmp_path: Path) -> None:
    for seed in (1, 2):
        record_config(tmp_path, OmegaConf.create({"seed": seed}))
    assert OmegaConf.load(tmp_path / "config.yaml").seed == 2


def test_settings_that_do_not_change_the_result_may_differ(tmp_path: Path) -> None:
    settings = OmegaConf.create({"seed": 1, "twice": "${seed}", "threads": 1, "run_dir": "a"})
    record_config(tmp_path, settings)
    assert OmegaConf.load(tmp_path / "config.yaml").twice == 1
    record_config(tmp_path, OmegaConf.merge(settings, {"threads": 2, "run_dir": "b"}))
    _begin(tmp_path)
    with pytest.raises(ValueError, match="other settings of seed, twice; resume it"):
        record_config(tmp_path, OmegaConf.merge(settings, {"seed": 2}))


def test_a_run_folder_may_be_moved(tmp_path: Path) -> None:
    for run_dir in ("here", "there/deeper"):
        settings = {"run_dir": run_dir, "logger": {}, "callbacks": {"dirpath": "${run_dir}/ckpt"}}
        record_config(tmp_path, OmegaConf.create(settings))
        (tmp_path / "summary.json").touch()
    assert OmegaConf.load(tmp_path / "config.yaml").callbacks.dirpath == "there/deeper/ckpt"


def test_a_summary_is_json_and_the_only_file(tmp_path: Path) -> None:
    path = write_summary(tmp_path, {"wer": 0.25, "versions": {"torch": torch.__version__}})
    assert json.loads(path.read_text())["wer"] == 0.25
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_run_in_a_folder_is_refused(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from recipes.run_folder import sole_run\n"
        f"with sole_run(Path({str(tmp_path)!r})):\n"
        "    print('runs', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "runs\n"
        with pytest.raises(ValueError, match=f"in use by process {first.pid} on .*hydra.run.dir"):
            sole_run(tmp_path).__enter__()
        first.kill()  # What is killed leaves no lock behind.
    with sole_run(tmp_path):
        pass
    with sole_run(tmp_path):
        pass


@pytest.mark.parametrize("recipe", ["evaluate", "deploy", "allocate"])
def test_a_recipe_in_the_folder_of_a_run_that_works_is_refused(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = ("hydra/job_logging=none", "hydra/hydra_logging=none")
    monkeypatch.setattr(sys, "argv", [recipe, "ckpt=a", f"hydra.run.dir={tmp_path}", *quiet])
    with sole_run(tmp_path), pytest.raises(SystemExit):
        as_program(recipe)(lambda _: None)()
    assert f"{tmp_path} is in use by process" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["evaluate", "deploy"])
def test_the_summary_of_a_run_is_not_replaced_by_another_recipe(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").touch()
    quiet = ("hydra/job_logging=none", "hydra/hydra_logging=none")
    monkeypatch.setattr(sys, "argv", [recipe, "ckpt=a", f"hydra.run.dir={tmp_path}", *quiet])
    with pytest.raises(SystemExit):
        as_program(recipe)(lambda _: None)()
    assert f"{tmp_path} is the folder of a run of training" in capsys.readouterr().err


def _settings(batch_size: int, **trainer: Any) -> DictConfig:
    return OmegaConf.create({"trainer": trainer, "data": {"batch_size": batch_size}})


def test_a_run_is_resumed_with_any_number_of_processes_and_batches_to_match(tmp_path: Path) -> None:
    before = _settings(4, devices=2, strategy="ddp", accumulate_grad_batches=2)
    _begin(tmp_path)
    for now in (
        _settings(8, devices=1, strategy="auto", accumulate_grad_batches=2),
        _settings(4, devices=1, strategy="auto", accumulate_grad_batches=4),
        _settings(4, devices=4, strategy="ddp_spawn", accumulate_grad_batches=1),
    ):
        record_config(tmp_path, now)
        record_config(tmp_path, before)


@pytest.mark.parametrize(
    ("now", "named"),
    [
        (_settings(4, devices=1, strategy="ddp", max_epochs=4), "trainer"),
        (_settings(4, devices=2, strategy="fsdp", max_epochs=3), "trainer"),
        (_settings(8, devices=2, strategy="ddp", max_epochs=3), "data"),
    ],
    ids=["another length", "split parameters", "other batches of the same processes"],
)
def test_a_run_is_not_resumed_with_what_changes_it(
    tmp_path: Path, now: DictConfig, named: str
) -> None:
    record_config(tmp_path, _settings(4, devices=2, strategy="ddp", max_epochs=3))
    _begin(tmp_path)
    with pytest.raises(ValueError, match=f"other settings of {named}; resume it with its own"):
        record_config(tmp_path, now)


def test_writing_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("a longer text", "short"):
        write_whole(path, text)
    assert path.read_text() == "short"


def test_provenance_names_command_commit_and_versions() -> None:
    origin = provenance(seed=3)
    assert origin["seed"] == 3
    assert torch.__version__.startswith(origin["versions"]["torch"])
    assert origin["command"].startswith("python ")
    assert origin["commit"] == git_commit()


def test_size_counts_bytes_of_the_dtype() -> None:
    layer = torch.nn.Linear(4, 2)
    assert size_of(layer) == {"parameters": 10, "size_bytes": 40}
    assert size_of(layer.half()) == {"parameters": 10, "size_bytes": 20}
