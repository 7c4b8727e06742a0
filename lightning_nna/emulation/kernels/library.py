"""Register kernels as operators ``torch.ops.lightning_nna.*``, and call the fastest that is there.

On CUDA they are Triton's. In the processor's memory they are called past PyTorch's dispatcher where
the package Numba is installed, which compiles them; otherwise operators run on processors without
them.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.on_host import in_memory, on_host

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


#: Modules of the kernels that are compiled for processors.
_COMPILED = (
    "compiled_elements",
    "compiled_gru",
    "compiled_lstm",
    "compiled_rows",
    "compiled_statistics",
    "compiled_tables",
    "compiled_weights",
)


class _Settings(threading.local):
    compiles = True


_SETTINGS = _Settings()


@lru_cache(maxsize=1)
def _compiled_modules() -> tuple[ModuleType, ...]:
    """Import the modules of compiled kernels; none where Numba cannot be imported."""
    try:
        importlib.import_module("numba")
    except ImportError:
        return ()
    package = "lightning_nna.emulation.kernels"
    return tuple(importlib.import_module(f"{package}.{name}") for name in _COMPILED)


@lru_cache(maxsize=64)
def compiled_kernel(name: str) -> Callable[..., Any] | None:
    """Return the kernel that is compiled for processors, or None.

    Args:
        name: Name of the kernel, as in :mod:`.definitions`.
    """
    kernels = (getattr(module, name, None) for module in _compiled_modules())
    return next((kernel for kernel in kernels if kernel is not None), None)


def compiled_for(name: str, x: Tensor) -> Callable[..., Any] | None:
    """Return the compiled kernel for a tensor of any shape, or None.

    There is one in the processor's memory if it can be compiled, and nobody follows the values.
    """
    return compiled_kernel(name) if _SETTINGS.compiles and on_host(x) else None


def runs_kernel(name: str, x: Tensor) -> bool:
    """Tell whether an operator should call a kernel: on a device always, else a compiled one."""
    return not in_memory(x) or compiled_for(name, x) is not None


def call(name: str, x: Tensor, *arguments: Any) -> Any:
    """Call a kernel wherever a tensor of any shape is.

    Args:
        name: Name of the kernel.
        x: Tensor that tells where.
        arguments: Arguments of the kernel.
    """
    kernel = compiled_for(name, x)
    if kernel is None:
        kernel = getattr(torch.ops.lightning_nna, name).default
    return kernel(x, *arguments)


def prepared(name: str, buffers: Sequence[Tensor], numbers: Sequence[Any]) -> Callable[..., bool]:
    """Prepare a kernel that is called with the same arguments at every step of a sequence.

    Args:
        name: Name of the kernel, whose arguments are buffers, rows of the step and numbers.
        buffers: Tensors of any shape; the first tells where the kernel runs.
        numbers: Its other arguments.

    Returns:
        Function of the rows, which tells whether the backward needs masks of this step; on a
        device, where nobody looks, it always does.
    """
    is_compiled = _SETTINGS.compiles and on_host(buffers[0])
    prepare = compiled_kernel(f"prepared_{name}") if is_compiled else None
    if prepare is not None:
        run: Callable[..., bool] = prepare(buffers, numbers)
        return run
    kernel = getattr(torch.ops.lightning_nna, name).default

    def launch(*rows: int) -> bool:
        kernel(*buffers, *rows, *numbers)
        return True

    return launch


@contextmanager
def without_compiled_kernels() -> Iterator[None]:
    """Take the branches of a processor without Numba inside of the block; for tests."""
    before, _SETTINGS.compiles = _SETTINGS.compiles, False
    try:
        yield
    finally:
        _SETTINGS.compiles = before
