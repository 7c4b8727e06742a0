"""Networks of one function, for the tests of the export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

#: Specs by the bits of their activations.
SPECS = {8: "litert-int8", 16: "litert-int16x8"}


class FunctionNetwork(nn.Module):
    """A function of arguments and layers."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments, *self.layers)
