from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipes.benchmark import timing
from recipes.benchmark.calls import CallRun
from recipes.benchmark.emulation import STUDY, VARIANTS, NotPossibleError, Variant
from recipes.benchmark.timing import peak_bytes
from recipes.benchmark.workloads import WORKLOADS, Workload

CPU = torch.device("cpu")


def tiny(size: int = 8) -> Workload:
    return Workload(
        "tiny",
        lambda: nn.Sequential(nn.Linear(size, size), nn.ReLU()),
        lambda: (torch.randn(4, size),),
        lambda result, _: result.square().mean(),
    )


@pytest.mark.parametrize("variant", ["float", "exact", "fast"])
def test_a_step_trains(variant: str) -> None:
    results: list[Tensor] = []

    def loss(result: Tensor, _: tuple[Tensor, ...]) -> Tensor:
        results.append(result.detach())
        return result.square().mean() * 1e4  # The learning rate is tiny.

    workload = Workload("tiny", tiny().module, tiny().batch, loss)
    VARIANTS[variant].step(workload, CPU)()
    assert not torch.equal(results[0], results[-1])


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_loss_of_every_workload_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    workload = WORKLOADS[name]
    module, batch = workload.module(), workload.batch()
    workload.loss(module(*batch), batch).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


def test_what_a_library_cannot_train_is_said() -> None:
    def fail(module: nn.Module, batch: tuple[Tensor, ...]) -> nn.Module:
        raise TypeError("no such layer\nand more")

    with pytest.raises(NotPossibleError, match=r"TypeError: no such layer$"):
        Variant("none", fail).step(tiny(), CPU)


def test_ratios_are_to_the_float_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    times = {"float": 1.0, "slow": 3.0}

    def seconds(step: Any, repeats: int, device: torch.device) -> float:
        return times[step()] * (1 + next(clock) // 2)  # A machine that gets slower pair by pair.

    monkeypatch.setattr(timing, "seconds", seconds)
    steps = {"slow": lambda: "slow", "float": lambda: "float"}
    next(clock)  # With the call that finds the number of repeats, pairs begin evenly.
    ratios, _ = timing.time_ratios(steps, CPU, pairs=3)  # type: ignore[arg-type]
    assert ratios == {"slow": [3.0] * 3, "float": [1.0] * 3}


def test_peak_memory_is_that_of_the_largest_tensors() -> None:
    def make() -> Any:
        numbers = torch.ones(4_000_000)

        def step() -> None:
            (numbers + 1).sum()

        return step

    assert peak_bytes(make, CPU) == pytest.approx(32_000_000, rel=0.1)


def row(variant: str, time: float | None, **more: Any) -> dict[str, Any]:
    figures: dict[str, Any] = {"time_ratio": time, "memory_ratio": time}
    if time is not None:
        figures |= {"time_ratio_low": time, "time_ratio_high": time, "float_ms": 10.0}
        figures["peak_bytes"] = 2_000_000
    common = {"work": "mlp", "device": "CPU", "threads": 1, "command": "python -m x"}
    return common | {"variant": variant} | figures | more


def test_the_report_says_what_is_missed_and_what_could_not_be_done() -> None:
    rows = [
        row("float", 1.0),
        row("exact", 1.9),
        row("fast", 1.2),
        row("torchao", None, reason="it cannot"),
    ]
    report = STUDY.render(rows)
    assert (
        "| MLP 512-1024-1024-512 | 10.0 | 1.90 (1.90-1.90) | 1.20 (1.20-1.20) | - | - |" in report
    )
    assert "| MLP 512-1024-1024-512 | 2.0 | 1.90 | 1.20 | - | - |" in report
    assert (
        "Time, ours, exact, layers: at most 1.5; missed by MLP 512-1024-1024-512 (1.90)." in report
    )
    assert "Time, ours, fast, layers: at most 1.25; met by every workload." in report
    assert "Memory: at most 1.5; missed by MLP 512-1024-1024-512, exact (1.90)." in report
    assert "torchao, MLP 512-1024-1024-512: `it cannot`" in report
    assert "small networks: at most" not in report


def test_small_networks_have_targets_and_a_table_of_their_own() -> None:
    rows = [row(variant, 2.2, work="kws") for variant in ("float", "exact", "fast")]
    report = STUDY.render(rows)
    assert "### Small networks" in report
    assert "### Layers and recognizers" not in report
    assert "Time, ours, exact, small networks: at most 2.5; met by every workload." in report
    assert "Time, ours, fast, small networks: at most 2.0; missed by MLPerf Tiny" in report


def test_calls_are_measured_and_have_a_table() -> None:
    rows = [{"command": "python -m x", **row} for row in CallRun("add").rows()]
    assert [row["variant"] for row in rows] == ["float", "exact", "fast"]
    assert rows[0]["python_calls"] < rows[1]["python_calls"]
    report = STUDY.render(rows)
    assert "### One call of an operator" in report
    assert f"| add | {rows[0]['microseconds']:.1f} ({rows[0]['python_calls']:.0f}) |" in report
