"""``CompressionReport``: the weights of a run's methods, as a table and figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_nna.figure_files import FileWriter, require_matplotlib, save_figure
from lightning_nna.files import write_whole
from lightning_nna.weights.layers import as_csv, as_html
from lightning_nna.weights.pipeline import pipeline_of
from lightning_nna.weights.report import Snapshot, as_json, codebook_transforms


class CompressionReport(FileWriter):
    """Watch the weights of the run's weight methods, and report when ``fit`` ends.

    The table has bits, distinct values, zeros, entropy, SQNR and packed bytes of every tensor; it
    is written as CSV and as a page that needs no other file, too. Figures show weights and their
    centroids over training, the SQNR by tensor, and the soft-hard gap. The place in the
    list of callbacks does not matter; training is the same with it and without. Files are written
    when the weights are deployed; what cannot be written is warned of.

    Args:
        dirpath: Folder of ``compression.json``, ``.csv``, ``.html`` and the figures; None for
            ``compression`` in the logger's folder, or in ``default_root_dir`` without a logger.
        snapshots: Number of snapshots, evenly over the run, its start and end included; without a
            known length of the run, one at the end of every epoch.
        figures: Whether figures are drawn; they need matplotlib.
        most_tensors: Number of the largest tensors whose histograms are drawn.

    Logs, at each snapshot, ``nna/compression_report/packed_bytes``, ``…/mean_bits``,
    ``…/entropy_bits``, ``…/zeros``, ``…/soft_hard_gap`` and ``…/sqnr_db/<parameter>``; figures go
    to loggers that take them (TensorBoard, W&B).

    Raises:
        ValueError: If an argument is out of range, or no callback of the Trainer is a weight
            method.
        ImportError: If figures are wanted and matplotlib, the extra ``figures``, is missing.

    Example:
        >>> import tempfile
        >>> import lightning.pytorch as pl
        >>> from lightning_nna.callbacks import GeneralQuantizer
        >>> from lightning_nna.testing import SmallRecurrentModule
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = CompressionReport(folder)
        ...     trainer = pl.Trainer(max_steps=4, callbacks=[GeneralQuantizer(3), report],
        ...         accelerator="cpu", logger=False, enable_checkpointing=False,
        ...         enable_progress_bar=False, enable_model_summary=False)
        ...     trainer.fit(SmallRecurrentModule())
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['compression.csv', 'compression.html', 'compression.json', 'soft_hard_gap.png',
        'sqnr.png', 'weights.png']
        >>> report.snapshots[-1].mean_bits
        3.0
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        snapshots: int = 5,
        figures: bool = True,
        most_tensors: int = 12,
    ) -> None:
        if snapshots < 1 or most_tensors < 1:
            raise ValueError(
                f"snapshots and most_tensors must be at least 1, got {snapshots} and {most_tensors}"
            )
        if figures:
            require_matplotlib()
        super().__init__(dirpath, "compression")
        self.count, self.draws, self.most_tensors = snapshots, figures, most_tensors
        #: What was seen so far, in the order of training.
        self.snapshots: list[Snapshot] = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not any(codebook_transforms(pipeline_of(pl_module))):
            raise ValueError(
                "CompressionReport found no weights with centroids, which neither pruning nor "
                "regularization alone gives them: add a weight method, such as GeneralQuantizer or "
                "HardCompression, to the Trainer's callbacks"
            )
        self._folder = None
        if self.snapshots and self.snapshots[-1].step > trainer.global_step:
            self.snapshots = []  # Of an earlier run; this one does not go on with it.
        if not self.snapshots:
            self._look(trainer, pl_module)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        total = trainer.estimated_stepping_batches
        if total == float("inf") or self.count < 2:
            return
        # By the steps and not by how many there are: a run may be stopped and resumed anywhere.
        newest, every = self.snapshots[-1].step, total / (self.count - 1)
        due = math.floor(newest / every + 1e-9) + 1
        if due < self.count - 1 and trainer.global_step >= due * every - 1e-9:
            self._look(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.estimated_stepping_batches == float("inf"):
            self._look(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, pl_module)
        rank_zero_info(f"CompressionReport:\n{self.snapshots[-1]}")
        self.plan_files(trainer)

    @override
    def write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, folder: Path) -> None:
        history = json.dumps(as_json(self.snapshots), indent=1) + "\n"
        write_whole(folder / "compression.json", history)
        rows = [tensor.row() for tensor in self.snapshots[-1].tensors]
        write_whole(folder / "compression.csv", as_csv(rows))
        title = f"Compression of {type(pl_module).__name__}"
        write_whole(folder / "compression.html", as_html(rows, title=title))
        if self.draws:
            self._draw(trainer, folder)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"snapshots": [snapshot.state_dict() for snapshot in self.snapshots]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.snapshots = [Snapshot.from_state(state) for state in state_dict["snapshots"]]

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a snapshot, unless there is one of this step."""
        if self.snapshots and self.snapshots[-1].step >= trainer.global_step:
            return
        snapshot = Snapshot.of(trainer.global_step, pipeline_of(pl_module))
        self.snapshots.append(snapshot)
        metrics = {f"nna/compression_report/{name}": x for name, x in snapshot.metrics().items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=snapshot.step)

    def _draw(self, trainer: pl.Trainer, folder: Path) -> None:
        from lightning_nna.weights.layer_figures import draw

        for name, figure in draw(self.snapshots, most_tensors=self.most_tensors).items():
            save_figure(
                trainer,
                figure,
                folder / f"{name}.png",
                key=f"nna/compression_report/{name}",
                step=self.snapshots[-1].step,
            )
