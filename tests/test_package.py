"""What is shipped and committed: the wheel, the pins, and text that runs on any machine."""

from __future__ import annotations

import email
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.version import Version

import lightning_nna
from hatch_build import with_absolute_links
from tests.conftest import ROOT
from tests.installed_package import first_example

SOURCE_FOLDERS = ("docs", "hydra_plugins", "lightning_nna", "recipes", "tests", ".ci", ".github")
TEXT_SUFFIXES = {
    "",
    ".cff",
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
EXTRAS = PROJECT["optional-dependencies"]
#: Code after which modules and their distributions are not found, as if they were not installed.
WITHOUT = """
import sys


class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        is_absent = name.partition(".")[0] in {modules!r}
        return None if is_absent else self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        is_absent = str(context.name).lower().replace("_", "-") in {distributions!r}
        distributions = getattr(self.finder, "find_distributions", lambda context: [])
        return [] if is_absent else distributions(context)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


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


def run_without(
    modules: list[str], statement: str, folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run a statement in a process in which modules look as if they were not installed."""
    installed = importlib.metadata.packages_distributions()
    names = [canonical(name) for module in modules for name in installed.get(module, [])]
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"{WITHOUT.format(modules=modules, distributions=names)}{statement}",
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("absent", "statement", "extra"),
    [
        ("ai_edge_litert", "import lightning_nna.deploy", "deploy"),
        ("flatbuffers", "import lightning_nna.deploy", "deploy"),
        # torchmetrics imports transformers where it is installed, which needs safetensors.
        ("safetensors transformers", "import lightning_nna.deploy", "deploy"),
        ("ai_edge_litert", "import lightning_nna.testing.replay", "deploy"),
        (
            "safetensors transformers",
            "from lightning_nna.weights.packed import save_packed; save_packed({}, 'packed')",
            "deploy",
        ),
        (
            "tflite_micro",
            "from lightning_nna.deploy import runtime_of; runtime_of('tflm').load(b'')",
            "deploy",
        ),
        (
            "ethosu",
            "open('a.tflite', 'w').close(); from lightning_nna.deploy import vela_report; "
            "vela_report('a.tflite')",
            "deploy",
        ),
        (
            "matplotlib",
            "from lightning_nna.callbacks import CompressionReport; CompressionReport()",
            "figures",
        ),
        (
            "matplotlib",
            "from lightning_nna.callbacks import DriftMonitor; DriftMonitor('loss')",
            "figures",
        ),
        *[
            (each, "import recipes", "asr")
            for each in (
                *("ai_edge_litert", "espeakng_loader", "flatbuffers", "hydra", "lhotse"),
                *("matplotlib", "omegaconf", "safetensors", "sentencepiece", "soundfile"),
                *("torchaudio", "tqdm"),
            )
        ],
        (
            "optuna",
            "from hydra_plugins.lightning_nna_study import StudySweeper as s; s.sweep(None, [])",
            "sweep",
        ),
        (
            "datasets",
            "from recipes.asr.manifest_forms import _read_hugging_face as read; read('a', 'b')",
            "huggingface",
        ),
        (
            "torchao",
            "from recipes.comparators import parq; parq([], bits=2, total_steps=1)",
            "bench",
        ),
    ],
    ids=lambda value: str(value).partition(" ")[0],
)
def test_what_needs_an_extra_names_it(
    absent: str, statement: str, extra: str, tmp_path: Path
) -> None:
    done = run_without(absent.split(), statement, tmp_path)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert f"lightning-nna[{extra}]" in message, done.stderr
    assert extra in PROJECT["optional-dependencies"]


def test_the_core_needs_no_extra(tmp_path: Path) -> None:
    extras = [Requirement(line) for lines in EXTRAS.values() for line in lines]
    core = {canonical(Requirement(line).name) for line in PROJECT["dependencies"]}
    distributions = importlib.metadata.packages_distributions()
    absent = [
        module
        for module, names in distributions.items()
        if {canonical(name) for name in names} & ({canonical(e.name) for e in extras} - core)
        # Lightning itself asks for these.
        if module not in ("fsspec", "tqdm", "rich", "hypothesis", "uv", "_pytest", "pytest")
    ]
    statement = "import lightning_nna.callbacks, lightning_nna.testing"
    done = run_without(absent, statement, tmp_path)
    assert {"ai_edge_litert", "safetensors", "matplotlib", "hydra"} <= set(absent)
    assert done.returncode == 0, done.stderr


def test_the_readme_says_what_each_extra_is_for() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("## Extras")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \| \S", table, re.MULTILINE)) == sorted(EXTRAS)


def test_versions_agree() -> None:
    version, citation = PROJECT["version"], (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert lightning_nna.__version__ == version
    assert yaml.safe_load(citation)["version"] == version
    assert f"version: {version}<" in (ROOT / "docs/badges/version.svg").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *releases = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    assert first == "[Unreleased]"
    matches = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d", line) for line in releases]
    assert None not in matches, releases
    released = [Version(match.group(1)) for match in matches if match]
    # A version that was released has its section; before the first release there is none.
    assert released == sorted(released, reverse=True)
    assert released[:1] in ([], [Version(version)])


def test_badges_say_what_the_project_says() -> None:
    badges = {path.stem: path.read_text() for path in (ROOT / "docs" / "badges").glob("*.svg")}
    assert sorted(badges) == ["license", "python", "types", "version"]
    assert f"license: {PROJECT['license']}<" in badges["license"]
    assert f"python: {PROJECT['requires-python'].removeprefix('>=')}+<" in badges["python"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"docs/badges/{name}.svg)" in readme for name in badges)


def test_the_citation_has_the_project_and_its_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["title"], citation["license"]) == (PROJECT["name"], PROJECT["license"])
    papers = {each["identifiers"][0]["value"]: each["title"] for each in citation["references"]}
    sources = " ".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "lightning_nna").rglob("*.py")
    )
    words = re.sub(r"\s+", " ", sources).lower()
    assert len(papers) == 5
    for identifier, title in papers.items():
        assert identifier.removeprefix("arXiv:") in words
        assert title.lower() in words


def test_continuous_integration_runs_the_targets_of_the_readme() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"][2:]]
    assert commands == ["make check", "make test"]
    assert all(command in (ROOT / ".ci/run").read_text() for command in commands)


def test_the_description_of_the_package_has_no_relative_link(installed: Path) -> None:
    (metadata,) = installed.glob("*.dist-info/METADATA")
    message = email.message_from_string(metadata.read_text(encoding="utf-8"))
    description = message.get_payload()
    assert message["Description-Content-Type"] == "text/markdown"
    assert message["Author"] == message["Maintainer"] == "The lightning-nna project"
    assert "What you train is, bit for bit, what the accelerator runs." in description
    links = re.findall(r"\]\(([^)\s]+)\)", description)
    assert [link for link in links if "://" not in link and not link.startswith("#")] == []
    assert "GeneralQuantizer(4)" in description


@pytest.mark.parametrize(
    ("text", "without", "absolute"),
    [
        ("[a `b`](docs/c.md#d)", "a `b`", "[a `b`](https://x.y/z/blob/HEAD/docs/c.md#d)"),
        ("![a](b.png)!", "!", "![a](https://x.y/z/raw/HEAD/b.png)!"),
        ("[a](https://b.c) [d](#e)", "[a](https://b.c) [d](#e)", "[a](https://b.c) [d](#e)"),
        ("```python\nf[a](b)\n```", "```python\nf[a](b)\n```", "```python\nf[a](b)\n```"),
    ],
)
def test_links_of_the_description(text: str, without: str, absolute: str) -> None:
    assert with_absolute_links(text, None) == without
    assert with_absolute_links(text, "https://x.y/z/") == absolute


def test_the_sdist_builds_the_same_wheel(installed: Path, tmp_path: Path) -> None:
    (sdist,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "hatch_build.py"} <= {
        path.name for path in source.iterdir()
    }
    (wheel,) = WheelBuilder(str(source)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names == {
        str(path.relative_to(installed))
        for path in installed.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }


def test_the_first_example_of_the_readme_is_complete() -> None:
    example = first_example((ROOT / "README.md").read_text(encoding="utf-8"))
    assert example.startswith("from lightning.pytorch.demos.boring_classes import")
    assert example.rstrip().endswith("# any LightningModule")
    with pytest.raises(ValueError, match="no block of Python"):
        first_example("# nothing")


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
