"""Launches and synchronizations of an emulated training step, counted without a GPU.

    python -m recipes.benchmark.launches               # count what is missing, then report
    python -m recipes.benchmark.launches --page-only

A step runs on a device that is simulated in the processor's memory (see
:mod:`lightning_nna.testing.simulated_device`); its output and gradients are compared with those of
the same step on the processor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nna import emulate
from lightning_nna.emulation.modes import Fidelity
from lightning_nna.testing.simulated_device import (
    Traffic,
    counted,
    launches_of,
    simulated_device,
)
from recipes.benchmark.emulation import PRESET
from recipes.benchmark.grid import Run, Study, axis, threads_option
from recipes.benchmark.report import Fields, line
from recipes.benchmark.rows import Row, select
from recipes.benchmark.workloads import WORKLOADS, Workload

#: Most launches over those of float, by fidelity, of networks without recurrent layers.
TARGETS = {"exact": 4.0, "fast": 3.0}
#: Most launches of a recurrent layer for one more step, in each pass.
STEP_TARGET = 3
#: Workloads of one kind of recurrent layer, with the number of layers.
RECURRENT = {"lstm": 2, "gru": 2}
_FIDELITIES = ("exact", "fast")
_MORE_STEPS = 10


class _Launches(TorchDispatchMode):
    """Count what a GPU would launch, for a network that runs on the processor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += launches_of(func)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class LaunchesRun(Run):
    """Count one workload in one fidelity.

    Attributes:
        work: A key of :data:`~recipes.benchmark.workloads.WORKLOADS`.
        fidelity: ``"exact"`` or ``"fast"``.
    """

    work: str
    fidelity: str

    @property
    def key(self) -> dict[str, Any]:
        """Values that the row of the run has."""
        return {"work": self.work, "fidelity": self.fidelity}

    @property
    def keys(self) -> list[dict[str, Any]]:
        """Values that identify the row."""
        return [self.key]

    def rows(self) -> Iterator[Row]:
        """Count the workload."""
        torch.set_num_threads(self.threads or 1)
        yield {**self.key, **count(self.work, self.fidelity)}


def count(work: str, fidelity: str, preset: str = PRESET) -> Row:
    """Count launches and synchronizations of a training step of a workload.

    Args:
        work: A key of :data:`~recipes.benchmark.workloads.WORKLOADS`.
        fidelity: ``"exact"`` or ``"fast"``.
        preset: Accelerator.

    Returns:
        Launches of float and of the emulated forward and backward; synchronizations of the float
        network, and of the emulated one in both, with their places, and between two steps; whether
        the output equals that of the processor; and the distance of all gradients from those of
        the processor, relative to these.
    """
    workload, device = WORKLOADS[work], simulated_device()
    host, float_launches = _step_on_host(workload, fidelity, preset)
    module, batch = _made(workload, device)
    with counted() as own:  # A network may look at values itself.
        workload.loss(module(*batch), batch).backward()
    _calibrate(module, batch, preset)
    for _ in range(2):  # The first fills caches.
        step = _Step(workload, module, batch, fidelity)
        step.run()
    distance = sum(
        float((a - b).square().sum()) for a, b in zip(step.grads, host.grads, strict=True)
    )
    size = sum(float(b.square().sum()) for b in host.grads)
    row: dict[str, Any] = {
        "float_launches": float_launches,
        "forward_launches": sum(step.forward.launches.values()),
        "backward_launches": sum(step.backward.launches.values()),
        "optimizer_launches": sum(step.optimization.launches.values()),
        "float_synchronizations": sum(own.synchronizations.values()),
        "synchronizations": sum(step.forward.synchronizations.values())
        + sum(step.backward.synchronizations.values()),
        "places": sorted({*step.forward.synchronizations, *step.backward.synchronizations}),
        "between_steps": sum(step.between.synchronizations.values()),
        "equal_output": torch.equal(step.output, host.output),
        "gradient_distance": (distance / size) ** 0.5,
    }
    if work in RECURRENT:
        longer = (torch.cat([batch[0], batch[0][:_MORE_STEPS]]),)
        more = _Step(workload, module, longer, fidelity)
        more.run()
        for name in ("forward", "backward"):
            counts = (sum(getattr(each, name).launches.values()) for each in (more, step))
            added = next(counts) - next(counts)
            row[f"{name}_launches_per_step"] = added / _MORE_STEPS / RECURRENT[work]
    return row


class _Step:
    """One forward and backward on the simulated device, or on the processor."""

    def __init__(
        self, workload: Workload, module: nn.Module, batch: tuple[Tensor, ...], fidelity: str
    ) -> None:
        self.workload, self.module, self.batch = workload, module, batch
        self.fidelity: Fidelity = "fast" if fidelity == "fast" else "exact"

    def run(self) -> None:
        """Run it, with counts of the parts, output and gradients on the host."""
        torch.manual_seed(1)
        self.module.zero_grad()
        optimizer = _optimizer(self.module)
        with counted() as everything, emulate(self.module, fidelity=self.fidelity):
            with counted() as self.forward:
                output = self.module(*self.batch)
                loss = self.workload.loss(output, self.batch)
            with counted() as self.backward:
                loss.backward()
            with counted() as self.optimization:
                optimizer.step()
        inside = self.forward.synchronizations + self.backward.synchronizations
        self.between = Traffic(synchronizations=everything.synchronizations - inside)
        self.output = output.detach().cpu()
        gradients = (x.grad for x in self.module.parameters())
        self.grads = [x.detach().cpu() for x in gradients if x is not None]


def _step_on_host(workload: Workload, fidelity: str, preset: str) -> tuple[_Step, int]:
    """The step on the processor, and the launches of the float network."""
    module, batch = _made(workload, torch.device("cpu"))
    optimizer = _optimizer(module)
    with _Launches() as launches:
        workload.loss(module(*batch), batch).backward()
        optimizer.step()
    module, batch = _made(workload, torch.device("cpu"))
    _calibrate(module, batch, preset)
    for _ in range(2):
        step = _Step(workload, module, batch, fidelity)
        step.run()
    return step, launches.count


def _made(workload: Workload, device: torch.device) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    module, batch = workload.module(), workload.batch()
    return module.to(device), tuple(x.to(device) for x in batch)


def _optimizer(module: nn.Module) -> torch.optim.Optimizer:
    # Weights stay as they are, so that steps can be compared.
    return torch.optim.SGD(module.parameters(), lr=0.0, foreach=False)


def _calibrate(module: nn.Module, batch: tuple[Tensor, ...], preset: str) -> None:
    torch.manual_seed(2)
    with emulate(module, preset) as emulator, emulator.observing():
        module(*batch)


def runs(
    *,
    works: Sequence[str] = tuple(WORKLOADS),
    fidelities: Sequence[str] = _FIDELITIES,
    threads: int = 1,
) -> list[LaunchesRun]:
    """List the grid."""
    return [LaunchesRun(work, each, threads=threads) for work in works for each in fidelities]


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report."""
    ordered = [row for work in WORKLOADS for row in select(rows, work=work)]
    return {
        "workloads": [_workload_line(row) for row in ordered],
        "recurrent": [_recurrent_line(row) for row in ordered if row["work"] in RECURRENT],
        "verdicts": [*_verdicts(ordered), *_exactness(ordered)],
        "places": _places(ordered),
    }


def _workload_line(row: Row) -> str:
    return line(
        WORKLOADS[row["work"]].title,
        row["fidelity"],
        row["float_launches"],
        row["forward_launches"],
        row["backward_launches"],
        row["optimizer_launches"],
        "-" if _is_recurrent(row) else f"{_ratio(row):.1f}",
        row["synchronizations"] - row["float_synchronizations"],
        row["between_steps"],
    )


def _ratio(row: Row) -> float:
    """Launches of the emulated step over those of the float one."""
    parts = ("forward_launches", "backward_launches", "optimizer_launches")
    ratio: float = sum(row[part] for part in parts) / row["float_launches"]
    return ratio


def _recurrent_line(row: Row) -> str:
    return line(
        WORKLOADS[row["work"]].title,
        row["fidelity"],
        f"{row['forward_launches_per_step']:.1f}",
        f"{row['backward_launches_per_step']:.1f}",
    )


def _verdicts(rows: Sequence[Row]) -> list[str]:
    lines = []
    for fidelity, target in TARGETS.items():
        ratios = {
            WORKLOADS[row["work"]].title: _ratio(row)
            for row in rows
            if row["fidelity"] == fidelity and not _is_recurrent(row)
        }
        missed = [f"{title} ({ratio:.1f})" for title, ratio in ratios.items() if ratio > target]
        lines.append(
            f"- Launches over those of float, networks without recurrent layers, {fidelity}: at "
            f"most {target:g}; {_missed_by(missed)}."
        )
    missed = [
        f"{WORKLOADS[row['work']].title}, {row['fidelity']}, {name} ({row[key]:.1f})"
        for row in rows
        for name in ("forward", "backward")
        if row.get(key := f"{name}_launches_per_step", 0.0) > STEP_TARGET
    ]
    lines.append(
        f"- Launches of a recurrent layer for one more step, in each pass: at most {STEP_TARGET}; "
        f"{_missed_by(missed)}."
    )
    waiting = [
        f"{WORKLOADS[row['work']].title}, {row['fidelity']} ({row['synchronizations']})"
        for row in rows
        if _waits(row)
    ]
    lines.append(
        f"- Synchronizations in a step beyond the float network's own: 0; {_missed_by(waiting)}."
    )
    return lines


def _exactness(rows: Sequence[Row]) -> list[str]:
    exact = [row for row in rows if row["fidelity"] == "exact"]
    different = [WORKLOADS[row["work"]].title for row in exact if not row["equal_output"]]
    largest = max((row["gradient_distance"] for row in exact), default=0.0)
    return [
        f"- Output in exact fidelity equal to the processor's in every bit: "
        f"{_missed_by(different)}.",
        f"- Distance of all gradients from the processor's, relative to these, exact: at most "
        f"{largest:.1e}.",
    ]


def _places(rows: Sequence[Row]) -> list[str]:
    places = sorted({place for row in rows if _waits(row) for place in row["places"]})
    return ["Where the host waits:\n", *(f"- `{place}`" for place in places)] if places else []


def _waits(row: Row) -> bool:
    return bool(row["synchronizations"] > row["float_synchronizations"])


def _is_recurrent(row: Row) -> bool:
    return row["work"] in {*RECURRENT, "rnnt"}


def _missed_by(names: Sequence[str]) -> str:
    return f"missed by {', '.join(names)}" if names else "met by every workload"


STUDY = Study(
    name="launches",
    runs=runs,
    report=report,
    options={
        "works": axis(WORKLOADS),
        "fidelities": axis(_FIDELITIES),
        "threads": threads_option(),
    },
)

if __name__ == "__main__":
    STUDY.main()
