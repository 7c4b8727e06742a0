"""Simulate an accelerator in the processor's memory, and count what Python asks of it.

What a step costs a GPU shows without one: how many kernels it launches, and how often the host
waits for a value of the device. A tensor of the simulated device wraps one of the processor, which
computes for it. As on a GPU, backwards run in a thread of their own, and an operator that gets
tensors of the host next to one of the device is an error.

The device is PyTorch's third-party backend (``PrivateUse1``), which a process registers once and
for good: use it in a process of its own. It takes PyTorch 2.11.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

_NAME = "simulated"
#: Operators that allocate or describe memory: a GPU has nothing to do for them.
_WITHOUT_LAUNCH = frozenset(
    "empty empty_strided empty_like new_empty new_empty_strided detach alias resize_ set_ "
    "_local_scalar_dense lift_fresh".split()
)
#: Operators whose result, or its shape, Python or PyTorch must know.
_WAITING = frozenset(
    "_local_scalar_dense equal nonzero is_nonzero masked_select _unique2 unique_dim "
    "unique_consecutive bincount histc repeat_interleave".split()
)
_INDEXING = frozenset("index index_put index_put_ _index_put_impl_ _unsafe_index".split())
_PACKAGES = ("lightning_nna", "recipes")


@dataclass(eq=False)
class Traffic:
    """Counts of what a device was asked to do.

    Attributes:
        launches: Number of launches by the name of the operator.
        synchronizations: Number of times that the host waited, by what for and where.
    """

    launches: Counter[str] = field(default_factory=Counter)
    synchronizations: Counter[str] = field(default_factory=Counter)


class SimulatedTensor(Tensor):
    """Tensor of the simulated device, of any shape.

    Args:
        host: Tensor of the processor that holds the values.
    """

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> SimulatedTensor:
        """Wrap a tensor of the processor."""
        tensor: SimulatedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(_NAME, 0),
            requires_grad=host.requires_grad,
        )
        tensor.host = host
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """Values without gradient, as of other tensors."""
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        assert isinstance(values, SimulatedTensor), "as with a GPU, nothing else fits"
        self.host = values.host

    def tolist(self) -> Any:
        """Read the values."""
        return self.cpu().tolist()

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:  # type: ignore[override]
        """Make a tensor of the device from numbers of Python."""
        return torch.tensor(data, dtype=dtype or self.dtype).to(self.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute an operator on the wrapped tensors, and count it."""
        return _execute(func, args, kwargs or {})


@cache
def simulated_device() -> torch.device:
    """Register the simulated device in this process, and return it.

    Example:
        >>> device = simulated_device()  # doctest: +SKIP
        >>> torch.ones(3, device=device).sum().item()  # doctest: +SKIP
        3.0
    """
    backend_registration._setup_privateuseone_for_python_backend(_NAME)
    # Factories have no operand that says where they run.
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: _execute(func, args, kwargs), "PrivateUse1")
    # These resize an empty tensor, which a wrapper of another one cannot follow.
    factories = torch.library.Library("aten", "IMPL")
    for overload in _FACTORIES:
        function = partial(_execute_factory, overload)
        factories.impl(overload._schema.name + _suffix(overload), function, "PrivateUse1")
    _LIBRARIES.extend((library, factories))
    # PyTorch copies what these make below the level that Python sees.
    for name in ("tensor", "as_tensor", "scalar_tensor"):
        setattr(torch, name, _made_on_host(getattr(torch, name)))
    return torch.device(_NAME, 0)


# A library that is collected takes its kernels along.
_LIBRARIES: list[Any] = []
_COUNTING: list[Traffic] = []


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what the simulated device is asked to do inside of the block.

    Yields:
        Counts, which grow until the block ends.
    """
    traffic = Traffic()
    _COUNTING.append(traffic)
    try:
        yield traffic
    finally:
        _COUNTING.remove(traffic)


_FACTORIES = (
    torch.ops.aten.arange.default,
    torch.ops.aten.arange.start,
    torch.ops.aten.arange.start_step,
    torch.ops.aten.linspace.default,
    torch.ops.aten.eye.default,
    torch.ops.aten.eye.m,
    torch.ops.aten.randperm.default,
)


def _suffix(overload: Any) -> str:
    name = overload._schema.overload_name
    return f".{name}" if name else ""


def _execute_factory(overload: Any, *args: Any, **kwargs: Any) -> Any:
    return _execute(overload, args, kwargs)


def _made_on_host(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a function make tensors of the simulated device on the host, and move them."""

    @wraps(function)
    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device).type != _NAME:
            return function(*args, device=device, **kwargs)
        return function(*args, **kwargs).to(device)

    return made


def launches_of(func: Any) -> int:
    """Return the number of kernels that an operator starts on CUDA: none for a view.

    Args:
        func: Overload of an operator, as ``__torch_dispatch__`` receives it.

    Example:
        >>> launches_of(torch.ops.aten.add.Tensor), launches_of(torch.ops.aten.view.default)
        (1, 0)
    """
    if func._schema.name.split("::")[1] in _WITHOUT_LAUNCH:
        return 0
    returns = func._schema.returns
    info = returns[0].alias_info if returns else None
    return 0 if info is not None and not info.is_write else 1


def _execute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.split("::")[1]
    _require_one_device(name, args, kwargs)
    for traffic in _COUNTING:
        traffic.launches[name] += launches_of(func)
        for reason in _reasons_to_wait(name, args, kwargs):
            traffic.synchronizations[f"{reason} at {_place()}"] += 1
    inputs, options = _of_host(args), _of_host(kwargs)
    device = options.get("device")
    if device is not None:
        options["device"] = torch.device("cpu")
    result = _SUBSTITUTES.get(name, func)(*inputs, **options)
    if name.startswith("_foreach") and name.endswith("_"):
        torch.autograd.graph.increment_version(args[0])  # As CUDA's do.
    if name == "_to_copy" and device is not None and torch.device(device).type == "cpu":
        return result
    if name in ("copy_", "_local_scalar_dense"):
        return args[0] if name == "copy_" else result
    written = {
        alias: value
        for alias, value in zip(_written(func), _values_written(func, args, kwargs), strict=True)
    }
    outputs = result if isinstance(result, (tuple, list)) else (result,)
    wrapped = [
        written[_alias_of(returned)] if _alias_of(returned) in written else _of_device(output)
        for returned, output in zip(_returns(func, len(outputs)), outputs, strict=True)
    ]
    return type(result)(wrapped) if isinstance(result, (tuple, list)) else wrapped[0]


def _lstm_cell(
    of_input: Tensor, of_hidden: Tensor, c: Tensor, *biases: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of a GPU's LSTM: h, c and the gates, shapes ``(batch, n)``, ``(batch, 4 n)``."""
    gates = of_input + of_hidden
    for bias in biases:
        gates = gates if bias is None else gates + bias
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return o * c.tanh(), c, torch.cat([i, f, g, o], 1)


def _lstm_cell_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    c_before: Tensor,
    c: Tensor,
    gates: Tensor,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the gates' inputs, of the cell state before, and of a bias."""
    i, f, g, o = gates.chunk(4, 1)
    t = c.tanh()
    grad_h = torch.zeros_like(c) if grad_h is None else grad_h
    of_c = grad_h * o * (1 - t * t)
    of_c = of_c if grad_c is None else of_c + grad_c
    of_gates = torch.cat(
        [
            of_c * g * i * (1 - i),
            of_c * c_before * f * (1 - f),
            of_c * i * (1 - g * g),
            grad_h * t * o * (1 - o),
        ],
        1,
    )
    return of_gates, of_c * f, of_gates.sum(0) if has_bias else of_gates.new_empty(0)


def _gru_cell(
    of_input: Tensor, of_hidden: Tensor, h: Tensor, *biases: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step of a GPU's GRU: h ``(batch, n)``, and what the backward needs ``(batch, 5 n)``."""
    both = [
        gates if bias is None else gates + bias
        for gates, bias in zip((of_input, of_hidden), biases or (None, None), strict=True)
    ]
    (r_x, z_x, n_x), (r_h, z_h, n_h) = (gates.chunk(3, 1) for gates in both)
    r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
    n = (n_x + r * n_h).tanh()
    return n + z * (h - n), torch.cat([r, z, n, h, n_h], 1)


def _gru_cell_backward(
    grad: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of both gates' inputs, of the state before, and of both biases."""
    r, z, n, h, n_h = workspace.chunk(5, 1)
    of_n = grad * (1 - z) * (1 - n * n)
    of_z = grad * (h - n) * z * (1 - z)
    of_r = of_n * n_h * r * (1 - r)
    of_input = torch.cat([of_r, of_z, of_n], 1)
    of_hidden = torch.cat([of_r, of_z, of_n * r], 1)
    biases = [x.sum(0) if has_bias else x.new_empty(0) for x in (of_input, of_hidden)]
    return of_input, of_hidden, grad * z, biases[0], biases[1]


# Operators that a processor does not have.
_SUBSTITUTES: dict[str, Callable[..., Any]] = {
    "_thnn_fused_gru_cell": _gru_cell,
    "_thnn_fused_gru_cell_backward": _gru_cell_backward,
    "_thnn_fused_lstm_cell": _lstm_cell,
    "_thnn_fused_lstm_cell_backward_impl": _lstm_cell_backward,
}


def _of_host(values: Any) -> Any:
    return tree_map_only(SimulatedTensor, lambda x: x.host, values)


def _of_device(values: Any) -> Any:
    return tree_map_only(Tensor, SimulatedTensor, values)


def _alias_of(argument: Any) -> Any:
    """Name of what is written, as the schema has it; None for what is not."""
    info = None if argument is None else argument.alias_info
    return frozenset(info.before_set) if info is not None and info.is_write else None


def _written(func: Any) -> list[Any]:
    return [_alias_of(each) for each in func._schema.arguments if _alias_of(each) is not None]


def _values_written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    named = dict(zip((each.name for each in func._schema.arguments), args, strict=False))
    named.update(kwargs)
    return [named.get(each.name) for each in func._schema.arguments if _alias_of(each) is not None]


def _returns(func: Any, count: int) -> list[Any]:
    """Returns of the schema, one for each output: a list of tensors is one of them."""
    returns = list(func._schema.returns)
    return returns if len(returns) == count else [None] * count


def _require_one_device(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_host = [x for x in tensors if not isinstance(x, SimulatedTensor)]
    if len(on_host) == len(tensors) or name in ("copy_", *_INDEXING):
        return
    # A number on the host goes along with the launch, as a Python number does; a second does not.
    arrays, numbers = [x for x in on_host if x.dim()], [x for x in on_host if not x.dim()]
    if arrays or len(numbers) > 1:
        shapes = [tuple(x.shape) for x in arrays or numbers]
        raise RuntimeError(
            f"{name} got tensors of shapes {shapes} on the host and others on the {_NAME} device, "
            f"at {_place()}: move them, once, before the step"
        )


def _reasons_to_wait(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    if name in _WAITING:
        return [name]
    if name in ("copy_", "_to_copy"):
        source = args[0] if name == "_to_copy" else args[1]
        target = kwargs.get("device") if name == "_to_copy" else args[0].device
        non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
        if target is None or torch.device(target).type == source.device.type or non_blocking:
            return []
        return [f"copy to {torch.device(target).type}"]
    if name == "where" and any(not isinstance(x, SimulatedTensor) for x in args[1:]):
        return ["copy of a number"]
    if name in _INDEXING:
        indices = [x for x in args[1] if x is not None]
        return [
            "mask as an index" if x.dtype in (torch.bool, torch.uint8) else "index of the host"
            for x in indices
            if x.dtype in (torch.bool, torch.uint8) or not isinstance(x, SimulatedTensor)
        ]
    return []


def _place() -> str:
    """Lines of the project that led here, the innermost first."""
    frames = [
        (Path(frame.filename), frame.lineno)
        for frame in traceback.extract_stack()
        if any(f"/{package}/" in frame.filename for package in _PACKAGES)
        and frame.filename != __file__
    ]
    names = [f"{path.parent.name}/{path.name}:{number}" for path, number in reversed(frames[-3:])]
    return " < ".join(names) or "?"
