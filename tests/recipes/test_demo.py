"""The demo on a handful of digits; the real one is ``make demo``."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.demo import checkpoint, demo, draw, table
from tests.recipes.conftest import SMALL_NETWORK


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.filterwarnings("ignore:NNAEmulation. 0 of")
def test_the_demo_trains_emulates_trains_emulated_and_deploys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # evaluation reads the cache that training wrote
    overrides = [
        *SMALL_NETWORK,
        *("data.train_size=24", "data.validation_size=4", "data.test_size=4"),
        *("data.batch_seconds=8", "data.num_buckets=2", "trainer.max_epochs=1"),
        *("trainer.log_every_n_steps=1", "callbacks.progress=null", "threads=1"),
        "trainer.enable_progress_bar=false",
        # A network of one epoch emits as many as it may.
        "model.max_labels_per_step=2",
    ]
    results = demo(tmp_path / "demo", overrides)
    assert list(results) == ["float", "chip", "chip_aware", "deployed"]
    assert [entry["method"] for entry in results.values()] == ["float", "chip", "nna8", "nna8"]
    deployed, emulated = results["deployed"], results["chip_aware"]
    assert (deployed["equal_outputs"], deployed["equal_transcripts"]) == (1.0, 1.0)
    assert deployed["wer"] == emulated["wer"]
    # The same outputs, summed in float32 in another order.
    assert deployed["loss_per_token"] == pytest.approx(emulated["loss_per_token"], rel=1e-6)
    assert all({"wer", "loss_per_token"} <= entry.keys() for entry in results.values())
    assert checkpoint(tmp_path / "demo" / "chip_aware").is_file()
    draw(results, tmp_path / "wer.png")
    assert (tmp_path / "wer.png").stat().st_size > 1000
    assert len(table(results).splitlines()) == 5
