"""Folders of a sweep's runs: short, on one level, and never one for two runs."""

from __future__ import annotations

import itertools
import re

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recipes.program import CONF
from recipes.run_name import run_name

# Pairs that look alike after shortening.
RUNS = [
    [],
    ["bits=4"],
    ["bits=4", "compression=gq"],
    ["init_from=runs/a/last.ckpt"],
    ["init_from=runs/b/last.ckpt"],
    ["init_from=last"],
    ["model.lr=1"],
    ["data.lr=1"],
    ["lr=1"],
    ["lr=0.1"],
    ["lr=0.10"],
    ["pattern='2:4'"],
    ["pattern='2-4'"],
    ["~callbacks.average"],
    ["callbacks.average=null"],
    [f"a={'x' * 300}"],
    [f"a={'x' * 301}"],
    ["a=.."],
    ["a=/"],
]


def test_names_are_file_names_and_differ() -> None:
    names = [run_name(run) for run in RUNS]
    assert all(re.fullmatch(r"[\w=+][\w=,.+-]{0,110}", name) for name in names), names
    for one, other in itertools.combinations(names, 2):
        assert one != other


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["compression=gq", "bits=4"], "bits=4,compression=gq"),
        (["+trainer=ddp", "threads=1"], "trainer=ddp"),
        (["threads=1"], "defaults"),
    ],
)
def test_names_of_what_needs_no_shortening(overrides: list[str], name: str) -> None:
    assert run_name(overrides, ["threads"]) == run_name(overrides[::-1], ["threads"]) == name


def test_the_configuration_names_runs_so() -> None:
    overrides = ["experiment=an4_rnnt", "threads=2", "data.root=a/b/an4", "seed=2"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [*overrides, "sweep=seeds"], return_hydra_config=True)
    OmegaConf.set_readonly(config, False)
    assert config.hydra.sweep.dir == "runs/an4_rnnt"
    name = run_name(["data.root=a/b/an4", "seed=2"])
    assert config.hydra.sweep.subdir == name
    assert re.fullmatch(r"root=an4,seed=2-\w{6}", name)
