"""The files of a run: its settings, its summary, and the metrics of its weights.

A run folder holds ``config.yaml`` (every setting, resolved), ``metrics/`` (CSV),
``checkpoints/``, ``summary.json`` and, if it was tested, what its adapter writes, such as
``transcripts.tsv``.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

from lightning_nna.deploy import save_packed
from lightning_nna.emulation.attachment import attached
from lightning_nna.files import write_whole
from lightning_nna.weights.codebook import index_bits
from lightning_nna.weights.pipeline import pipeline_of
from recipes.adapter import EVERYTHING, names_within
from recipes.other_processes import with_processes_of
from recipes.parent import command_line
from recipes.run_name import INDIFFERENT

_log = logging.getLogger(__name__)

# Settings that do not change what is learned; a resumed run may have others.
_MAY_CHANGE = INDIFFERENT | {"test", "beam_width"}


def record_config(run_dir: Path, config: DictConfig) -> None:
    """Write ``config`` into ``run_dir``; raise if the folder has a run with other settings.

    Args:
        run_dir: Run folder; created if it does not exist.
        config: All settings of the run.

    Raises:
        ValueError: If the folder's ``config.yaml`` differs in a setting that changes what is
            learned, and it has a checkpoint or results; lists these settings. Another number of
            processes is none of them.
    """
    path = run_dir / "config.yaml"
    settings = settings_of(config)
    has_begun = any(run_dir.glob("checkpoints/*.ckpt")) or (run_dir / "summary.json").exists()
    # A debug run takes the place of the one before, and any run that of one that has not begun.
    if path.exists() and has_begun and not settings.get("debug"):
        differing = _differing(path, settings) - _MAY_CHANGE
        if differing:
            raise ValueError(
                f"{run_dir} holds a run with other settings of {', '.join(sorted(differing))}; "
                "resume it with its own, or choose another hydra.run.dir"
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    # The results of an earlier end are not those of these settings.
    (run_dir / "summary.json").unlink(missing_ok=True)
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(settings)))


@contextmanager
def sole_run(run_dir: Path, *, setting: str = "hydra.run.dir") -> Iterator[None]:
    """Keep other processes from running in a folder, until the context ends or the process does.

    Args:
        run_dir: Run folder; created if it does not exist.
        setting: Setting that names another folder, for the message of the error.

    Raises:
        ValueError: If another process runs there; names it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, sole_run(Path(folder)):
        ...     [path.name for path in Path(folder).iterdir()]
        ['.lock']
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a+", encoding="utf-8") as file:
        try:
            # The system lifts the lock with the process, however it ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{run_dir} is in use by {file.read().strip() or 'another process'}: wait for it, "
                f"or choose another {setting}"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def finished_summary(run_dir: Path, config: DictConfig) -> dict[str, Any] | None:
    """Return the summary of a run that was finished with the same settings.

    Args:
        run_dir: Run folder.
        config: All settings of the run.

    Returns:
        Content of ``summary.json``; None if the run was not finished, or with other settings.
    """
    config_file, summary_file = run_dir / "config.yaml", run_dir / "summary.json"
    if not (config_file.is_file() and summary_file.is_file()):
        return None
    if _differing(config_file, settings_of(config)) - INDIFFERENT:
        return None
    summary: dict[str, Any] = json.loads(summary_file.read_text(encoding="utf-8"))
    return summary


def _differing(path: Path, settings: dict[str, Any]) -> set[str]:
    """Return the settings that differ from those in a file; other processes do not count."""
    before = _without_run_dir(settings_of(OmegaConf.load(path)))
    now = with_processes_of(before, _without_run_dir(settings))
    return {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}


def _without_run_dir(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace the path of the run folder in all settings: the folder may be moved."""
    run_dir = str(settings.get("run_dir"))

    def moved(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: moved(value) for key, value in node.items()}
        if isinstance(node, str) and (node == run_dir or node.startswith(f"{run_dir}/")):
            return f"<run_dir>{node.removeprefix(run_dir)}"
        return node

    return {key: moved(value) for key, value in settings.items()}


def settings_of(config: DictConfig | ListConfig) -> dict[str, Any]:
    """Return the settings in ``config`` as plain containers, references resolved."""
    settings = OmegaConf.to_container(config, resolve=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def provenance(seed: int | None) -> dict[str, Any]:
    """Return command, commit, versions and seed of this process, to store with its results.

    Example:
        >>> sorted(provenance(seed=1))
        ['command', 'commit', 'seed', 'versions']
    """
    packages = ("torch", "torchaudio", "lightning", "lhotse", "torchmetrics")
    versions = {package: importlib.metadata.version(package) for package in packages}
    versions["python"] = platform.python_version()
    return {
        "command": command_line(),
        "commit": git_commit(),
        "seed": seed,
        "versions": versions,
    }


def task_overrides() -> list[str]:
    """Return the overrides of this run; none outside of a program of Hydra."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def git_commit() -> str | None:
    """Return the commit of the running checkout; None outside of one."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def size_of(module: nn.Module, targets: Sequence[str] = EVERYTHING) -> dict[str, int]:
    """Count the parameters of the networks of a module, and their bytes in the present dtype.

    Args:
        module: Module.
        targets: Patterns of its networks.

    Example:
        >>> size_of(nn.Linear(3, 2))
        {'parameters': 8, 'size_bytes': 32}
    """
    parameters = list(_parameters_of(module, targets).values())
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "size_bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    }


def weight_metrics(module: nn.Module, targets: Sequence[str] = EVERYTHING) -> dict[str, float]:
    """Measure bits, zeros and bytes of the networks as they are deployed now.

    Args:
        module: Module that has run; emulated weights count as the accelerator stores them.
        targets: Patterns of its networks.

    Returns:
        ``bits`` (mean over the weights of all matrices; of the index of a centroid, or of the
        number where neither emulation nor a weight method restricts it), ``sparsity`` (fraction of
        these weights that are zero) and ``packed_bytes`` (of the networks in the file that
        :func:`.save_packed` writes, without its header). Networks without a matrix have the last
        alone.
    """
    emulator, pipeline = attached(module), pipeline_of(module)
    matrices: list[Tensor] = []
    bits = 0
    for parameter in _parameters_of(module, targets).values():
        if parameter.ndim < 2:
            continue
        rows = None if emulator is None else emulator.state.rows_of(parameter)
        if emulator is not None and rows is not None:
            matrix = emulator.state.weight(parameter, rows).stored
            width = emulator.spec.weight_bits
        else:
            matrix = pipeline.deployed(parameter).detach()
            width = 8 * matrix.element_size()
        if pipeline.grid_of(parameter) is not None:
            width = index_bits(matrix, pipeline.transforms_of(parameter))
        bits += width * matrix.numel()
        matrices.append(matrix)
    weights = sum(matrix.numel() for matrix in matrices)
    with tempfile.TemporaryDirectory() as folder:
        is_emulated = emulator is not None and bool(emulator.state.used_weights)
        source = module if is_emulated else _deployed_tensors(module)
        report = save_packed(source, Path(folder) / "packed.safetensors")
    packed = [report.packed[name] for name in names_within(report.packed, targets)]
    if not weights:
        return {"packed_bytes": sum(packed)}
    return {
        "bits": round(bits / weights, 4),
        "sparsity": sum(int((matrix == 0).sum()) for matrix in matrices) / weights,
        "packed_bytes": sum(packed),
    }


def _parameters_of(module: nn.Module, targets: Sequence[str]) -> dict[str, nn.Parameter]:
    parameters = dict(module.named_parameters())
    return {name: parameters[name] for name in names_within(parameters, targets)}


def _deployed_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers of a module that is not emulated, as deployed."""
    pipeline = pipeline_of(module)
    parameters = {n: pipeline.deployed(p) for n, p in module.named_parameters()}
    return {**dict(module.named_buffers()), **parameters}


def log_summary(summary: Mapping[str, Any]) -> None:
    """Log a summary in one line, without the versions of packages."""
    _log.info("%s", {key: value for key, value in summary.items() if key != "versions"})


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> Path:
    """Write ``summary.json`` into ``run_dir`` and return its path."""
    path = run_dir / "summary.json"
    write_whole(path, json.dumps(dict(summary), indent=2) + "\n")
    return path
