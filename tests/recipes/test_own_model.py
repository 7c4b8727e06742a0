"""Modules that are none of ours in the recipes: those of the documentation, one of a library."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from omegaconf import OmegaConf
from torch import nn

from recipes.adapter import Adapter, adapter_of
from recipes.train import train
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "tutorials" / "own_model.md"
_RUN = """
import sys
from recipes.command_line import main
for arguments in eval(sys.stdin.read()):
    main(arguments)
"""


def _summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def page_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the files of the page, run its commands, and return the folder of the runs."""
    folder, text = tmp_path_factory.mktemp("own_model"), PAGE.read_text("utf-8")
    for name, content in re.findall(r"```\w+\n# (\S+)\n(.*?)```", text, re.DOTALL):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    commands = [
        shlex.split(line)[1:] for line in re.findall(r"^lightning-nna .*$", text, re.MULTILINE)
    ]
    done = subprocess.run(
        [sys.executable, "-c", _RUN],
        input=repr(commands),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / "images"


@pytest.mark.slow
def test_the_page_trains_compresses_and_deploys(page_runs: Path) -> None:
    trained, compressed = _summary(page_runs / "float"), _summary(page_runs / "gq4")
    assert trained["error"] < 0.15
    assert (compressed["bits"], trained["bits"]) == (4.0, 32.0)
    scored, deployed = _summary(page_runs / "scored"), _summary(page_runs / "deployed")
    assert scored["error"] == compressed["error"] == deployed["emulated"]["error"]
    assert deployed["error"] == compressed["error"]
    assert deployed["equal_outputs"] == 1.0
    assert (deployed["outputs"], deployed["examples"]) == (3970, 397)
    assert deployed["firmware"]["network"]["equal_outputs"] == 1.0
    bits = json.loads((page_runs / "allocated" / "bits.json").read_text())
    assert set(bits["overrides"]) == {"network.0.weight", "network.5.weight"}


@pytest.mark.slow
def test_a_module_of_a_library_trains_emulated_and_is_compressed(
    compose_config: Any, tmp_path: Path
) -> None:
    """Lightning's own boring module: one layer, batches that are tensors, no metric logged."""
    settings = ["compression=gq", "bits=3", "callbacks.nna.calibration_steps=4"]
    config = compose_config(
        "train", *settings, "trainer.max_epochs=1", "callbacks.average=null", "callbacks.best=null"
    )
    demos = "lightning.pytorch.demos.boring_classes"
    config.data = OmegaConf.create({"_target_": f"{demos}.BoringDataModule"})
    config.model = OmegaConf.create({"_target_": f"{demos}.BoringModel"})
    config.targets, config.objective = ["*"], ["packed_bytes"]
    summary = train(config)
    assert summary["bits"] == 3.0
    assert summary["parameters"] == 66


def test_a_batch_of_keys_is_named_with_the_remedy() -> None:
    adapter = Adapter(BoringModel(), BoringDataModule())
    with pytest.raises(TypeError, match=r"a dict with images, labels.*inputs_of\(batch\)"):
        adapter.run({"images": 1, "labels": 2})
    images = torch.zeros(3, 32)
    assert adapter.run((images, "labels")).shape == (3, 2)


def test_an_adapter_is_named_by_class_or_path() -> None:
    class Mine(Adapter):
        pass

    class Named(BoringModel):
        recipe_adapter: Any = Mine

    data = BoringDataModule()
    assert type(adapter_of(Named(), data)) is Mine
    Named.recipe_adapter = "recipes.keywords.adapter.KeywordAdapter"
    assert type(adapter_of(Named(), data)).__name__ == "KeywordAdapter"
    Named.recipe_adapter = 3
    with pytest.raises(TypeError, match="recipe_adapter of Named is 3, and must be a subclass"):
        adapter_of(Named(), data)


def test_a_pattern_of_targets_makes_no_program() -> None:
    adapter = Adapter(BoringModel(), BoringDataModule(), ["lay*"])
    with pytest.raises(ValueError, match=r"targets=\['lay\*'\] has lay\*, which names no child"):
        adapter.networks()


def test_results_are_those_of_the_test() -> None:
    class Several(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Linear(2, 2)

    adapter = Adapter(Several(), BoringDataModule(), ["network"])
    logged = {"test/error": 0.1, "test_loss": 0.2, "val/error": 0.3, "tested": 1.0}
    assert adapter.results(logged) == {"error": 0.1, "loss": 0.2}
    assert adapter.titles_of({"error": 0.1, "words": 3}) == {"error": "error"}
    assert adapter.names == ["network.weight", "network.bias"]
