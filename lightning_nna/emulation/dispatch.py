"""Dispatch every torch function that a forward calls.

``Dispatch`` is a ``TorchFunctionMode``. It finds the call site of each function and runs it as an
operator of the accelerator, as a layout (data-movement) operator, as a constant of the program, or
in float if the accelerator does not have it. It also handles, once for all operators, phases,
in-place results, learned scales, telemetry and listeners.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from lightning_nna.emulation.arguments import first_of, floats, tensors_in, written
from lightning_nna.emulation.arithmetic.deferred_checks import DEFERRED
from lightning_nna.emulation.compilation import COMPILATION_DISABLED
from lightning_nna.emulation.constants import Kind
from lightning_nna.emulation.modes import Mode, SiteCall, Treatment
from lightning_nna.emulation.non_finite import with_cause
from lightning_nna.emulation.operators import driver, float_kernels
from lightning_nna.emulation.operators.call import Call, UnsupportedError
from lightning_nna.emulation.operators.catalog import operator_of, operators
from lightning_nna.emulation.operators.gather import READS
from lightning_nna.emulation.operators.index_arithmetic import CASTS, OF_CONDITIONS, OF_INDICES
from lightning_nna.emulation.operators.layout import (
    EACH,
    JOINS,
    LIKE,
    MOVEMENTS,
    VIEW_PROPERTIES,
    is_movement,
)
from lightning_nna.emulation.operators.linear import LOOK_UPS, index_of_rows
from lightning_nna.emulation.operators.numbers_of_indices import NUMBERS
from lightning_nna.emulation.operators.record import Arguments, Operator
from lightning_nna.emulation.program import Instruction
from lightning_nna.emulation.ranges import MixedQParams, QParams
from lightning_nna.emulation.remedies import reason_against, remedy_of
from lightning_nna.emulation.sites import TRANSPARENT_FILES, CallSites, Location, source_of_call
from lightning_nna.emulation.state import EmulationState
from lightning_nna.emulation.telemetry import Telemetry, in_float

# If two modules are emulated in nested blocks, one dispatch calls the other.
TRANSPARENT_FILES.update((__file__, float_kernels.__file__))

_BACKWARD = frozenset({"backward", "grad"})
# Functions that return Python numbers, indices or masks: they consume values and return none.
_DECISIONS = frozenset(
    """
    item tolist numpy __bool__ __repr__ __format__ __array__ eq ne lt le gt ge __eq__ __ne__ __lt__
    __le__ __gt__ __ge__ isnan isinf isfinite any all argmax argmin nonzero equal allclose
    """.split()
)
# Those of them whose results are indices.
_INDICES = frozenset({"argmax", "argmin"})
# Functions that return shapes or random tensors.
_IGNORED = frozenset(
    """
    __len__ __get__ __set__ size dim numel stride is_contiguous storage_offset data_ptr
    __hash__ is_floating_point is_complex is_inference untyped_storage rand randn rand_like
    randn_like randint
    is_same_size register_hook retain_grad
    record_stream is_tensor is_autocast_enabled get_device element_size nelement
    _nested_tensor_from_mask_left_aligned
    """.split()
)
# Functions that create tensors from numbers.
_FACTORIES = frozenset(
    """
    zeros ones empty full arange range tensor as_tensor scalar_tensor zeros_like ones_like
    empty_like full_like new_zeros new_ones new_empty new_full new_tensor linspace logspace eye
    bartlett_window blackman_window hamming_window hann_window kaiser_window
    """.split()
)
# Those whose values are whatever the memory has.
_EMPTY = frozenset({"empty", "empty_like", "new_empty"})
# Functions whose result is random.
_RANDOM = frozenset(
    """
    bernoulli bernoulli_ cauchy_ exponential_ geometric_ log_normal_ multinomial normal normal_
    poisson random_ uniform_
    """.split()
)
# Functions that make numbers of conditions.
_CASTS = frozenset({"float", "to", "type", "type_as"})
# Types that hold every integer of an activation times its scale.
_EXACT = (torch.float32, torch.float64)
# Operators that update running statistics.
_FOLLOWS_STATISTICS = ("batch_norm", "instance_norm")
_FLOAT, _COMPLEX = 1, 2
_FILLS = ("masked_fill", "masked_fill_")
# Functions whose result holds values of their tensors, whose parameters it has if they share them.
_SELECTIONS = ("where", "maximum", "minimum")
_PRODUCTS = ("mul", "__mul__", "__rmul__", "multiply")
# No network multiplies activations by less.
_ABSENT = -1e9

# Functions whose treatment depends on more than whether a float tensor is among their arguments.
_SPECIAL = frozenset(
    {
        *("copy_", "__setitem__", "where", "pad", "constant_pad_nd"),
        *(*_FILLS, *_CASTS, *READS, *LOOK_UPS, *JOINS, *CASTS),
    }
)
# Functions that initialize a parameter or make a mask, and then run as torch does.
_PREPARING = frozenset({*_RANDOM, *_FILLS, *_PRODUCTS})


@dataclass(frozen=True, slots=True)
class _Function:
    """Describe a torch function by what is needed with every call.

    Args:
        name: Name.
        kind: Kind, see :func:`_kind_of`; ``""`` if it depends on the call.
        is_plain: Whether a call with a float tensor is nothing else than a call of an operator.
        is_movement: Whether a call is nothing else than a call of a layout operator.
        is_random: Whether its result is random.
        may_prepare: Whether it may initialize a parameter or make a mask.
    """

    name: str
    kind: str
    is_plain: bool
    is_movement: bool
    is_random: bool
    may_prepare: bool


# Descriptions by function.
_FUNCTIONS: dict[Callable[..., Any], _Function] = {}


class Dispatch(TorchFunctionMode):
    """Run torch functions in the modules in scope as the accelerator does.

    Args:
        state: State of the module.
        call_sites: Finder of the call site of the running code.
    """

    def __init__(self, state: EmulationState, call_sites: CallSites) -> None:
        super().__init__()
        self.state, self.call_sites = state, call_sites
        self.scope = call_sites.scope
        # By the key of the site, with the mode that the call was made for.
        self._calls: dict[str, tuple[Mode, Call]] = {}

    # --- scopes ---------------------------------------------------------------------------------

    def enter(self) -> None:
        """Start dispatching in this thread; calls nest.

        Weights are quantized again for each outermost scope. ``torch.compile`` is disabled, since
        the dispatch cannot see the functions of compiled code.

        Raises:
            RuntimeError: If compiled code is running already.
        """
        if self.scope.entered == 0:
            self.state.forget_weights()
            self.state.follow_tensors()
            self.state.numbers.refresh()
            COMPILATION_DISABLED.enter()
            self.__enter__()
        self.scope.entered += 1

    def leave(self) -> None:
        """Undo one :meth:`enter`."""
        self.scope.entered -= 1
        if self.scope.entered == 0:
            self.__exit__(None, None, None)
            # They hold receivers of the mode.
            self._calls.clear()
            COMPILATION_DISABLED.leave()

    def unwind(self, entered: int, depth: int) -> None:
        """Leave scopes and forwards that an exception has ended.

        Args:
            entered: Number of scopes that stay entered.
            depth: Number of modules whose forward still runs.
        """
        del self.scope.stack[depth:]
        while self.scope.entered > entered:
            self.leave()

    def begin_forward(self, path: str) -> None:
        """Enter the scope of a module whose forward begins.

        Raises:
            RuntimeError: If the module is to be emulated and has no ranges.
        """
        if not self.state.calibrated:
            self.state.require_ranges()
        self.enter()
        if not self.scope.stack:
            self.state.constants.begin_forward()
        self.scope.stack.append(path)

    def end_forward(self, path: str, result: Any, *, is_root: bool) -> None:
        """Leave the scope of a module whose forward has ended, or raised."""
        # If another hook raised, the forward has not begun.
        if self.scope.stack and self.scope.stack[-1] == path:
            self.scope.stack.pop()
            if is_root:
                self.state.note_outside_consumers(result)
            self.leave()

    # --- classification -------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function as an operator, a layout operator, a constant, ignored, or a fallback."""
        kwargs = kwargs or {}
        function = _FUNCTIONS.get(func) or _describe(func)
        kind = function.kind
        if kind == "ignored" and "out" not in kwargs:
            return func(*args, **kwargs)
        if function.is_plain:
            types_given = _types_in(args)
            if kwargs:
                types_given |= _types_in(kwargs.values())
            if types_given:
                return self._compute(function, func, args, kwargs, types_given)
        if function.is_movement:
            return self._move(func, args, kwargs)
        if kind in ("ignored", "assignment"):
            return self._plainly(func, args, kwargs)
        if kind == "backward":
            return self._outside(func, args, kwargs)
        if kind == "factory":
            return self._create(func, args, kwargs)
        return self._classify(function, func, args, kwargs)

    def _classify(
        self,
        function: _Function,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a function whose treatment depends on its arguments."""
        name, kind = function.name, function.kind
        of_indices = self._operator_of_indices(name, args, kwargs)
        if of_indices is not None:
            path, location = self.call_sites.locate()
            if path is not None:
                key = self._key(path, of_indices.name, location)
                return self._run(of_indices, key, func, args, kwargs)
        if function.is_plain:
            # No argument is a float tensor: see the caller.
            if self._joins_conditions(name, args):
                return self._compute(function, func, args, kwargs, types_given=0)
            return self._decide(func, args, kwargs)
        if kind == "decision":
            if not _types_in((args, kwargs)):
                return self._decide(func, args, kwargs)
            if not self._is_comparison(name, args, kwargs):
                self.state.note_outside_consumers((args, kwargs))
                return self._decide(func, args, kwargs)
        if name in _CASTS and args and self._is_condition(args[0]):
            result = self._move(func, args, kwargs)
            is_number = isinstance(result, Tensor) and result.dtype == torch.float32
            if is_number and self.call_sites.in_scope():
                return self.__torch_function__(torch.where, (), (args[0], 1.0, 0.0))
            return result
        if name in _CASTS and args and self._is_computed(args[0]):
            result = self._move(func, args, kwargs)
            path, location = self.call_sites.locate()
            if path is None or not isinstance(result, Tensor) or result.dtype != torch.float32:
                return result
            key = self._key(path, NUMBERS.name, location)
            return self._run(NUMBERS, key, Tensor.float, (args[0],), {})
        moves = kind == "layout" or name == "copy_" or self._is_padding(name, args, kwargs)
        if moves and not self._looks_up(name, args, kwargs):
            return self._move(func, args, kwargs)
        if name == "__setitem__" and _is_there_already(*args):
            return None
        if name in JOINS and self._share_qparams(name, (args, kwargs)):
            return self._move(func, args, kwargs)
        types_given = _types_in(args) | _types_in(kwargs.values())
        is_select = name == "where" and args and self._is_condition(args[0])
        if not types_given and not is_select and not self._joins_conditions(name, args):
            return self._decide(func, args, kwargs)
        return self._compute(function, func, args, kwargs, types_given)

    def _compute(
        self,
        function: _Function,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        types_given: int,
    ) -> Any:
        """Run a function of float tensors or conditions as an operator, a constant or a fallback.

        Args:
            function: Description of ``func``.
            func: Torch function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            types_given: Types among the arguments, see :func:`_types_in`.
        """
        path, location = self.call_sites.locate()
        name, state = function.name, self.state
        if path is None:
            if name in _SELECTIONS:
                # A decoder selects among states between the forwards that it calls.
                # A number need not be a multiple of their scale.
                has_number = any(isinstance(x, (int, float)) for x in (*args, *kwargs.values()))
                if not has_number and self._share_qparams(name, (args, kwargs)):
                    return self._move(func, args, kwargs)
            state.note_outside_consumers((args, kwargs) if kwargs else args)
            return self._plainly(func, args, kwargs)
        operator = operator_of(name)
        label = name.strip("_") if operator is None else operator.name or name
        run = float_kernels.FLOAT_FUNCTIONS.get(name, func)
        # The input of a layer with weights is an activation, even if it was computed from integers.
        layer = operator if operator is not None and operator.name else operators().get(label)
        has_weights = layer is not None and layer.has_weights
        if not has_weights and not label.startswith("embedding") and not function.is_random:
            depends = state.constants.kind_of((args, kwargs) if kwargs else args)
            if depends is not None:
                key = self._key(path, label, location)
                return self._fold(key, func, run, args, kwargs, depends)
        if function.may_prepare:
            if _initializes_parameter(name, args, kwargs):
                return self._plainly(func, args, kwargs)
            if _scales_a_mask(name, args):
                state.note_outside_consumers((args, kwargs))
                return self._plainly(func, args, kwargs)
            if _makes_a_mask(name, args, kwargs) and not self._share_qparams(
                name, first_of(args, kwargs)
            ):
                return self._plainly(func, args, kwargs)
        mode, reason = state.modes.current, None
        if operator is None or types_given & _COMPLEX:
            reason = remedy_of(name)
        else:
            if mode.phase != "float":
                reason = reason_against(operator, name, state.spec, args, kwargs)
            if has_weights:
                state.constants.mark_layer_inputs(args)
        if operator is None or reason is not None:
            # A form that the accelerator lacks has the name of its torch function.
            key = self._key(path, name.strip("_"), location)
            return self._fall_back(key, func, run, args, kwargs, reason or "")
        if mode.phase == "float":
            return func(*args, **kwargs)
        key = self.call_sites.key(path, label, location)
        return self._emulate_or_observe(operator, key, mode, func, args, kwargs)

    def _key(self, path: str, label: str, location: Location) -> str:
        """Return the key of a call site; in float sites are not numbered, since none is used."""
        if self.state.modes.current.phase == "float":
            return f"{path}/{label}"
        return self.call_sites.key(path, label, location)

    def _create(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Create a tensor from numbers: a constant, if the code is emulated."""
        result = self._plainly(func, args, kwargs)
        # The first argument of ``new_full`` and the like gives no values, only a device and dtype.
        contents = (args[1:], kwargs) if func.__name__.startswith(("new_", "full")) else ()
        contents = (args, kwargs) if func.__name__ in ("tensor", "as_tensor", "full") else contents
        if isinstance(result, Tensor) and self.call_sites.in_scope():
            if (
                func.__name__ in _EMPTY and not result.requires_grad
            ):  # A forward fills it in parts, each with parameters.
                result.zero_()
            self.state.constants.mark_created(result, contents)
        return result

    def _decide(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a comparison, or a function of integers; its result is data if an argument is."""
        arguments = (args, kwargs) if kwargs else args
        kind = self.state.constants.kind_of(arguments)  # Before a write ends the marks.
        result = self._plainly(func, args, kwargs)
        self.state.constants.mark_decision(result, kind, arguments, self.call_sites.in_scope)
        return result

    def _plainly(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a function as torch does, and note its writes."""
        result = func(*args, **kwargs)
        if targets := written(func, args, kwargs):
            self.state.note_writes(targets)
        return result

    def _outside(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a function that may call forwards, as a backward does with activation checkpointing.

        PyTorch disables the function mode while it handles a function; such a forward enters it
        again.
        """
        entered, stack = self.scope.entered, self.scope.stack
        self.scope.entered, self.scope.stack = 0, []
        self.state.modes.in_backward.append(threading.get_ident())
        try:
            return func(*args, **kwargs)
        finally:
            self.state.modes.in_backward.remove(threading.get_ident())
            self.scope.entered, self.scope.stack = entered, stack
            # Hooks of a backward are not dispatched, and may have written to weights by ``.data``.
            self.state.forget_weights()

    # --- operators -------------------------------------------------------------------------------

    def _run(
        self,
        operator: Operator,
        key: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run an operator of the accelerator in the mode of the thread."""
        mode = self.state.modes.current
        if mode.phase == "float":
            return func(*args, **kwargs)
        return self._emulate_or_observe(operator, key, mode, func, args, kwargs)

    def _emulate_or_observe(
        self,
        operator: Operator,
        key: str,
        mode: Mode,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run an operator of the accelerator in a mode other than float."""
        state = self.state
        if not state.calibrated:
            state.require_ranges()
        known = self._calls.get(key)
        if known is None or known[0] is not mode:
            known = self._calls[key] = mode, self._new_call(key, mode)
        call = known[1]
        targets = written(func, args, kwargs)
        try:
            if targets:
                return self._run_writing(targets, operator, call, func, args, kwargs)
            result = self._emulate(operator, call, func, args, kwargs)
        except UnsupportedError as error:
            if func.__name__ in _INDICES:
                # As without a kernel: the index decides in Python.
                state.note_outside_consumers((args, kwargs))
                return self._decide(func, args, kwargs)
            return self._fall_back(key, func, func, args, kwargs, str(error))
        # Indices, as those of maxima, and conditions.
        if not isinstance(result, Tensor) or not result.is_floating_point():
            state.constants.mark(result, None)
        if operator.name and mode.listener is not None:
            self._tell(key, "emulated", func, (args, kwargs), result)
        return result

    def _new_call(self, key: str, mode: Mode) -> Call:
        """Return the call of a site in a mode; one serves all calls of the site in that mode."""
        bits = self.state.spec.activation_bits
        return Call(
            self.state,
            key,
            mode.phase == "observe",
            # With 16 bits, rounding in float32 would be wrong too often.
            mode.fidelity == "exact" or bits == 16,
            bits,
            recorder=mode.recorder,
            telemetry=mode.telemetry if mode.phase == "emulate" else None,
        )

    def _emulate(
        self,
        operator: Operator,
        call: Call,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Compute the operator's result, a new tensor; ``func`` is its torch function."""
        key = call.site
        # The float result for the telemetry would update the batch statistics a second time.
        is_sampled = operator.name and operator.name not in _FOLLOWS_STATISTICS
        telemetry = call.telemetry if is_sampled else None
        noted = DEFERRED.noted
        try:
            if call.recorder is None:
                result = driver.run(operator, call, args, kwargs)
            else:
                # Nothing is recorded of a function that turns out to be no operator.
                recorded: list[Instruction] = []
                buffered = replace(call, recorder=recorded.append)
                result = driver.run(operator, buffered, args, kwargs)
                for instruction in recorded:
                    call.recorder(instruction)
        except FloatingPointError as error:
            raise with_cause(error, key, (args, kwargs), self.state.names) from error
        if DEFERRED.noted > noted:
            self._explain(noted, key, args, kwargs)
        if telemetry is not None:
            self._compare(telemetry, operator, key, func, (args, kwargs), result)
        if self.state.scales.learning == "all" and f"{key}/output" in self.state.scales.activations:
            result = self._learn_output(key, result, func, args, kwargs)
        return result

    def _compare(
        self,
        telemetry: Telemetry,
        operator: Operator,
        key: str,
        func: Callable[..., Any],
        arguments: Arguments,
        result: Any,
    ) -> None:
        """Tell the telemetry how far a result is from the float one, both without dropout."""
        undropped = operator.without_dropout(*arguments[0], **arguments[1])
        if undropped is not None:
            # Float and emulation drop other values: what was dropped is no error of the arithmetic.
            arguments = undropped
            result = self._again(operator, key, arguments)
        exact = in_float(func, *arguments)
        first = result if isinstance(result, Tensor) else result[0]
        if exact is not None and first.is_floating_point():
            exact = self.state.fusion.apply_relu(key, exact)
            telemetry.compare(key, exact, first, self.state.qparams_of(first))

    def _again(self, operator: Operator, key: str, arguments: Arguments) -> Any:
        """Emulate a site once more, which nobody records, counts or differentiates."""
        args, kwargs = arguments
        modes = self.state.modes
        unseen = replace(modes.current, telemetry=None, recorder=None, listener=None)
        around = modes.enter(unseen)
        try:
            with torch.no_grad():
                return driver.run(operator, self._new_call(key, unseen), args, kwargs)
        finally:
            modes.enter(around)

    def _explain(self, noted: int, key: str, args: Any, kwargs: dict[str, Any]) -> None:
        """Let checks that a device has not computed yet name the site and its parameters."""
        names = self.state.names
        parameters = [x for x in tree_leaves((args, kwargs)) if id(x) in names]

        def named(error: Exception) -> Exception:
            if not isinstance(error, FloatingPointError):
                return error
            return with_cause(error, key, parameters, names)

        DEFERRED.explain(noted, named)

    def _learn_output(
        self, key: str, result: Tensor, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        """Let the gradient reach the learned scale, if the result has one."""
        qparams = self.state.qparams_of(result)
        if (
            qparams is None
            or not result.requires_grad
            or not self.state.scales.is_learned(f"{key}/output", qparams)
        ):
            return result
        operands = self.state.quantized_operands(args, kwargs)
        learned = self.state.scales.learn_output(f"{key}/output", result, qparams, func, operands)
        self.state.set_qparams(learned, qparams)
        self.state.fusion.note_copy(result, learned)
        return learned

    # --- in-place results -----------------------------------------------------------------------

    def _run_writing(
        self,
        targets: list[Tensor],
        operator: Operator,
        call: Call,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run an operator whose result is written to an existing tensor.

        The operator returns a new tensor, which is then copied to the target. If a backward will
        follow, the target's values are copied before: autograd has saved them as an operand.
        """
        if kwargs.get("out") is not None:
            return self._run_into(targets, operator, call, func, args, kwargs)
        target = targets[0]
        if not args:
            args, kwargs = (target,), {k: v for k, v in kwargs.items() if k != "input"}
        has_backward = torch.is_grad_enabled() and any(
            x.requires_grad for x in floats((args, kwargs))
        )
        operand = self.state.clone(target) if has_backward else target
        args, kwargs = tree_map(lambda x: operand if x is target else x, (args, kwargs))
        result = self._emulate(operator, call, partial(_on_a_copy, func), args, kwargs)
        self._store(target, result)
        if operator.name:
            self._tell(call.site, "emulated", func, (args, kwargs), target)
        return target

    def _run_into(
        self,
        targets: list[Tensor],
        operator: Operator,
        call: Call,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run an operator with ``out=``; as in torch, without gradients and with any shape."""
        others = {key: value for key, value in kwargs.items() if key != "out"}
        if torch.is_grad_enabled() and any(x.requires_grad for x in floats((args, others))):
            return func(*args, **kwargs)  # Raises what torch raises.
        result = self._emulate(operator, call, func, args, others)
        results = [result] if isinstance(result, Tensor) else list(result)
        for target, each in zip(targets, results, strict=True):
            if target.shape != each.shape:
                target.resize_(each.shape)
            self._store(target, each)
        if operator.name:
            self._tell(call.site, "emulated", func, (args, others), kwargs["out"])
        return kwargs["out"]

    def _store(self, target: Tensor, result: Tensor) -> None:
        """Write an operator's result and its quantization parameters to another tensor.

        Marks of the target, and of every tensor that shares its memory, end.
        """
        qparams, base = self.state.qparams_of(result), self.state.parameters_of_base(target)
        target.copy_(result)
        self.state.note_writes([target])
        self.state.fusion.note_copy(result, target)
        if not target.is_floating_point():
            self.state.constants.mark(target, None)
        # Other dtypes cannot hold every integer.
        if qparams is not None and target.dtype == torch.float32:
            self.state.set_qparams(target, qparams)
            self.state.restore_base(target, qparams, base)

    def _move(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layout function: float results get the quantization parameters of the source.

        The source is the first float tensor among the arguments; for ``copy_`` the second argument.
        """
        name = func.__name__
        is_copy = name == "copy_"
        if not is_copy and not (name in EACH and _tensors_of(args)):
            source = first_of(args, kwargs)
            if isinstance(source, Tensor) and source.is_floating_point():
                qparams = self.state.qparams_of(source)
                if qparams is not None:
                    return self._move_activation(func, args, kwargs, source, qparams)
        first = args[1] if is_copy else first_of(args, kwargs)
        if name in EACH and (several := _tensors_of(args)):
            return self._move_each(func, args, kwargs, several)
        sources = first if is_copy or name in LIKE else (args, kwargs)
        is_float = isinstance(first, Tensor) and first.is_floating_point()
        source = next(iter(floats(first if is_float or name in LIKE else args)), None)
        is_identity = _is_identity(func, args)
        if source is not None and not is_identity:
            self.state.fusion.note_consumer(source, "a layout operator")
        qparams = None if source is None else self.state.qparams_of(source)
        kind = None if qparams is not None else self.state.constants.kind_of(sources)
        base = self.state.parameters_of_base(args[0]) if is_copy else None
        result = func(*args, **kwargs)
        self.state.note_writes(written(func, args, kwargs), kind)
        if is_copy and qparams is not None and result.dtype == torch.float32:
            self.state.restore_base(result, qparams, base)
        # A kind other than data is noted of floats alone.
        if kind is None or (_types_in((result,)) and self.call_sites.in_scope()):
            self.state.constants.mark(result, kind)
        mixed = None
        if source is not None and qparams is None:
            mixed = self.state.mixed_qparams_of(source)
        if mixed is not None and source is not None and not is_copy:
            self._move_mixed_qparams(mixed, source, (func, args, kwargs), result)
        if source is not None and qparams is None and kind is None:
            for leaf in floats(result):
                self.state.fusion.note_layout(source, leaf)
        if source is not None and is_identity:
            self.state.fusion.note_copy(source, result)
        elif source is not None and kind is None and self.state.modes.current.listener is not None:
            self._tell_of_layout(func, (args, kwargs), result)
        if qparams is not None:
            for leaf in floats(result):
                if leaf.dtype in _EXACT:
                    self.state.set_qparams(leaf, qparams)
        return result

    def _move_activation(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        source: Tensor,
        qparams: QParams,
    ) -> Any:
        """Run a layout function of one activation, of any shape, with its parameters."""
        state, is_identity = self.state, _is_identity(func, args)
        if not is_identity:
            state.fusion.note_consumer(source, "a layout operator")
        result = func(*args, **kwargs)
        if targets := written(func, args, kwargs):
            state.note_writes(targets)
        is_tensor = isinstance(result, Tensor)
        if not is_tensor or not result.is_floating_point():
            state.constants.mark(result, None)
        if is_identity:
            state.fusion.note_copy(source, result)
        elif state.modes.current.listener is not None:
            self._tell_of_layout(func, (args, kwargs), result)
        for leaf in (result,) if is_tensor else floats(result):
            if leaf.dtype in _EXACT:
                state.set_qparams(leaf, qparams)
        return result

    def _move_each(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        sources: list[Tensor],
    ) -> Any:
        """Run a layout function of several tensors: each result has the marks of its source."""
        results = func(*args, **kwargs)
        in_scope = self.call_sites.in_scope()
        for source, result in zip(sources, results, strict=True):
            qparams = self.state.qparams_of(source)
            self.state.fusion.note_consumer(source, "a layout operator")
            kind = None if qparams is not None else self.state.constants.kind_of(source)
            if kind is None or in_scope:
                self.state.constants.mark(result, kind)
            if qparams is not None and result.dtype in _EXACT:
                self.state.set_qparams(result, qparams)
            elif kind is None:
                self.state.fusion.note_layout(source, result)
        return results

    def _move_mixed_qparams(
        self,
        mixed: MixedQParams,
        source: Tensor,
        call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]],
        result: Any,
    ) -> None:
        """Attach parameters to the elements of a result: the index moves as the values do."""
        func, args, kwargs = call
        moved = func(*(mixed.index if x is source else x for x in args), **kwargs)
        leaves = moved if isinstance(moved, (tuple, list)) else [moved]
        for leaf, index in zip(floats(result), leaves, strict=True):
            moved_qparams = MixedQParams(index, mixed.qparams)
            qparams = moved_qparams.single() if index.numel() else None
            if qparams is not None:
                self.state.set_qparams(leaf, qparams)
            elif leaf is not source:
                self.state.set_mixed_qparams(leaf, moved_qparams)

    def _is_comparison(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell whether a call compares activations: results are conditions or indices of data."""
        operator = operator_of(name)
        if operator is None or not args:
            return False
        if all(self.state.qparams_of(x) is None for x in floats(args)):
            return False
        # Without a kernel an index decides in Python, as for the loop of a decoder.
        return name not in _INDICES or not reason_against(
            operator, name, self.state.spec, args, kwargs
        )

    def _operator_of_indices(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Operator | None:
        """Return the operator of a call that computes with indices of the data, or reads at them.

        Instructions of integers matter to those alone who record or list them.
        """
        operator = READS.get(name)
        if operator is not None and args:
            if not (args[0].is_floating_point() or self._is_told()):
                return None
            index = tensors_in((args[1:], kwargs))
            if not any(map(self._is_computed, index)) or self._looks_up(name, args, kwargs):
                return None
            return operator
        operator = OF_INDICES.get(name)
        if operator is None or not (name == "where" or self._is_told()):
            return None
        if _types_in(args) or _types_in(kwargs.values()):
            return None
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if not tensors or self.state.constants.kind_of(tensors) is not None:
            return None
        numbers = [x for x in leaves if isinstance(x, (int, float)) and not isinstance(x, bool)]
        if any(isinstance(x, float) for x in numbers):
            return None
        of_conditions = all(x.dtype == torch.bool for x in tensors)
        if name in CASTS:
            types = CASTS[name]
            if not of_conditions or (types and types.isdisjoint(map(_type_of, leaves))):
                return None
        if of_conditions and not numbers and name not in OF_CONDITIONS:
            return None
        return operator

    def _is_told(self) -> bool:
        """Tell whether somebody records the instructions or lists the call sites."""
        mode = self.state.modes.current
        return mode.phase != "float" and (mode.recorder is not None or mode.listener is not None)

    def _is_computed(self, x: Any) -> bool:
        """Tell whether a value is a tensor of integers that are computed of the data."""
        is_integer = isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64)
        return is_integer and self.state.constants.kind_of([x]) is None

    def _is_condition(self, x: Any) -> bool:
        """Tell whether a value is a tensor of booleans that data decide."""
        is_bool = isinstance(x, Tensor) and x.dtype == torch.bool
        return is_bool and self.state.constants.kind_of([x]) is None

    def _joins_conditions(self, name: str, args: tuple[Any, ...]) -> bool:
        """Tell whether a call is a function of conditions alone."""
        operator = operator_of(name)
        if operator is None or operator.name != "logical":
            return False
        if not all(isinstance(x, Tensor) for x in args):
            return False
        return all(x.dtype == torch.bool for x in args) and any(map(self._is_condition, args))

    def _is_padding(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell whether a call fills with zeros, or with values of the tensor, and computes none."""
        if name in _FILLS:
            mask = kwargs["mask"] if "mask" in kwargs else args[1 - ("input" in kwargs)]
            return (
                _filled_in(args, kwargs) == 0 and self.state.constants.kind_of([mask]) is not None
            )
        if name == "constant_pad_nd":
            return not (kwargs["value"] if "value" in kwargs else args[2] if len(args) > 2 else 0)
        if name != "pad":
            return False
        return is_movement(*args[1:], **{k: v for k, v in kwargs.items() if k != "input"})

    def _looks_up(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell whether a call reads rows of a parameter whose numbers the program does not fix."""
        if name not in LOOK_UPS or not isinstance(table := first_of(args, kwargs), nn.Parameter):
            return False
        index = index_of_rows(name, *args[1:], **kwargs)
        if index is None or self.state.constants.is_constant(index):
            return False
        return table.is_floating_point() and self.call_sites.in_scope()

    def _share_qparams(self, name: str, args: tuple[Any, ...]) -> bool:
        """Tell whether all float tensors among arguments have the same quantization parameters.

        While ranges are observed parameters are not known yet, and operators observe a range.
        """
        has_range = name in JOINS and operator_of(name) is not None
        if has_range and self.state.phase == "observe":
            return False
        qparams = [self.state.qparams_of(leaf) for leaf in floats(args)]
        return bool(qparams) and qparams[0] is not None and all(q == qparams[0] for q in qparams)

    def _fold(
        self,
        key: str,
        func: Callable[..., Any],
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kind: Kind,
    ) -> Any:
        """Run in float a function without activations: its result is a constant of the program."""
        result = run(*args, **kwargs)
        targets = written(func, args, kwargs)
        self.state.note_writes(targets, kind)
        self.state.constants.mark((result, targets), kind)
        self._tell(key, "constant", func, (args, kwargs), result)
        return result

    def _fall_back(
        self,
        key: str,
        func: Callable[..., Any],
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        remedy: str,
    ) -> Any:
        """Run a function that the accelerator does not have, in float."""
        if not self.state.calibrated:
            self.state.require_ranges(key, remedy)
        for operand in floats((args, kwargs)):
            self.state.fusion.note_consumer(operand, key)
            self.state.fusion.require_computed(operand, key)
        result = run(*args, **kwargs)
        self.state.note_writes(written(func, args, kwargs))
        self.state.constants.mark(result, None)
        self._tell(key, "fallback", func, (args, kwargs), result, remedy)
        return result

    def _tell(
        self,
        key: str,
        where: Treatment,
        func: Callable[..., Any],
        operands: Any,
        result: Any,
        remedy: str = "",
    ) -> None:
        """Pass a call of a site to the listener of the mode, if any."""
        listener = self.state.modes.current.listener
        if listener is not None:
            name = resolve_name(func) or func.__name__
            listener(SiteCall(key, where, name, source_of_call(), remedy, operands, result))

    def _tell_of_layout(self, func: Callable[..., Any], operands: Any, result: Any) -> None:
        """Pass a call of a data-movement operator to the listener of the mode."""
        path, location = self.call_sites.locate()
        if path is not None:
            key = self.call_sites.key(path, _layout_name(func), location, is_layout=True)
            self._tell(key, "layout", func, operands, result)


def _type_of(x: Any) -> torch.dtype | None:
    """Return a type among the arguments of a cast; of a tensor its own is none."""
    return x if isinstance(x, torch.dtype) else None


def _layout_name(func: Callable[..., Any]) -> str:
    """Return the name of a layout function; of a property, as ``T``, its own."""
    name = func.__name__
    return str(getattr(func, "__self__", func).__name__) if name == "__get__" else name


def _on_a_copy(func: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Compute what an in-place function writes to a tensor, and leave the tensor unchanged."""
    return func(x.clone(), *args, **kwargs)


def _is_identity(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Tell whether a layout function returns its tensor unchanged.

    PyTorch calls ``x.view_as(x)`` if an ``autograd.Function`` returns its input unchanged, as that
    of a module's backward hooks does.
    """
    return func.__name__ == "view_as" and len(args) == 2 and args[0] is args[1]


def _describe(func: Callable[..., Any]) -> _Function:
    """Describe a torch function that is met for the first time."""
    name, kind = _kind_of(func)
    function = _FUNCTIONS[func] = _Function(
        name,
        kind,
        is_plain=not kind and name not in _SPECIAL,
        is_movement=kind == "layout" and name not in {*_SPECIAL, *OF_INDICES},
        is_random=name in _RANDOM,
        may_prepare=name in _PREPARING,
    )
    return function


def _kind_of(func: Callable[..., Any]) -> tuple[str, str]:
    """Return the name of a function and its kind, ``""`` if the kind depends on the call."""
    name = getattr(func, "__name__", "")
    if name in _BACKWARD:
        return name, "backward"
    # A method and a function of other arguments have this name.
    if name in MOVEMENTS and func is not F.unfold:
        return name, "layout"
    if name == "__get__":
        viewed = getattr(getattr(func, "__self__", None), "__name__", "") in VIEW_PROPERTIES
        return name, "layout" if viewed else "ignored"
    if name == "__set__":
        assigned = getattr(getattr(func, "__self__", None), "__name__", "")
        return name, "assignment" if assigned == "data" else "ignored"
    if name in _FACTORIES:
        return name, "factory"
    if name in _DECISIONS:
        return name, "decision"
    return name, "ignored" if name in _IGNORED else ""


def _tensors_of(args: tuple[Any, ...]) -> list[Tensor]:
    """Return the tensors, of any shapes, that a call takes one by one or in a list; [] for one."""
    values = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    return list(values) if not isinstance(args[0], Tensor) or len(args) > 1 else []


def _is_there_already(target: Tensor, index: Any, value: Any) -> bool:
    """Tell whether ``target[index] = value`` writes values over themselves.

    Python calls it so after ``target[index] += x`` has written to the slice.
    """
    if not isinstance(value, Tensor) or value._base is None:
        return False
    with torch._C.DisableTorchFunction(), torch.no_grad():
        view = target[index]
    same = view.shape == value.shape and view.stride() == value.stride()
    return same and view.data_ptr() == value.data_ptr() and view.numel() > 0


def _initializes_parameter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether a call fills a parameter with random numbers, as that of a lazy layer."""
    is_in_place = name in _RANDOM and name.endswith("_")
    return is_in_place and isinstance(first_of(args, kwargs), nn.Parameter)


def _scales_a_mask(name: str, args: tuple[Any, ...]) -> bool:
    """Tell whether a call makes an additive mask of ones and zeros: ``(1 - mask) * -1e9``.

    Its range would leave no integers for the scores; as a mask it only leaves scores out.
    """
    if name not in _PRODUCTS or len(args) < 2:
        return False
    return any(isinstance(x, (int, float)) and x <= _ABSENT for x in args)


def _makes_a_mask(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether a call fills with minus infinity, which makes a mask of attention scores."""
    return name in _FILLS and _filled_in(args, kwargs) == float("-inf")


def _filled_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """Return the number that ``masked_fill`` fills in; None for a tensor."""
    value = kwargs["value"] if "value" in kwargs else args[-1]
    return None if isinstance(value, Tensor) else value


def _types_in(values: Iterable[Any]) -> int:
    """Return bits for float tensors, and for complex tensors or numbers, among arguments.

    Without any of them there is nothing to emulate.
    """
    bits = 0
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                bits |= _FLOAT
            elif value.is_complex():
                bits |= _COMPLEX
        elif isinstance(value, (tuple, list)):
            bits |= _types_in(value)
        elif isinstance(value, dict):
            bits |= _types_in(value.values())
        elif isinstance(value, complex):
            bits |= _COMPLEX
    return bits
