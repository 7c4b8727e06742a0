"""Select the modules that are emulated, and find those that cannot be."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from lightning_nna.emulation.sites import ROOT
from lightning_nna.weights.selection import is_loss_or_metric, select


def lightning_classes() -> tuple[type, ...]:
    """Return LightningModule of ``lightning.pytorch`` and ``pytorch_lightning``, if imported."""
    names = ("lightning.pytorch", "pytorch_lightning")
    return tuple(sys.modules[name].LightningModule for name in names if name in sys.modules)


def is_redirected(module: nn.Module) -> bool:
    """Tell whether a call of a module runs one of its steps and not its forward.

    Strategies that wrap the module (DDP, FSDP, DeepSpeed) run ``training_step`` and the like
    through the wrapper's forward: Lightning replaces the module's forward for that one call.
    """
    forward = module.__dict__.get("forward")
    return isinstance(forward, FunctionType) and forward.__module__.split(".")[0] in (
        "lightning",
        "lightning_fabric",
        "pytorch_lightning",
    )


def forward_codes(module: nn.Module) -> Iterator[tuple[CodeType, Any]]:
    """Yield the code of a module's forward, in its classes or on the instance, and of decorators.

    Yields:
        Code, and None or, for the code of a decorator, the function that the decorator calls: the
        code of a decorator is the same for all functions.

    Example:
        >>> [(code.co_qualname, inner) for code, inner in forward_codes(nn.Tanh())]
        [('Tanh.forward', None)]
    """
    functions: list[Any] = [vars(base).get("forward") for base in type(module).__mro__[:-1]]
    if not is_redirected(module):
        functions.append(module.__dict__.get("forward"))
    for function in functions:
        while function is not None:
            function = getattr(function, "__func__", function)
            inner = getattr(function, "__wrapped__", None)
            code = getattr(function, "__code__", None)
            if isinstance(code, CodeType) and code is not nn.Module.forward.__code__:
                yield code, inner
            function = inner


def modules_in_scope(named: Mapping[str, nn.Module], targets: Sequence[str]) -> set[str]:
    """Return the paths that targets select, with all below them, without losses and metrics.

    Args:
        named: Modules by path.
        targets: Globs or ``re:…`` on paths.
    """
    outside = [name for name, child in named.items() if is_loss_or_metric(child)]
    candidates = [name for name in named if not _is_below(name, outside)]
    selected = select(targets, candidates, what="module")
    return {name for name in candidates if ROOT in selected or _is_below(name, selected)}


def outermost(paths: Iterable[str]) -> list[str]:
    """Return the paths of modules that no other of the modules contains, in alphabetical order.

    Example:
        >>> outermost({"encoder", "encoder.layers.0", "head"})
        ['encoder', 'head']
    """
    names = sorted(paths)
    if ROOT in names:
        return [ROOT]
    return [name for name in names if not _is_below(name, [x for x in names if x != name])]


def _is_below(name: str, ancestors: Sequence[str]) -> bool:
    return any(name == above or name.startswith(above + ".") for above in ancestors)


def named_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return modules by path, without the wrappers that ``torch.compile`` puts around modules.

    Example:
        >>> compiled = torch.compile(nn.Tanh(), backend="eager")
        >>> [name for name, _ in named_modules(nn.Sequential(compiled))]
        ['', '0']
    """
    return [
        (".".join(part for part in name.split(".") if part != "_orig_mod"), child)
        for name, child in module.named_modules()
        if not _is_compiled_wrapper(child)
    ]


def compiled_modules(module: nn.Module) -> list[str]:
    """Return the paths of modules that ``torch.compile`` or ``Module.compile`` was applied to."""
    names = [name for name, child in module.named_modules() if _is_compiled(child)]
    return [name.removesuffix("_orig_mod").rstrip(".") or "the module" for name in names]


def _is_compiled(module: nn.Module) -> bool:
    # Lightning unwraps a compiled LightningModule and stores the compiler's context in it.
    by_lightning = getattr(module, "_compiler_ctx", None) is not None
    in_place = module._compiled_call_impl is not None
    return by_lightning or in_place or _is_compiled_wrapper(module)


def _is_compiled_wrapper(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule)


def require_float32(module: nn.Module) -> None:
    """Raise if a module has float parameters that are not float32.

    Raises:
        ValueError: If a parameter is not float32; names it.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ValueError(
                f"parameter {name} is {parameter.dtype}: emulation needs float32 "
                f"parameters; use precision '32-true' or 'bf16-mixed'"
            )
