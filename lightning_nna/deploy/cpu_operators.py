"""Float operators of a forward that a runtime computes on its CPU, between quantized tensors.

The operand is dequantized, the operator computes in float32, and each emulated operator that reads
the result quantizes it, as in the emulation:

    DEQUANTIZE -> EXP -> QUANTIZE

The emulation computes such an operator with PyTorch, the program with the runtime's own function.
Square roots and their reciprocals, squares, absolute values and `floor` are the same in every bit.
The emulation rounds an exponential, a logarithm, a sine and a cosine from float64. The last bit of
the runtime's float32 may differ; after the rounding to 8 bits this rarely changes an integer, but
it may.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from lightning_nna.deploy.graph import CaptureError, Graph, spec_of
from lightning_nna.deploy.layout import codes_of, equal_codes, tensors_in
from lightning_nna.deploy.provenance_map import ProvenanceMap
from lightning_nna.emulation.operators.catalog import kernels
from lightning_nna.emulation.program import Stored


class CpuOperators:
    """Record the float operators of a forward.

    Args:
        graph: Program so far.
        provenance_map: Codes of the forward so far.
        quantized_tensor: Function that returns the number of the tensor of an activation, given the
            call site that reads it and the activation; None for one that is not quantized.
    """

    def __init__(
        self,
        graph: Graph,
        provenance_map: ProvenanceMap,
        quantized_tensor: Callable[[str, Tensor], int | None],
    ) -> None:
        self.graph, self.provenance_map = graph, provenance_map
        self._quantized_tensor = quantized_tensor
        self._results: set[int] = set()
        self._quantized: dict[tuple[Any, ...], int] = {}

    def record(self, key: str, operands: Any, result: Any) -> bool:
        """Record an operator; tell if a runtime has it.

        Args:
            key: Key of its call site.
            operands: Positional and keyword arguments.
            result: Result in the forward.

        Raises:
            CaptureError: If its operand is an argument in float, or was laid out in float.
        """
        (args, kwargs), kernel = operands, cpu_kernel(key)
        if kernel is None or len(args) != 1 or kwargs or not result.numel():
            return False
        (x,) = args
        if x.untyped_storage()._cdata == result.untyped_storage()._cdata:
            return False  # In place: its operand is gone.
        source = self._quantized_tensor(key, x)
        if source is not None:
            floats = self._dequantize(key, x, source)
        else:
            floats = self._result_of(key, self.provenance_map.resolve(x, "float32", key))
        number = self._float(f"{key}/{kernel.lower()}", result)
        self.graph.run(kernel, key, [floats], [number], {})
        ids = self.provenance_map.ids(Stored(result, "float32", source=result))
        self.provenance_map.define("float32", ids, codes_of(number, np.arange(result.numel())))
        return True

    def is_result(self, number: int) -> bool:
        """Tell if a tensor is the result of such an operator, in float."""
        return number in self._results

    def quantize(self, site: str, codes: Any, stored: Stored) -> int:
        """Return the tensor with a quantized result.

        Args:
            site: Call site that reads it.
            codes: Codes of the result.
            stored: Integers and quantization parameters of the forward.

        Raises:
            CaptureError: If the result was laid out in float.
        """
        source = self._result_of(site, codes)
        key = (source, stored.dtype, float(stored.scale), stored.zero_point)
        if key not in self._quantized:
            integers = stored.integers.numpy()
            number = self.graph.add(f"{site}/quantize", spec_of(stored), integers)
            self.graph.run("QUANTIZE", site, [source], [number], {})
            self._quantized[key] = number
        return self._quantized[key]

    def _dequantize(self, key: str, x: Tensor, source: int) -> int:
        number = self._float(f"{key}/dequantize", x)
        self.graph.run("DEQUANTIZE", key, [source], [number], {})
        return number

    def _result_of(self, where: str, codes: Any) -> int:
        """Return the result that has all of these codes, in their order."""
        sources = tensors_in(codes)
        if len(sources) == 1 and sources[0] in self._results:
            count = int(np.prod(self.graph.specs[sources[0]].shape))
            if codes.size == count and equal_codes(codes, codes_of(sources[0], np.arange(count))):
                return sources[0]
        raise CaptureError(
            f"{where} reads floats that no operator of the CPU computes in this layout: transpose, "
            "slice and join values while they are quantized, and quantize an argument first"
        )

    def _float(self, name: str, x: Tensor) -> int:
        stored = Stored(x.detach(), "float32")
        number = self.graph.add(name, spec_of(stored), x.detach().numpy())
        self._results.add(number)
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
