"""What is shipped and committed: the wheel, the pins, and text that runs on any machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

import lightning_nna
from tests.conftest import ROOT

SOURCE_FOLDERS = ("docs", "hydra_plugins", "lightning_nna", "recipes", "tests", ".ci")
TEXT_SUFFIXES = {
    "",
    ".cfg",
    ".jsonl",
    ".md",
    ".py",
    ".sh",
    ".svg",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def committed_text() -> list[Path]:
    """List the text files of the checkout; works without git."""
    files = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    for folder in SOURCE_FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [path for path in files if path.suffix in TEXT_SUFFIXES]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel has."""
    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_wheel_ships_package_and_recipes_alone(installed: Path) -> None:
    metadata = f"lightning_nna-{lightning_nna.__version__}.dist-info"
    packages = {"hydra_plugins", "lightning_nna", "recipes"}
    assert {path.name for path in installed.iterdir()} == {*packages, metadata}
    # Other packages have plugins of Hydra in the same folder.
    assert [path.name for path in (installed / "hydra_plugins").glob("*.py")] == [
        "lightning_nna_study.py"
    ]
    assert (installed / "lightning_nna" / "py.typed").is_file()
    assert (installed / "recipes" / "conf" / "train.yaml").is_file()
    assert not (installed / "recipes" / "benchmark").exists()


def test_recipes_of_the_wheel_find_their_settings_and_the_users(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text(
        "# @package _global_\ndefaults:\n  - commands\n  - _self_\nname: own\n"
    )
    script = "from recipes.command_line import main; main()"
    done = subprocess.run(
        [
            *(sys.executable, "-c", script, "train", "--config-dir", "mine", "experiment=own"),
            *("--cfg", "job"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "name: own\n" in done.stdout
    assert "train_size: 8000" in done.stdout


def test_core_imports_without_the_speech_stack() -> None:
    script = """
import sys

absent = ["ai_edge_litert", "hydra", "lhotse", "omegaconf", "recipes", "torchaudio", "wandb"]
sys.modules.update(dict.fromkeys(absent))  # a module that is None raises when it is imported
import lightning_nna
import lightning_nna.callbacks
import lightning_nna.testing
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def requirements() -> list[Requirement]:
    """Collect what the project and each of its extras ask for."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_constraints_pin_what_the_project_asks_for(requirement: Requirement) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.lstrip().startswith("#")]
    versions = [
        str(pin.specifier).removeprefix("==")
        for pin in pins
        if canonical(pin.name) == canonical(requirement.name)
    ]
    assert versions, f"{requirement.name} is not in constraints.txt: run make constraints"
    assert all(requirement.specifier.contains(version) for version in versions)


def test_committed_text_names_no_registry_and_no_machine() -> None:
    registry = re.compile(r"https?://\S*(pypi|pythonhosted|/simple\b|npmjs|download\.pytorch)")
    machine = re.compile(r"(?<![\w.*/~)}\]-])/(?:work|tmp|root|home|opt)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in committed_text()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if registry.search(line) or machine.search(line)
    ]
    assert found == []
