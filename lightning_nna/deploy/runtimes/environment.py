"""Environments of runtimes whose packages ask for other versions than ours.

``python -m lightning_nna.deploy.runtimes.environment`` makes them, with the packages of the
requirement files beside this one, in ``.cache/runtimes`` beside the package or in the folder that
the variable ``LIGHTNING_NNA_RUNTIMES`` names. What is there already is left as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

#: Command that makes all of them.
COMMAND = "python -m lightning_nna.deploy.runtimes.environment"
#: Names of the runtimes that have one.
NAMES = ("tosa",)
_VARIABLE = "LIGHTNING_NNA_RUNTIMES"
_REQUIREMENTS = "requirements.txt"


def python_of(name: str) -> Path | None:
    """Return the interpreter of a runtime's environment; None if that is not there.

    An environment of other versions than those of the requirement file is none.

    Args:
        name: Name of the runtime, of :data:`NAMES`.
    """
    folder = _folder(name)
    made_from = folder / _REQUIREMENTS
    if not made_from.is_file() or made_from.read_text() != _requirements(name).read_text():
        return None
    return _python(folder)


def make_environment(name: str) -> Path:
    """Make the environment of a runtime, completely or not at all, unless it is there.

    Packages come from where pip is configured to look, as wheels.

    Args:
        name: Name of the runtime, of :data:`NAMES`.

    Returns:
        Its interpreter.

    Raises:
        subprocess.CalledProcessError: If packages cannot be installed; pip says why.
    """
    existing = python_of(name)
    if existing is not None:
        return existing
    folder, requirements = _folder(name), _requirements(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{name}.") as unfinished:
        environment = Path(unfinished) / name
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True
        )
        _install(_python(environment), requirements)
        shutil.copy(requirements, environment / _REQUIREMENTS)
        shutil.rmtree(folder, ignore_errors=True)
        environment.rename(folder)
    return _python(folder)


def versions(name: str, packages: tuple[str, ...]) -> str:
    """Return the versions of packages of a requirement file, as ``"name 1.0, other 2.0"``.

    Args:
        name: Name of the runtime, of :data:`NAMES`.
        packages: Names of the packages.

    Example:
        >>> versions("tosa", ("numpy",))
        'numpy 2.1.3'
    """
    lines = _requirements(name).read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    return ", ".join(f"{package} {pinned[package]}" for package in packages)


def _install(python: Path, requirements: Path) -> None:
    """Install into an environment that has no installer of its own."""
    # uv links what another environment has already, in seconds.
    if find_spec("uv") is not None:
        command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
    else:
        command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*command, "--only-binary", ":all:", "-r", str(requirements)], check=True)


def _folder(name: str) -> Path:
    beside_the_package = Path(__file__).resolve().parents[3] / ".cache" / "runtimes"
    return Path(os.environ.get(_VARIABLE) or beside_the_package) / name


def _requirements(name: str) -> Path:
    return Path(__file__).with_name(f"{name}_requirements.txt")


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


if __name__ == "__main__":
    for each in NAMES:
        print(make_environment(each))
