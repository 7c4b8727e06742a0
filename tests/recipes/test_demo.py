"""The demo on a handful of digits; the real one is ``make demo``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.demo import announcement, demo, main, set_aside, table
from recipes.demo_networks import NETWORKS, SHOWN, Scale, checkpoint
from recipes.run_folder import sole_run
from tests.recipes.conftest import SMALL_NETWORK

_DATA = (
    *("data.train_size=24", "data.validation_size=4", "data.test_size=4", "data.vocabulary=digits"),
    *("data.batch_seconds=8", "data.scoring_batch_seconds=4", "data.num_buckets=2"),
)
_NETWORK = (
    *SMALL_NETWORK,
    # A network of one epoch emits as many as it may.
    *("model.max_labels_per_step=2", "trainer.log_every_n_steps=1"),
)
_SCALE = Scale(
    data=_DATA,
    epochs=1,
    epoch_batches=6,
    fine_tuning=(*_NETWORK, "callbacks.nna.calibration_steps=2"),
    float_training=(*_NETWORK, *_DATA, "trainer.max_epochs=1"),
    compared_batches=1,
)


@pytest.mark.slow
def test_the_demo_makes_scores_and_deploys_every_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # All processes read the cache that the first has written.
    folder = tmp_path / "demo"
    lines: list[str] = []
    rows = demo(folder, workers=2, from_scratch=True, scale=_SCALE, tell=lines.append)
    assert list(rows) == list(NETWORKS)
    assert len(lines) == 3 + len(NETWORKS)
    assert json.loads((folder / "results.json").read_text()) == rows
    assert (folder / "pareto.png").stat().st_size > 10_000

    on_devices = [row for name, row in rows.items() if name != "float"]
    for row in on_devices:
        assert list(row["runtimes"]) == ["TFLite-Micro", "LiteRT"]
        for runtime in row["runtimes"].values():
            assert 0 < runtime["equal_outputs"] == runtime["outputs"]
            # The first batch of the test set, of four utterances.
            assert 1 <= runtime["utterances"] < 4
    # All are scored on the whole test set.
    assert len({row["words"] for row in rows.values()}) == 1
    assert rows["float"]["runtimes"] == {}
    # An embedding and all matrices; 4-bit numbers are packed as such.
    assert (rows["gq2"]["bits"], rows["gq4"]["bits"], rows["chip"]["bits"]) == (2, 4, 4)
    assert rows[SHOWN]["sparsity"] == pytest.approx(0.8, abs=0.02)
    assert rows["gq2"]["packed_bytes"] < rows["gq4"]["packed_bytes"] < rows["int8"]["packed_bytes"]

    shown = folder / SHOWN / "deployed"
    assert (shown / "report.html").is_file()
    assert (shown / "firmware" / "encoder" / "README.md").is_file()
    assert checkpoint(folder / SHOWN).is_file()
    text = table(rows)
    assert len(text.splitlines()) == 1 + len(NETWORKS) + 5
    assert text.count("  equal") == 2 * len(on_devices)
    assert "DIFFERS" not in text


def test_the_announcement_names_the_start_and_the_time() -> None:
    quick = announcement(Path("runs/demo"), 2, from_scratch=False)
    assert "recipes/pretrained/commands_rnnt.safetensors" in quick
    assert "minutes on two idle cores" in quick
    assert "trained first" in announcement(Path("runs/demo"), 2, from_scratch=True)


def test_whole_results_are_set_aside_and_others_removed(tmp_path: Path) -> None:
    def written(result: str) -> None:
        (tmp_path / "gq4").mkdir()
        (tmp_path / "gq4" / "log.txt").write_text(result)
        (tmp_path / ".lock").write_text("mine")

    written("stopped")
    assert not set_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    for result in ("first", "second"):
        written(result)
        (tmp_path / "results.json").write_text(result)
        assert set_aside(tmp_path)
    written("stopped")
    assert not set_aside(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "before"]
    assert (tmp_path / "before" / "results.json").read_text() == "second"
    assert (tmp_path / "before" / "gq4" / "log.txt").read_text() == "second"


def test_two_demos_in_one_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "results.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["demo", "--folder", str(folder)])
    with (
        sole_run(folder),
        pytest.raises(SystemExit, match=r"is in use by process \d+ .*choose another --folder"),
    ):
        main()
    assert (folder / "results.json").read_text() == "{}"


def test_a_number_of_workers_is_positive(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["demo", "--workers", "0"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--workers must be at least 1, got 0" in capsys.readouterr().err
