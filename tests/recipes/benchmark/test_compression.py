"""The grid of low-bit weights: its runs, its rows, its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize

from recipes.benchmark.compression import (
    ALLOCATIONS,
    METHODS,
    ONE_BIT,
    SMALL_ONE_BIT,
    STUDY,
    CompressionRun,
    checks,
    packed_bytes,
    runs,
)
from recipes.benchmark.recipe_runs import START
from recipes.benchmark.rows import append_row
from recipes.settings import check_settings


def _row(method: str, bits: int | str, loss: float, seed: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "command": f"python -m recipes.train compression={method} bits={bits}",
        "method": method,
        "bits": bits,
        "mean_bits": float(bits) if isinstance(bits, int) else 3.0,
        "one_bit_tensors": [],
        "seed": seed,
        "wer": 0.15,
        "wer_low": 0.13,
        "wer_high": 0.18,
        "loss_per_token": loss,
        "packed_bytes": 700_000,
        "train_seconds": 180.0,
        "cpu_seconds": 190.0,
    } | more


ROWS = [
    _row("float", 32, 0.17, train_seconds=None, cpu_seconds=None),
    _row("float_tuned", 32, 0.168),
    _row("float_tuned", 32, 0.19, seed=2),
    _row("gq", 5, 0.16),
    _row("gq", 2, 0.171),
    _row("lsq", 2, 0.175),
    _row("ste", 2, 0.1705),
    _row("s8bqat", 5, 0.2, seed=2),
    _row("codebook", ONE_BIT, 0.17, one_bit_tensors=["encoder"]),
    _row("nna8", 8, 0.159),
]


def test_every_run_has_a_folder_and_starts_from_the_same_float_weights() -> None:
    grid = runs()
    assert len({run.folder for run in grid}) == len(grid)
    for run in grid:
        assert any(word.endswith(f"={START}") for word in run.command)
    assert runs(methods=["gq"], bits=["2"], seeds=[3]) == [CompressionRun("gq", 2, 3)]


@pytest.mark.parametrize("run", runs(seeds=[1]), ids=lambda c: f"{c.method}-{c.bits}")
def test_every_command_composes(run: CompressionRun) -> None:
    module, *overrides = run.command
    name = module.removeprefix("recipes.")
    settings = [word for word in overrides if not word.startswith("hydra.")]
    with initialize(version_base="1.3", config_path="../../../recipes/conf"):
        config = compose(config_name=name, overrides=settings)
    check_settings(config, name)
    expected = {SMALL_ONE_BIT: 4} | dict.fromkeys(ALLOCATIONS, 8)
    has_bits = METHODS[run.method].compression not in ("none", "nna8")
    assert config.bits == (expected.get(run.bits, run.bits) if has_bits else None)


def test_a_target_that_is_missed_is_called_so() -> None:
    text = "\n".join(checks(ROWS))
    of_one = "over 1 seed(s)"
    tuned, before = "in loss than float, trained further:", "in loss than float before training:"
    assert f"GQ at 5 bits no worse {tuned} -4.8% ± 0.0% {of_one}, met" in text
    assert f"GQ at 5 bits no worse {before} -5.9% ± 0.0% {of_one}, met" in text
    assert f"S8BQAT at 5 bits no worse {tuned} +5.3% ± 0.0% {of_one}, missed" in text
    # What was not trained stands beside every seed.
    assert f"S8BQAT at 5 bits no worse {before} +17.6% ± 0.0% {of_one}, missed" in text
    assert (
        "GQ best or tied at 2 bits: loss per token +0.0005 ± 0.0000 nats against the best " in text
    )
    assert f"other (straight-through, uniform) {of_one}, missed" in text
    assert "GQ best or tied at 2 bits: +0.0 ± 0.0 points of WER against the best other" in text
    assert "half of LSQ's increase of the loss: GQ +0.6%, LSQ +2.9%, met" in text
    assert "before training: 3.00 bits, +0.0 ± 0.0 points of WER over 1 seed(s), met" in text
    assert (
        f"GQ at 5 bits no worse in loss than 8 bits, accelerator-aware: +0.6% ± 0.0% {of_one}"
        in text
    )
    assert text.count("missed") == 4


def test_within_the_standard_error_over_seeds_is_a_tie() -> None:
    rows = [
        *(_row("gq", 3, loss, seed) for seed, loss in enumerate([0.17, 0.18, 0.16])),
        *(_row("lsq", 3, loss, seed) for seed, loss in enumerate([0.16, 0.185, 0.158])),
    ]
    line, rate = checks(rows)
    # The differences are 0.010, -0.005 and 0.002.
    assert (
        "loss per token +0.0023 ± 0.0043 nats against the best other (LSQ) over 3 seed(s)" in line
    )
    assert line.endswith("tied.")
    assert rate.endswith("met.")


def test_the_report_has_every_row_and_a_figure(tmp_path: Path) -> None:
    path = tmp_path / "compression.jsonl"
    for row in ROWS:
        append_row(path, row)
    STUDY.write_report(path)
    text = path.with_suffix(".md").read_text()
    assert text == STUDY.render(ROWS)
    assert all(row["command"] in text for row in ROWS)
    assert "| fixed codebook | mixed, 3.00, 1 bit too | 1 | 15.0 % |" in text
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_packed_sizes() -> None:
    counts = {"a": 9, "b": 16, "bias": 2}
    assert packed_bytes(counts, {"a": 1, "b": 8}) == (2 + 2 + 4) + (16 + 4) + 8
    assert packed_bytes(counts, {"a": 32, "b": 32}) == 4 * 27
