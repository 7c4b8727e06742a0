"""Float operators of a forward that a runtime computes on its CPU, between the chip's integers.

The chip's integers leave their grid, the operator computes in float32, and whatever the chip reads
of its result comes back onto a grid, as in the emulator:

    DEQUANTIZE -> EXP -> QUANTIZE

The emulator computes such an operator with PyTorch, the program with the runtime's own function.
Square roots and their reciprocals, squares, absolute values and `floor` are the same in every bit.
The emulator rounds an exponential, a logarithm, a sine and a cosine from float64. The last bit of
the runtime's float32 may be another, which is seen after the rounding to 8 bits rarely, but is not
promised not to be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from lightning_nna.deploy.elements import Elements
from lightning_nna.deploy.graph import CaptureError, Graph, form_of
from lightning_nna.deploy.layout import codes_of, same, tensors_in
from lightning_nna.emulation.operators.catalog import kernels
from lightning_nna.emulation.program import Stored


class CpuOperators:
    """Takes float operators of a forward down.

    Args:
        graph: The program so far.
        elements: Where everything is.
        on_chip: Gives the tensor that holds an activation, or None for what is on no grid.
    """

    def __init__(
        self, graph: Graph, elements: Elements, on_chip: Callable[[str, Tensor], int | None]
    ) -> None:
        self.graph, self.elements, self._on_chip = graph, elements, on_chip
        self._made: set[int] = set()
        self._quantized: dict[tuple[Any, ...], int] = {}

    def take(self, key: str, operands: Any, result: Any) -> bool:
        """Take one down, and say whether a runtime has it.

        Args:
            key: Of its call site.
            operands: Positional and keyword arguments.
            result: What it has given.

        Raises:
            CaptureError: If its operand is an argument in float, or was moved in float.
        """
        (args, kwargs), kernel = operands, cpu_kernel(key)
        if kernel is None or len(args) != 1 or kwargs or not result.numel():
            return False
        (x,) = args
        if x.untyped_storage()._cdata == result.untyped_storage()._cdata:
            return False  # In place: its operand is gone.
        source = self._on_chip(key, x)
        floats = self._left_the_grid(key, x, source) if source is not None else self._held(key, x)
        made = self._float(f"{key}/{kernel.lower()}", result)
        self.graph.run(kernel, key, [floats], [made], {})
        addresses = self.elements.addresses(Stored(result, "float32", source=result))
        self.elements.define("float32", addresses, codes_of(made, np.arange(result.numel())))
        return True

    def made(self, number: int) -> bool:
        """Whether a tensor is a result of one, in float."""
        return number in self._made

    def quantized(self, site: str, codes: Any, grid: Stored) -> int:
        """The tensor with a result, given by its codes, on a grid.

        Raises:
            CaptureError: If it was moved in float.
        """
        number = self._whole(site, codes)
        key = (number, grid.dtype, float(grid.scale), grid.zero_point)
        if key not in self._quantized:
            integers = grid.integers.numpy()
            made = self.graph.add(f"{site}/quantize", form_of(grid), integers)
            self.graph.run("QUANTIZE", site, [number], [made], {})
            self._quantized[key] = made
        return self._quantized[key]

    def _left_the_grid(self, key: str, x: Tensor, source: int) -> int:
        made = self._float(f"{key}/dequantize", x)
        self.graph.run("DEQUANTIZE", key, [source], [made], {})
        return made

    def _held(self, key: str, x: Tensor) -> int:
        """The result of another operator of the CPU, taken as it is."""
        return self._whole(key, self.elements.resolve(x, "float32", key))

    def _whole(self, where: str, codes: Any) -> int:
        sources = tensors_in(codes)
        if len(sources) == 1 and sources[0] in self._made:
            count = int(np.prod(self.graph.specs[sources[0]].shape))
            if codes.size == count and same(codes, codes_of(sources[0], np.arange(count))):
                return sources[0]
        raise CaptureError(
            f"{where} reads floats that no operator of the CPU has left so: move values while they "
            "are on the chip, and bring an argument onto it first"
        )

    def _float(self, name: str, x: Tensor) -> int:
        stored = Stored(x.detach(), "float32")
        number = self.graph.add(name, form_of(stored), x.detach().numpy())
        self._made.add(number)
        return number


def cpu_kernel(key: str) -> str | None:
    """Return the kernel that computes a call site in float on a runtime's CPU.

    Args:
        key: Key of the call site.

    Returns:
        Name of the kernel; None if no kernel has the torch function.

    Example:
        >>> cpu_kernel("encoder.layers.0/exp#1")
        'EXP'
    """
    function = function_of(key)
    names = (name for name, kernel in kernels().items() if function in kernel.computes_in_float)
    return next(names, None)


def function_of(key: str) -> str:
    """Return the function's name in the key of a call site.

    Example:
        >>> function_of("encoder.layers.0/exp#1")
        'exp'
    """
    return key.rsplit("/", 1)[1].split("#")[0]
