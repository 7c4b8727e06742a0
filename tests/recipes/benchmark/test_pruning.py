"""The grid of zeros: its runs, its rows, its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize
from hydra.utils import instantiate
from torch import nn

from recipes.benchmark.pruning import (
    GRIDS,
    STUDY,
    PruningRun,
    checks,
    commands_line,
    commands_steps,
    ladder,
    ladder_steps,
    nonzero_counts,
    packed_bytes,
    runs,
)
from recipes.benchmark.recipe_runs import commands_words, pack_errors
from recipes.benchmark.rows import append_row
from recipes.settings import check_settings


def _row(
    method: str, sparsity: float, loss: float, seed: int = 1, seconds: float | None = 100.0
) -> dict[str, Any]:
    return {
        "command": f"python -m recipes.train compression={method} sparsity={sparsity}",
        "corpus": "an4",
        "method": method,
        "sparsity": sparsity,
        "zeros": sparsity,
        "seed": seed,
        "wer": 0.15,
        "wer_low": 0.13,
        "wer_high": 0.18,
        "loss_per_token": loss,
        "packed_bytes": 700_000,
        "train_seconds": seconds,
    }


ROWS = [
    _row("float", 0.0, 0.17, seconds=None),
    _row("csp", 0.7, 0.168),
    _row("csp", 0.9, 0.19),
    _row("gmp", 0.7, 0.172),
    _row("gmp", 0.9, 0.185),
    _row("random", 0.9, 0.4),
]


def test_every_run_has_a_folder_of_its_own() -> None:
    grid = runs()
    assert len({run.folder for run in grid}) == len(grid)
    assert runs(methods=["csp"], sparsities=[0.9], seeds=[2]) == [
        PruningRun("an4", "csp", 0.9, 2),
        PruningRun("commands", "csp", 0.9, 2),
    ]


@pytest.mark.parametrize(
    ("corpus", "method"), [(corpus, method) for corpus, grid in GRIDS.items() for method in grid]
)
def test_every_command_composes_and_its_callback_can_be_made(corpus: str, method: str) -> None:
    run = runs(corpora=[corpus], methods=[method])[0]
    module, *overrides = run.command
    settings = [word for word in overrides if not word.startswith("hydra.")]
    with initialize(version_base="1.3", config_path="../../../recipes/conf"):
        config = compose(config_name=module.removeprefix("recipes."), overrides=settings)
    check_settings(config, module.removeprefix("recipes."))
    prune = instantiate(config.callbacks.get("prune"))
    numbers = getattr(getattr(prune, "selection", None), "default", run.sparsity)
    assert numbers == run.sparsity


def test_targets_are_judged() -> None:
    lines = checks(ROWS)
    assert lines[0].startswith(
        "- CSP no worse than every baseline at 70%: loss per token -0.0040 ± 0.0000"
    )
    assert "against the best of them (gradual magnitude)" in lines[0]
    assert lines[0].endswith(
        "met; +0.0 ± 0.0 points of WER against the best (gradual magnitude), met."
    )
    assert lines[1].startswith(
        "- CSP clearly better than every baseline at 90%: loss per token +0.0050"
    )
    assert lines[1].endswith(
        "missed; +0.0 ± 0.0 points of WER against the best (gradual magnitude), met."
    )
    assert "70 % of zeros without loss of accuracy against float: -1.2% of the loss" in lines[2]


def test_words_are_judged_beside_who_is_best_in_words() -> None:
    rival = _row("gmp_global", 0.7, 0.18) | {"wer": 0.14}
    line = checks([*ROWS, rival])[0]
    assert "-0.0040 ± 0.0000 nats against the best of them (gradual magnitude)" in line
    assert line.endswith(
        "+1.0 ± 0.0 points of WER against the best (gradual magnitude, global budget), missed."
    )


def test_clearly_better_is_by_more_than_the_standard_error() -> None:
    rows = [
        *(_row("csp", 0.8, loss, seed) for seed, loss in enumerate([0.17, 0.18, 0.17])),
        *(_row("gmp", 0.8, loss, seed) for seed, loss in enumerate([0.18, 0.175, 0.178])),
        *(_row("csp", 0.9, loss, seed) for seed, loss in enumerate([0.17, 0.18, 0.17])),
        *(_row("gmp", 0.9, loss, seed) for seed, loss in enumerate([0.18, 0.185, 0.178])),
    ]
    at_80, at_90 = checks(rows)
    # The differences are -0.010, 0.005 and -0.008; and -0.010, -0.005 and -0.008.
    assert "-0.0043 ± 0.0047" in at_80
    assert "seed(s), tied; " in at_80
    assert "-0.0077 ± 0.0015" in at_90
    assert "seed(s), met; " in at_90


def test_patterns_are_judged_beside_their_own_baseline() -> None:
    blocks = [_row("csp_1x16", 0.5, 0.19), _row("gmp_1x16", 0.5, 0.18), _row("csp_2:4", 0.5, 0.1)]
    (line,) = set(checks([*ROWS, *blocks])) - set(checks(ROWS))
    assert (
        "blocks of 16, no worse than gradual magnitude, blocks of 16 at 50%: loss per token +0.0100"
        in line
    )
    assert "seed(s), missed; " in line


def test_the_ladder_has_the_rungs_with_rows_and_their_differences() -> None:
    rungs = [
        _row("gmp_global", 0.8, 0.23) | {"wer": 0.25},
        _row("csp_plain", 0.8, 0.2) | {"wer": 0.2},
        _row("csp_unfitted", 0.5, 0.2),
        *(_row("csp", 0.8, loss, seed) | {"wer": 0.18} for seed, loss in ((1, 0.18), (2, 0.19))),
    ]
    assert ladder(rungs) == [
        "| magnitude, one budget | - | 25.0 %, 0.230 (1) | - |",
        "| input moments instead of projections | - | 20.0 %, 0.200 (1) | - |",
        "| and the fit of the survivors: CSP of the recipes | - | 18.0 %, 0.185 (2) | - |",
    ]
    assert ladder_steps(rungs) == []
    fitted = _row("csp_unfitted", 0.8, 0.19) | {"wer": 0.19}
    assert ladder_steps([*rungs, fitted]) == [
        "- Gradients, 80%: -1.0 ± 0.0 points of WER; loss per token -0.0100 ± 0.0000 nats; "
        "1 seed(s).",
        "- The fit of the survivors, 80%: -1.0 ± 0.0 points of WER; loss per token -0.0100 ± "
        "0.0000 nats; 1 seed(s).",
    ]


def _on_commands(method: str, sparsity: float, errors: int, **more: Any) -> dict[str, Any]:
    each = np.zeros(len(commands_words()), dtype=int)
    each[:errors] = 1
    packed = {"corpus": "commands", "utterance_errors": pack_errors(each.tolist())}
    return _row(method, sparsity, 0.2, **more) | packed


def test_commands_are_compared_utterance_by_utterance() -> None:
    rows = [
        _on_commands("float", 0.0, 1000, seconds=None),
        _on_commands("csp_unfitted", 0.8, 1500),
        _on_commands("csp", 0.8, 1200),
        _on_commands("csp_2:4", 0.5, 1100),
        _on_commands("gmp_2:4", 0.5, 1100),
    ]
    (change,) = commands_steps(rows)
    words = commands_words().sum()
    what, at_70, at_80, at_90 = change.strip("| ").split(" | ")
    assert (what, at_70, at_90) == ("The fit of the survivors", "-", "-")
    assert at_80.startswith(f"{-100 * 300 / words:+.1f} (-")
    cells = commands_line(rows, "csp_unfitted", 0.8).strip("| ").split(" | ")
    assert cells[-2].startswith(f"{100 * 500 / words:+.1f} (+")
    assert cells[-1] == at_80
    assert commands_line(rows, "csp", 0.8).endswith("| - |")
    assert commands_line(rows, "gmp_2:4", 0.5).endswith("| +0.0 (+0.0 to +0.0, tied) |")


def test_what_has_fewer_zeros_is_no_rival() -> None:
    dense = _row("model_pruning", 0.9, 0.17) | {"zeros": 0.03}
    assert checks([*ROWS, dense]) == checks(ROWS)


def test_the_report_has_every_row_and_a_figure(tmp_path: Path) -> None:
    path = tmp_path / "pruning.jsonl"
    for row in ROWS:
        append_row(path, row)
    STUDY.write_report(path)
    text = path.with_suffix(".md").read_text()
    assert text == STUDY.render(ROWS)
    assert all(row["command"] in text for row in ROWS)
    assert "| CSP, activations | 70% | 70.0% | 1 | 15.0 % |" in text
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_masks_are_counted_in_a_checkpoint() -> None:
    mask = torch.tensor([[True, False, False]])
    ours = {"state_dict": {}, "callbacks": {"a": {"masks": {"x": {"mask": mask}}}, "b": 3}}
    weights = {"layer.weight": mask.float(), "layer.bias": torch.zeros(3)}
    theirs = {"state_dict": weights, "callbacks": {}}
    assert nonzero_counts(ours) == {"x": (1, 3)}
    assert nonzero_counts(theirs) == {"layer.weight": (1, 3)}
    assert nonzero_counts({"state_dict": nn.Linear(2, 2).state_dict(), "callbacks": {}}) == {}


def test_packed_sizes() -> None:
    assert packed_bytes({}, bits=8, parameters=100) == 100
    assert packed_bytes({"a": (10, 80)}, bits=8, parameters=100) == 20 + 10 + 10 + 4
    assert packed_bytes({"a": (80, 80)}, bits=8, parameters=80) == 80 + 4
    assert packed_bytes({"a": (16, 80)}, bits=5, parameters=80) == 10 + 10 + 32 + 4
