from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.benchmark import large_module, scale
from recipes.benchmark.scale import AXES, STUDY, ScaleRun, runs, training_step


@pytest.mark.parametrize("name", AXES)
def test_the_smallest_size_of_every_axis_trains_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    workload = AXES[name].workload(AXES[name].sizes[0])
    module, batch = workload.module(), workload.batch()
    workload.loss(module(*batch), batch).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
    training_step(name, str(AXES[name].sizes[0]), "exact", device=torch.device("cpu"))()


def test_a_thousand_layers_do_not_end_in_zeros() -> None:
    torch.manual_seed(0)
    workload = AXES["depth"].workload(1000)
    result = workload.module()(*workload.batch())
    assert 1e-3 < float(result.detach().square().mean()) < 1e3


@pytest.mark.parametrize(("name", "millions"), [("parameters", 50), ("module", 50)])
def test_the_largest_networks_have_fifty_million_parameters(name: str, millions: int) -> None:
    with torch.device("meta"):
        module = (
            large_module.LargeModule(large_module.LAYERS, large_module.WIDTH)
            if name == "module"
            else AXES[name].workload(millions).module()
        )
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(millions * 1e6, rel=0.06)


def test_the_grid_ends_with_the_module() -> None:
    grid = runs()
    assert len(grid) == sum(len(each.sizes) for each in AXES.values()) + len(large_module.TASKS)
    assert [each.size for each in runs(axes=["depth"], largest=100) if isinstance(each, ScaleRun)]
    keys = [json.dumps(key) for run in grid for key in run.keys]
    assert len(set(keys)) == len(keys)


@pytest.mark.slow
@pytest.mark.parametrize("task", large_module.TASKS)
def test_every_stage_of_the_module_has_a_row(task: str) -> None:
    run = large_module.LargeModuleRun(task, layers=1, width=32)
    rows = list(run.rows())
    assert [row["stage"] for row in rows] == [key["stage"] for key in run.keys]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)


def row(axis: str, size: int, fidelity: str, ratio: float) -> dict[str, Any]:
    times = {f"time_ratio{end}": ratio for end in ("", "_low", "_high")}
    return {
        **{"axis": axis, "size": size, "fidelity": fidelity, "memory_ratio": 1.0, "device": "CPU"},
        **times,
        **{"float_ms": 2.0, "float_bytes": 3_000_000, "peak_bytes": 3_000_000, "command": "x"},
    }


def test_the_report_compares_the_largest_size_with_the_middle(tmp_path: Path) -> None:
    rows = [
        row("depth", size, fidelity, ratio)
        for fidelity in scale.FIDELITIES
        for size, ratio in ((10, 9.0), (100, 4.0), (1000, 5.0))
    ]
    stage = {"axis": "module", "stage": "export", "seconds": 3.0, "time_ratio": 6.0}
    memory = {"peak_bytes": 9e8, "memory_ratio": 2.0, "parameters": 50_400_000}
    report = STUDY.render([*rows, {**stage, **memory, "device": "CPU", "command": "y"}])
    assert (
        "time at 1,000 layers over 100 layers: exact 1.25, fast 1.25, missed (at most 1.2)"
        in report
    )
    assert "memory at 1,000 layers over 100 layers: exact 1.00, fast 1.00, met" in report
    assert "| 100 | 2.00 | 4.00 (4.00-4.00) | 4.00 (4.00-4.00) | 3.0 | 1.00 | 1.00 |" in report
    assert (
        "| export of one sequence to a .tflite program | 3.00 s | 6.0 | 900 MB | 2.00 |" in report
    )
    assert "A module of 50.4 million parameters" in report
    assert STUDY.plot is not None
    STUDY.plot(rows, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").is_file()
