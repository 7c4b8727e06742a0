"""Figures and reports of callbacks, to disk and to the loggers that take them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_nna.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_matplotlib() -> None:
    """Raise unless figures can be drawn.

    Raises:
        ImportError: Names the extra.
    """
    if find_spec("matplotlib") is None:
        raise ImportError(
            "figures need matplotlib: pip install 'lightning-nna[figures]', or set figures=False"
        )


@contextmanager
def warned_of(name: str, folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into a warning: a run is worth more than its report.

    Args:
        name: Of the callback that writes.
        folder: That it writes to.
    """
    try:
        yield
    except OSError as error:
        rank_zero_warn(f"{name} could not write to {folder}, and goes on without: {error}")


def figure_folder(trainer: pl.Trainer, dirpath: Path | None, name: str) -> Path:
    """Where figures go: ``dirpath``, or a folder ``name`` beside the log; ask on every rank."""
    # The Trainer broadcasts it.
    logged = trainer.log_dir
    return dirpath or Path(logged or trainer.default_root_dir) / name


def save_figure(trainer: pl.Trainer, figure: Figure, path: Path, *, key: str, step: int) -> None:
    """Write a PNG, and hand the figure to TensorBoard and W&B under ``key``."""
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=150, format="png", metadata={"Software": None})
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # W&B
            logger.log_image(key=key, images=[str(path)])
            continue
        writer: Any = getattr(logger, "experiment", None)
        if hasattr(writer, "add_figure"):  # TensorBoard
            writer.add_figure(key, figure, global_step=step)
