"""Figures of a program for a microcontroller, and the page that goes with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_nna.deploy.decode import CompressedTensor
from lightning_nna.deploy.graph import Port
from lightning_nna.deploy.tflite import ProgramFile, StoredTensor
from lightning_nna.deploy.vela import VelaProgram
from lightning_nna.deploy.verification import Agreement


@dataclass(frozen=True)
class MicroExport:
    """A folder that :func:`export_micro` has written.

    Args:
        folder: Folder.
        path: Path of the program.
        spec: Name of the spec.
        flash_bytes: Bytes of the program.
        plain_flash_bytes: Bytes of the program without compressed constants, before Vela.
        arena_bytes: Bytes of working memory in which TFLite-Micro runs the program, the least ones
            but for a sixteenth or a kilobyte; None if it is not installed, or if the program is
            compiled for an NPU.
        plain_arena_bytes: The same of the program without compressed constants, before Vela.
        operators: Number of instructions of each operator, in the order in which they first run.
        compressed: Compressed constants.
        agreement: Fraction of outputs of TFLite-Micro that equal the emulation, over the test
            vectors; None if it is not installed. A program for an NPU is compared before Vela.
        vela: Program that Vela has compiled, its command line and estimate; None without an NPU.
    """

    folder: Path
    path: Path
    spec: str
    flash_bytes: int
    plain_flash_bytes: int
    arena_bytes: int | None
    plain_arena_bytes: int | None
    operators: Mapping[str, int]
    compressed: tuple[CompressedTensor, ...]
    agreement: Agreement | None
    vela: VelaProgram | None

    def __str__(self) -> str:
        arena = "not measured" if self.arena_bytes is None else f"{self.arena_bytes} bytes"
        return (
            f"{self.path}: flash {self.flash_bytes} bytes, arena {arena}; "
            f"{len(self.compressed)} constants compressed; outputs equal: {self.agreement}"
        )


def readme(name: str, export: MicroExport, file: ProgramFile) -> str:
    """Return the page of a program for a microcontroller.

    Args:
        name: Name of the files and of the C++ namespace.
        export: Figures of the program.
        file: Program, before Vela.
    """
    sections = [
        f"# {name}",
        f"A program for TFLite-Micro, spec `{export.spec}`, written by lightning-nna.",
        _memory(export),
        _ports(file),
        _calling(name, export, file),
        _equality(export),
    ]
    if export.compressed:
        sections.append(_compression(export))
    if export.vela is not None:
        sections.append(_npu(name, export.vela))
    return "\n\n".join(sections) + "\n"


def _memory(export: MicroExport) -> str:
    arena = "not measured" if export.arena_bytes is None else f"{export.arena_bytes:,} bytes"
    rows = [("flash: the program", f"{export.flash_bytes:,} bytes"), ("RAM: the arena", arena)]
    note = (
        "An arena in which TFLite-Micro's reference kernels run on a 64-bit computer. Its own "
        "structures are smaller on 32 bits; kernels of CMSIS-NN may take buffers in addition: "
        "read `interpreter.arena_used_bytes()` on the device."
    )
    if export.vela is not None:
        rows[1] = ("RAM: tensors, Vela's estimate", f"{export.vela.report.sram_bytes:,} bytes")
        note = (
            "Vela's estimate has the tensors alone: read `interpreter.arena_used_bytes()` on the "
            "device."
        )
    return f"## Memory\n\n{_table(('', 'size'), rows)}\n\n{note}"


def _ports(file: ProgramFile) -> str:
    rows = []
    for kind, tensors, ports in (
        ("input", file.input_tensors, file.inputs),
        ("output", file.output_tensors, file.outputs),
    ):
        for number, tensor in enumerate(tensors):
            here = [_position(port, kind) for port in ports if port.tensor == tensor.name]
            rows.append((f"{kind} {number}", ", ".join(here), *_form(tensor)))
    table = _table(("", "in the module", "type", "shape", "scale", "zero point"), rows)
    return f"## Inputs and outputs\n\nreal value = scale * (integer - zero point)\n\n{table}"


def _position(port: Port, kind: str) -> str:
    what = "argument" if kind == "input" else "result"
    part = "" if port.part is None else f", elements {port.part[0]} to {port.part[1]}"
    order = "" if port.order is None else f", axes {list(port.order)}"
    return f"{what} {port.position}{part}{order}"


def _form(tensor: StoredTensor) -> tuple[str, str, str, str]:
    scale = "" if tensor.qparams is None else f"{tensor.qparams.scale:.9g}"
    zero_point = "" if tensor.qparams is None else str(tensor.qparams.zero_point)
    return tensor.dtype, str(list(tensor.shape)), scale, zero_point


def _calling(name: str, export: MicroExport, file: ProgramFile) -> str:
    arena = "64 * 1024" if export.arena_bytes is None else f"{name}::kArenaBytes"
    fixed = "".join(
        f"\nArgument {position} is part of the program: {value!r:.200}.\n"
        for position, value in file.fixed.items()
    )
    return f"""## Call

Add `{name}_data.cc` to the firmware, and to a test of it `{name}_test_vectors.cc` and
`{name}_check.cc`. A main function of the firmware:

```cpp
#include "{name}_data.h"
#include "{name}_operators.h"
#include "tensorflow/lite/micro/micro_interpreter.h"
#include "tensorflow/lite/schema/schema_generated.h"

alignas(16) static std::uint8_t arena[{arena}];

int main() {{
  static {name}::Operators operators;
  {name}::AddOperators(operators);
  static tflite::MicroInterpreter interpreter(
      tflite::GetModel({name}::kData), operators, arena, sizeof(arena));
  interpreter.AllocateTensors();
  // Fill interpreter.input(k)->data with integers, then
  interpreter.Invoke();
  // and read interpreter.output(k)->data. Reset() sets the states of recurrent layers to zero.
}}
```

`{name}::Check(arena, sizeof(arena))` runs the test vectors on the device and returns whether
every output is the expected one in every bit.
{fixed}""".rstrip()


def _equality(export: MicroExport) -> str:
    if export.agreement is None:
        text = "Not compared with TFLite-Micro, which was not installed where this was written."
    else:
        agreement = export.agreement
        before = "" if export.vela is None else ", before Vela,"
        text = (
            "The expected outputs are those of the emulation in training. TFLite-Micro's reference "
            f"kernels{before} compute {agreement.outputs - agreement.differing:,} of "
            f"{agreement.outputs:,} integers of the test vectors equally."
        )
    return f"## Equality\n\n{text}"


def _compression(export: MicroExport) -> str:
    rows = [
        (
            f"`{each.name}`",
            each.method,
            str(each.bits),
            str(each.before_bytes),
            str(each.after_bytes),
        )
        for each in export.compressed
    ]
    table = _table(("constant", "form", "bits", "bytes", "compressed"), rows)
    arenas = ""
    if export.plain_arena_bytes is not None and export.arena_bytes is not None:
        arenas = f", and {export.plain_arena_bytes:,} bytes of arena became {export.arena_bytes:,}"
    return f"""## Compressed constants

{export.plain_flash_bytes:,} bytes of flash became {export.flash_bytes:,}{arenas}.
Constants are decoded into the arena before each operator that reads them. Kernels that read weights
before the program runs, as some optimized ones do, cannot run it.

{table}"""


def _npu(name: str, vela: VelaProgram) -> str:
    report = vela.report
    cpu = ", ".join(report.cpu_operators) or "none"
    return f"""## NPU

`{name}.tflite` is what Vela makes of `{name}_source.tflite`:

```bash
{vela.command}
```

{report.accelerator}: {report.inference_ms:.3f} ms, weights {report.weight_bytes:,} bytes,
compressed {report.encoded_bytes:,}. Operators on the CPU: {cpu}."""


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
