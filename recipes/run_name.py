"""Names for the folders of a sweep's runs: short, without slashes, and one for each command.

``hydra.sweep.subdir`` in ``recipes/conf/train.yaml`` calls the resolver ``run_name``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from omegaconf import OmegaConf

#: Settings that change neither what a run learns nor how it is scored.
INDIFFERENT = frozenset({"run_dir", "threads", "resume", "logger", "objective"})

#: Letters of a name: file systems take 255, and a path has several names.
_LONGEST = 100


def run_name(overrides: Sequence[str], excluded: Sequence[str] = ()) -> str:
    """Name a run by the overrides of its command.

    A key is shortened to its last part, and a path to its last part without suffix. Where that, or
    a letter that does not belong into a file name, loses something, the name ends in a digest of
    all overrides in full.

    Args:
        overrides: Overrides of the run, as ``bits=4`` or ``~callbacks.average``.
        excluded: Keys that do not distinguish runs.

    Returns:
        The name; ``defaults`` without any override. The order of overrides does not matter.

    Example:
        >>> run_name(["compression=gq", "bits=4", "threads=2"], ["threads"])
        'bits=4,compression=gq'
        >>> run_name(["init_from=runs/digits/seed1/checkpoints/last.ckpt"])
        'init_from=last-6fb1a4'
    """
    pairs = sorted(_split(override) for override in overrides)
    pairs = [(key, value) for key, value in pairs if key not in excluded]
    full = ",".join(f"{key}={value}" for key, value in pairs)
    name = ",".join(f"{key.split('.')[-1]}={_shortened(value)}" for key, value in pairs)
    name = re.sub(r"[^\w=,.+-]+", "-", re.sub(r"['\"\[\]{}~]", "", name), flags=re.ASCII)
    if name != full or len(name) > _LONGEST or name.startswith((".", "-")):
        digest = hashlib.sha256(full.encode()).hexdigest()[:6]
        name = f"{name[:_LONGEST].strip('.-')}-{digest}"
    return name if pairs else "defaults"


def _split(override: str) -> tuple[str, str]:
    """Return key and value of an override; a deleted key has the value ``~``."""
    key, _, value = override.partition("=")
    if key.startswith("~"):
        return key[1:], "~"
    return key.lstrip("+"), value


def _shortened(value: str) -> str:
    """Return the last part of a path without its suffix; another value as it is."""
    if not re.search(r"[/.][A-Za-z]", value):
        return value
    return re.sub(r"\.[A-Za-z]\w*$", "", PurePosixPath(value.strip("'\"")).name)


# Hydra composes after this module was imported, by recipes.program.
OmegaConf.register_new_resolver("run_name", run_name, replace=True)
