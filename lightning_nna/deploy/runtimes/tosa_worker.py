"""Convert programs to TOSA and run them: the process of the runtime ``"tosa"``.

It runs in an environment of its own (see :mod:`.environment`), knows nothing of our package, and
answers one request after the other: pickled tuples of plain values on its standard streams. An
array is its type, its shape and its bytes.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# An operator without a form in TOSA stays one of the dialect "tfl".
_LEFT = re.compile(r'= "?tfl\.(\w+)')
_CONSTANTS = ("pseudo_const", "pseudo_qconst", "no_value")


def convert(contents: bytes) -> tuple[str, Any]:
    """Convert a .tflite file to a .tosa file.

    Returns:
        ``("tosa", bytes)``, or ``("left", names)`` with the operators that have no form in TOSA.
    """
    import tosa_converter_for_tflite as converter
    import tosa_tools_cli

    with TemporaryDirectory() as folder:
        tflite, text, code, tosa = (
            str(Path(folder, f"program.{end}")) for end in ("tflite", "mlir", "mlirbc", "tosa")
        )
        Path(tflite).write_bytes(contents)
        forms = converter.TosaConverterOutputFormat
        converter.tflite_flatbuffer_to_tosa_mlir(tflite, text, forms.Text)
        left = set(_LEFT.findall(Path(text).read_text())) - {*_CONSTANTS}
        if left:
            return "left", sorted(left)
        # In the text conditions of the program have a form that the next tool does not read.
        converter.tflite_flatbuffer_to_tosa_mlir(tflite, code, forms.Bytecode)
        tool = Path(tosa_tools_cli.__file__).parents[1] / "bin" / "tosa-opt"
        serialize = [f"--tosa-flatbuffer-filename={tosa}", "--tosa-serialize"]
        subprocess.run([tool, *serialize, code, "-o", os.devnull], check=True, stdout=sys.stderr)
        return "tosa", Path(tosa).read_bytes()


def run(contents: bytes, calls: list[list[tuple[Any, ...]]]) -> tuple[str, Any]:
    """Run a .tosa file once for each element of ``calls``.

    Returns:
        ``("outputs", arrays of each call)``, or ``("failed", status)``.
    """
    import numpy as np
    import tosa_reference_model as model

    results = []
    for call in calls:
        inputs = [np.frombuffer(data, dtype).reshape(shape).copy() for dtype, shape, data in call]
        outputs, status = model.run(contents, inputs)
        if status != model.GraphStatus.TOSA_VALID:
            return "failed", str(status)
        results.append([(x.dtype.str, x.shape, x.tobytes()) for x in outputs])
    return "outputs", results


def serve() -> None:
    """Answer requests until the standard input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What libraries print is no answer.
    requests = sys.stdin.buffer
    functions: dict[str, Any] = {"convert": convert, "run": run}
    while True:
        try:
            name, *arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = functions[name](*arguments)
        except Exception as error:
            answer = ("failed", f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
