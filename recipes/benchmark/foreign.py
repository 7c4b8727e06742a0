"""Networks that others wrote: trained emulated, compressed, exported, compiled for an Ethos-U55.

    python -m recipes.benchmark.foreign                 # run what is missing, then report
    python -m recipes.benchmark.foreign --modules bert  # a part of the grid
    python -m recipes.benchmark.foreign --page-only

The networks come with the extra ``foreign``, small and with random weights; nothing is downloaded.
Each is trained in float first; then it is trained on, in float and emulated, from the same weights.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_nna import calibrate, coverage, emulate, strip
from lightning_nna.callbacks import CompressedSensingPruning, GeneralQuantizer, NNAEmulation
from lightning_nna.deploy import export_tflite, vela_report, verify
from lightning_nna.deploy.verification import Agreement
from lightning_nna.weights.method import WeightMethod
from recipes.benchmark.foreign_module import ForeignModule, ForeignProgram, ForeignTask
from recipes.benchmark.foreign_nemo import HAS_NEMO, NEMO
from recipes.benchmark.foreign_sequences import SEQUENCES
from recipes.benchmark.foreign_transformers import TRANSFORMERS
from recipes.benchmark.foreign_vision import VISION
from recipes.benchmark.grid import Run, Study, axis, threads_option
from recipes.benchmark.report import Fields, line, percent, ruled
from recipes.benchmark.rows import Row, select
from recipes.benchmark.timing import Step, ratio_columns, time_ratios

#: All networks, by the name that rows and the command line use.
FOREIGN: dict[str, ForeignModule] = {**TRANSFORMERS, **VISION, **SEQUENCES, **NEMO}
#: Those that can be made here: NeMo has an environment of its own.
INSTALLED = {name: each for name, each in FOREIGN.items() if HAS_NEMO or name not in NEMO}
SPECS = ("litert-int8", "litert-int16x8")
#: Optimizer steps that observe ranges, and emulated ones after them.
CALIBRATION_STEPS, EMULATED_STEPS = 4, 12
#: Largest relative difference of the losses; the loss is the mean of the last steps.
LOSS_TARGET, LAST_STEPS = 0.1, 4
#: Outputs of the programs of a network that are compared at least.
OUTPUTS = 10_000
#: Random inputs of one program at most.
MOST_INPUTS = 400
BITS, SPARSITY = 4, 0.7
PAIRS = 5
_ACCELERATOR = "ethos-u55-128"
#: Vela's names of operators that move data and compute nothing.
_DATA_MOVEMENT = frozenset(
    """
    BroadcastTo Concat ConcatTFLite ExpandDims Memcpy Pack PackReshaped Pad PadV2 Reshape Slice
    Split SplitSliceRead SplitV Squeeze StridedSlice Tile Transpose Unpack UnpackReshaped
    """.split()
)


def fit(task: ForeignTask, steps: int, *callbacks: pl.Callback) -> list[float]:
    """Train a network, and return the loss of every step.

    Args:
        task: Network to train; it is changed.
        steps: Number of training batches.
        callbacks: Callbacks of the Trainer.
    """
    task.losses = []
    trainer = pl.Trainer(
        max_epochs=steps,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(task)
    return task.losses


def warmed_up(foreign: ForeignModule, seed: int = 0) -> ForeignTask:
    """Make a network and train it in float.

    Args:
        foreign: The network.
        seed: Seed of its weights and its batch.
    """
    task = foreign.task(seed)
    fit(task, foreign.warmup_steps)
    return task


def compare_training(task: ForeignTask, spec: str) -> dict[str, Any]:
    """Train on in float and emulated, from the same weights; the network is left emulated.

    Args:
        task: Network that was trained in float.
        spec: Accelerator.
    """
    steps = CALIBRATION_STEPS + EMULATED_STEPS
    float_loss = fmean(fit(copy.deepcopy(task), steps)[-LAST_STEPS:])
    emulation = NNAEmulation(
        spec,
        calibration_steps=CALIBRATION_STEPS * _updates(task),
        range_margin=task.foreign.range_margin,
        telemetry_every_n_steps=0,
    )
    emulated_loss = fmean(fit(task, steps, emulation)[-LAST_STEPS:])
    return {
        "float_loss": round(float_loss, 5),
        "emulated_loss": round(emulated_loss, 5),
        "loss_change": round(emulated_loss / float_loss - 1, 4),
    }


def _updates(task: ForeignTask) -> int:
    """Count the optimizer steps of a training batch."""
    optimizers = task.configure_optimizers()
    return len(optimizers[0]) if isinstance(optimizers, tuple) else 1


def compare_programs(task: ForeignTask, spec: str) -> Iterator[dict[str, Any]]:
    """Export the programs of a trained network, compare their outputs, and compile them.

    Args:
        task: Network after emulated training; it is changed.
        spec: Accelerator.

    Yields:
        The columns of each program.
    """
    foreign, batch = task.foreign, task.batch()
    task.eval()
    arguments = [program.arguments(task.network, *batch) for program in foreign.exported]
    for program, example in zip(foreign.exported, arguments, strict=True):
        calibrate(task, [example], partial(_of_batch, program))
    wanted = OUTPUTS
    for program, example in zip(reversed(foreign.exported), reversed(arguments), strict=True):
        row: dict[str, Any] = {"name": program.name, "is_deployed": program.is_deployed}
        forward = partial(_of_arguments, program)
        with tempfile.TemporaryDirectory() as folder:
            try:
                model = export_tflite(task, list(example), f"{folder}/net.tflite", forward=forward)
                compared = _compared(task, model.path, example, forward, wanted)
                # Of a network with several programs, each is compared to some extent.
                wanted = max(wanted - compared.outputs, OUTPUTS // 10)
                row |= {"outputs": compared.outputs, "differing": compared.differing}
                row |= {"operators": dict(model.operators)}
                if program.is_deployed and spec == SPECS[0]:
                    row |= _compiled(model.path)
            except Exception as error:
                row["error"] = reason(error)
        yield row


def _of_batch(program: ForeignProgram, task: Any, batch: tuple[Any, ...]) -> Any:
    return program.run(task.network, *batch)


def _of_arguments(program: ForeignProgram, task: Any, *arguments: Any) -> Any:
    return program.run(task.network, *arguments)


def _compared(
    task: ForeignTask,
    path: Path,
    example: Sequence[Any],
    forward: Callable[..., Any],
    wanted: int,
) -> Agreement:
    """Compare a program with the emulation on as many random inputs as give enough outputs."""
    outputs = verify(task, path, list(example), forward=forward, random_inputs=0).outputs
    count = min(math.ceil(wanted / outputs), MOST_INPUTS)
    return verify(task, path, list(example), forward=forward, random_inputs=count)


def _compiled(path: Path) -> dict[str, Any]:
    """Compile a program with Vela."""
    report = vela_report(path, accelerator=_ACCELERATOR)
    cycles = sum(operator.cycles for operator in report.operators)
    moved = sum(o.cycles for o in report.operators if o.operator in _DATA_MOVEMENT)
    return {
        "cycles": cycles,
        "movement_cycles": moved,
        "cpu_operators": dict(Counter(report.cpu_operators)),
    }


def compress(task: ForeignTask, method: WeightMethod) -> dict[str, Any]:
    """Train a network emulated with a method of compression.

    Args:
        task: Network that was trained in float; it is changed.
        method: Method of compression.
    """
    emulation = NNAEmulation(
        calibration_steps=CALIBRATION_STEPS * _updates(task), telemetry_every_n_steps=0
    )
    losses = fit(task, CALIBRATION_STEPS + EMULATED_STEPS, emulation, method)
    weights = [dict(task.named_parameters())[name] for name in method.selected]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return {
        "loss": round(fmean(losses[-LAST_STEPS:]), 5),
        "tensors": len(weights),
        "most_values": max(len(weight.unique()) for weight in weights),
        "zeros": round(zeros / sum(weight.numel() for weight in weights), 4),
    }


def time_training(task: ForeignTask, spec: str) -> dict[str, Any]:
    """Time a training step, exact and fast, compared with float.

    Args:
        task: Network that was trained in float; it is changed.
        spec: Accelerator.
    """
    batch = task.batch()
    steps: dict[str, Step] = {}
    for fidelity in (None, "exact", "fast"):
        net = copy.deepcopy(task)
        if fidelity is not None:
            with emulate(net, spec) as emulator, emulator.observing(), torch.no_grad():
                net(*batch)
        steps[fidelity or "float"] = partial(_step, net, batch, spec, fidelity)
    ratios, float_ms = time_ratios(steps, torch.device("cpu"), PAIRS)
    columns = {name: ratio_columns(ratios[name])["time_ratio"] for name in ("exact", "fast")}
    return {"float_ms": round(float_ms, 2), **columns}


def _step(net: ForeignTask, batch: tuple[Any, ...], spec: str, fidelity: Any) -> None:
    """Compute the loss of a network and its gradients."""
    net.zero_grad()
    if fidelity is None:
        net.foreign.loss(net(*batch)).backward()
        return
    with emulate(net, spec, fidelity=fidelity):
        net.foreign.loss(net(*batch)).backward()


def reason(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first}"


@dataclass(frozen=True)
class ForeignRun(Run):
    """One network on one accelerator.

    Attributes:
        module: A key of :data:`FOREIGN`.
        spec: Name of a preset.
    """

    module: str
    spec: str

    def rows(self) -> Iterator[Row]:
        """Train, export, compress and time the network."""
        torch.set_num_threads(self.threads or 1)
        with quiet():
            row = self.row()
        yield row

    def row(self) -> Row:
        """Make the row; a part that fails has the reason instead of its columns."""
        foreign = FOREIGN[self.module]
        row: dict[str, Any] = {"module": self.module, "spec": self.spec}
        start = warmed_up(foreign)
        table = coverage(start, *start.batch(), spec=self.spec)
        row["fallbacks"] = dict(Counter(site.operator for site in table.fallbacks))
        trained = copy.deepcopy(start)
        row["training"] = _attempt(compare_training, trained, self.spec)
        if "error" not in row["training"]:
            programs = _attempt(lambda: {"programs": list(compare_programs(trained, self.spec))})
            row["programs"] = programs.get("programs", [programs])
        strip(trained)
        if self.spec == SPECS[0]:
            row["gq"] = _attempt(compress, copy.deepcopy(start), GeneralQuantizer(BITS))
            pruning = CompressedSensingPruning(SPARSITY)
            row["csp"] = _attempt(compress, copy.deepcopy(start), pruning)
        row["time"] = _attempt(time_training, start, self.spec)
        return row


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and messages of training in a block."""
    loggers = [logging.getLogger(name) for name in ("lightning_nna", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _attempt(measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Return what a function measures, or why it failed."""
    try:
        return measure(*args)
    except Exception as error:
        return {"error": reason(error)}


def runs(
    *, modules: Sequence[str] = tuple(INSTALLED), specs: Sequence[str] = SPECS, threads: int = 1
) -> list[ForeignRun]:
    """List the grid, one run a network and an accelerator."""
    return [ForeignRun(module, spec, threads=threads) for spec in specs for module in modules]


# --- report -------------------------------------------------------------------------------------


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report: a table for each accelerator, checks and failures."""
    tables: list[str] = []
    for spec in SPECS:
        selected = [row for name in FOREIGN for row in select(rows, spec=spec, module=name)]
        if selected:
            tables += [f"## {spec}\n", *_table(selected), "", *checks(selected), ""]
            tables += _failures(selected)
    return {"tables": tables}


def _table(rows: Sequence[Row]) -> list[str]:
    lines = ruled(
        [
            "network",
            "code of",
            "loss, float",
            "emulated",
            "fallbacks",
            "exported",
            "outputs equal",
            "on the U55's CPU",
            "data movement",
            f"GQ {BITS} bits",
            f"CSP {SPARSITY:.0%}",
            "time, exact",
            "fast",
        ]
    )
    for row in rows:
        foreign = FOREIGN[row["module"]]
        training, time = row["training"], row["time"]
        lines.append(
            line(
                foreign.title,
                foreign.source,
                _number(training, "float_loss", ".4f"),
                f"{_number(training, 'emulated_loss', '.4f')} {_change(training)}".rstrip(),
                _counted(row["fallbacks"]),
                _exported(row),
                _equal(row),
                _on_cpu(row),
                _moved(row),
                _compressed(row.get("gq")),
                _compressed(row.get("csp"), zeros=True),
                _number(time, "exact", ".1f"),
                _number(time, "fast", ".1f"),
            )
        )
    return lines


def _number(columns: Row, name: str, form: str) -> str:
    return format(columns[name], form) if name in columns else "failed"


def _change(training: Row) -> str:
    return f"({training['loss_change']:+.1%})" if "loss_change" in training else ""


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _programs(row: Row) -> list[Row]:
    return list(row.get("programs", []))


def is_exported(row: Row) -> bool:
    """Tell whether all programs of a network were exported.

    Example:
        >>> is_exported({"programs": [{"name": "encoder", "outputs": 9}, {"error": "no operator"}]})
        False
    """
    programs = _programs(row)
    return bool(programs) and all("outputs" in program for program in programs)


def is_equal(row: Row) -> bool:
    """Tell whether all outputs of all programs are equal, and enough were compared.

    Example:
        >>> is_equal({"programs": [{"name": "", "outputs": 12_000, "differing": 0}]})
        True
    """
    programs = _programs(row)
    count = sum(program.get("outputs", 0) for program in programs)
    return (
        is_exported(row)
        and count >= OUTPUTS
        and not sum(program["differing"] for program in programs)
    )


def _exported(row: Row) -> str:
    programs = [program for program in _programs(row) if program.get("is_deployed", True)]
    count = sum("outputs" in program for program in programs)
    if len(programs) < 2:
        return "yes" if count else "no"
    return f"{count} of {len(programs)} programs"


def _equal(row: Row) -> str:
    programs = [program for program in _programs(row) if "outputs" in program]
    outputs = sum(program["outputs"] for program in programs)
    if not outputs:
        return "-"
    differing = sum(program["differing"] for program in programs)
    return f"all of {outputs:,}" if not differing else f"{differing:,} of {outputs:,} differ"


def _on_cpu(row: Row) -> str:
    programs = [program for program in _programs(row) if "cpu_operators" in program]
    counts: Counter[str] = Counter()
    for program in programs:
        counts.update(program["cpu_operators"])
    return _counted(counts) if programs else "-"


def movement_share(row: Row) -> float | None:
    """Return the fraction of the cycles of a network's programs in which data are moved.

    Example:
        >>> movement_share({"programs": [{"cycles": 200, "movement_cycles": 3}]})
        0.015
    """
    programs = [program for program in _programs(row) if program.get("cycles")]
    cycles = sum(program["cycles"] for program in programs)
    return sum(program["movement_cycles"] for program in programs) / cycles if cycles else None


def _moved(row: Row) -> str:
    share = movement_share(row)
    return "-" if share is None else percent(share)


def _compressed(columns: Row | None, *, zeros: bool = False) -> str:
    if columns is None:
        return "-"
    if "error" in columns:
        return "failed"
    return f"{columns['zeros']:.0%} zeros" if zeros else f"{columns['most_values']} values"


def checks(rows: Sequence[Row]) -> list[str]:
    """Count the networks that pass each acceptance check, and name the others."""
    outcomes: list[tuple[str, Callable[[Row], bool]]] = [
        (
            f"trained emulated with a loss at most {LOSS_TARGET:.0%} above float's",
            lambda row: row["training"].get("loss_change", math.inf) <= LOSS_TARGET,
        ),
        ("without fallbacks", lambda row: not row["fallbacks"]),
        ("exported", is_exported),
        (f"with {OUTPUTS:,} outputs or more compared, all equal", is_equal),
    ]
    if rows[0]["spec"] == SPECS[0]:
        outcomes += [
            (
                "with no operator but `GatherV2` on the U55's CPU",
                lambda row: (is_exported(row) and _on_cpu(row) in ("none", "-")) or _gathers(row),
            ),
            (
                f"trained with GQ, at most {2**BITS} values a tensor",
                lambda row: row["gq"].get("most_values", math.inf) <= 2**BITS,
            ),
            (
                f"trained with CSP, {SPARSITY:.0%} zeros",
                lambda row: row["csp"].get("zeros", 0.0) >= SPARSITY - 0.01,
            ),
        ]
    lines = []
    for text, passes in outcomes:
        missed = [FOREIGN[row["module"]].title for row in rows if not passes(row)]
        rest = f"; not {'; '.join(missed)}" if missed else ""
        lines.append(f"- {len(rows) - len(missed)} of {len(rows)} {text}{rest}.")
    return lines


def _gathers(row: Row) -> bool:
    """Tell whether no operator but lookups of embeddings is on the CPU of the accelerator."""
    programs = _programs(row)
    names = {name for program in programs for name in program.get("cpu_operators", {})}
    return is_exported(row) and names <= {"GatherV2", "Gather"}


def _failures(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        title = FOREIGN[row["module"]].title
        parts = {name: row.get(name) or {} for name in ("training", "gq", "csp", "time")}
        parts |= {f"program {p.get('name', '')}".strip(): p for p in _programs(row)}
        for name, columns in parts.items():
            if "error" in columns:
                lines.append(f"- {title}, {name}: `{columns['error']}`")
    return ["What failed:\n", *lines, ""] if lines else []


STUDY = Study(
    name="modules",
    runs=runs,
    report=report,
    options={
        "modules": axis(FOREIGN),
        "specs": axis(SPECS),
        "threads": threads_option(),
    },
)

if __name__ == "__main__":
    STUDY.main()
