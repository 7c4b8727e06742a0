"""Where numbers come from: date, command, commit and versions, to be stored with them."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

#: Packages that decide the numbers of a deployment.
PACKAGES = (
    *("lightning-nna", "torch", "lightning", "numpy"),
    *("ai-edge-litert", "tflite-micro", "ethos-u-vela"),
)


@dataclass(frozen=True)
class Origin:
    """Origin of the numbers of a report.

    Args:
        date: Date and time, in UTC.
        command: Command line of the process.
        commit: Commit of the checkout; None outside of one.
        is_changed: Whether tracked files differ from the commit.
        versions: Versions of the packages that decide the numbers, by name.
        machine: Processor and system.
    """

    date: str
    command: str
    commit: str | None
    is_changed: bool
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""

    @classmethod
    def of_process(
        cls,
        folder: str | Path = ".",
        *,
        command: str | None = None,
        packages: Sequence[str] = PACKAGES,
    ) -> Origin:
        """Describe this process, now.

        Args:
            folder: Folder of the checkout whose commit counts.
            command: Command line; None for the one of this process.
            packages: Packages whose versions count; those that are not installed are left out.

        Example:
            >>> sorted(vars(Origin.of_process()))
            ['command', 'commit', 'date', 'is_changed', 'machine', 'versions']
        """
        commit = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
        versions = {"python": platform.python_version()}
        for name in packages:
            if version := installed_version(name):
                versions[name] = version
        return cls(
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            command=command if command is not None else shlex.join(sys.orig_argv),
            commit=commit,
            is_changed=bool(changes),
            versions=versions,
            machine=f"{platform.machine()}, {platform.system()}",
        )


def installed_version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed.

    Example:
        >>> installed_version("there-is-no-such-package") is None
        True
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: str | Path, *arguments: str) -> str | None:
    """Return the output of a command of git; None outside of a checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
