"""Kernels that compute in float what the accelerator has no operator for, on a runtime's CPU."""

from __future__ import annotations

from lightning_nna.emulation.operators.record import NO_OPTIONS, Kernel, register_kernel

for _kernel in (
    Kernel("ABS", versions={"int8": 2, "int16": 3}, computes_in_float=("abs", "absolute")),
    Kernel("COS", computes_in_float=("cos",)),
    Kernel("EXP", versions={"int8": 2, "int16": 2}, computes_in_float=("exp",)),
    Kernel("FLOOR", options=NO_OPTIONS, computes_in_float=("floor",)),
    Kernel("LOG", options=NO_OPTIONS, versions={"int8": 2, "int16": 2}, computes_in_float=("log",)),
    Kernel("SIN", options=NO_OPTIONS, computes_in_float=("sin",)),
    Kernel(
        "SQRT", options=NO_OPTIONS, versions={"int8": 2, "int16": 2}, computes_in_float=("sqrt",)
    ),
    Kernel("SQUARE", computes_in_float=("square",)),
):
    register_kernel(_kernel)
