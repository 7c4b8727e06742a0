"""A run prints each thing once, and nothing that its user cannot act on."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from recipes.train import main
from tests.recipes.conftest import SMALL_NETWORK


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    monkeypatch.setattr("sys.argv", ["recipes.train", *arguments, *quiet])
    main()


def test_a_run_and_its_resumption_say_each_thing_once(
    small_an4: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    command = [
        *("experiment=an4_rnnt", *SMALL_NETWORK, f"data.root={small_an4}", "data.num_mels=8"),
        *("data.cache_dir=cache", "data.speeds=[1.0]", "data.spec_augment.frequency_width=2"),
        *("data.batch_seconds=2", "data.num_buckets=2", "data.num_workers=0"),
        *("data.validation_fraction=0.2", "trainer.accelerator=cpu", "callbacks.progress=null"),
        *("trainer.enable_progress_bar=false", "trainer.max_epochs=1", "trainer.max_steps=2"),
        *("trainer.limit_test_batches=1", "trainer.limit_val_batches=0", "hydra.run.dir=run"),
        *("compression=codebook", "bits=4", "callbacks.nna.calibration_steps=1"),
    ]
    _run(monkeypatch, *command)
    said = caplog.messages
    assert len([line for line in said if "is emulated on" in line]) == 1
    assert not [line for line in said if line.startswith("emulating ")]
    (bits,) = [line for line in said if line.startswith("GeneralQuantizer: bits of")]
    assert bits.startswith("GeneralQuantizer: bits of 10 tensors: 4 for model.encoder.")
    assert bits.endswith(" and 2 more")

    caplog.clear()
    # Scored in another way: the run is resumed at its end. A warning would be an error here.
    _run(monkeypatch, *command, "test=false")
    resumed = caplog.messages
    assert len([line for line in resumed if "is emulated on" in line]) == 1
    assert not [line for line in [*said, *resumed] if "Tip:" in line]
