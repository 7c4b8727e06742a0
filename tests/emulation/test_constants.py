"""Functions without activations run in float, exactly, and are constants of the program."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_nna import calibrate, coverage, emulate
from tests.emulation.modules import Function


class Recording(nn.Module):
    """Store intermediate values of a forward."""

    def keep(self, *values: Tensor) -> None:
        self.values = [value.detach().clone() for value in values]


class Rotary(Recording):
    """Rotary position embedding, as Llama and RoFormer have it."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.register_buffer("frequencies", 1e4 ** -(torch.arange(0, 8, 2).float() / 8))

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], dtype=torch.float32)
        angles = positions[:, None] @ self.frequencies[None]
        cos, sin = angles.cos(), angles.sin()
        self.keep(cos, sin)
        first, second = self.query(x).chunk(2, -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class Lengths(Recording):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        shorter = torch.floor((lengths + 2 - 3) / 2 + 1).long()
        mask = torch.arange(x.shape[1])[None] < lengths[:, None]
        share = lengths.float() / lengths.float().sum()
        self.keep(shorter, share)
        result: Tensor = self.layer(x) * mask[..., None].float()
        return result


class Buckets(Recording):
    """Relative positions of T5: the logarithm of 0 is taken, and not used."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[-1])
        distance = -torch.min(steps[None] - steps[:, None], torch.zeros(1, dtype=torch.long))
        far = 8 + (torch.log(distance.float() / 8) / math.log(16) * 8).to(torch.long)
        bucket = torch.where(distance < 8, distance, torch.min(far, torch.full_like(far, 15)))
        self.keep(bucket)
        scores = x[:, :, None] * x[:, None, :]
        return scores + self.bias(bucket)[..., 0]


class Sinusoids(Recording):
    """The table of "Attention is all you need", made in the forward and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        table = torch.zeros(x.shape[1], 8)
        position = torch.arange(x.shape[1]).unsqueeze(1)
        rate = torch.exp(torch.arange(0, 8, 2) * (-math.log(1e4) / 8))
        table[:, 0::2] = torch.sin(position * rate)
        table[:, 1::2].copy_(torch.cos(position * rate))
        scaled = table * self.scale
        self.keep(table, scaled)
        return x * 2 + scaled


CASES: dict[str, tuple[Callable[[], Recording], tuple[Tensor, ...]]] = {
    "rotary": (Rotary, (torch.randn(2, 256, 8),)),
    "lengths": (Lengths, (torch.randn(3, 20, 4), torch.tensor([20, 7, 13]))),
    "buckets": (Buckets, (torch.randn(2, 40),)),
    "sinusoids": (Sinusoids, (torch.randn(2, 300, 8),)),
}


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_float_computes(name: str, spec: str) -> None:
    torch.manual_seed(0)
    build, inputs = CASES[name]
    net = build()
    calibrate(net, [inputs], lambda net, batch: net(*batch), spec)
    with emulate(net, spec):
        result = net(*inputs)
    emulated_values = net.values
    expected = net(*inputs).detach()
    # All but the last bit, which float itself has otherwise on other processors.
    torch.testing.assert_close(emulated_values, net.values, rtol=2**-22, atol=2**-22)
    span = float(expected.max() - expected.min())
    torch.testing.assert_close(result, expected, rtol=0, atol=0.03 * span)


def test_coverage_names_it() -> None:
    report = coverage(Rotary(), torch.randn(2, 16, 8))
    locations = {row.operator: row.where for row in report.rows}
    assert [locations[name] for name in ("cos", "sin", "mul")] == [
        "constant",
        "constant",
        "emulated",
    ]
    assert "constant" in str(report)
    assert not report.fallbacks
    assert sum(row.crossing_bytes for row in report.rows) == 0


@pytest.mark.parametrize(
    "normalize",
    [
        nn.utils.weight_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
    ],
)
def test_normalized_weights_are_those_of_float_and_have_their_gradients(
    normalize: Callable[[nn.Module], nn.Module],
) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = normalize(nn.Linear(6, 5))
    net, x = nn.Sequential(layer, nn.Sigmoid()), torch.randn(16, 6)
    locations = {row.where for row in coverage(net, x).rows}
    plain = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid())
    plain[0].load_state_dict({"weight": layer.weight, "bias": layer.bias})
    results = []
    for each in (net, plain):
        calibrate(each, [x])
        with emulate(each):
            results.append(each(x))
        results[-1].square().sum().backward()
    assert locations == {"emulated", "constant"}
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    # The normalization's own gradients, in float, of the gradient that a plain weight gets.
    names = [name for name, _ in layer.named_parameters() if name != "bias"]
    net[0](x)  # Normalizes again.
    parameters = [layer.get_parameter(name) for name in names]
    expected = torch.autograd.grad(layer.weight, parameters, plain[0].weight.grad)
    torch.testing.assert_close([p.grad for p in parameters], list(expected))


class Images(nn.Module):
    """Bytes, brought to floats within the network."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x.float() / 255 - self.mean) / 0.3).relu().mean((2, 3))


def test_images_of_bytes_are_data_where_a_layer_reads_them() -> None:
    torch.manual_seed(0)
    net, x = Images(), torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    emulator = calibrate(net, [x, x // 16])
    assert "layer/convolution#0/input" in emulator.ranges
    with emulate(net):
        dark = net(x // 16)
        result = net(x)
        result.sum().backward()
    torch.testing.assert_close(result, net(x), rtol=0, atol=0.02)
    # The grid is that of calibration, whatever comes in.
    torch.testing.assert_close(dark, net(x // 16), rtol=0, atol=0.02)
    assert bool(net.layer.weight.grad.any())  # type: ignore[union-attr]


def test_arguments_are_data_whatever_made_them() -> None:
    net = Function(lambda x: torch.sigmoid(x * 3.0))
    with emulate(net) as emulator:
        x = torch.ones(2, 3) * 0.3
        with emulator.observing():
            net(x)
        net(torch.linspace(0, 0.3, 5).float())
    assert "./mul#0/input" in emulator.ranges


def random_gate(x: Tensor) -> Tensor:
    return x * torch.rand(x.shape[0], 1)


def drawn_in_place(x: Tensor) -> Tensor:
    return x * x.new_empty(x.shape).bernoulli_(0.5)


def of_a_mask(x: Tensor) -> Tensor:
    return x * ((x > 0) & (x < 1)).float()


def of_an_index(x: Tensor) -> Tensor:
    return x * (x.argmax(-1, keepdim=True) // 2).float()


def of_extremes(x: Tensor) -> Tensor:
    return x * (x * 1.0).max(-1, keepdim=True)[1].to(torch.float32)


def test_a_mask_of_data_is_data() -> None:
    emulator = calibrate(Function(of_a_mask), [torch.randn(4, 6)])
    assert "./select#0/result" in emulator.ranges.ranges


@pytest.mark.parametrize("function", [random_gate, drawn_in_place])
def test_what_is_random_is_data(function: Callable[[Tensor], Tensor]) -> None:
    net = Function(function)
    emulator = calibrate(net, [torch.randn(4, 6)])
    assert any(key.endswith("/other") for key in emulator.ranges.ranges)


@pytest.mark.parametrize("function", [of_an_index, of_extremes])
def test_an_index_of_data_is_data(function: Callable[[Tensor], Tensor]) -> None:
    emulator = calibrate(Function(function), [torch.randn(4, 6)])
    assert "./numbers_of_indices#0/input" in emulator.ranges.ranges


def test_input_that_is_padded_stays_the_input() -> None:
    net = Function(lambda x: torch.sigmoid(torch.cat([x, x.new_zeros(3, 2)], 1)))
    emulator = calibrate(net, [torch.randn(3, 4)])
    assert list(emulator.ranges.ranges) == ["./sigmoid#0/input"]


class Cache(nn.Module):
    """A buffer that the forward fills with activations."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("buffer", torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        self.buffer[:2] = (x * 3.0).detach()
        return self.buffer * 0.5


def test_a_buffer_that_activations_are_written_to_is_no_constant() -> None:
    torch.manual_seed(0)
    net = Cache()
    emulator = calibrate(net, [torch.randn(2, 8) * 10])
    assert "./assignment#0/result" in emulator.ranges
    with emulate(net):
        result = net(torch.full((2, 8), 0.01))
    # On the grid of calibration this is nothing; on a grid of its own values it would be itself.
    assert not bool(result.any())


@pytest.mark.parametrize(
    ("function", "sites"),
    [
        (lambda x: torch.fft.irfft(torch.fft.rfft(x) * x[:, :5].sigmoid()), {"mul": "fallback"}),
        (lambda x: torch.exp(1j * x).real * 2, {"exp": "fallback"}),
        (lambda x: (1j * x).abs() * 2.0, {"abs": "fallback"}),
        (
            lambda x: torch.view_as_real(torch.complex(x, x) + x) * 2,
            {"complex": "fallback", "add": "fallback"},
        ),
    ],
)
def test_complex_operands_are_left_to_the_cpu(
    function: Callable[[Tensor], Tensor], sites: dict[str, str]
) -> None:
    torch.manual_seed(0)
    net, x = Function(function), torch.randn(3, 8)
    locations = {row.operator: row.where for row in coverage(net, x).rows}
    assert sites.items() <= locations.items()
    calibrate(net, [x])
    with emulate(net):
        result = net(x)
    torch.testing.assert_close(result, function(x), rtol=0, atol=0.04)


def test_complex_rotations_of_a_buffer_are_constants() -> None:
    class Rotations(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("angles", torch.arange(12.0).view(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            turns = torch.polar(torch.ones(3, 4), self.angles)
            pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)))
            return torch.view_as_real(pairs * turns).flatten(-2)

    locations = {row.operator: row.where for row in coverage(Rotations(), torch.randn(3, 8)).rows}
    assert locations == {"polar": "constant", "view_as_complex": "fallback", "mul": "fallback",
                      "view_as_real": "fallback"}  # fmt: skip


@pytest.mark.parametrize("value", [0, 0.0, 1.5, -1e9, float("-inf")])
def test_masks_are_filled_by_keyword(value: float) -> None:
    mask = torch.tensor([[False, True, False, False]] * 3)
    x = torch.randn(3, 4)

    def by_keyword(x: Tensor) -> Tensor:
        return F.softmax((x * 2).masked_fill(mask, value=value), -1)

    def by_position(x: Tensor) -> Tensor:
        return F.softmax((x * 2).masked_fill(mask, value), -1)

    def all_by_keyword(x: Tensor) -> Tensor:
        return F.softmax(torch.masked_fill(input=x * 2, mask=mask, value=value), -1)

    results = []
    for function in (by_keyword, by_position, all_by_keyword):
        net = Function(function)
        calibrate(net, [x])
        with emulate(net):
            results.append(net(x))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], by_position(x), rtol=0, atol=0.03)


@pytest.mark.parametrize("empty", [torch.zeros(3, 0), torch.zeros(0)])
@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_caches_begin_empty(empty: Tensor, spec: str) -> None:
    torch.manual_seed(0)
    net, x = Function(lambda x, cache: torch.cat([cache, x * 2], 1)), torch.randn(3, 4)
    with emulate(net, spec) as emulator:
        with emulator.observing():
            net(x, net(x, empty))
        first = net(x, empty)
        second = net(x, first)
    torch.testing.assert_close(first, 2 * x, rtol=0, atol=0.03)
    torch.testing.assert_close(second, torch.cat([first, 2 * x], 1), rtol=0, atol=0.03)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4)])
def test_batches_may_be_empty(shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.LayerNorm(5), nn.Sigmoid())
    calibrate(net, [torch.randn(6, 4)])
    with emulate(net):
        assert net(torch.zeros(shape)).shape == (*shape[:-1], 5)
        assert Function(lambda x: x * 2.0 + x)(torch.zeros(shape)).shape == shape


def test_checkpointed_layers_find_tables_that_they_were_given_constant() -> None:
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return self.layer(x) * table

    class Net(nn.Module):
        def __init__(self, checkpoints: bool) -> None:
            super().__init__()
            self.rotated, self.checkpoints = Rotated(), checkpoints

        def forward(self, x: Tensor) -> Tensor:
            table = torch.arange(x.shape[0]).float().cos()[:, None]
            if self.checkpoints:
                result: Tensor = checkpoint(self.rotated, x, table, use_reentrant=False)
                return result
            return self.rotated(x, table)

    gradients = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        net, x = Net(checkpoints), torch.randn(6, 8)
        emulator = calibrate(net, [x])
        known = set(emulator.ranges.ranges)
        with emulate(net):
            net(x).square().sum().backward()
        assert set(emulator.ranges.ranges) == known
        assert "rotated/mul#0/other" not in known
        gradients.append(net.rotated.layer.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
