"""Every file of recipes/conf composes, and names only what the code it builds takes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from lightning_nna.callbacks import GeneralQuantizer
from recipes.asr.data import SpeechDataModule
from recipes.keywords.data import KeywordData

CONF = Path(__file__).resolve().parents[2] / "recipes" / "conf"
GROUPS = ("callbacks", "data", "model", "trainer", "nna", "compression", "logger", "sweep")
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
CHOICES = sorted(
    f"{group}={path.stem}" for group in GROUPS for path in (CONF / group).glob("*.yaml")
)
# What train.py adds to the arguments in the configuration.
ADDED = {
    "recipes.asr.recognizer.TransducerRecognizer": ("vocabulary", "num_mels"),
    "recipes.asr.ctc.CTCRecognizer": ("vocabulary", "num_mels"),
    "recipes.keywords.spotter.KeywordSpotter": ("labels",),
    "lightning.pytorch.Trainer": ("callbacks", "logger"),
}
#: Classes that take what the functions of a module pass on.
BEHIND = {"recipes.asr.data": [SpeechDataModule], "recipes.keywords.data": [KeywordData]}


def _composed(*overrides: str, name: str = "train") -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(name, overrides=["run_dir=somewhere", *overrides])
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return container  # type: ignore[return-value]


def _targets(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping with a ``_target_`` in ``node``."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield dict(node)
        for value in node.values():
            yield from _targets(value)


def _bind(node: dict[str, Any]) -> None:
    """Bind the keys of ``node`` to the signature of its target, as a call would."""
    path = node["_target_"]
    module, _, name = path.rpartition(".")
    target = getattr(importlib.import_module(module), name)
    settings = {key: value for key, value in node.items() if not key.startswith("_")}
    settings |= dict.fromkeys(ADDED.get(path, ()))
    signature = inspect.signature(target)
    bound = signature.bind_partial if node.get("_partial_") else signature.bind
    bound(**settings)
    forwarded = _forwarded(path, target)
    unknown = settings.keys() - signature.parameters.keys() - forwarded
    assert not forwarded or not unknown, f"{path} does not take {unknown}"


def _forwarded(path: str, target: Any) -> set[str]:
    """Names of the arguments behind ``**settings``: of base classes, or of a corpus's module."""
    owners = [owner for owner in getattr(target, "__mro__", ()) if "__init__" in vars(owner)]
    owners = BEHIND.get(path.rpartition(".")[0], owners)
    names: set[str] = set()
    for owner in owners:
        parameters = inspect.signature(owner.__init__).parameters
        names |= parameters.keys()
        if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            break
    return names


@pytest.mark.parametrize("choice", CHOICES)
def test_every_key_of_a_choice_is_taken_by_its_target(choice: str) -> None:
    nodes = list(_targets(_composed(choice)))
    built = {node["_target_"] for node in nodes}
    assert {"lightning.pytorch.Trainer"} < built & set(ADDED)
    for node in nodes:
        _bind(node)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_key_of_an_experiment_is_taken_by_its_target(experiment: str) -> None:
    config = _composed(f"experiment={experiment}")
    assert config["name"] == experiment
    for node in _targets(config):
        _bind(node)


@pytest.mark.parametrize("experiment", ["an4_rnnt", "commands", "librispeech_conformer"])
def test_experiments_go_with_a_corpus_of_ones_own(experiment: str) -> None:
    config = _composed(f"experiment={experiment}", "data=manifest", "data.train=a.json")
    assert config["data"]["_target_"] == "recipes.asr.data.manifest"
    for node in _targets(config):
        _bind(node)


def test_a_misspelt_key_is_an_error() -> None:
    config = _composed("+model.network.encoder_sise=3")
    with pytest.raises(TypeError, match="encoder_sise"):
        _bind(config["model"]["network"])


@pytest.mark.parametrize("compression", ["none", "nna8"])
def test_evaluation_composes(compression: str) -> None:
    config = _composed("ckpt=a.ckpt", f"compression={compression}", name="evaluate")
    assert ("nna" in config["callbacks"]) == (compression == "nna8")


def test_callbacks_are_keyed_so_that_groups_merge() -> None:
    config = _composed("compression=nna8", "callbacks.average=null")
    assert config["method"] == "nna8"
    assert config["callbacks"]["average"] is None
    assert config["callbacks"].keys() >= {"checkpoint", "nna"}


def test_every_logger_includes_the_csv() -> None:
    files = sorted(path.stem for path in (CONF / "logger").glob("*.yaml"))
    assert files == ["csv", "tensorboard", "wandb"]
    for name in files:
        assert "csv" in _composed(f"logger={name}")["logger"]


@pytest.mark.parametrize("bits", [2, 4])
def test_the_recipe_of_the_general_quantizer_is_the_callbacks_defaults(bits: int) -> None:
    node = _composed("compression=gq", f"bits={bits}")["callbacks"]["gq"]
    assert node["mu"] > 0
    assert node["train_centroids"]
    by_default = GeneralQuantizer(bits, targets=["model"])
    built = instantiate(node)
    assert isinstance(built, GeneralQuantizer)
    settings = vars(by_default).keys() - {"bits", "_adam", "_counter"}
    assert {name: vars(built)[name] for name in settings} == {
        name: vars(by_default)[name] for name in settings
    }


def test_the_codebook_has_no_part_of_the_general_quantizer() -> None:
    built = instantiate(_composed("compression=codebook", "bits=2")["callbacks"]["codebook"])
    assert isinstance(built, GeneralQuantizer)
    assert (built.hard_from, built.train_centroids, built.mu) == (0.0, False, 0.0)
    assert built.gradient_sharpness is None


@pytest.mark.parametrize(("group", "key"), [("csp_gq", "gq"), ("csp_codebook", "codebook")])
def test_pruned_weights_have_a_centroid_of_their_own(group: str, key: str) -> None:
    node = _composed(f"compression={group}", "bits=4", "sparsity=0.8")["callbacks"][key]
    assert node["pin_zero"] is True


def test_no_configuration_points_into_the_benchmarks() -> None:
    for path in CONF.rglob("*.yaml"):
        targets = {node["_target_"] for node in _targets(yaml.safe_load(path.read_text()))}
        assert not {target for target in targets if target.startswith("recipes.benchmark")}, path


def test_every_file_is_plain_yaml() -> None:
    for path in CONF.rglob("*.yaml"):
        assert yaml.safe_load(path.read_text()) is None or path.stat().st_size


def test_seed_reaches_data_and_model(compose_config: Callable[..., DictConfig]) -> None:
    config = compose_config("train", "experiment=an4_rnnt", "seed=7")
    assert (config.data.seed, config.model.seed) == (7, 7)


# Settings of the trainer that the recipes choose otherwise than Lightning does.
OWN_TRAINER = {
    *("devices", "precision", "max_epochs", "check_val_every_n_epoch", "num_sanity_val_steps"),
    *("gradient_clip_val", "log_every_n_steps", "enable_model_summary", "default_root_dir"),
}


def test_the_trainer_has_lightnings_defaults_but_for_those_of_the_recipes() -> None:
    defaults = inspect.signature(Trainer.__init__).parameters
    settings = {k: v for k, v in _composed("model=digits")["trainer"].items() if k != "_target_"}
    own = {"max_epochs": 6, "check_val_every_n_epoch": 1}  # Of experiment=digits.
    assert {key: settings[key] for key in own} == own
    others = settings.keys() - OWN_TRAINER
    assert {key: settings[key] for key in others} == {key: defaults[key].default for key in others}


@pytest.mark.parametrize(
    "override",
    [
        *("limit_train_batches=3", "limit_val_batches=0.5", "limit_test_batches=1", "max_steps=5"),
        *("min_steps=1", "min_epochs=1", "max_time='00:00:01:00'", "accumulate_grad_batches=2"),
        *("val_check_interval=2", "strategy=ddp", "num_nodes=2", "precision=bf16-mixed"),
        *("deterministic=true", "profiler=simple", "detect_anomaly=true", "overfit_batches=2"),
        *("fast_dev_run=true", "enable_progress_bar=false", "benchmark=true"),
        *("gradient_clip_algorithm=norm", "sync_batchnorm=true", "enable_checkpointing=true"),
    ],
)
def test_every_limit_of_the_trainer_is_set_without_a_plus(override: str) -> None:
    trainer = _composed(f"trainer.{override}")["trainer"]
    assert trainer[override.split("=")[0]] is not None
    _bind(trainer)
