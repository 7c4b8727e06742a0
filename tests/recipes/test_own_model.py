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
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from omegaconf import OmegaConf
from torch import nn

from recipes.adapter import Adapter, adapter_of
from recipes.allocate import allocate
from recipes.deploy import deploy
from recipes.evaluate import evaluate
from recipes.program import explanation
from recipes.train import train
from recipes.weights import RecipeInCheckpoint
from tests.conftest import ROOT
from tests.recipes import own_modules

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


@pytest.fixture
def run_own(compose_config: Any, tmp_path: Path) -> Any:
    """Train a module of ``own_modules``, and run other recipes on its checkpoint."""

    def run(name: str, *overrides: str, recipe: str = "train", **data: Any) -> Any:
        if recipe != "train":
            ckpt = f"ckpt={tmp_path / 'run/checkpoints/last.ckpt'}"
            config = compose_config(recipe, ckpt, f"run_dir={tmp_path / recipe}", *overrides)
            return {"evaluate": evaluate, "deploy": deploy, "allocate": allocate}[recipe](config)
        settings = ["trainer.max_epochs=1", "trainer.accelerator=cpu", "callbacks.progress=null"]
        config = compose_config("train", *settings, *overrides)
        config.data = OmegaConf.create({"_target_": f"{own_modules.__name__}.Numbers", **data})
        config.model = OmegaConf.create({"_target_": f"{own_modules.__name__}.{name}"})
        if "targets" not in " ".join(overrides):
            config.targets = ["network"]
        config.name, config.objective = "own", ["loss"]
        return train(config)

    return run


EMULATED = ("compression=nna8", "callbacks.nna.calibration_steps=1")
PROGRAMS = ("systems=[]", "score_float=false")


def test_what_is_outside_of_the_networks_is_scored_as_it_was_trained(run_own: Any) -> None:
    """Only ``network`` is a target: the mean and the head come from the checkpoint, too."""
    trained = run_own("Classifier")
    assert run_own("Classifier", recipe="evaluate")["loss"] == trained["loss"]


@pytest.mark.parametrize(
    ("name", "data", "outputs", "examples"),
    [
        ("NamedArguments", {}, 36, 9),
        ("CallsTwice", {}, 72, 9),
        ("Classifier", {"loaders": 2}, 72, 18),
    ],
)
def test_programs_equal_the_emulation(
    run_own: Any, name: str, data: dict[str, Any], outputs: int, examples: int
) -> None:
    trained = run_own(name, *EMULATED, **data)
    deployed = run_own(name, *PROGRAMS, recipe="deploy")
    assert deployed["equal_outputs"] == 1.0
    assert (deployed["outputs"], deployed["examples"]) == (outputs, examples)
    losses = [key for key in trained if key.startswith("loss")]
    assert len(losses) == data.get("loaders", 1)
    assert [deployed[key] for key in losses] == [trained[key] for key in losses]


def test_some_batches_are_compared_and_all_are_scored(run_own: Any) -> None:
    trained = run_own("NamedArguments", *EMULATED)
    deployed = run_own("NamedArguments", *PROGRAMS, "compared_batches=1", recipe="deploy")
    assert 0 < deployed["examples"] < 9
    assert (deployed["equal_outputs"], deployed["outputs"]) == (1.0, 4 * deployed["examples"])
    assert deployed["loss"] == deployed["emulated"]["loss"] == trained["loss"]
    with pytest.raises(ValueError, match="compared_batches must be a positive number, got 0"):
        run_own("NamedArguments", *PROGRAMS, "compared_batches=0", recipe="deploy")


@pytest.mark.parametrize(
    ("name", "lengths", "message"),
    [
        ("ReturnsInput", (1, 1, 1), r"program of network has 1 outputs, and its network returns 2"),
        ("TimeFirst", (2, 2, 2), "network returns a tensor of .*examples along the first axis"),
        ("Classifier", (1, 2, 1), r"network has inputs of the shapes .*pad the inputs of all"),
    ],
)
def test_a_network_that_no_program_replaces_is_named(
    run_own: Any, name: str, lengths: tuple[int, ...], message: str
) -> None:
    run_own(name, *EMULATED, lengths=lengths)
    with pytest.raises(ValueError, match=message):
        run_own(name, *PROGRAMS, recipe="deploy")


def test_hyperparameters_that_are_objects_are_left_out_of_the_checkpoint(
    run_own: Any, tmp_path: Path
) -> None:
    trained = run_own("KeepsObjects")
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"] == {"width": 4}
    assert run_own("KeepsObjects", recipe="evaluate")["loss"] == trained["loss"]


def test_the_state_of_data_is_plain() -> None:
    class Holds(BoringDataModule):
        def state_dict(self) -> dict[str, Any]:
            return {"mean": torch.zeros(2), "tokenizer": nn.Linear(1, 1)}

    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RecipeInCheckpoint({})],
    )
    with pytest.raises(TypeError, match="state_dict of Holds has tokenizer, a Linear"):
        trainer.fit(BoringModel(), Holds())


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("Classifier", "targets=[netwrok]", r"has netwrok, which names no child.*network, head"),
        ("Classifier", "targets=network", r"list of names of children, as \[network\]"),
        ("OptimizesItself", "seed=1", r"gradient_clip_val=5.0 is not used.* set it to null"),
        ("WithoutTest", "seed=1", "WithoutTest has no test_step.*test=false"),
    ],
)
def test_a_run_that_could_not_end_does_not_begin(
    run_own: Any, tmp_path: Path, name: str, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        run_own(name, override)
    assert explanation(error.value, "train") is not None
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_objective_is_the_first_result_of_a_table(run_own: Any) -> None:
    summary = run_own("TwoResults", "trainer.limit_train_batches=1")
    assert list(summary["titles"]) == ["loss", "error"]


def test_networks_without_a_matrix_have_bytes_alone(run_own: Any) -> None:
    summary = run_own("Classifier", "targets=[network.bias]")
    assert summary["packed_bytes"] > 0
    assert not {"bits", "sparsity"} & summary.keys()


@pytest.mark.parametrize("name", ["WithoutIndex", "SkipsBatches"])
def test_the_loss_of_allocation_is_that_of_training(run_own: Any, name: str) -> None:
    data = own_modules.Numbers()
    module = getattr(own_modules, name)().eval()
    batches = list(data.train_dataloader())
    with torch.no_grad():
        losses = [float(nn.functional.cross_entropy(module(x), y)) for x, y in batches]
    used = slice(1, None) if name == "SkipsBatches" else slice(None)
    sizes = [4, 4, 1][used]
    mean = sum(a * b for a, b in zip(losses[used], sizes, strict=True)) / sum(sizes)
    assert Adapter(module, data).loss(batches) == pytest.approx(mean)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("OptimizesItself", r"OptimizesItself optimizes by itself: .*with loss\(batches\)"),
        ("WithoutLoss", "WithoutLoss returns no loss: return it, or name"),
    ],
)
def test_a_module_without_a_loss_to_allocate_by_is_named(name: str, message: str) -> None:
    data = own_modules.Numbers()
    adapter = Adapter(getattr(own_modules, name)(), data)
    with pytest.raises(ValueError, match=message):
        adapter.loss(list(data.train_dataloader()))


def test_a_forward_that_a_batch_does_not_fit_is_named_with_the_remedy() -> None:
    data = own_modules.Numbers()
    batch = next(iter(data.train_dataloader()))
    with pytest.raises(TypeError, match=r"forward of TwoInputs .*'others'\).*inputs_of\(batch\)"):
        Adapter(own_modules.TwoInputs(), data).run(batch)
    with pytest.raises(TypeError, match=r"WithoutTest has no forward.* with run\(batch\)"):
        Adapter(own_modules.WithoutTest(), data).run(batch)
