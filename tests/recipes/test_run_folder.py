"""What a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from recipes.run_folder import (
    git_commit,
    provenance,
    record_config,
    size_of,
    write_summary,
    write_whole,
)


def test_settings_that_do_not_change_the_result_may_differ(tmp_path: Path) -> None:
    settings = OmegaConf.create({"seed": 1, "twice": "${seed}", "threads": 1, "run_dir": "a"})
    record_config(tmp_path, settings)
    assert OmegaConf.load(tmp_path / "config.yaml").twice == 1
    record_config(tmp_path, OmegaConf.merge(settings, {"threads": 2, "run_dir": "b"}))
    with pytest.raises(ValueError, match="other settings of seed, twice; resume it"):
        record_config(tmp_path, OmegaConf.merge(settings, {"seed": 2}))


def test_a_run_folder_may_be_moved(tmp_path: Path) -> None:
    for place in ("here", "there/deeper"):
        settings = {"run_dir": place, "logger": {}, "callbacks": {"dirpath": "${run_dir}/ckpt"}}
        record_config(tmp_path, OmegaConf.create(settings))
    assert OmegaConf.load(tmp_path / "config.yaml").callbacks.dirpath == "there/deeper/ckpt"


def test_a_summary_is_json_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = write_summary(tmp_path, {"wer": 0.25, "versions": {"torch": torch.__version__}})
    assert json.loads(path.read_text())["wer"] == 0.25
    assert list(tmp_path.iterdir()) == [path]


def test_writing_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("a longer text", "short"):
        write_whole(path, text)
    assert path.read_text() == "short"


def test_provenance_names_command_commit_and_versions() -> None:
    found = provenance(seed=3)
    assert found["seed"] == 3
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert found["command"].startswith("python ")
    assert found["commit"] == git_commit()


def test_size_counts_bytes_of_the_dtype() -> None:
    layer = torch.nn.Linear(4, 2)
    assert size_of(layer) == {"parameters": 10, "size_bytes": 40}
    assert size_of(layer.half()) == {"parameters": 10, "size_bytes": 20}
