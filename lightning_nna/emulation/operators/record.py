"""One record for every operator: what it is called, what it computes, which kernels it becomes.

An operator is entered with :func:`register_operator`, from inside of the package or from outside.
Everything that has to know which operators there are (the dispatch, specs, coverage, learned
scales, the export, the tests and the documentation) asks the records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

#: What a program's operator is called where it has no table of options.
NO_OPTIONS = ""


@dataclass(frozen=True)
class Kernel:
    """An operator of the TensorFlow Lite schema.

    Args:
        name: Its name among the schema's builtin operators, as ``"LOGISTIC"``.
        options: Name of its table of options in the schema; None for the one that follows from the
            name (``"SOFTMAX"``: ``"SoftmaxOptions"``), :data:`NO_OPTIONS` for none.
        versions: Lowest version by the type of the first operand; 1 for a type that is not there.
        versions_by_rank: Pairs of a number of axes and the lowest version for more axes than that.
        version: For what depends on more than this: takes the version so far, the operator and its
            tensors (see :mod:`lightning_nna.deploy.flatbuffer`), and returns the version.
        operands: Names of operands by position, where a position says what an operand is.
        is_float: Whether it runs in float on the CPU alone.
    """

    name: str
    options: str | None = None
    versions: Mapping[str, int] = field(default_factory=dict)
    versions_by_rank: tuple[tuple[int, int], ...] = ()
    version: Callable[[int, Any, Any], int] | None = None
    operands: Mapping[int, str] = field(default_factory=dict)
    is_float: bool = False


@dataclass(frozen=True)
class Example:
    """A network that consists of one operator, for the oracle of tests.

    Args:
        build: Returns the module.
        shapes: Shapes of the float tensors that it takes.
        large_results: Whether ``shapes`` are so large that at least 10,000 results are compared.
    """

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    large_results: bool = True


@dataclass(frozen=True)
class Operator:
    """What the emulator knows of one operator.

    An operator that is one instruction has ``float``, ``integers`` and perhaps ``backward``; the
    driver (:mod:`.driver`) quantizes its operands, observes its range, computes and clips its
    integers, records its instruction and keeps autocast away. An operator that consists of others,
    or has weights, has ``emulate`` instead and calls them.

    Args:
        name: Name in specs, call sites and coverage; empty for a function that is no instruction.
        torch: Names of the torch functions and methods, or the functions themselves.
        float: The operator on float tensors, with the signature of the torch function.
        integers: Integers of the result less its zero point, not clipped, whole numbers.
        backward: Gradients of the operands, given that of the result where it was not clipped;
            None for the derivative of ``float`` at the quantized operands.
        emulate: Takes a ``Call`` and the torch function's own arguments.
        supports: Whether the accelerator has this form of it; receives the function's arguments.
        litert: Kernels that this operator brings along; the first is that of its instruction.
        widths: Widths of activations for which it exists.
        learns_scale: Whether the scale of its output can be learned.
        has_weights: Whether it is a layer with weights, whose input is an activation in any case.
        arithmetic: What the table of the documentation says of its arithmetic.
        examples: Networks for the oracle of tests.
    """

    name: str
    torch: Sequence[str | Callable[..., Any]]
    float: Callable[..., Tensor] | None = None
    integers: Callable[..., Tensor] | None = None
    backward: Callable[..., Any] | None = None
    emulate: Callable[..., Any] | None = None
    supports: Callable[..., bool] = lambda *args, **kwargs: True
    litert: tuple[Kernel, ...] = ()
    widths: tuple[int, ...] = (8, 16)
    learns_scale: bool = False
    has_weights: bool = False
    arithmetic: str = ""
    examples: tuple[Example, ...] = ()
