"""The oracle that every operator of the accelerator passes, also one from outside of the package.

:func:`check_operator` takes the name of a registered operator and example networks. An operator
runs in integers, so nearly every check demands equality in every bit. It needs the extra
``deploy``.

    softplus = Example(nn.Softplus, ((120, 100),))
    check_operator("softplus", [softplus])

With pytest, each check is a test of its own:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_softplus(check):
        check_operator("softplus", [softplus], checks=[check])
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna.deploy import TFLiteModel, export_tflite, verify
from lightning_nna.emulation import calibrate, coverage, emulate
from lightning_nna.emulation.modes import FIDELITIES
from lightning_nna.emulation.operators.catalog import operators
from lightning_nna.emulation.operators.record import Operator
from lightning_nna.emulation.spec import DEFAULT_PRESET, PRESETS
from lightning_nna.testing.replay import WITHOUT_REFERENCE, replays

#: Presets whose activations have so many bits, of LiteRT.
SPECS = {8: "litert-int8", 16: "litert-int16x8"}
#: The same by runtime.
SPECS_OF = {
    "litert": SPECS,
    "tflm": {8: "tflm-int8", 16: "tflm-int16x8"},
    "tosa": {8: "tosa-int8", 16: "tosa-int16x8"},
}
#: Number of results that random inputs compare at least.
MANY = 10_000
# Gradients of quantized operands point where those of the float network do.
_LEAST_COSINE = 0.9
_NOISE = 1e-4
_NO_SECOND_DERIVATIVE = re.compile(r"an emulated operator \(.+\) has no second derivative")


@dataclass(frozen=True)
class Example:
    """A network around one operator.

    Args:
        build: Function that returns the module; its forward returns one tensor.
        shapes: Shapes of its inputs, float32, large enough for 10,000 results of one instruction.
        rows: Number of rows that inputs select, if they are integers as those of an embedding; 0
            for float inputs.
        moves_only: Whether no instruction computes so many results, as in a concatenation.
        fast_tolerance: Largest fraction of 8-bit results in which fast fidelity may differ.
        exported: Whether the network can be exported as it is.
    """

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    rows: int = 0
    moves_only: bool = False
    fast_tolerance: float = 1e-3
    exported: bool = True

    def inputs(self, offset: float = 0.4) -> list[Tensor]:
        """Draw inputs: normal numbers around ``offset``, or row numbers."""
        if self.rows:
            return [torch.randint(self.rows, shape) for shape in self.shapes]
        return [torch.randn(shape) + offset for shape in self.shapes]


Check = Callable[[Operator, Example, str], None]


def check_operator(
    operator: str | Operator,
    examples: Sequence[Example],
    *,
    widths: Iterable[int] | None = None,
    runtime: str = PRESETS[DEFAULT_PRESET].runtime,
    checks: Iterable[Check] | None = None,
) -> None:
    """Demand everything that holds for operators of the accelerator.

    Args:
        operator: Record of the operator, or its name.
        examples: Networks that consist of it.
        widths: Bits of activations; None for all widths of the record.
        runtime: Runtime whose kernels it is compared with, a key of :data:`SPECS_OF`; the default
            preset's unless given.
        checks: Functions of :data:`CHECKS`; None for all.

    Raises:
        AssertionError: If a check fails; the message names operator, preset, example and check.
        ValueError: If there is no example.
    """
    record = operators()[operator] if isinstance(operator, str) else operator
    if not examples:
        raise ValueError(f"operator {record.name!r} has no example to check: give at least one")
    for bits in record.widths if widths is None else widths:
        spec = SPECS_OF[runtime][bits]
        for index, example in enumerate(examples):
            for check in CHECKS if checks is None else checks:
                torch.manual_seed(0)
                try:
                    check(record, example, spec)
                except AssertionError as error:
                    raise AssertionError(
                        f"operator {record.name!r}, {spec}, example {index}, "
                        f"{check.__name__}: {error}"
                    ) from error


def equals_the_runtime_on_random_inputs(operator: Operator, example: Example, spec: str) -> None:
    """Compare at least 10,000 results of random inputs, a few of them beyond the range."""
    inputs = example.inputs()
    wider = inputs if example.rows else [1.5 * x for x in inputs]
    compared = replays(example.build(), *inputs, inputs=wider, spec=spec)
    compared.pop("QUANTIZE", None)
    assert compared, "no instruction was recorded"
    most = max(compared.values())
    assert example.moves_only or most >= MANY, (
        f"the largest instruction has {most} results, of {MANY} that are needed: enlarge the shapes"
    )


def equals_the_runtime_in_the_worst_case(operator: Operator, example: Example, spec: str) -> None:
    """Compare with every weight and every input at an end of its range, and beyond it.

    In some rows all are at the same end, so that sums are as large as they get.
    """
    module = example.build()
    for parameter in module.parameters():
        parameter.data = torch.where(torch.rand_like(parameter) < 0.5, -1.0, 1.0)
        parameter.data[: len(parameter) // 2] = 1.0
    if example.rows:
        replays(module, *example.inputs(), spec=spec)
        return
    worst = [torch.randn(shape).sign() for shape in example.shapes]
    for x in worst:
        count = max(1, len(x) // 4)
        x[:count], x[count : 2 * count] = 1.0, -1.0
    calibration = [x * torch.rand(x.shape) for x in worst]
    calibration[0].view(-1)[:2] = torch.tensor([-1.0, 1.0])
    for inputs in (worst, [3 * x for x in worst]):  # At the ends of the range, and beyond.
        replays(module, *calibration, inputs=inputs, spec=spec)


def is_covered(operator: Operator, example: Example, spec: str) -> None:
    """Demand a call site of the operator on the accelerator, and none on the CPU."""
    table = coverage(example.build(), *example.inputs(), spec=spec)
    assert not table.fallbacks, f"{[row.site for row in table.fallbacks]} run on the CPU"
    sites = [row.site for row in table.rows if row.where == "emulated"]
    names = {site.rsplit("/", 1)[1].split("#")[0] for site in sites}
    assert operator.name in names, f"no site of it is among {sites}"


def is_exported(operator: Operator, example: Example, spec: str) -> None:
    """Export the network and demand that the runtime computes every bit of it."""
    if not example.exported:
        return
    module, inputs = example.build().eval(), example.inputs()
    _calibrate(module, inputs, spec)
    with TemporaryDirectory() as folder:
        model = export_tflite(module, inputs, Path(folder) / "network.tflite")
        agreement = verify(module, model.path, inputs, runtime=runtime_for(model))
    written = set(model.operators)
    accelerator = PRESETS[spec]
    dtype = f"int{accelerator.activation_bits}"
    kernels = [kernel.name for kernel in operator.litert]
    # Without its own kernel it is a table, or has another form.
    has_all = all(accelerator.has_kernel(name, dtype) for name in kernels)
    assert not (kernels and has_all) or not written.isdisjoint(kernels), (
        f"none of {kernels} is among the program's instructions {sorted(written)}"
    )
    assert agreement == 1.0, f"the runtime disagrees with the exported program: {agreement}"


def fast_fidelity_is_close(operator: Operator, example: Example, spec: str) -> None:
    """Demand that fast fidelity differs nowhere in 16 bits, and nearly nowhere in 8."""
    module, inputs = example.build(), example.inputs()
    results = []
    with emulate(module, spec) as chip, torch.no_grad():
        with chip.observing():
            module(*inputs)
        for fidelity in FIDELITIES:
            with chip.running(fidelity=fidelity):
                results.append(module(*(x if example.rows else 1.1 * x for x in inputs)))
    fraction = float((results[0] != results[1]).float().mean())
    allowed = {8: example.fast_tolerance, 16: 1e-9}[PRESETS[spec].activation_bits]
    assert fraction < allowed, f"fast fidelity differs in a fraction of {fraction} of the results"


def gradients_are_straight_through(operator: Operator, example: Example, spec: str) -> None:
    """Compare gradients with those of the float network: finite, and of the same direction."""
    module, inputs = example.build(), example.inputs()
    _calibrate(module, inputs, spec)
    leaves = [x.requires_grad_(not example.rows) for x in inputs]
    in_float = _gradients(module, leaves)
    with emulate(module, spec):
        emulated = _gradients(module, leaves)
    largest = max(float(x.abs().max()) for x in in_float.values())
    for name, expected in in_float.items():
        result = emulated.get(name)
        assert result is not None, f"{name} has no gradient"
        assert result.isfinite().all(), f"the gradient of {name} is not finite"
        # A gradient that is rounding noise in float (a bias before a batch norm) has no direction.
        if expected.abs().max() > _NOISE * largest:
            cosine = float(F.cosine_similarity(result.flatten(), expected.flatten(), dim=0))
            assert cosine > _LEAST_COSINE, (
                f"the gradient of {name} has a cosine of {cosine:.3f} with that of float"
            )


def second_derivative_is_an_error(operator: Operator, example: Example, spec: str) -> None:
    """Demand an error that names the operator, unless the second derivative is zero in float."""
    if example.rows:
        return
    module, inputs = example.build(), example.inputs()
    _calibrate(module, inputs, spec)
    leaves = [x.requires_grad_() for x in inputs]
    with emulate(module, spec):
        try:
            torch.autograd.grad(module(*leaves).sum(), leaves, create_graph=True)
        except RuntimeError as error:
            message = str(error)
        else:
            message = ""
    if message:
        assert _NO_SECOND_DERIVATIVE.search(message), f"create_graph raises {message!r}"
        return
    slopes = torch.autograd.grad(module(*leaves).sum(), leaves, create_graph=True)
    for slope in slopes:
        if slope.requires_grad:
            curvatures = torch.autograd.grad(
                slope.sum(), leaves, retain_graph=True, allow_unused=True
            )
            assert all(c is None or not c.any() for c in curvatures), (
                "create_graph raises nothing, and the float network has a second derivative"
            )


def not_finite_inputs_are_errors(operator: Operator, example: Example, spec: str) -> None:
    """Demand an error that names the call site for NaN and infinity, if the operator reads them."""
    if example.rows:
        return
    for value in (float("nan"), float("inf"), -float("inf")):
        for index in range(len(example.shapes)):
            module, inputs = example.build(), example.inputs()
            spoiled = [x.clone() for x in inputs]
            spoiled[index].view(-1)[1] = value
            with emulate(module, spec) as chip, torch.no_grad():
                with chip.observing():
                    module(*inputs)
                try:
                    module(*spoiled)
                except FloatingPointError as error:
                    message = str(error)
                else:
                    message = "no error"
            assert re.search(r"/\w+#\d+.* not finite", message), (
                f"{value} in input {index} gives {message!r}, and not its call site"
            )


def in_place_is_the_same(operator: Operator, example: Example, spec: str) -> None:
    """Compare values and gradients of in-place forms with those of the other form, to the bit."""
    for label, in_place, plain in in_place_forms(operator):
        x = torch.randn(20, 30)
        results = []
        for function in (in_place, plain):
            module = _Affine(function)
            _calibrate(module, [x], spec)
            with emulate(module, spec):
                leaf = x.clone().requires_grad_()
                y = module(leaf)
                (y * y).sum().backward()
            results.append((y.detach(), leaf.grad))
        for first, second, kind in zip(*results, ("values", "gradients"), strict=True):
            assert first is not None
            assert second is not None
            assert torch.equal(first, second), f"{label} has other {kind} than its other form"


def scale_is_learned(operator: Operator, example: Example, spec: str) -> None:
    """Demand a gradient of the output's scale, if the record says that it is learned."""
    module, inputs = example.build(), example.inputs()
    _calibrate(module, inputs, spec)
    leaves = [x.requires_grad_(not example.rows) for x in inputs]
    with emulate(module, spec, learned_scales="all") as chip:
        module(*leaves).square().sum().backward()
        scales = {
            key: scale
            for key, scale in chip.scales.activations.items()
            if re.search(rf"/{operator.name}#\d+/output$", key)
        }
    if not operator.learns_scale:
        assert not scales, f"{list(scales)} are learned, which the record says are not"
        return
    gradients = [scale.grad for scale in scales.values() if scale.grad is not None]
    assert gradients, f"no scale of {operator.name} has a gradient"
    assert all(bool(g.isfinite()) for g in gradients), "the gradient of a scale is not finite"


#: Everything that :func:`check_operator` demands.
CHECKS: tuple[Check, ...] = (
    equals_the_runtime_on_random_inputs,
    equals_the_runtime_in_the_worst_case,
    is_covered,
    is_exported,
    fast_fidelity_is_close,
    gradients_are_straight_through,
    second_derivative_is_an_error,
    not_finite_inputs_are_errors,
    in_place_is_the_same,
    scale_is_learned,
)


def runtime_for(model: TFLiteModel) -> str | None:
    """Return the runtime that has all kernels of a program; None for the one of its spec."""
    lacks = model.spec in SPECS.values() and not WITHOUT_REFERENCE.isdisjoint(model.operators)
    return "litert-optimized" if lacks else None


def in_place_forms(
    operator: Operator,
) -> list[tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """Return what PyTorch has in place of an operator's functions of one tensor.

    A method with a trailing underscore, as ``relu_``, is called with one number where it needs a
    second operand, as ``add_``; a function with ``inplace`` is called with it.

    Args:
        operator: Record of the operator.

    Returns:
        Label, in-place function and plain function of each form.
    """
    forms = []
    for name in operator.functions:
        method = getattr(Tensor, name, None)
        plain = getattr(Tensor, name.removesuffix("_"), None)
        if name.endswith("_") and not name.startswith("__") and method and plain:
            arguments = _arguments(plain)
            if arguments is not None:
                first, second = (_calling(each, arguments) for each in (method, plain))
                forms.append((name, _within_domain(first), _within_domain(second)))
        function: Any = getattr(F, name, None)
        code = getattr(function, "__code__", None)
        if code is not None and "inplace" in code.co_varnames[: code.co_argcount]:
            required = code.co_argcount - len(function.__defaults__ or ())
            if required > 1:
                continue
            forms.append((name, _calling(function, (), inplace=True), function))
    return forms


def _arguments(method: Callable[..., Any]) -> tuple[float, ...] | None:
    """Return the numbers that a method needs after the tensor; None if it needs others."""
    for arguments in ((), (0.5,)):
        try:
            method(torch.ones(2), *arguments)
        except (RuntimeError, TypeError):
            continue
        return arguments
    return None


def _within_domain(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that is finite everywhere: of x^2 + 0.1 where that of x is not."""
    if function(torch.tensor([-1.0, 0.0])).isfinite().all():
        return function
    return lambda x: function(x * x + 0.1)


def _calling(
    function: Callable[..., Any], arguments: tuple[float, ...], **keywords: Any
) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        result: Tensor = function(x, *arguments, **keywords)
        return result

    return call


class _Affine(nn.Module):
    """A function between products, so that it writes over an activation that others made."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * 1.5) * 2


def _calibrate(module: nn.Module, inputs: Sequence[Tensor], spec: str) -> None:
    """Find ranges from one run."""
    batches = [[x.detach() for x in inputs]]
    calibrate(module, batches, forward=lambda module, batch: module(*batch), spec=spec)


def _gradients(module: nn.Module, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return gradients of a random weighting of the results, by the name of what has them."""
    named = [*((f"input {k}", x) for k, x in enumerate(leaves)), *module.named_parameters()]
    for _, leaf in named:
        leaf.grad = None
    result = module(*leaves)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    (result * weights).sum().backward()
    return {name: x.grad.clone() for name, x in named if x.grad is not None}
