from __future__ import annotations

import copy
import csv
import json
import math
import pickle
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_nna.callbacks import (
    CompressionReport,
    GeneralQuantizer,
    HardCompression,
    MRACosRegularization,
    NNAEmulation,
)
from lightning_nna.testing.contract import assert_same, module, trainer

_STEPS = 12

# Runs are stopped before their schedules end; test_runs.py has the warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*missed its target")


def gq() -> GeneralQuantizer:
    return GeneralQuantizer(2, overrides={"head.first": 1}, sharpness=4.0, hard_from=100)


def report(folder: Path, **settings: Any) -> CompressionReport:
    return CompressionReport(folder, **({"figures": False} | settings))


def test_tables_of_channels_count(tmp_path: Path) -> None:
    fitted, watch = module(), report(tmp_path)
    method = GeneralQuantizer(2, codebook="per_channel", granularity="per_channel", hard_from=0)
    trainer(watch, method, steps=_STEPS).fit(fitted)
    sizes = {tensor.name: tensor.packed_bytes for tensor in watch.snapshots[-1].tensors}
    # Two bits a weight; 4 centroids and a scale of 4 bytes for each of 8 rows, or of 4 gates.
    assert sizes["head.first.weight"] == 64 * 2 // 8 + 8 * (4 + 4)
    assert sizes["lstm.weight_hh_l0"] == 4 * 8 * 8 * 2 // 8 + 4 * (4 + 4)


@pytest.mark.parametrize("is_first", [True, False])
def test_the_table_is_that_of_the_deployed_weights(is_first: bool, tmp_path: Path) -> None:
    fitted, method, watch = module(), gq(), report(tmp_path)
    callbacks = [watch, method] if is_first else [method, watch]
    run = trainer(*callbacks, steps=_STEPS)
    run.fit(fitted)
    newest = watch.snapshots[-1]
    latents = method.state_dict()["latents"]
    assert [tensor.name for tensor in newest.tensors] == method.selected
    for tensor in newest.tensors:
        deployed, latent = fitted.get_parameter(tensor.name).detach(), latents[tensor.name]
        noise = (latent - deployed).double().square().sum()
        ratio = 10 * math.log10(latent.double().square().sum() / noise)
        assert tensor.sqnr_db == pytest.approx(ratio, abs=1e-3)
        assert tensor.values == len(deployed.unique())
        assert tensor.bits == method.bits[tensor.name]
        assert sum(tensor.histogram) == tensor.weights == deployed.numel()
        size = -(-deployed.numel() * tensor.bits // 8) + 2**tensor.bits + 4
        assert tensor.packed_bytes == size
        assert set(deployed.unique().tolist()) <= set(torch.tensor(tensor.centroids).tolist())
        _, counts = deployed.unique(return_counts=True)
        shares = [int(count) / deployed.numel() for count in counts]
        entropy = sum(share * math.log2(1 / share) for share in shares)
        assert tensor.entropy_bits == pytest.approx(entropy)
        assert tensor.zeros == float((deployed == 0).float().mean())
    rows = list(csv.DictReader((tmp_path / "compression.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == method.selected
    assert "head.first.weight" in (tmp_path / "compression.html").read_text()
    written = json.loads((tmp_path / "compression.json").read_text())
    assert written["packed_bytes"] == sum(t.packed_bytes for t in newest.tensors)
    assert len(str(newest).splitlines()) == len(newest.tensors) + 2


def test_it_looks_evenly_over_the_run(tmp_path: Path) -> None:
    watch = report(tmp_path, snapshots=4)
    trainer(gq(), watch, steps=_STEPS).fit(module())
    assert [snapshot.step for snapshot in watch.snapshots] == [0, 4, 8, 12]


def test_training_is_the_same_with_it(tmp_path: Path) -> None:
    states = []
    for callbacks in ([gq()], [report(tmp_path), gq()]):
        fitted = module()
        trainer(*callbacks, steps=_STEPS).fit(fitted)
        states.append(fitted.state_dict())
    assert_same(*states)


def test_resumed_it_reports_what_an_uninterrupted_run_does(tmp_path: Path) -> None:
    whole = report(tmp_path / "whole")
    trainer(gq(), whole, steps=_STEPS).fit(module())
    first = trainer(gq(), report(tmp_path / "cut"), steps=5)
    first.fit(module())
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = report(tmp_path / "cut")
    trainer(gq(), resumed, steps=_STEPS).fit(module(), ckpt_path=tmp_path / "stopped.ckpt")
    # The stopped run's last look, at step 5, stays; no scheduled one is dropped for it.
    assert [snapshot.step for snapshot in whole.snapshots] == [0, 3, 6, 9, 12]
    assert {0, 6, 9, 12} <= {snapshot.step for snapshot in resumed.snapshots}
    assert_same(resumed.snapshots[0].state_dict(), whole.snapshots[0].state_dict())
    for place in (-1, -2, -3):
        assert_same(resumed.snapshots[place].state_dict(), whole.snapshots[place].state_dict())


def test_resumed_from_a_checkpoint_in_the_middle_it_looks_at_the_same_steps(
    tmp_path: Path,
) -> None:
    saving = LambdaCallback(
        on_train_batch_end=lambda run, *_: (
            run.save_checkpoint(tmp_path / "5.ckpt") if run.global_step == 5 else None
        )
    )
    whole = report(tmp_path / "whole")
    trainer(gq(), whole, saving, steps=_STEPS).fit(module())
    resumed = report(tmp_path / "cut")
    trainer(gq(), resumed, steps=_STEPS).fit(module(), ckpt_path=tmp_path / "5.ckpt")
    assert_same(resumed.state_dict(), whole.state_dict())


def test_a_second_module_has_a_report_of_its_own(tmp_path: Path) -> None:
    watch = report(tmp_path, snapshots=3)
    trainer(gq(), watch, steps=_STEPS).fit(module())
    trainer(gq(), watch, steps=6).fit(module())
    assert [snapshot.step for snapshot in watch.snapshots] == [0, 3, 6]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_report_that_cannot_be_written_costs_no_weights(is_first: bool, tmp_path: Path) -> None:
    (tmp_path / "report").write_text("a file is in the way")
    fitted, method = module(), gq()
    watch = CompressionReport(tmp_path / "report")
    callbacks = [watch, method] if is_first else [method, watch]
    with pytest.warns(UserWarning, match="CompressionReport could not write to .*report"):
        trainer(*callbacks, steps=4).fit(fitted)
    assert len(fitted.head.first.weight.unique()) <= 2
    assert watch.snapshots[-1].step == 4
    assert (tmp_path / "report").read_text() == "a file is in the way"


def test_figures_on_disk_and_in_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    watch = CompressionReport(most_tensors=4)
    trainer(gq(), NNAEmulation(calibration_steps=2), watch, steps=_STEPS, logger=logger).fit(
        module()
    )
    folder = tmp_path / "run" / "compression"
    names = ["soft_hard_gap", "sqnr", "weights"]
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"compression.{kind}" for kind in ("csv", "html", "json")),
        *(f"{name}.png" for name in names),
    ]
    for name in names:
        picture = matplotlib.image.imread(folder / f"{name}.png")
        assert picture[..., :3].std() > 0.02  # Something is drawn.
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert sorted(events.Tags()["images"]) == [f"nna/compression_report/{name}" for name in names]
    logged = [event.value for event in events.Scalars("nna/compression_report/packed_bytes")]
    assert logged == [float(snapshot.packed_bytes) for snapshot in watch.snapshots]


def test_scalars_in_a_csv_file_and_an_error_of_nothing_is_null(tmp_path: Path) -> None:
    hard = HardCompression(3, every_n_steps=1)
    watch = report(tmp_path / "report")
    logger = CSVLogger(tmp_path, name="", version="run")
    trainer(hard, MRACosRegularization(3), watch, steps=4, logger=logger).fit(module())
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"nna/compression_report/mean_bits", "nna/compression_report/soft_hard_gap"} <= set(
        header
    )
    newest = json.loads((tmp_path / "report" / "compression.json").read_text())["snapshots"][-1]
    assert [tensor["sqnr_db"] for tensor in newest["tensors"]] == [None] * len(hard.selected)
    assert {tensor["method"] for tensor in newest["tensors"]} == {"hard_compression"}


def test_an_endless_run_is_looked_at_each_epoch(tmp_path: Path) -> None:
    def stop(trainer: Any, module: Any) -> None:
        trainer.should_stop |= trainer.global_step == 24

    watch, method = report(tmp_path), GeneralQuantizer(2, sharpness=2.0, hard_from=3)
    ending = LambdaCallback(on_train_epoch_end=stop)
    trainer(method, watch, ending, steps=-1, max_epochs=-1).fit(module())
    assert [snapshot.step for snapshot in watch.snapshots] == [0, 8, 16, 24]


def test_a_copy_and_a_pickle_have_what_was_seen(tmp_path: Path) -> None:
    watch = report(tmp_path)
    trainer(gq(), watch, steps=3).fit(module())
    for twin in (copy.deepcopy(watch), pickle.loads(pickle.dumps(watch))):
        assert_same(twin.state_dict(), watch.state_dict())


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    trainer(gq(), report(tmp_path), fast_dev_run=2).fit(module())
    assert list(tmp_path.iterdir()) == []


def test_without_a_weight_method() -> None:
    with pytest.raises(ValueError, match="add a weight method, such as GeneralQuantizer"):
        trainer(CompressionReport(), steps=2).fit(module())


def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="at least 1, got 0 and 12"):
        CompressionReport(snapshots=0)
    monkeypatch.setattr("lightning_nna.figure_files.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"'lightning-nna\[figures\]', or set figures=False"):
        CompressionReport()
    assert CompressionReport(figures=False).snapshots == []
