"""Recurrent layers whose steps are kernels: the bits of a processor without them, two a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nna import calibrate, emulate
from lightning_nna.emulation.arithmetic.on_host import as_on_a_device
from lightning_nna.emulation.kernels import library
from lightning_nna.emulation.spec import NNASpec, resolve_spec

HAS_NUMBA = find_spec("numba") is not None

SPECS: dict[str, NNASpec] = {
    **{name: resolve_spec(name) for name in ("litert-int8", "tflm-int8", "tflm-int16x8")},
    "litert, 16 bits saturate": NNASpec(
        runtime="litert", accumulator_bits=16, accumulator_overflow="saturate"
    ),
    "tflm, 16 bits wrap": NNASpec(accumulator_bits=16),
    "litert, single": NNASpec(runtime="litert", rounding="single", weight_bits=4),
    "tflm, shift": NNASpec(rounding="shift"),
}


class Layer(nn.Module):
    """A recurrent layer, its states included in the result."""

    def __init__(self, layer: nn.RNNBase, gain: float = 1.0) -> None:
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(gain)

    def forward(self, x: Tensor | PackedSequence, *states: Any) -> list[Tensor]:
        result, last = self.layer(x, *states)
        rows = result.data if isinstance(result, PackedSequence) else result
        return [rows, *(last if isinstance(last, tuple) else [last])]


class Launches(TorchDispatchMode):
    """Calls that a device would see."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # An allocation launches nothing, nor does another view of the same memory.
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "new_empty", "empty_like", "detach"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def on_a_device() -> Iterator[Launches]:
    """Take the branches of a device, and count."""
    with Launches() as launches, as_on_a_device():
        yield launches


def _results(
    module: Layer, x: Any, states: Any, scope: AbstractContextManager[None]
) -> list[Tensor]:
    """Results and gradients of the input, the initial states and the parameters."""
    torch.manual_seed(1)  # Of a dropout.
    module.zero_grad()
    leaves = [x.data if isinstance(x, PackedSequence) else x]
    leaves += [] if states is None else list(states) if isinstance(states, tuple) else [states]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    first, given = leaves[0], leaves[1:]
    if isinstance(x, PackedSequence):
        first = PackedSequence(first, *x[1:])
    arguments = [] if not given else [tuple(given) if isinstance(states, tuple) else given[0]]
    with scope, emulate(module):
        results = module(first, *arguments)
        total = sum(
            (each * torch.linspace(-1, 1, each.numel()).view(each.shape)).sum() for each in results
        )
        assert isinstance(total, Tensor)
        total.backward()
    gradients = [leaf.grad for leaf in (*leaves, *module.parameters())]
    assert all(grad is not None for grad in gradients)
    return [each.detach() for each in (*results, *gradients) if each is not None]


def _sequences() -> PackedSequence:
    return pack_sequence([torch.randn(length, 6) for length in (7, 5, 5, 2)])


def _states(kind: type[nn.RNNBase]) -> Any:
    states = tuple(torch.randn(1, 4, 8) for _ in range(2))
    return states if kind is nn.LSTM else states[0]


#: A layer, its input and its initial states, by the kind of the layer.
CASES: dict[str, Any] = {
    "plain": lambda kind: (Layer(kind(6, 8)), torch.randn(9, 4, 6), None),
    "no bias": lambda kind: (Layer(kind(6, 8, bias=False)), torch.randn(9, 4, 6), None),
    "states": lambda kind: (Layer(kind(6, 8)), torch.randn(9, 4, 6), _states(kind)),
    "large weights": lambda kind: (Layer(kind(6, 8), 30.0), torch.randn(9, 4, 6), None),
    "both ways": lambda kind: (
        Layer(kind(6, 8, num_layers=2, bidirectional=True, batch_first=True)),
        torch.randn(4, 9, 6),
        None,
    ),
    "dropout": lambda kind: (Layer(kind(6, 8, 2, dropout=0.4)), torch.randn(9, 4, 6), None),
    "packed": lambda kind: (Layer(kind(6, 8, bidirectional=True), 3.0), _sequences(), None),
    "one sequence": lambda kind: (Layer(kind(6, 8)), torch.randn(9, 6), None),
    "wide": lambda kind: (Layer(kind(6, 1100)), torch.randn(2, 2, 6), None),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_layer_on_a_device_has_the_bits_of_a_processor(
    kind: type[nn.RNNBase], name: str, spec: str
) -> None:
    torch.manual_seed(0)
    module, x, states = CASES[name](kind)
    small = x._replace(data=0.5 * x.data) if isinstance(x, PackedSequence) else 0.5 * x
    calibrate(module, [small], spec=SPECS[spec])
    expected = _results(module, x, states, nullcontext())
    computed = _results(module, x, states, on_a_device())
    for own, other in zip(expected, computed, strict=True):
        assert torch.equal(own, other)


@pytest.mark.skipif(not HAS_NUMBA, reason="needs the package numba")
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="without vector instructions gradients of PyTorch differ in the last bit of float32",
)
@pytest.mark.parametrize("spec", [*SPECS, "tosa-int8", "shift"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_layer_with_compiled_kernels_has_the_bits_of_one_without(
    kind: type[nn.RNNBase], name: str, spec: str
) -> None:
    torch.manual_seed(0)
    module, x, states = CASES[name](kind)
    small = x._replace(data=0.5 * x.data) if isinstance(x, PackedSequence) else 0.5 * x
    calibrate(module, [small], spec=SPECS.get(spec, spec))
    expected = _results(module, x, states, library.without_compiled_kernels())
    computed = _results(module, x, states, nullcontext())
    for own, other in zip(expected, computed, strict=True):
        assert torch.equal(own, other)


@pytest.mark.skipif(not HAS_NUMBA, reason="needs the package numba")
@pytest.mark.parametrize("fidelity", ["exact", "fast"])
@pytest.mark.parametrize("spec", ["litert-int8", "tflm-int8", "tflm-int16x8"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_processor_calls_a_kernel_for_each_step(
    kind: type[nn.RNNBase], spec: str, fidelity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_nna.emulation.kernels import compiled_gru, compiled_lstm

    calls: list[int] = []
    run = compiled_lstm.over_rows

    def noted(rows: int, *arguments: Any) -> int:
        calls.append(rows)
        return run(rows, *arguments)

    for kernels in (compiled_gru, compiled_lstm):
        monkeypatch.setattr(kernels, "over_rows", noted)
    torch.manual_seed(0)
    module, x = Layer(kind(6, 8)), _sequences()
    calibrate(module, [x], spec=spec)
    with emulate(module, fidelity=fidelity):
        result = module(x)[0]
        assert calls == x.batch_sizes.tolist()
        result.sum().backward()
    assert calls == [*x.batch_sizes.tolist(), *x.batch_sizes.flip(0).tolist()]


@pytest.mark.parametrize("spec", ["litert-int8", "tflm-int8", "tflm-int16x8"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_step_is_two_launches(kind: type[nn.RNNBase], spec: str) -> None:
    torch.manual_seed(0)
    module, counts = Layer(kind(6, 8)), []
    calibrate(module, [torch.randn(9, 4, 6)], spec=spec)
    for steps in (8, 24, 40):
        x = torch.randn(steps, 4, 6, requires_grad=True)
        with on_a_device() as forward, emulate(module):
            result = module(x)[0]
        with on_a_device() as backward:
            result.sum().backward()
        step = f"{kind.__name__.lower()}_step"
        assert forward.names.count(step) == backward.names.count(f"{step}_backward") == steps
        counts.append((len(forward.names), len(backward.names)))
    # The first run fills tables, and gradients are not added to others yet.
    _, first, second = counts
    assert [more - fewer for fewer, more in zip(first, second, strict=True)] == [32, 32]
