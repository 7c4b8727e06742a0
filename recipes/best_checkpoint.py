"""``BestCheckpoint``: the checkpoint of the validation that scored best, as it was scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_nna.callbacks import NNAEmulation
from lightning_nna.weights.method import WeightMethod


class BestCheckpoint(ModelCheckpoint):
    """Keep the checkpoint with the best validation metric so far in one file.

    Validations are compared only once the network runs as it will be deployed. Before the ranges
    of an emulation are frozen it is scored in float, and before a pruning schedule has ended it has
    fewer zeros than asked for: such scores are of another network, and often lower.

    With ``EMAWeightAveraging`` validation scores the averaged weights, and the checkpoint has the
    same in its ``state_dict``. A run that never validates, or whose module does not log the metric,
    has no such checkpoint.

    Args:
        dirpath: Folder of the file.
        monitor: Name of a validation metric.
        mode: ``"min"`` or ``"max"``.
        filename: Name of the file, without ``.ckpt``.
    """

    def __init__(
        self, *, dirpath: str, monitor: str, mode: str = "min", filename: str = "best"
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self._reason = "no validation ran"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # A run that starts anew in the folder of another does not have that one's best.
        if stage == "fit" and trainer.ckpt_path is None and trainer.is_global_zero:
            Path(str(self.dirpath), f"{self.filename}.ckpt").unlink(missing_ok=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._should_skip_saving_checkpoint(trainer):
            return
        if self.monitor not in trainer.callback_metrics:
            if not self._reason.endswith("not logged"):
                logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
                rank_zero_warn(
                    f"no best checkpoint is kept: {self.monitor} is not logged in validation; "
                    f"logged are {logged}; set monitor, or callbacks.best=null"
                )
            self._reason = f"{self.monitor} is not logged"
            return
        if (reason := _unfinished(trainer)) is not None:
            self._reason = f"in every validation {reason}"
            return
        super().on_validation_end(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not self.best_model_path and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info(f"there is no {self.filename}.ckpt: {self._reason}")

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if not Path(self.best_model_path).is_file():
            # The file was removed: the next validation is the best again.
            self.best_model_path, self.best_model_score, self.best_k_models = "", None, {}


def _unfinished(trainer: Trainer) -> str | None:
    """Return why the network does not yet run as it will be deployed; None if it does."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, NNAEmulation) and not callback.emulator.calibrated:
            return "the network ran in float, before the ranges of the emulation were frozen"
        if isinstance(callback, WeightMethod) and (missed := callback.missed()):
            return f"the weights had not reached their target: {'; '.join(missed)}"
    return None
