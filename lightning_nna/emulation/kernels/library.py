"""Register kernels as operators ``torch.ops.lightning_nna.*``, Triton's on CUDA if it is there."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

_LIBRARY = torch.library.Library("lightning_nna", "FRAGMENT")


def define(schema: str, reference: ModuleType, module: str) -> None:
    """Define an operator by its reference and its kernel.

    Args:
        schema: Schema of the operator, whose name functions of both modules have.
        reference: Module of the function in plain PyTorch, which runs on every device but CUDA.
        module: Name of the module of the Triton kernel, imported when it is first called.
    """
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    function = getattr(reference, name)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, on_cuda(name, function, module), "CUDA")


def on_cuda(name: str, reference: Callable[..., Any], module: str) -> Callable[..., Any]:
    """Return the launch of a Triton kernel, or the reference where there is no Triton.

    Args:
        name: Name of the kernel.
        reference: Function in plain PyTorch.
        module: Name of the kernel's module.
    """

    @lru_cache(maxsize=1)
    def kernel() -> Callable[..., Any]:
        kernels = triton_module(module)
        return reference if kernels is None else getattr(kernels, name)

    def launch(*arguments: Any) -> Any:
        return kernel()(*arguments)

    return launch


@lru_cache(maxsize=1)
def warn_without_triton(reason: str) -> None:
    """Warn, once, that kernels run in plain PyTorch on a GPU."""
    warnings.warn(
        f"the package triton cannot be imported ({reason}): kernels of several launches run in "
        "its place, slower and with the same integers; pip install triton",
        stacklevel=2,
    )


def triton_module(name: str) -> ModuleType | None:
    """Import a module of Triton kernels; return None where Triton cannot be imported."""
    try:
        return importlib.import_module(f"lightning_nna.emulation.kernels.{name}")
    except ImportError as error:
        warn_without_triton(str(error))
        return None
