"""The grid of low-bit weights on commands: its runs, its rows, its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize

from lightning_nna.callbacks import GeneralQuantizer
from lightning_nna.weights.allocation import BitAllocation
from recipes.benchmark.low_bits import (
    METHODS,
    STUDY,
    LowBitsRun,
    allocation_folder,
    checks,
    combined,
    parts,
    runs,
)
from recipes.benchmark.recipe_runs import (
    STARTS,
    STEPS,
    budget,
    commands_words,
    pack_errors,
    packed_errors,
    utterance_errors,
    wer_difference,
)
from recipes.benchmark.report import points
from recipes.benchmark.rows import append_row
from recipes.settings import check_settings

WORDS = commands_words()


def _row(method: str, bits: int, errors: np.ndarray, **more: Any) -> dict[str, Any]:
    trained = METHODS[method].trains
    return {
        "model": "rnnt",
        "method": method,
        "bits": bits,
        "steps": STEPS if trained else 0,
        "seed": 1,
        "part": "test",
        "command": f"python -m recipes.train {method} {bits}",
        "wer": errors.sum() / WORDS.sum(),
        "wer_low": 0.1,
        "wer_high": 0.2,
        "loss_per_token": 0.4,
        "packed_bytes": 1e6,
        "train_seconds": 60.0 if trained else None,
        "utterance_errors": pack_errors(errors.tolist()),
    } | more


def _errors(rate: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).binomial(WORDS, rate)


def test_the_commands_have_ten_thousand_words_to_test_on() -> None:
    assert (len(WORDS), WORDS.sum()) == (3400, 10350)
    assert (len(commands_words("validation")), commands_words("validation").sum()) == (700, 2100)


@pytest.mark.parametrize("steps", [480, 1500, 5000])
def test_a_budget_has_its_steps(steps: int) -> None:
    epochs, batches = (int(override.split("=")[1]) for override in budget(steps))
    assert epochs * batches == steps


def test_a_budget_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="481 steps are no multiple of 4 epochs"):
        budget(481)


def test_every_run_has_a_folder_of_its_own() -> None:
    grid = runs(methods=list(METHODS), steps=(480, 1500))
    assert len({run.folder for run in grid}) == len(grid)
    assert runs(models=["rnnt"], methods=["chip", "gq"], bits=[2], seeds=[1, 2]) == [
        LowBitsRun("rnnt", "chip", 8, 0, 1, "test"),
        LowBitsRun("rnnt", "gq", 2, STEPS, 1, "test"),
        LowBitsRun("rnnt", "gq", 2, STEPS, 2, "test"),
    ]


@pytest.mark.parametrize(
    ("model", "method"), [*(("rnnt", each) for each in METHODS), ("conformer", "gq")]
)
def test_every_command_composes(model: str, method: str) -> None:
    run, *_ = runs(models=[model], methods=[method], bits=[2], seeds=[1], part="validation")
    module, *overrides = run.command
    name = module.removeprefix("recipes.")
    settings = [word for word in overrides if not word.startswith("hydra.")]
    with initialize(version_base="1.3", config_path="../../../recipes/conf"):
        config = compose(config_name=name, overrides=settings)
    check_settings(config, name)
    assert config.data.test_part == "validation"
    assert config.bits in (None, run.bits)
    assert (config.bits is None) == (METHODS[method].compression in ("none", "nna8", "csp"))
    assert STARTS[model].weights.is_file()


def test_errors_of_utterances_survive_packing(tmp_path: Path) -> None:
    lines = [
        "utterance\terrors\twords\treference\thypothesis",
        "b\t2\t3\tx y z\tx",
        "a\t0\t1\tx\tx",
    ]
    (tmp_path / "transcripts.tsv").write_text("\n".join(lines) + "\n")
    row = {"utterance_errors": packed_errors(tmp_path)}
    assert utterance_errors(row).tolist() == [0, 2]


def test_methods_are_compared_seed_by_seed() -> None:
    few, many = _errors(0.10, 0), _errors(0.12, 1)
    rows = [_row("gq", 2, few), _row("gq", 2, few, seed=2)]
    others = [_row("lsq", 2, many), _row("lsq", 2, few, seed=3)]
    change = wer_difference(rows, others)
    assert change is not None
    assert change.mean == pytest.approx((few.sum() - many.sum()) / WORDS.sum())
    assert not change.is_tied
    assert wer_difference(rows, others[1:]) is None
    # What was not trained is compared with every seed.
    untrained = wer_difference(rows, [_row("lloyd", 2, few)])
    assert untrained is not None
    assert untrained.is_tied


def test_checks_say_met_tied_and_missed() -> None:
    few, many = _errors(0.10, 0), _errors(0.12, 1)
    rows = [
        *(_row("gq", bits, errors) for bits, errors in ((4, few), (3, few), (2, many))),
        *(_row("lsq", bits, errors) for bits, errors in ((4, many), (3, few), (2, few))),
    ]
    first, second, third = checks(rows)
    assert "commands, RNN-T, 4 bit(s), 480 steps, 1 seed(s): GQ no worse than LSQ: -" in first
    assert first.endswith("points, met.")
    assert second.endswith("+0.0 (+0.0 to +0.0, tied) points, tied.")
    assert third.endswith("points, missed.")


def test_parts_are_compared_on_the_validation_part() -> None:
    words = commands_words("validation")
    errors = np.random.default_rng(0).binomial(words, 0.2)
    rows = [
        _row(method, 2, errors, part="validation", wer=errors.sum() / words.sum())
        for method in ("gq", "gq_mu15", "gq_to_end", "codebook")
    ]
    first, own, other, codebook = parts(rows)
    rate = f"{100 * errors.sum() / words.sum():.1f} %"
    start = "commands, RNN-T"
    tied = "+0.0 (+0.0 to +0.0, tied)"
    to_end = "GQ, centroids trained to the end"
    assert first == f"| {start} | {to_end} | 2 | 480 | 1 | {rate} | 0.4000 | - |"
    assert own == f"| {start} | GQ | 2 | 480 | 1 | {rate} | 0.4000 | {tied} |"
    assert other == f"| {start} | µ = 15 | 2 | 480 | 1 | {rate} | 0.4000 | {tied} |"
    assert codebook.startswith(f"| {start} | fixed codebook, straight-through | 2 | 480 |")


def test_small_networks_are_compared_with_float_and_with_gq() -> None:
    few, many = _errors(0.10, 0), _errors(0.12, 1)
    rows = [
        _row("float", 32, few, packed_bytes=8e6),
        _row("gq_to_end", 4, many),
        _row("gq_ones", 4, many),
        _row("csp50", 8, few, packed_bytes=2e6),
    ]
    gq, ones, sparse = combined(rows)
    tied = "+0.0 (+0.0 to +0.0, tied)"
    assert gq.startswith("| commands, RNN-T | GQ, centroids trained to the end | 4 | 1 |")
    assert gq.endswith("| - | 1.000 MB | 8.0 |")
    assert ones.endswith(f"| {tied} | 1.000 MB | 8.0 |")
    assert sparse.endswith(f"| {tied} | - | 2.000 MB | 4.0 |")


def test_bits_of_tensors_are_allocated_once_for_all_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bits, asked = {"model.a.weight": 1, "model.b.weight": 4}, []
    widths = {name: {1: 0.5, 4: 0.1} for name in bits}
    sizes = {name: {1: 2, 4: 8} for name in bits}
    allocation = BitAllocation(bits, widths, sizes, dict.fromkeys(bits, 16), 0.1)

    def run_recipe(module: str, *overrides: str, log: Path) -> None:
        asked.append((module, *overrides))
        log.parent.mkdir(parents=True, exist_ok=True)
        allocation.save(log.with_name("bits.json"))

    monkeypatch.setattr("recipes.benchmark.low_bits.run_recipe", run_recipe)
    monkeypatch.chdir(tmp_path)
    grid = runs(models=["rnnt"], methods=["gq_ones", "gq_mixed"], seeds=[1])
    for run in grid:
        run.prepare()
    assert [run.bits for run in grid] == [4, 3, 3, 2]
    assert ["target_mean_bits=2" in each for each in asked] == [True, False]
    folder = allocation_folder("rnnt", 2)
    files = [run.allocation for run in grid]
    assert files[:2] == [folder / "ones.json", folder / "ones.json"]
    assert files[2:] == [allocation_folder("rnnt", 3) / "bits.json", folder / "bits.json"]
    assert GeneralQuantizer(4, overrides=folder / "ones.json").selection.overrides == {
        "model.a.weight": 1
    }
    assert f"bit_overrides={files[0]}" in grid[0].command


def test_the_report_has_every_row_and_a_figure(tmp_path: Path) -> None:
    path = tmp_path / "low_bits.jsonl"
    rows = [
        _row("float", 32, _errors(0.1, 0)),
        _row("nna8", 8, _errors(0.1, 1)),
        _row("gq", 2, _errors(0.1, 2)),
        _row("gq", 2, _errors(0.1, 2), steps=1500),
        _row("lsq", 2, _errors(0.13, 3)),
    ]
    for row in rows:
        append_row(path, row)
    STUDY.write_report(path)
    text = path.with_suffix(".md").read_text()
    assert all(row["command"] in text for row in rows)
    assert "## Conformer" not in text
    assert f"| LSQ | 2 | 1 | {100 * rows[4]['wer']:.1f} % |" in text
    assert "| commands, RNN-T | GQ | 2 | 1500 | 1 |" in text
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_points_have_signs() -> None:
    change = wer_difference([_row("gq", 2, _errors(0.1, 0))], [_row("lsq", 2, _errors(0.2, 1))])
    assert points(change).startswith("-")
