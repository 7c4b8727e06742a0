"""Write plots and reports of callbacks to disk and to the loggers that take them."""

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
    """Validate that matplotlib is installed.

    Raises:
        ImportError: If it is not; the message names the extra.
    """
    if find_spec("matplotlib") is None:
        raise ImportError(
            "figures need matplotlib: pip install 'lightning-nna[figures]', or set figures=False"
        )


@contextmanager
def warned_of(name: str, folder: Path) -> Iterator[None]:
    """Turn errors of writing into a warning: a run is worth more than its report.

    Args:
        name: Name of the callback that writes.
        folder: Folder that it writes to.
    """
    try:
        yield
    except OSError as error:
        rank_zero_warn(f"{name} could not write to {folder}, and continues without: {error}")


def figure_folder(trainer: pl.Trainer, dirpath: Path | None, name: str) -> Path:
    """Return the folder of the plots; call it on every rank.

    Args:
        trainer: Trainer of the run.
        dirpath: Folder that the user has set, or None for one beside the log.
        name: Name of the folder beside the log.
    """
    # The Trainer broadcasts it.
    logged = trainer.log_dir
    return dirpath or Path(logged or trainer.default_root_dir) / name


def save_figure(trainer: pl.Trainer, figure: Figure, path: Path, *, key: str, step: int) -> None:
    """Write a PNG, and log the plot to TensorBoard and W&B.

    Args:
        trainer: Trainer with the loggers.
        figure: Plot.
        path: Path of the PNG.
        key: Key in the loggers.
        step: Optimizer step that it is logged at.
    """
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=150, format="png", metadata={"Software": None})
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # W&B
            logger.log_image(key=key, images=[str(path)])
            continue
        writer: Any = getattr(logger, "experiment", None)
        if hasattr(writer, "add_figure"):  # TensorBoard
            writer.add_figure(key, figure, global_step=step)
