from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_nna.callbacks import DriftMonitor
from lightning_nna.drift.detector import DriftDetector, DriftReading
from lightning_nna.testing.contract import CHECKS, assert_same, trainer

EPOCHS = 30
NOISE = 0.02 * np.random.default_rng(0).standard_normal(EPOCHS)
FLAT = (0.2 + NOISE).tolist()
STEP = (0.2 + 0.1 * (np.arange(EPOCHS) >= 15) + NOISE).tolist()


class Told(BoringModel):
    """Logs what it is told at the end of each validation, as metrics of a whole epoch are.

    Args:
        metrics: A value for each epoch; None is not logged.
        in_step: Log in ``validation_step`` instead.
    """

    def __init__(
        self, metrics: Mapping[str, Sequence[float | None]], *, in_step: bool = False
    ) -> None:
        super().__init__()
        self.metrics, self.in_step = metrics, in_step

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        if self.in_step:
            self._tell()

    def on_validation_epoch_end(self) -> None:
        if not self.in_step:
            self._tell()

    def _tell(self) -> None:
        for name, values in self.metrics.items():
            value = values[self.current_epoch]
            if value is not None:
                self.log(name, torch.tensor(value, dtype=torch.float64))


def watched(*callbacks: pl.Callback, epochs: int = EPOCHS, **settings: Any) -> pl.Trainer:
    chosen: dict[str, Any] = {
        "max_epochs": epochs,
        "steps": -1,
        "limit_train_batches": 1,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 1,
    }
    return trainer(*callbacks, **(chosen | settings))


def monitor(names: str | Sequence[str] = "val/wer", **settings: Any) -> DriftMonitor:
    return DriftMonitor(names, **({"figures": False} | settings))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[..., None], tmp_path: Path) -> None:
    check(lambda: monitor("val/loss", warmup=2), tmp_path)


@pytest.mark.parametrize("in_step", [False, True])
def test_what_is_logged_is_what_the_detector_says(in_step: bool) -> None:
    callback, detector = monitor(), DriftDetector()
    expected = [detector.update(value) for value in STEP]
    run = watched(callback)
    run.fit(Told({"val/wer": STEP}, in_step=in_step))
    assert repr(callback.readings["val/wer"]) == repr(expected)
    assert callback.steps["val/wer"] == list(range(1, EPOCHS + 1))
    last = expected[-1]
    for logged in (run.callback_metrics, run.logged_metrics):
        assert float(logged["drift/val/wer/value"]) == pytest.approx(last.value)
        assert float(logged["drift/val/wer/radius"]) == pytest.approx(last.radius)
        assert float(logged["drift/val/wer/effective_window"]) == pytest.approx(
            last.effective_window
        )
        assert float(logged["drift/val/wer/drift"]) == 1.0


@pytest.mark.parametrize("first", [True, False])
def test_checkpoints_and_early_stopping_read_the_value_of_this_epoch(
    first: bool, tmp_path: Path
) -> None:
    """Wherever it stands among the callbacks."""
    seen: list[float] = []

    class Watch(EarlyStopping):
        def on_validation_end(self, run: pl.Trainer, module: pl.LightningModule) -> None:
            if not run.sanity_checking:
                seen.append(float(run.callback_metrics[self.monitor]))
            super().on_validation_end(run, module)

    key = "drift/val/wer/value"
    callback, stopping = monitor(), Watch(key, patience=5)
    best = ModelCheckpoint(tmp_path, monitor=key, save_top_k=1, filename="{epoch}")
    others = [callback, stopping, best] if first else [stopping, best, callback]
    run = watched(*others, enable_checkpointing=True)
    run.fit(Told({"val/wer": STEP}))
    values = [reading.value for reading in callback.readings["val/wer"]]
    assert seen == pytest.approx(values)
    assert run.current_epoch < EPOCHS
    assert float(best.best_model_score or 0) == pytest.approx(min(values))
    assert best.best_model_path.endswith(f"epoch={int(np.argmin(values))}.ckpt")


def test_a_scheduler_waits_for_the_value_of_this_epoch() -> None:
    seen: list[float] = []

    class Watch(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: int | None = None) -> None:
            seen.append(float(metrics))
            super().step(metrics, epoch)

    class Scheduled(Told):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = Watch(optimizer, patience=5)
            scheduled = {"scheduler": scheduler, "monitor": "drift/val/wer/value"}
            return {"optimizer": optimizer, "lr_scheduler": scheduled}

    callback = monitor()
    watched(callback).fit(Scheduled({"val/wer": STEP}))
    assert seen == pytest.approx([reading.value for reading in callback.readings["val/wer"]])


def test_resuming_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole, first, again = (monitor(["val/wer", "val/loss"]) for _ in range(3))
    told = {"val/wer": STEP, "val/loss": FLAT}
    watched(whole).fit(Told(told))
    stopped = watched(first, epochs=17)
    stopped.fit(Told(told))
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    watched(again).fit(Told(told), ckpt_path=tmp_path / "stopped.ckpt")
    assert_same(whole.state_dict(), again.state_dict())
    assert repr(whole.readings) == repr(again.readings)
    assert_same(pickle.loads(pickle.dumps(again)).state_dict(), whole.state_dict())


def test_stopping_when_a_drift_begins() -> None:
    callback = monitor(on_drift="stop")
    run = watched(callback)
    run.fit(Told({"val/wer": STEP}))
    flags = [reading.drift for reading in callback.readings["val/wer"]]
    assert flags.index(True) == len(flags) - 1
    assert 15 < run.current_epoch <= 20


def test_warning_and_calling_once_when_a_drift_begins() -> None:
    with pytest.warns(UserWarning, match=r"val/wer has drifted to 0\.\d+ ± .* best level was 0.1"):
        watched(monitor(on_drift="warn")).fit(Told({"val/wer": STEP}))
    calls: list[tuple[str, float, int]] = []

    def act(run: pl.Trainer, module: pl.LightningModule, name: str, reading: DriftReading) -> None:
        calls.append((name, reading.raw, run.current_epoch))

    told = {"val/wer": FLAT, "val/acc": [-value for value in STEP]}
    mode = {"val/wer": "min", "val/acc": "max"}
    watched(monitor(["val/wer", "val/acc"], mode=mode, on_drift=act)).fit(Told(told))
    ((name, raw, epoch),) = calls
    assert name == "val/acc"
    assert raw == -STEP[epoch]


def test_what_is_not_finite_is_left_out_and_warned_of_once() -> None:
    told: list[float | None] = [math.nan, *FLAT[1:]]
    told[5], told[7], told[9] = math.inf, math.nan, None
    callback, seen = monitor(), []

    class Watch(pl.Callback):
        def on_validation_end(self, run: pl.Trainer, module: pl.LightningModule) -> None:
            seen.append(float(run.callback_metrics.get("drift/val/wer/value", -1.0)))

    with pytest.warns(UserWarning, match="val/wer is nan; such values are left out") as caught:
        watched(callback, Watch()).fit(Told({"val/wer": told}))
    assert sum("DriftMonitor" in str(each.message) for each in caught) == 1
    # In the ninth epoch the metric still has its last value.
    assert len(callback.readings["val/wer"]) == EPOCHS - 3
    sanity, first, *others = seen
    assert sanity == first == -1.0  # Nothing to say yet: a NaN would stop `EarlyStopping`.
    assert others[4] == others[3]
    assert all(math.isfinite(value) for value in others)


def test_a_missing_metric_is_warned_of_once() -> None:
    callback = monitor("val/cer")
    run = watched(callback, epochs=5)
    message = r"val/cer was not logged; logged are \['val/wer'\]; waiting for it"
    with pytest.warns(UserWarning, match=message) as all_:
        run.fit(Told({"val/wer": FLAT}))
    assert sum("DriftMonitor" in str(each.message) for each in all_) == 1
    assert callback.readings["val/cer"] == []
    assert not any(key.startswith("drift/") for key in run.callback_metrics)


@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_waits_for_a_metric_that_comes_late(first: bool) -> None:
    """Neither its patience nor its check for what is not finite counts until then."""
    late = [None] * 6 + [1.0, 0.9, 0.8, 2.0, 3.0, 4.0, 5.0, 6.0]
    stopping = EarlyStopping("drift/val/late/value", patience=2)
    callback = monitor("val/late")
    callbacks = [callback, stopping] if first else [stopping, callback]
    run = watched(*callbacks, epochs=len(late))
    with pytest.warns(UserWarning, match="val/late was not logged; logged are") as all_:
        run.fit(Told({"val/late": late, "val/wer": FLAT}))
    assert sum("DriftMonitor" in str(each.message) for each in all_) == 1
    values = [reading.value for reading in callback.readings["val/late"]]
    # Two without an improvement after the best one, from the first value on.
    assert run.current_epoch == 6 + int(np.argmin(values)) + 2 + 1 < len(late)


def test_early_stopping_waits_for_a_name_that_nobody_logs() -> None:
    run = watched(monitor("val/wrr"), EarlyStopping("drift/val/wrr/value", patience=1), epochs=5)
    with pytest.warns(UserWarning, match=r"val/wrr was not logged; logged are \['val/wer'\]"):
        run.fit(Told({"val/wer": FLAT}))
    assert run.current_epoch == 5


def test_figures_that_cannot_be_written_end_no_fit(tmp_path: Path) -> None:
    (tmp_path / "drift").write_text("a file is in the way")
    run = watched(DriftMonitor("val/wer", dirpath=tmp_path / "drift"), epochs=3)
    with pytest.warns(UserWarning, match="DriftMonitor could not write to .*drift"):
        run.fit(Told({"val/wer": FLAT}))
    assert run.current_epoch == 3


def test_a_constant_metric_never_drifts() -> None:
    callback = monitor()
    with pytest.warns(UserWarning, match="val/wer has been 0.5 7 times: no drift is seen"):
        watched(callback, epochs=12).fit(Told({"val/wer": [0.5] * 12}))
    assert not any(reading.drift for reading in callback.readings["val/wer"])
    assert callback.readings["val/wer"][-1].value == 0.5


def test_evaluation_alone_is_not_watched() -> None:
    callback = monitor()
    run = watched(callback)
    run.validate(Told({"val/wer": FLAT}), verbose=False)
    assert callback.readings["val/wer"] == []
    assert not any(key.startswith("drift/") for key in run.callback_metrics)


def test_a_figure_of_each_metric_goes_to_disk_and_to_loggers(tmp_path: Path) -> None:
    callback = DriftMonitor(["val/wer", "val/loss"], dirpath=tmp_path / "figures")
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    watched(callback, logger=loggers).fit(Told({"val/wer": STEP, "val/loss": FLAT}))
    files = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert files == ["val_loss.png", "val_wer.png"]
    assert all((tmp_path / "figures" / name).stat().st_size > 10_000 for name in files)
    (metrics,) = tmp_path.rglob("metrics.csv")
    text = metrics.read_text()
    assert "drift/val/wer/value" in text
    assert "nan" not in text
    assert b"drift/val/wer/figure" in next(tmp_path.rglob("events.*")).read_bytes()


def test_two_metrics_have_two_figures(tmp_path: Path) -> None:
    names = ["val/wer", "val_wer"]
    run = watched(DriftMonitor(names, dirpath=tmp_path), epochs=2)
    run.fit(Told(dict.fromkeys(names, FLAT)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["val_wer.png", "val_wer_.png"]


def test_without_a_folder_figures_stand_beside_the_log(tmp_path: Path) -> None:
    watched(DriftMonitor("val/wer"), epochs=3, default_root_dir=tmp_path).fit(
        Told({"val/wer": FLAT})
    )
    assert (tmp_path / "drift" / "val_wer.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"monitor": []}, "must name metrics, each once"),
        ({"monitor": ["a", "a"]}, "must name metrics, each once"),
        ({"monitor": "a", "mode": {"b": "min"}}, r"for each of \['a'\], got \['b'\]"),
        ({"monitor": "a", "mode": "up"}, "mode must be 'min' or 'max'"),
        ({"monitor": "a", "on_drift": "shout"}, "on_drift must be"),
        ({"monitor": "a", "delta": 3.0}, "delta must lie"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DriftMonitor(**arguments)


def test_figures_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_nna.figure_files.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"'lightning-nna\[figures\]', or set figures=False"):
        DriftMonitor("a")
    assert DriftMonitor("a", figures=False).readings == {"a": []}
