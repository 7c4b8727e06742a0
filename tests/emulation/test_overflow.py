"""Sums and results that leave the kernels' integers: they wrap around, as LiteRT's do."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_nna import emulate
from lightning_nna.emulation.arithmetic.fixed_point import quantize_multiplier
from lightning_nna.emulation.arithmetic.rescaling import Rescaler
from lightning_nna.testing.replay import check_instructions
from tests.emulation.oracle import grid, integers, random_integers, real
from tests.integer_reference import INT8, rescale

SPECS = {8: "litert-int8", 16: "litert-int16x8"}


class Calling(nn.Module):
    """A function, or a layer with several results."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        result = self.function(*inputs)
        return result[0] if isinstance(result, tuple) else result


def large(layer: nn.Module, times: float) -> nn.Module:
    """The layer with larger parameters."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(times)
    return layer


def constant(layer: nn.Module) -> nn.Module:
    """The layer with equal weights, whose sums are the largest that there are."""
    with torch.no_grad():
        layer.weight.fill_(0.01)
    return layer


LONG = 70_000
# A module, what it is calibrated with, what it runs on, and the widths in which a sum is lost.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], float, set]] = {
    "fully_connected": (
        lambda: constant(nn.Linear(2 * LONG, 2)),
        lambda: (torch.ones(2, 2 * LONG),),
        1.0,
        {8},
    ),
    "convolution": (
        lambda: constant(nn.Conv2d(LONG // 2, 2, 2)),
        lambda: (torch.ones(1, LONG // 2, 2, 2),),
        1.0,
        {8},
    ),
    "folded_norm": (
        lambda: nn.Sequential(constant(nn.Conv2d(LONG // 2, 2, 2)), nn.BatchNorm2d(2)).eval(),
        lambda: (torch.ones(1, LONG // 2, 2, 2),),
        1.0,
        {8},
    ),
    "batch_matmul": (
        lambda: Calling(torch.matmul),
        lambda: (torch.ones(1, 2, 2 * LONG), torch.rand(1, 2 * LONG, 2) + 1),
        1.0,
        {8},
    ),
    "mean": (
        lambda: Calling(lambda x: x.mean(1)),
        lambda: (torch.ones(2, LONG),),
        1.0,
        {16},
    ),
    "sum": (lambda: Calling(lambda x: x.sum(1)), lambda: (torch.ones(2, LONG),), 1.0, {16}),
    "lstm": (lambda: Calling(nn.LSTM(8, 6)), lambda: (torch.randn(5, 3, 8),), 1e6, {8, 16}),
    "lstm_of_large_weights": (
        lambda: Calling(large(nn.LSTM(8, 6), 1e8)),
        lambda: (torch.randn(5, 3, 8),),
        1.0,
        {8, 16},
    ),
    "lstm_of_a_projection": (
        lambda: Calling(large(nn.LSTM(8, 6, proj_size=4), 1e8)),
        lambda: (torch.randn(5, 3, 8),),
        1.0,
        {8, 16},
    ),
    "gru": (lambda: Calling(nn.GRU(8, 6)), lambda: (torch.randn(5, 3, 8),), 1e6, {8, 16}),
    "sigmoid": (lambda: Calling(torch.sigmoid), lambda: (torch.randn(40, 8),), 1e6, {16}),
    "tanh": (lambda: Calling(torch.tanh), lambda: (torch.randn(40, 8),), 1e6, {16}),
}


@pytest.mark.exactness
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", CASES)
def test_sums_wrap_around_as_litert_does_and_the_site_is_named(
    name: str, bits: int, caplog: pytest.LogCaptureFixture
) -> None:
    make, inputs, times, lost = CASES[name]
    torch.manual_seed(3)
    module, given = make(), tuple(times * x for x in inputs())
    leaves = [x.clone().requires_grad_() for x in given]
    recorded: list = []
    with caplog.at_level(logging.WARNING), emulate(module, SPECS[bits]) as chip:
        with chip.observing(), torch.no_grad():
            module(*given)
        with chip.running(recorder=recorded.append):
            exact = module(*leaves)
        module(*given)
        with chip.running(fidelity="fast"):
            fast = module(*leaves)
    check_instructions(recorded)
    torch.testing.assert_close(fast, exact, rtol=0, atol=0)
    exact.square().mean().backward()
    gradients = [leaf.grad for leaf in leaves] + [p.grad for p in module.parameters()]
    assert all(bool(torch.isfinite(grad).all()) for grad in gradients)
    warnings = [r.getMessage() for r in caplog.records if "do not fit" in r.getMessage()]
    assert bool(warnings) == (bits in lost)
    assert len(warnings) == len(set(warnings)), "once a site"


@pytest.mark.exactness
def test_outputs_that_calibration_never_came_near(caplog: pytest.LogCaptureFixture) -> None:
    """Outputs 2^31 steps beyond their grid: a double becomes the lowest integer of 32 bits."""
    layer = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
    x = torch.randn(40, 1)
    recorded: list = []
    with caplog.at_level(logging.WARNING), emulate(layer, "litert-int16x8") as chip:
        with chip.observing(), torch.no_grad():
            layer(torch.cat([x, -x], 1))
        chip.ranges.ranges["0/fully_connected#0/output"].maximum = 1e-9
        with chip.running(recorder=recorded.append), torch.no_grad():
            layer(torch.randn(40, 2))
    assert check_instructions(recorded)["FULLY_CONNECTED"] == 80
    assert "0/fully_connected#0: " in caplog.text


def wrapped(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def doubled(x: int, factor: float, zero_point: int) -> int:
    """The multiplier of gemmlowp, in integers of 32 bits."""
    mantissa, shift = quantize_multiplier(factor)
    high = (wrapped(x << max(shift, 0)) * mantissa + 2**30) >> 31
    right = max(-shift, 0)
    half = (1 << right) >> 1
    return wrapped((abs(high) + half >> right) * (1 if high >= 0 else -1) + zero_point)


def reduced(x: int, factor: float, zero_point: int) -> int:
    mantissa, shift = quantize_multiplier(factor)
    short = min((mantissa + 2**15) >> 16, 2**15 - 1)
    return wrapped(((x * short + (1 << 14 - shift)) >> 15 - shift) + zero_point)


def converted(x: int, factor: float, zero_point: int) -> int:
    scaled = x * factor
    rounded = math.floor(abs(scaled) + 0.5) * (1 if scaled >= 0 else -1)
    return wrapped((rounded if -(2**31) <= rounded < 2**31 else -(2**31)) + zero_point)


@pytest.mark.parametrize("zero_point", [-128, 0, 127])
@pytest.mark.parametrize("factor", [0.4, 0.9999999, 1.0, 1.3, 37.1, 9000.0])
@pytest.mark.parametrize(
    ("rounding", "literal"), [("double", doubled), ("reduced", reduced), ("real", converted)]
)
def test_a_rescaler_has_the_integers_of_the_kernel(
    rounding: str, literal: Callable[[int, float, int], int], factor: float, zero_point: int
) -> None:
    generator = np.random.default_rng(0)
    ends = [0, 1, -1, 2**30, -(2**30), 2**31 - 1, -(2**31), 2**31 - 100, 100 - 2**31]
    sums = [*ends, *(int(x) for x in generator.integers(-(2**31), 2**31, 300))]
    rescaler = Rescaler(
        torch.tensor([factor], dtype=torch.float64),
        rounding=rounding,  # type: ignore[arg-type]
        largest=2.0**31,
        zero_point=zero_point,
    )
    found = rescaler(torch.tensor(sums, dtype=torch.float64)) + zero_point
    assert found.long().tolist() == [literal(x, factor, zero_point) for x in sums]


@pytest.mark.parametrize("overflow", ["wrap", "saturate"])
def test_a_narrow_accumulator_that_is_rounded_twice(overflow: str) -> None:
    """Against integers of NumPy: 20 bits, then a fixed-point multiplier."""
    torch.manual_seed(0)
    layer = nn.Linear(200, 5)
    with torch.no_grad():
        layer.weight.abs_()
    spec = {"preset": "ethos-u", "accumulator_bits": 20, "accumulator_overflow": overflow}
    with emulate(layer, spec) as chip, torch.no_grad():
        with chip.observing():
            layer(3 * torch.rand(50, 200))
        x, y = (grid(chip, f"./fully_connected#0/{name}") for name in ("input", "output"))
        q_x = random_integers((400, 200), 1)
        found = integers(layer(real(q_x, x)), y)
        weight = chip.state.weight(layer.weight, 1)
    scales = weight.scales.double() * x.scale
    q_b = (layer.bias.detach().double() / scales).round().long().numpy()
    stored = weight.integers.numpy().astype(np.int64)
    sums = (q_x.astype(np.int64) - x.zero_point) @ stored.T + q_b
    limit = 2**19
    assert (np.abs(sums) > limit).mean() > 0.1
    held = {
        "wrap": (sums + limit) % (2 * limit) - limit,
        "saturate": np.clip(sums, -limit, limit - 1),
    }[overflow]
    factors = [float(scale) / y.scale for scale in scales]
    columns = [rescale(held[:, k], factor) for k, factor in enumerate(factors)]
    np.testing.assert_array_equal(found, np.clip(np.stack(columns, 1) + y.zero_point, *INT8))


@pytest.mark.parametrize("layer", [nn.LSTM(64, 8), nn.GRU(64, 8)], ids=["lstm", "gru"])
@pytest.mark.parametrize("rounding", ["reference", "double", "single"])
def test_a_narrow_accumulator_of_a_recurrent_layer(layer: nn.Module, rounding: str) -> None:
    module, x = Calling(layer), 9 * torch.rand(5, 3, 64)
    with emulate(module, {"accumulator_bits": 20, "rounding": rounding}) as chip:
        with chip.observing():
            module(x)
        result = module(x)
    result.sum().backward()
    assert result.isfinite().all()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())


@pytest.mark.exactness
@pytest.mark.parametrize("span", [1e-8, 1.0, 1e6])
def test_a_hard_swish_that_gives_next_to_nothing(span: float) -> None:
    """Its outputs ask for a grid that is finer than the kernel's multiplier can write."""
    module = Calling(nn.functional.hardswish)
    calibration = -3 - span * torch.rand(20, 9)
    recorded: list = []
    with emulate(module) as chip, torch.no_grad():
        with chip.observing():
            module(calibration)
        with chip.running(recorder=recorded.append):
            module(3 * span * torch.randn(20, 9))
    assert check_instructions(recorded)["HARD_SWISH"] == 180
