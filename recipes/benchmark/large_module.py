"""Cost of every stage of work on a module of 50 million parameters, compared with a float step.

A stage runs in a process of its own (``python -m recipes.benchmark.large_module gq``), where float
steps are timed before it; each process does its stage on one layer first, so that what libraries
load at their first use does not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nna import emulate
from lightning_nna.callbacks import CompressedSensingPruning, GeneralQuantizer
from lightning_nna.deploy import export_tflite
from recipes.benchmark.emulation import PRESET
from recipes.benchmark.grid import Run
from recipes.benchmark.rows import Row
from recipes.benchmark.timing import (
    FREED_AT_ONCE,
    machine,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
)

#: Layers of 3.15 million parameters each.
LAYERS = 16
WIDTH, HEADS = 512, 8
BATCH, STEPS = 4, 32
#: Titles of the stages, by the name that rows use.
STAGES = {
    "float": "step, float",
    "attach": "attach: first forward, observed",
    "exact": "step, emulated exactly",
    "fast": "step, emulated fast",
    "gq_start": "GQ at 4 bits: start of the fit",
    "gq_step": "GQ at 4 bits: step",
    "csp_step": "CSP: step that measures inputs",
    "csp_update": "CSP: step with a mask update",
    "export": "export of one sequence to a .tflite program",
}
_REPEATS = 3


@dataclass(frozen=True)
class Cost:
    """Time and memory of a stage.

    Attributes:
        seconds: Wall time.
        peak_bytes: Peak memory above what the process had before the network was made.
    """

    seconds: float
    peak_bytes: int


class Stopwatch:
    """Measure stages of a network, with its own memory."""

    def __init__(self) -> None:
        reset_peak()
        self._before = resident_bytes()
        self.costs: dict[str, list[Cost]] = {}

    def measure(self, stage: str, act: Callable[[], Any]) -> None:
        """Run a stage and note its cost; only blocks in use before it count."""
        reset_peak()
        began = time.perf_counter()
        act()
        self.note(stage, time.perf_counter() - began)

    def note(self, stage: str, seconds: float) -> None:
        """Note the time of a stage that has just ended, and begin a new peak."""
        cost = Cost(seconds, peak_resident_bytes() - self._before)
        self.costs.setdefault(stage, []).append(cost)
        reset_peak()

    def cost(self, stage: str) -> Cost:
        """Return the median time and the greatest peak of a stage."""
        costs = self.costs[stage]
        return Cost(median(x.seconds for x in costs), max(x.peak_bytes for x in costs))


class LargeModule(pl.LightningModule):
    """Transformer layers, with random weights of their own, and a batch of noise.

    Args:
        layers: Number of layers.
        width: Size of an encoding; that inside of a layer is four times as large.
    """

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, HEADS, 4 * width, dropout=0.0, batch_first=True)
                for _ in range(layers)
            )
        )
        self.batch = torch.randn(BATCH, STEPS, width)

    def forward(self, x: Tensor) -> Tensor:
        """Encode a batch of shape ``(batch, steps, width)``."""
        result: Tensor = self.encoder(x)
        return result

    def training_step(self, *_: Any) -> Tensor:
        """Return the mean square of the encodings of the batch."""
        return torch.as_tensor(self(self.batch)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD without momentum, which has no state."""
        return torch.optim.SGD(self.parameters(), lr=1e-4, foreach=False)


def _step(module: LargeModule, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    module.training_step().backward()
    optimizer.step()


def _observe(module: LargeModule) -> None:
    with emulate(module, PRESET) as emulator, emulator.observing():
        module(module.batch)


def _float(module: LargeModule, watch: Stopwatch) -> None:
    optimizer = module.configure_optimizers()
    for _ in range(_REPEATS + 1):
        watch.measure("float", partial(_step, module, optimizer))
    del watch.costs["float"][0]  # Its gradients are allocated.


def _emulated(module: LargeModule, watch: Stopwatch) -> None:
    watch.measure("attach", partial(_observe, module))
    optimizer = module.configure_optimizers()
    for fidelity in ("exact", "fast"):
        optimizer.zero_grad()
        with emulate(module, PRESET, fidelity=fidelity):
            for _ in range(_REPEATS + 1):
                watch.measure(fidelity, partial(_step, module, optimizer))
        del watch.costs[fidelity][0]  # Weights are prepared, as after calibration in a run.


class _StepTimes(pl.Callback):
    """Note the time from each batch to the next, the first one under another name.

    Args:
        watch: Stopwatch to note it with.
        stages: Names of the start and of each step.
    """

    def __init__(self, watch: Stopwatch, stages: tuple[str, ...]) -> None:
        self._watch, self._stages = watch, iter(stages)
        self._began = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        """Note the step before, or the start."""
        self._note()

    def on_train_end(self, *_: Any) -> None:
        """Note the last step."""
        self._note()

    def _note(self) -> None:
        self._watch.note(next(self._stages), time.perf_counter() - self._began)
        self._began = time.perf_counter()


def _fit(module: LargeModule, watch: Stopwatch, method: pl.Callback, *stages: str) -> None:
    trainer = pl.Trainer(
        max_steps=len(stages) - 1,
        callbacks=[_StepTimes(watch, stages), method],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.zeros(len(stages)))))


def _gq(module: LargeModule, watch: Stopwatch) -> None:
    _fit(module, watch, GeneralQuantizer(4), "gq_start", *["gq_step"] * (_REPEATS + 1))


def _csp(module: LargeModule, watch: Stopwatch) -> None:
    steps = ["csp_step"] * _REPEATS
    prune = CompressedSensingPruning(
        0.5, every_n_steps=_REPEATS + 1, measure_steps=_REPEATS, freeze_step=_REPEATS + 1
    )
    _fit(module, watch, prune, "csp_start", *steps, "csp_update")


def _export(module: LargeModule, watch: Stopwatch) -> None:
    _observe(module)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.tflite"
        watch.measure("export", lambda: export_tflite(module, [module.batch[:1]], path))


#: What a process measures, by its name.
TASKS: Mapping[str, Callable[[LargeModule, Stopwatch], None]] = {
    "float": _float,
    "emulated": _emulated,
    "gq": _gq,
    "csp": _csp,
    "export": _export,
}
_STAGES_OF = {
    "float": ("float",),
    "emulated": ("attach", "exact", "fast"),
    "gq": ("gq_start", "gq_step"),
    "csp": ("csp_step", "csp_update"),
    "export": ("export",),
}


@dataclass(frozen=True)
class LargeModuleRun(Run):
    """The stages that one process measures.

    Attributes:
        task: A key of :data:`TASKS`.
        layers: Number of layers.
        width: Size of an encoding.
    """

    task: str
    layers: int = LAYERS
    width: int = field(default=WIDTH, kw_only=True)

    @property
    def keys(self) -> list[dict[str, Any]]:
        """Values that identify the rows of this run, one mapping for each stage."""
        key = {"axis": "module", "size": self.layers, "threads": self.threads}
        return [{**key, "stage": stage} for stage in _STAGES_OF[self.task]]

    def rows(self) -> Iterator[Row]:
        """Measure the stages in a process of their own."""
        command = [sys.executable, "-m", "recipes.benchmark.large_module"]
        done = subprocess.run(
            [*command, self.task, str(self.layers), str(self.width), str(self.threads or 1)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | FREED_AT_ONCE,
        )
        measured = json.loads(done.stdout.splitlines()[-1])
        base = measured["costs"]["float"]
        for key in self.keys:
            seconds, peak = measured["costs"][key["stage"]]
            yield {
                **key,
                "device": machine(torch.device("cpu")),
                "parameters": measured["parameters"],
                "seconds": round(seconds, 4),
                "time_ratio": round(seconds / base[0], 3),
                "float_seconds": round(base[0], 4),
                "peak_bytes": peak,
                "memory_ratio": round(peak / base[1], 3),
                "float_bytes": base[1],
            }


def _measured(task: str, layers: int, width: int) -> tuple[dict[str, Cost], int]:
    """Measure a task; return the costs by stage, and the number of parameters."""
    torch.manual_seed(0)
    watch = Stopwatch()
    module = LargeModule(layers, width)
    TASKS[task](module, watch)
    costs = {stage: watch.cost(stage) for stage in watch.costs}
    return costs, sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    """Print the costs of a task and of a float step: task, numbers of layers, width, threads."""
    task, layers, width, threads = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    for each in dict.fromkeys(("float", task)):
        _measured(each, 1, width)
    costs, parameters = _measured("float", layers, width)
    if task != "float":
        costs |= _measured(task, layers, width)[0]
    numbers = {stage: (cost.seconds, cost.peak_bytes) for stage, cost in costs.items()}
    print(json.dumps({"parameters": parameters, "costs": numbers}))


if __name__ == "__main__":
    main()
