"""Kernels that the runtimes have, by the type of their first operand.

The table is measured: ``python -m recipes.benchmark.kernels`` loads and runs a program of one
instruction for each kernel and type. What it does not mention, as the kernel of an operator from
outside of the package, a runtime is taken to have: the export tells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

#: The measured table: types by runtime and kernel.
PATH = Path(__file__).with_name("runtime_kernels.json")
#: Names of runtimes in sentences.
TITLES = {"litert": "LiteRT", "tflm": "TFLite-Micro", "tosa": "the TOSA reference model"}

_CHOICE = "choose the largest before or after the emulated modules, which targets= selects"
_COMPARE = "compare 8-bit activations, or after the emulated modules, which targets= selects"
_ROOT = "write x * torch.rsqrt(x + eps), or use a preset of 8-bit activations"
_NARROW = "use a preset of 8-bit activations, where it is a table"
_INDEX = "compute with indices after the emulated modules, which targets= selects"
_REMEDIES = {
    **dict.fromkeys(("TOPK_V2", "ARG_MAX", "ARG_MIN"), _CHOICE),
    **dict.fromkeys(
        ("EQUAL", "NOT_EQUAL", "LESS", "LESS_EQUAL", "GREATER", "GREATER_EQUAL"), _COMPARE
    ),
    **dict.fromkeys(("EXP", "LOG", "GELU", "ELU", "HARD_SWISH"), _NARROW),
    **dict.fromkeys(("ONE_HOT", "FLOOR_DIV", "FLOOR_MOD", "SUM", "CAST", "GATHER_ND"), _INDEX),
    "SQRT": _ROOT,
    "REDUCE_MAX": "write F.max_pool1d over the axis, or use a preset of 8-bit activations",
    "REDUCE_MIN": "write -F.max_pool1d(-x) over the axis, or use a preset of 8-bit activations",
    "RESIZE_BILINEAR": "write mode='nearest', or use a preset of 8-bit activations",
    "GATHER": "read at indices that the program fixes, or use a preset of 8-bit activations",
}


def has_kernel(runtime: str, name: str, dtype: str) -> bool:
    """Tell whether a runtime has a kernel.

    Args:
        runtime: Name of the runtime.
        name: Name of the kernel among the schema's operators.
        dtype: Type of its first operand.

    Example:
        >>> has_kernel("litert", "GELU", "int8"), has_kernel("tflm", "GELU", "int8")
        (True, False)
    """
    measured = table()
    if runtime not in measured or dtype in measured[runtime].get(name, ()):
        return True
    # What no runtime has was not asked for.
    return not any(dtype in kernels.get(name, ()) for kernels in measured.values())


def reason_against_kernel(runtime: str, name: str, dtype: str) -> str:
    """Return that a runtime lacks a kernel, and what to write instead.

    Args:
        runtime: Name of the runtime.
        name: Name of the kernel.
        dtype: Type of its first operand.

    Example:
        >>> reason = reason_against_kernel("tflm", "TOPK_V2", "int8")
        >>> reason.split(": ")[0], reason.split(", or ")[1]
        ('TFLite-Micro has no kernel TOPK_V2 of int8',
        'take a preset of LiteRT (litert-int8, litert-int16x8), which have it')
    """
    reason = f"{TITLES.get(runtime, runtime)} has no kernel {name} of {dtype}"
    remedies = [_REMEDIES[name]] if name in _REMEDIES else []
    if dtype in table()["litert"].get(name, ()):
        remedies.append("take a preset of LiteRT (litert-int8, litert-int16x8), which have it")
    return f"{reason}: {', or '.join(remedies)}" if remedies else reason


@cache
def table() -> Mapping[str, Mapping[str, tuple[str, ...]]]:
    """Return the types of the first operand by runtime and kernel.

    Example:
        >>> table()["tflm"]["TANH"]
        ('int16', 'int8')
    """
    measured = json.loads(PATH.read_text(encoding="utf-8"))
    return {
        runtime: {name: tuple(types) for name, types in kernels.items()}
        for runtime, kernels in measured.items()
    }
