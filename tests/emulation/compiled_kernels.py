"""Calls of the kernels that are compiled for processors; run in processes of other processors.

``python -m tests.emulation.compiled_kernels`` compares them with the reference, and prints one line
of JSON: for every case what differs, or an empty string, and for every compiled function the fused
multiply-adds in its machine code. Numba tells of the code that it compiled itself: with
NUMBA_CACHE_DIR at an empty folder, of all.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.integer_softmax import exp_table
from lightning_nna.emulation.kernels import library, reference
from tests.emulation.kernel_cases import CASES, REQUANTIZATIONS, difference, requantization

#: Kernels that are compiled for processors.
KERNELS = (
    *("requantize", "look_up", "look_up_pair", "softmax_rows", "normalize_rows"),
    *("quantize_rows", "largest_of_groups", "raise_scales", "fold_batch_norm", "dequantize"),
)
#: Names of cases whose kernels are compiled.
OPERATORS = tuple(name for name in CASES if name in KERNELS)


def compiled(name: str, *arguments: Any) -> Any:
    """Call a compiled kernel; in place of no mask its results have one of zeros."""
    kernel = library.compiled_kernel(name)
    assert kernel is not None, name
    results = kernel(*arguments)
    if not isinstance(results, tuple) or None not in results:
        return results
    expected = getattr(reference, name)(*arguments)
    pairs = zip(results, expected, strict=True)
    return tuple(torch.zeros_like(b) if a is None else a for a, b in pairs)


def cases(operator: str) -> dict[str, tuple[Any, ...]]:
    """Return arguments by case, of the compiled kernels among an operator's cases."""
    return {
        name: arguments
        for name, arguments in CASES[operator]()
        if name.partition("/")[0] in KERNELS
    }


def other_cases() -> dict[str, tuple[Any, ...]]:
    """Return arguments in shapes that the other cases do not have, most of few elements."""
    generator = torch.Generator().manual_seed(11)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    results: dict[str, tuple[Any, ...]] = {}
    for name, settings in REQUANTIZATIONS.items():
        sums, *rest, _, wide = requantization(name, **settings)
        results[f"requantize/{name}, inner 1"] = sums[:, :, 3], *rest, 1, wide
        results[f"requantize/{name}, inner 7"] = sums[:, :, :7], *rest, 7, wide
    weight = torch.randn(150, 1000, generator=generator)
    results["quantize_rows/many of one scale"] = weight, None, 150, 127, False
    table, mask = torch.randn(65536, generator=generator), integers(0, 9, 65536) == 0
    for size in (0, 1, 5, 17, 1023, 1025, 3000):
        x = integers(-130, 140, size).float() * 0.1
        results[f"look_up/{size}"] = x, table[:256], mask[:256], 0.1, -128
        results[f"look_up_pair/{size}"] = x, x.flip(0), table, mask, 0.1, -128, 0.1, -128
        sums = integers(-(2**30), 2**30, size, 3, 5)
        scales, bias = torch.rand(3, generator=generator), torch.randn(3, generator=generator)
        results[f"dequantize/{size}"] = sums.double(), scales, bias, 0.3, 5
        results[f"dequantize/{size}, no bias"] = -sums.float(), scales, None, 0.3, 5
    pairs = ((2, 3, 1, 5, 1), (1, 3, 4, 1, 6)), ((3, 1, 5), (4, 1)), ((7,), (2, 3, 1)), ((), ())
    for shapes in pairs:
        a, b = (integers(-128, 128, *shape).float() for shape in shapes)
        results[f"look_up_pair/{shapes}"] = a, b, table, mask, 1.0, -128, 1.0, -128
    for columns, reach in ((1, 256), (2, 3), (9, 256), (255, 256), (256, 256), (300, 20)):
        x = integers(0, reach, 6, columns) - 128
        results[f"softmax_rows/{columns}, {reach}"] = x.float() * 0.05, exp_table(0.05), 0.05
    for rows, columns in ((1, 1), (3, 7), (6, 300)):
        stored = integers(-5, 6, rows, columns).to(torch.int8)
        scales = torch.rand(rows, generator=generator)
        bias = scales * torch.tensor([1.0, 900.0, 3e4, 0.0, -700.0, 1.0])[:rows]
        for shared in (1, rows):
            same = scales if shared == 1 else scales[:1].repeat(rows)
            arguments = stored, same, bias, 512.0, shared, False
            results[f"raise_scales/{rows}, {columns}, {shared}"] = arguments
        weight = torch.randn(rows, columns, generator=generator)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            arguments = weight.to(dtype), None, 1, 127, False
            results[f"quantize_rows/{rows}, {columns}, {dtype}"] = arguments
            results[f"largest_of_groups/{rows}, {columns}, {dtype}"] = weight.to(dtype), rows
    return results


def differences(name: str, arguments: tuple[Any, ...]) -> str:
    """Tell how a compiled kernel's results differ from those of the reference."""
    operator = name.partition("/")[0]
    own, other = ([_cloned(x) for x in arguments] for _ in range(2))
    return difference(getattr(reference, operator)(*own), compiled(operator, *other))


def _cloned(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def digests() -> dict[str, str]:
    """Return a digest of the results by case, with whatever kernels there are."""
    results = {}
    for name, arguments in other_cases().items():
        values = library.call(name.partition("/")[0], *arguments)
        values = values if isinstance(values, tuple) else (values,)
        digest = hashlib.sha256()
        for value in values:
            # No mask is one of zeros.
            mask = torch.zeros(values[0].shape, dtype=torch.bool) if value is None else value
            digest.update(mask.numpy().tobytes())
        results[name] = digest.hexdigest()
    return results


def fused() -> dict[str, list[str]]:
    """Return the fused multiply-adds of every function that this process has compiled."""
    results = {}
    for module_name in ("compiled", *library._COMPILED):
        module = importlib.import_module(f"lightning_nna.emulation.kernels.{module_name}")
        for name, function in vars(module).items():
            if getattr(function, "signatures", None):
                code = "\n".join(function.inspect_asm().values())
                assert "ret" in code, name
                results[name] = re.findall(r"\bv?f(?:n?m(?:add|sub))\w*", code)
    return results


def main() -> None:
    """Print what differs from the reference, and what is fused."""
    every = other_cases()
    for operator in OPERATORS:
        every |= dict(list(cases(operator).items())[::4])
    told = {name: differences(name, arguments) for name, arguments in every.items()}
    print(json.dumps({"differences": told, "fused": fused()}))


if __name__ == "__main__":
    main()
