"""Flash and RAM of a microcontroller: a row of a run, and the page."""

from __future__ import annotations

import importlib.util

import pytest

from recipes.benchmark.micro import METHODS, NETWORKS, STUDY, MicroRun


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ethosu") is None, reason="Vela is not installed")
@pytest.mark.skipif(
    importlib.util.find_spec("tflite_micro") is None, reason="TFLite-Micro is not installed"
)
def test_few_bits_are_little_flash_and_equal_outputs() -> None:
    (row,) = MicroRun("anomaly_detection", "gq4").rows()
    assert row["equal_outputs"] == 1.0
    assert row["outputs"] == 8 * 640
    assert row["forms"] == {"lookup table": 10}
    assert row["flash_bytes"] < 0.6 * row["plain_flash_bytes"]
    assert row["compressed_bytes"] < 0.52 * row["constant_bytes"]
    assert row["arena_bytes"] > row["plain_arena_bytes"]
    assert row["vela_encoded_bytes"] < row["vela_weight_bytes"]
    page = STUDY.render([{"command": "the command", **row}])
    assert f"| {NETWORKS['anomaly_detection']} | GQ, 4 bits | {row['sqnr_db']:.1f} |" in page
    assert "| 10 lookup table |" in page
    assert "| 1.000000 |" in page


def test_the_grid_is_every_network_with_every_method() -> None:
    grid = STUDY.runs(list(NETWORKS), list(METHODS), 1)
    assert len(grid) == len(NETWORKS) * len(METHODS) == 30
    assert grid[0] == MicroRun("keyword_spotting", "dense")
