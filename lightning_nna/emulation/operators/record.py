"""One record for every operator: its name, its arithmetic and the kernels that it becomes.

An operator is entered with :func:`register_operator`, from inside of the package or from outside.
Everything that has to know which operators there are (the dispatch, specs, coverage, learned
scales, the export, the tests and the documentation) asks the records. The package's own are in the
modules of this folder, all of which :mod:`.catalog` imports.

    register_operator(
        Operator("sigmoid", torch=("sigmoid", "sigmoid_"), emulate=sigmoid, litert=(LOGISTIC,))
    )
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from torch import Tensor

from lightning_nna.emulation.operators.tables import LookedUp

#: Name of the table of options of a kernel that has none.
NO_OPTIONS = ""

Record = TypeVar("Record")

#: Positional and keyword arguments of a call.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_OPERATORS: dict[str, Operator] = {}
_BY_FUNCTION: dict[str, Operator] = {}
_KERNELS: dict[str, Kernel] = {}
_VIEW: Mapping[str, Operator] = MappingProxyType(_OPERATORS)


@dataclass(frozen=True)
class Kernel:
    """An operator of the TensorFlow Lite schema.

    Args:
        name: Name among the schema's builtin operators, as ``"LOGISTIC"``.
        options: Name of its table of options in the schema; None for the one that follows from the
            name (``"SOFTMAX"``: ``"SoftmaxOptions"``), :data:`NO_OPTIONS` for none.
        versions: Lowest version by the type of the first operand; 1 for a type that is not there.
        versions_by_rank: Pairs of a number of axes and the lowest version for more axes than that.
        version: Function for a version that depends on more than this: takes the version so far,
            the operator and its tensors (see :mod:`lightning_nna.deploy.flatbuffer`), and returns
            the version; None for no such function.
        operands: Names of operands by position, for positions that say what an operand is.
        computes_in_float: Names of torch functions that are no operator of the accelerator, and
            that a runtime computes with this kernel in float, on its CPU.
        order: Orders of elements in which it computes the same numbers, so that an export needs no
            transposition (see :mod:`lightning_nna.deploy.element_order`): ``"fixed"``, that of its
            instruction alone; ``"elements"``, any; ``"rows"``, any order of rows along the last
            axis; ``"columns"``, the same, and any order of columns, as its second operand, the
            weight, has them, too; ``"concatenation"``, ``"padding"`` and ``"reduction"``, any order
            of axes, which an option or the second operand names; ``"table"``, any of the indices
            into a table of one axis.
        fuses_activation: Whether it clips its result as an option, its fused activation, says.

    Example:
        >>> Kernel("TANH", options=NO_OPTIONS, versions={"int8": 2, "int16": 3}).versions["int16"]
        3
    """

    name: str
    options: str | None = None
    versions: Mapping[str, int] = field(default_factory=dict)
    versions_by_rank: tuple[tuple[int, int], ...] = ()
    version: Callable[[int, Any, Any], int] | None = None
    operands: Mapping[int, str] = field(default_factory=dict)
    computes_in_float: tuple[str, ...] = ()
    order: Literal[
        "fixed", "elements", "rows", "columns", "concatenation", "padding", "reduction", "table"
    ] = "fixed"
    fuses_activation: bool = False


@dataclass(frozen=True)
class Form:
    """Other torch functions that become the same operator, with arguments of their own.

    Args:
        torch: Names of the torch functions and methods, or the functions themselves.
        emulate: Function that takes a ``Call`` and the torch function's own arguments.
        supports: Function of the torch function's arguments, see :class:`Operator`.
        without_dropout: Function of the torch function's arguments, see :class:`Operator`.
    """

    torch: Sequence[str | Callable[..., Any]]
    emulate: Callable[..., Any]
    supports: Callable[..., bool | str] = lambda *args, **kwargs: True
    without_dropout: Callable[..., Arguments | None] = lambda *args, **kwargs: None


@dataclass(frozen=True)
class Operator:
    """An operator as the emulator knows it.

    An operator that is one instruction has ``float``, ``integers`` and perhaps ``backward``; the
    driver (:mod:`.driver`) quantizes its operands, observes its range, computes and clips its
    integers, records its instruction and keeps autocast away. An operator that consists of others,
    has weights, or does what the driver does by itself, has ``emulate`` instead.

    Args:
        name: Name in specs, call sites and coverage; empty for functions that are no instruction,
            whose sites are called like the function.
        torch: Names of the torch functions and methods, or the functions themselves; a trailing
            underscore is the in-place form.
        float: The operator on float tensors, with the signature of the torch function.
        operands: Names of the arguments of ``float`` that are activations or constants; the others
            are parameters.
        operand_bits: Widths of the operands that do not have the width of the activations.
        integers: Integers of the result less its zero point, not clipped, whole numbers, in the
            shape of the result: takes the operands as ``Activation``, the quantization parameters
            ``y`` of the result, the ``call``, and the parameters, the latter three by name.
        backward: Gradient of the operand, given that of the result where it was not clipped, what
            ``saves`` names, and the parameters by name; one such function an operand where there
            are several, called where the operand's gradient is asked for; None for the derivative
            of ``float`` at the quantized operands. Gradients may have the shape of the result: the
            driver sums them to that of the operand.
        saves: Values that ``backward`` takes: all quantized operands; those (the ``"factors"``)
            that gradients of other operands need, and None for the rest; the result; or nothing,
            where the gradients are linear and may be summed before.
        output: Quantization parameters of the result by the width of the first operand, where the
            kernel fixes them; None for those of the range that calibration observes.
        output_of: Function of the call, the operands as ``Activation``, and the quantization
            parameters of the observed range: parameters that the kernel can write; None for any.
        options: Options of the instruction by the schema's names, from the parameters.
        instructions: Function that records the instructions, where they are not one with all
            operands in their order: takes the record, the call, the operands and the result as
            ``Activation``, and the parameters by name.
        emulate: Function that takes a ``Call`` and the torch function's own arguments.
        supports: Function of the torch function's arguments: whether the accelerator has this form;
            instead of False it may return a text that says what to write instead.
        without_dropout: Function of the torch function's arguments, where it drops values at
            random: the positional and keyword arguments of a call that drops none, or None if this
            one does not; the telemetry compares such a call.
        forms: Other torch functions of this operator.
        litert: Kernels that this operator brings along; the first is that of its instruction.
        widths: Widths of activations for which it exists.
        learns_scale: Whether the scale of its output can be learned: it is one instruction, whose
            output has a range of its own.
        has_weights: Whether it is a layer with weights, whose input is an activation in any case.
        arithmetic: Its arithmetic in one line, for the table of the documentation.
    """

    name: str
    torch: Sequence[str | Callable[..., Any]]
    float: Callable[..., Tensor] | None = None
    operands: tuple[str, ...] = ("input",)
    operand_bits: Mapping[str, int] = field(default_factory=dict)
    integers: Callable[..., Tensor | LookedUp] | None = None
    backward: Callable[..., Tensor] | tuple[Callable[..., Tensor], ...] | None = None
    saves: Literal["operands", "factors", "result", "nothing"] = "operands"
    output: Mapping[int, Any] | None = None
    output_of: Callable[..., Any] | None = None
    options: Callable[..., dict[str, Any]] = lambda **parameters: {}
    instructions: Callable[..., None] | None = None
    emulate: Callable[..., Any] | None = None
    supports: Callable[..., bool | str] = lambda *args, **kwargs: True
    without_dropout: Callable[..., Arguments | None] = lambda *args, **kwargs: None
    forms: tuple[Form, ...] = ()
    litert: tuple[Kernel, ...] = ()
    widths: tuple[int, ...] = (8, 16)
    learns_scale: bool = False
    has_weights: bool = False
    arithmetic: str = ""

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of all its torch functions.

        Example:
            >>> Operator("sigmoid", torch=("sigmoid", "sigmoid_"), emulate=print).functions
            ('sigmoid', 'sigmoid_')
        """
        of_forms = (name for form in self.forms for name in _names(form.torch))
        return (*_names(self.torch), *of_forms)


def register_operator(operator: Operator) -> Operator:
    """Enter an operator: from now on the accelerators of specs that do not list theirs have it.

    Args:
        operator: Record with a name and torch functions that no other record has.

    Returns:
        The same record.

    Raises:
        ValueError: If another record has the name or one of the torch functions, if another kernel
            has the name of one of its kernels, or if the record says nothing of the arithmetic.

    Example:
        >>> register_operator(Operator("gain", torch=("sigmoid",), emulate=print))
        Traceback (most recent call last):
            ...
        ValueError: operator 'gain' wants the torch function 'sigmoid', which 'sigmoid' has
    """
    if operator.emulate is None and (operator.float is None or operator.integers is None):
        raise ValueError(f"operator {operator.name!r} needs float and integers, or emulate")
    if operator.name and operator.name in _OPERATORS:
        known = ", ".join(_OPERATORS[operator.name].functions)
        raise ValueError(
            f"there are two operators {operator.name!r}: of the torch functions {known}, and of "
            f"{', '.join(operator.functions)}"
        )
    for function in operator.functions:
        if function in _BY_FUNCTION:
            raise ValueError(
                f"operator {operator.name!r} wants the torch function {function!r}, which "
                f"{_BY_FUNCTION[function].name!r} has"
            )
    for kernel in operator.litert:
        register_kernel(kernel)
    if operator.name:
        _insert(_OPERATORS, operator.name, operator)
    _BY_FUNCTION.update(dict.fromkeys(_names(operator.torch), operator))
    for form in operator.forms:
        variant = replace(
            operator,
            emulate=form.emulate,
            supports=form.supports,
            without_dropout=form.without_dropout,
        )
        _BY_FUNCTION.update(dict.fromkeys(_names(form.torch), variant))
    return operator


@contextmanager
def registered(operator: Operator) -> Iterator[Operator]:
    """Enter an operator for the time of a block, as tests of a plugin do.

    Args:
        operator: Record, see :func:`register_operator`.

    Example:
        >>> with registered(Operator("arctan", torch=("atan",), emulate=print)):
        ...     "arctan" in operators()
        True
        >>> "arctan" in operators()
        False
    """
    registers: tuple[dict[str, Any], ...] = (_OPERATORS, _BY_FUNCTION, _KERNELS)
    before = [dict(entries) for entries in registers]
    try:
        yield register_operator(operator)
    finally:
        for entries, earlier in zip(registers, before, strict=True):
            entries.clear()
            entries.update(earlier)


def register_kernel(kernel: Kernel) -> Kernel:
    """Enter a kernel that programs may have; the same one may be entered again.

    Args:
        kernel: Record of the kernel.

    Returns:
        The same record.

    Raises:
        ValueError: If another kernel has its name.

    Example:
        >>> register_kernel(Kernel("TANH"))
        Traceback (most recent call last):
            ...
        ValueError: there are two kernels 'TANH': Kernel(name='TANH', ...
    """
    known = _KERNELS.get(kernel.name, kernel)
    if known != kernel:
        raise ValueError(f"there are two kernels {kernel.name!r}: {known} and {kernel}")
    _insert(_KERNELS, kernel.name, kernel)
    return kernel


def operators() -> Mapping[str, Operator]:
    """Return every operator by its name, in alphabetical order.

    Example:
        >>> operators()["tanh"].widths
        (8, 16)
    """
    return _VIEW


def operator_of(function_name: str) -> Operator | None:
    """Return the operator of a torch function, with what emulates this function.

    Args:
        function_name: Name of the torch function or method, as ``"add_"``.

    Returns:
        The record; None for a function that is no operator of the accelerator.

    Example:
        >>> operator_of("div").name
        'mul'
    """
    return _BY_FUNCTION.get(function_name)


def kernels() -> Mapping[str, Kernel]:
    """Return every kernel that a program may have by its name in the schema, in alphabetical order.

    Example:
        >>> kernels()["LOGISTIC"].versions["int16"]
        3
    """
    return MappingProxyType(_KERNELS)


def _insert(records: dict[str, Record], name: str, record: Record) -> None:
    """Add a record, and keep the alphabetical order."""
    entries = sorted({**records, name: record}.items())
    records.clear()
    records.update(entries)


def _names(functions: Sequence[str | Callable[..., Any]]) -> list[str]:
    """Names of torch functions, which the dispatch knows them by."""
    return [each if isinstance(each, str) else each.__name__ for each in functions]
