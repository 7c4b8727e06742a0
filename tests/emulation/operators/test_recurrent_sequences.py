"""Recurrent layers as one function equal their instructions step by step, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from lightning_nna import emulate
from lightning_nna.emulation.kernels.library import without_compiled_kernels
from lightning_nna.emulation.operators.gru import _GatedStep
from lightning_nna.emulation.operators.rnn import _PlainStep
from lightning_nna.emulation.telemetry import Telemetry

pytestmark = pytest.mark.exactness

PRESETS = ("tflm-int8", "tflm-int16x8", "litert-int8", "tosa-int8", "tosa-int16x8", "shift")
OTHERS: dict[str, dict[str, Any]] = {
    "per tensor": {"preset": "litert-int8", "weight_granularity": "per_tensor"},
    "24 bits": {"preset": "tflm-int8", "accumulator_bits": 24},
    "tables": {"preset": "litert-int8", "table_entries": 64},
    "single": {"preset": "litert-int16x8", "rounding": "single"},
}
SPECS = {**{preset: preset for preset in PRESETS}, **OTHERS}


class Quantized(nn.Module):
    """A layer that starts from the last state of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GRU(5, 7), nn.GRU(5, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.second(x, self.first(x)[1])
        return result


class Packed(nn.Module):
    """Sequences of several lengths."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([6, 1, 4, 4, 2])
        output, last = self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False), h)
        return output.data, last


class Checkpointed(nn.Module):
    """A layer that runs again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(5, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = checkpoint(self.layer, x, use_reentrant=False)
        return result


class Loop(nn.Module):
    """A cell, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(5, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state, outputs = None, []
        for step in x:
            state = self.cell(step, state)
            outputs.append(state)
        return torch.stack(outputs), outputs[-1]


#: By name: the module, the shape of its input and that of the initial state.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "gru": (lambda: nn.GRU(5, 7), (6, 5, 5), ()),
    "two ways": (lambda: nn.GRU(5, 7, 2, bidirectional=True), (6, 5, 5), (4, 5, 7)),
    "without bias": (lambda: nn.GRU(5, 7, bias=False, batch_first=True), (5, 6, 5), ()),
    "without batch": (lambda: nn.GRU(5, 7), (6, 5), (1, 7)),
    "packed": (lambda: Packed(nn.GRU(5, 7, bidirectional=True)), (6, 5, 5), (2, 5, 7)),
    "quantized start": (Quantized, (6, 5, 5), ()),
    "checkpoint": (Checkpointed, (6, 5, 5), ()),
    "cell": (Loop, (4, 5, 5), ()),
    "tanh": (lambda: nn.RNN(5, 7, 2, bidirectional=True), (6, 5, 5), (4, 5, 7)),
    "relu": (lambda: nn.RNN(5, 7, nonlinearity="relu"), (6, 5, 5), (1, 5, 7)),
    "packed tanh": (lambda: Packed(nn.RNN(5, 7)), (6, 5, 5), ()),
    "packed relu": (lambda: Packed(nn.RNN(5, 7, nonlinearity="relu")), (6, 5, 5), (1, 5, 7)),
}
#: Where sums of the steps' gradients and one product may differ.
SUMS = ("weight_hh", "bias_hh")


@contextmanager
def step_by_step() -> Iterator[None]:
    """Run layers as chains of operators, as an export does."""
    with pytest.MonkeyPatch.context() as patch:
        for step in (_GatedStep, _PlainStep):
            patch.setattr(step, "at_once", lambda *_: None)
        yield


@contextmanager
def counted() -> Iterator[list[bool]]:
    """Note which layers ran as one function."""
    at_once: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        for step in (_GatedStep, _PlainStep):
            whole: Callable[..., Tensor | None] = step.at_once

            def noted(*args: Any, run: Callable[..., Tensor | None] = whole) -> Tensor | None:
                result = run(*args)
                at_once.append(result is not None)
                return result

            patch.setattr(step, "at_once", noted)
        yield at_once


def gradient_tolerance() -> dict[str, float]:
    """Return zero where a row of a product does not depend on the number of rows.

    It does with MKL on some processors. The gradient of a sequence's input is one product, that of
    the steps one for each of them; outputs are integers and the same everywhere.
    """
    generator = torch.Generator().manual_seed(0)
    for inner in (7, 14, 21):
        rows = torch.randn(30, inner, generator=generator)
        weight = torch.randn(inner, 5, generator=generator)
        if not torch.equal(rows @ weight, torch.cat([part @ weight for part in rows.split(5)])):
            return {"rtol": 1e-5, "atol": 1e-6}
    return {"rtol": 0.0, "atol": 0.0}


def run(module: nn.Module, leaves: list[Tensor]) -> dict[str, Tensor]:
    """Outputs, last states and all gradients."""
    module.zero_grad()
    inputs = [leaf.clone().requires_grad_() for leaf in leaves]
    outputs, last = module(*inputs)
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(x.shape, generator=generator) for x in (outputs, last))
    sum((x * w).sum() for x, w in zip((outputs, last), weights, strict=True)).backward()  # type: ignore[union-attr]
    gradients = [*((f"input {k}", x.grad) for k, x in enumerate(inputs))]
    gradients += [(name, p.grad) for name, p in module.named_parameters()]
    results = {name: grad.clone() for name, grad in gradients if grad is not None}
    return {"outputs": outputs.detach(), "last": last.detach(), **results}


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", CASES)
def test_every_bit_is_that_of_the_steps(name: str, spec: str, fidelity: Any) -> None:
    """Inputs beyond those of the calibration clip every intermediate somewhere."""
    build, *shapes = CASES[name]
    torch.manual_seed(0)
    module, leaves = build(), [0.6 * torch.randn(shape) for shape in shapes if shape]
    leaves[0] *= 2
    # Compiled steps have the integers of exact fidelity in both.
    host = without_compiled_kernels() if fidelity == "fast" else nullcontext()
    with host, emulate(module, SPECS[spec], fidelity=fidelity) as chip:
        with chip.observing(), torch.no_grad():
            module(*leaves)
        beyond = [1.5 * leaf for leaf in leaves]
        with counted() as at_once:
            results = run(module, beyond)
        with step_by_step():
            expected = run(module, beyond)
        with torch.no_grad():
            evaluated = module(*beyond)
    assert at_once
    assert all(at_once)
    assert results.keys() == expected.keys()
    of_gradients = gradient_tolerance()
    for key, value in expected.items():
        tolerance = of_gradients if key not in ("outputs", "last") else {"rtol": 0.0, "atol": 0.0}
        if any(part in key for part in SUMS):
            tolerance = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(results[key], value, **tolerance)
    torch.testing.assert_close(evaluated[0], expected["outputs"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["two ways", "packed", "tanh", "relu"])
def test_what_is_recorded_has_the_same_bits(name: str) -> None:
    """An export runs the instructions one by one."""
    build, *shapes = CASES[name]
    torch.manual_seed(0)
    module, leaves = build(), [torch.randn(shape) for shape in shapes if shape]
    recorded: list[Any] = []
    with emulate(module) as chip, torch.no_grad():
        with chip.observing():
            module(*leaves)
        expected = module(*leaves)
        with chip.running(recorder=recorded.append):
            results = module(*leaves)
    assert recorded
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["two ways", "packed", "tanh"])
def test_telemetry_is_that_of_the_steps(name: str) -> None:
    build, *shapes = CASES[name]
    torch.manual_seed(0)
    module, leaves = build(), [torch.randn(shape) for shape in shapes if shape]
    tables = Telemetry(), Telemetry()
    with emulate(module, OTHERS["24 bits"]) as chip, torch.no_grad():
        with chip.observing():
            module(*leaves)
        with chip.running(telemetry=tables[0]):
            module(*leaves)
        with step_by_step(), chip.running(telemetry=tables[1]):
            module(*leaves)
    assert tables[0].state_dict() == tables[1].state_dict()
    assert any(row.accumulated for row in tables[0].sites.values())


def test_a_checkpoint_runs_again_without_the_telemetry() -> None:
    """Biases that are too large for 20 bits are counted in the first run alone."""
    torch.manual_seed(0)
    module, x = Checkpointed(), torch.randn(6, 5, 5)
    spec = {"preset": "litert-int8", "accumulator_bits": 20, "accumulator_overflow": "saturate"}
    with emulate(module, spec) as chip:
        with chip.observing(), torch.no_grad():
            module(x)
        with chip.running(telemetry=Telemetry()):
            outputs = module(x)[0]
        outputs.sum().backward()
    assert module.layer.weight_hh_l0.grad is not None
    assert bool(module.layer.weight_hh_l0.grad.any())


def test_learned_scales_of_weights_have_the_gradients_of_the_steps() -> None:
    torch.manual_seed(0)
    module, x = nn.GRU(5, 7), torch.randn(6, 5, 5)
    with emulate(module, learned_scales="weights") as chip:
        with chip.observing(), torch.no_grad():
            module(x)
        results = []
        for around in (counted, step_by_step):
            with around():
                run(module, [x])
            scales = chip.scales.tensors()
            results.append({key: scale.grad for key, scale in scales.items()})
            for scale in scales.values():
                scale.grad = None
    assert len(results[0]) == 2
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_a_first_run_after_the_freeze_takes_the_steps() -> None:
    """Ranges that calibration has not seen are those of the first step."""
    torch.manual_seed(0)
    module, x = nn.GRU(5, 7), torch.randn(6, 5, 5)
    with emulate(module) as chip, torch.no_grad(), counted() as at_once:
        with chip.observing():
            module(x)
        key = next(key for key in chip.ranges.ranges if key.endswith("reset/output"))
        del chip.ranges.ranges[key]
        first = module(x)[0]
        torch.testing.assert_close(module(x)[0], first, rtol=0, atol=0)
    assert at_once == [False, True]


@pytest.mark.parametrize(("layer", "name"), [(nn.GRU(5, 7), "gru"), (nn.RNN(5, 7), "rnn")])
def test_a_second_derivative_is_an_error(layer: nn.Module, name: str) -> None:
    x = torch.randn(6, 5, 5)
    with emulate(layer, "litert-int16x8") as chip:
        with chip.observing(), torch.no_grad():
            layer(x)
        with pytest.raises(RuntimeError, match=rf"operator \({name}\) has no second derivative"):
            torch.autograd.grad(layer(x.requires_grad_())[0].sum(), x, create_graph=True)
