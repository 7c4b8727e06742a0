"""Export an emulated module as a .tosa file, which compilers of NPUs read.

The program is that of :func:`.export_tflite`, converted by Arm's converter, see
:mod:`.runtimes.tosa`. It is called with integers: the file has no ports.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lightning_nna.deploy.runtimes.tosa import converted
from lightning_nna.deploy.tflite import TFLiteModel, export_tflite
from lightning_nna.files import whole_file


def export_tosa(
    module: nn.Module,
    example_inputs: Sequence[Any],
    path: str | Path,
    *,
    forward: Callable[..., Any] | None = None,
) -> TFLiteModel:
    """Write an emulated module as a TOSA program of one shape, a flatbuffer.

    On a preset of TOSA it computes every bit of the emulation.

    Args:
        module: Emulated module, calibrated.
        example_inputs: Arguments of its forward.
        path: Path of the file, which is written completely or not at all.
        forward: Function of the module and the arguments that runs it; None for its own forward.

    Returns:
        Path and size of the file, and operators and ports of the .tflite program that it was.

    Raises:
        CaptureError: See :func:`.capture.capture`.
        MissingRuntimeError: If the environment of the converter was not made.
        UnsupportedProgramError: If an operator has no form in TOSA; the message names it.

    Example:
        >>> import torch
        >>> from lightning_nna import calibrate
        >>> net, x = nn.Linear(4, 3), torch.randn(8, 4)
        >>> emulator = calibrate(net, [x], spec="tosa-int8")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = export_tosa(net, [x], f"{folder}/net.tosa")
        ...     dict(model.operators), model.size_bytes > 100
        ({'FULLY_CONNECTED': 1}, True)
    """
    with tempfile.TemporaryDirectory() as folder:
        program = export_tflite(
            module, example_inputs, Path(folder) / "program.tflite", forward=forward
        )
        contents = converted(program.path.read_bytes())
    with whole_file(Path(path)) as unfinished:
        unfinished.write_bytes(contents)
    return replace(program, path=Path(path), size_bytes=len(contents))
