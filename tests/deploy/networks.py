"""Networks of one function, for the tests of the export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_nna.emulation.operators.catalog import kernels, operators
from lightning_nna.emulation.spec import PRESETS

#: Specs by the bits of their activations.
SPECS = {8: "litert-int8", 16: "litert-int16x8"}

_IN_FLOAT = {name for kernel in kernels().values() for name in kernel.computes_in_float}
#: The same of accelerators that lack what a runtime computes in float.
POORER_SPECS = {
    bits: replace(PRESETS[name], operators=tuple(x for x in operators() if x not in _IN_FLOAT))
    for bits, name in SPECS.items()
}


class FunctionNetwork(nn.Module):
    """A function of arguments and layers."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments, *self.layers)
