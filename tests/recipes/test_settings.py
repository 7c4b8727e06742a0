"""A command with missing or unused settings is an error before anything is written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from recipes import require_extra
from recipes.settings import CONF, check_settings, instantiate_all
from recipes.train import build_callbacks, check_processes, train

Compose = Callable[..., DictConfig]
PRIMARY = ("allocate", "deploy", "evaluate", "train")


def _mandatory(node: Any, path: str = "") -> Iterator[str]:
    """Dotted keys of a file whose value has to be given."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _mandatory(value, f"{path}.{key}" if path else str(key))
    elif node == "???":
        yield path


def _mandatory_of_groups() -> Iterator[tuple[str, set[str]]]:
    """Choices with mandatory values, and these as a composed configuration names them."""
    for path in sorted(CONF.glob("*/*.yaml")):
        content = OmegaConf.to_container(OmegaConf.load(path))
        keys = set(_mandatory(content))
        group = path.parent.name
        if keys:
            is_global = "@package _global_" in path.read_text()
            names = keys if is_global else {f"{group}.{name}" for name in keys}
            yield f"{group}={path.stem}", names


GROUPS = list(_mandatory_of_groups())


@pytest.mark.parametrize(("choice", "names"), GROUPS, ids=[choice for choice, _ in GROUPS])
def test_a_mandatory_value_of_a_group_is_missing_until_it_is_set(
    choice: str, names: set[str], compose_config: Compose
) -> None:
    config = compose_config("train", choice)
    assert OmegaConf.missing_keys(config) == names
    with pytest.raises(ValueError, match=f"{min(names)} must be set: add"):
        check_settings(config, "train")


@pytest.mark.parametrize("name", PRIMARY)
def test_a_mandatory_value_of_a_command_is_missing_until_it_is_set(
    name: str, compose_config: Compose
) -> None:
    content = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert OmegaConf.missing_keys(compose_config(name)) == set(_mandatory(content))


@pytest.mark.parametrize("experiment", ["digits_finetune", "an4_conformer_finetune"])
def test_fine_tuning_does_not_start_from_random_weights(
    experiment: str, compose_config: Compose, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="init_from must be set"):
        train(compose_config("train", f"experiment={experiment}"))
    assert not (tmp_path / "run").exists()
    check_settings(compose_config("train", f"experiment={experiment}", "init_from=a.ckpt"), "train")


UNUSED = [
    (["compression=nna8", "bits=2"], r"bits=2 is not used: .*compression=csp_gq, compression=dkm,"),
    (["bits=2"], "bits=2 is not used"),
    (["compression=gq", "sparsity=0.5"], r"sparsity=0\.5 is not used: compression=csp,"),
    (["compression=model_pruning", "pattern=row"], "pattern=row is not used"),
    (["compression=csp", "bit_overrides=bits.json"], r"bit_overrides=bits\.json is not used"),
    (["compression=gq", "parq_steps=9"], "parq_steps=9 is not used: compression=parq read"),
    (["nna=shift"], "nna=shift is not used: nothing is emulated"),
    (["+learning_rate=1"], "recipes.train has no setting learning_rate"),
]


@pytest.mark.parametrize(("overrides", "complaint"), UNUSED)
def test_a_setting_that_nothing_reads_is_an_error(
    overrides: list[str], complaint: str, compose_config: Compose
) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_settings(compose_config("train", *overrides), "train")


ACCEPTED = [
    ["compression=gq", "bits=2", "nna=ethos-u"],
    ["compression=csp_gq", "bits=2", "sparsity=0.5", "pattern='2:4'"],
    ["compression=csp", "callbacks.nna=null", "sparsity=0.5"],
    ["compression=none"],
]


@pytest.mark.parametrize("overrides", [*ACCEPTED, ["compression=parq", "bits=2", "parq_steps=9"]])
def test_settings_that_are_read_are_accepted(overrides: list[str], compose_config: Compose) -> None:
    check_settings(compose_config("train", *overrides), "train")


@pytest.mark.parametrize("name", ["evaluate", "deploy"])
@pytest.mark.parametrize("overrides", ACCEPTED)
def test_other_commands_take_the_same_settings(
    name: str, overrides: list[str], compose_config: Compose
) -> None:
    check_settings(compose_config(name, "ckpt=a.ckpt", *overrides), name)


def test_settings_of_an_absent_callback_are_an_error(compose_config: Compose) -> None:
    config = compose_config("train", "compression=nna8", "+callbacks.gq.bits=2")
    with pytest.raises(ValueError, match=r"callbacks\.gq has settings \(bits\) and no _target_"):
        build_callbacks(config)


def test_null_entries_are_left_out() -> None:
    assert instantiate_all(OmegaConf.create({"average": None}), "callbacks") == {}


def test_a_key_that_occurs_twice_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("bits: 8\nseed: 1\nbits: 4\n")
    with (
        initialize_config_dir(str(tmp_path), version_base="1.3"),
        pytest.raises(Exception, match=r"(?s)duplicate key bits.*twice\.yaml\", line 3"),
    ):
        compose("twice")


def test_a_mistyped_setting_is_an_error(compose_config: Compose) -> None:
    with pytest.raises(ConfigCompositionException, match="bist"):
        compose_config("train", "bist=2")


def test_a_sweep_of_several_processes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = SimpleNamespace(mode=RunMode.MULTIRUN)
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: mode)
    one, two = (Trainer(accelerator="cpu", devices=size, logger=False) for size in (1, 2))
    check_processes(one)
    with pytest.raises(ValueError, match="a sweep cannot be run by 2 processes"):
        check_processes(two)
    mode.mode = RunMode.RUN
    check_processes(two)


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes.comparators import parq

    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"torchao is not installed: it comes with the extra ben"):
        parq([], bits=2, total_steps=1)
    for module in ("hydra", "torchaudio", "espeakng_loader"):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"{module} is not installed: .* the extra asr"):
            require_extra("asr", "lightning", module)
