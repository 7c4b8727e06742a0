"""Write plots and reports of callbacks to disk and to the loggers that take them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

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
        dirpath: Folder that the user has set, or None for one next to the log.
        name: Name of the folder next to the log.
    """
    # The Trainer broadcasts it.
    logged = trainer.log_dir
    return dirpath or Path(logged or trainer.default_root_dir) / name


class FileWriter(Callback):
    """Base of callbacks that write files when a fit has ended and its weights are deployed.

    A subclass calls :meth:`plan_files` at the end of training, and implements :meth:`write`.

    Args:
        dirpath: Folder of the files; None for a folder in the logger's one.
        default_folder: Name of that folder.
    """

    def __init__(self, dirpath: str | Path | None, default_folder: str) -> None:
        self.dirpath = None if dirpath is None else Path(dirpath)
        self._default_folder = default_folder
        # Folder of this run, once its training has ended.
        self._folder: Path | None = None

    @abstractmethod
    def write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, folder: Path) -> None:
        """Write the files of a fit; an ``OSError`` becomes a warning.

        Args:
            trainer: Trainer of the fit.
            pl_module: Module with deployed weights.
            folder: Folder of the files, which may not exist yet.
        """

    def plan_files(self, trainer: pl.Trainer, *, wanted: bool = True) -> None:
        """Have files written after the fit, by the first process alone; call it on every rank.

        Args:
            trainer: Trainer of the fit.
            wanted: Whether there is anything to write.
        """
        folder = figure_folder(trainer, self.dirpath, self._default_folder)
        if wanted and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._folder = folder

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # After `on_fit_end`, where weight methods deploy: an error here costs no weights.
        folder, self._folder = self._folder, None
        if folder is not None:
            with warned_of(type(self).__name__, folder):
                self.write(trainer, pl_module, folder)


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
