from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import bake, calibrate, coverage, emulate, strip
from lightning_nna.testing import SmallNet, SmallRecurrentModule
from lightning_nna.testing.contract import assert_same, is_unhooked


def calibrated(module: nn.Module, *inputs: Tensor) -> nn.Module:
    calibrate(module, [inputs], lambda net, batch: net(*batch))
    return module


def on_chip(module: nn.Module, *inputs: Tensor, fidelity: str = "exact") -> Tensor:
    with emulate(module, fidelity=fidelity):  # type: ignore[arg-type]
        return module(*inputs)


def test_strip_gives_the_float_module_back() -> None:
    net, x = SmallNet(), torch.randn(32, 4)
    plain, before = net(x), copy.deepcopy(net.state_dict())
    calibrated(net, x)
    assert not torch.equal(on_chip(net, x), plain)
    assert not is_unhooked(net)
    assert strip(net) is net
    assert is_unhooked(net)
    assert torch.equal(net(x), plain)
    assert_same(dict(before), dict(net.state_dict()))
    assert strip(net) is net


def test_outside_of_the_block_the_module_is_in_float() -> None:
    net, x = SmallNet(), torch.randn(32, 4)
    plain = net(x)
    calibrated(net, x)
    on_chip(net, x)
    assert torch.equal(net(x), plain)


def test_bake_folds_the_weights_and_baking_twice_changes_nothing() -> None:
    net, x = SmallNet(), torch.randn(32, 4)
    chip = on_chip(calibrated(net, x), x)
    ranges = calibrate(net, [x]).state_dict()
    bake(net)
    assert is_unhooked(net)
    weight = net.first.weight.detach()
    steps = weight / (weight.abs().amax(1, keepdim=True) / 127)
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    with emulate(net) as again:
        again.load_state_dict(ranges)
        assert torch.equal(net(x), chip)
    baked = copy.deepcopy(net.state_dict())
    bake(net)
    assert_same(dict(baked), dict(net.state_dict()))


def test_bake_without_a_chip() -> None:
    with pytest.raises(RuntimeError, match="nothing to bake"):
        bake(SmallNet())


def test_the_baked_float_network_is_near_the_chip() -> None:
    torch.manual_seed(0)
    module = SmallRecurrentModule().requires_grad_(False)
    x = torch.randn(16, 6, 4)
    plain = module(x)
    chip = on_chip(calibrated(module, x), x)
    assert float((chip - plain).abs().max()) < 0.03
    assert float((bake(module)(x) - chip).abs().max()) < 0.03


@pytest.mark.parametrize("seed", range(3))
def test_fast_differs_in_less_than_a_thousandth_of_the_outputs(seed: int) -> None:
    torch.manual_seed(seed)
    module = nn.LSTM(40, 64, batch_first=True)
    x = torch.randn(32, 50, 40)
    calibrate(module, [x])
    with torch.no_grad(), emulate(module) as chip:
        exact, _ = module(x)
        with chip.running(fidelity="fast"):
            fast, _ = module(x)
    assert float((exact != fast).float().mean()) < 1e-3


def test_fast_equals_exact_for_linear_and_elementwise() -> None:
    torch.manual_seed(0)
    net, x = SmallNet(32, 64, 16), torch.randn(2000, 32)
    calibrated(net, x)
    exact, fast = on_chip(net, x), on_chip(net, x, fidelity="fast")
    assert float((exact != fast).float().mean()) < 1e-3


def test_the_gradient_is_straight_through_and_zero_where_clipped() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    x = torch.randn(200, 5)
    calibrate(layer, [x[:20]])  # Narrow on purpose: some of the other outputs are clipped.
    inputs = x.clone().requires_grad_()
    with emulate(layer) as chip:
        y = layer(inputs)
        weight = chip.state.weight(layer.weight, 1).values
    y.sum().backward()
    low, high = float(y.detach().min()), float(y.detach().max())
    with emulate(layer) as chip:
        observed = chip.ranges["./fully_connected#0/input"]
    inside_x = (x >= observed.minimum) & (x <= observed.maximum)
    real = x.clamp(observed.minimum, observed.maximum) @ weight.T + layer.bias.detach()
    surely_inside = (real > low + 0.05) & (real < high - 0.05)
    surely_clipped = (real < low - 0.05) | (real > high + 0.05)
    rows = (surely_inside | surely_clipped).all(1) & (
        (inside_x | (x < observed.minimum - 0.05) | (x > observed.maximum + 0.05)).all(1)
    )
    expected = (surely_inside.float() @ weight) * inside_x
    assert int(rows.sum()) > 100
    assert int(surely_clipped[rows].sum()) > 0
    assert torch.allclose(inputs.grad[rows], expected[rows], atol=1e-6)


def test_observing_an_lstm_is_its_float_forward_and_backward() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(6, 10, 2, batch_first=True)
    x = torch.randn(4, 9, 6)
    state = (torch.randn(2, 4, 10), torch.randn(2, 4, 10))
    expected, _ = module(x, state)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    with emulate(module) as chip, chip.observing():
        result, _ = module(x, state)
        result.square().sum().backward()
    assert torch.allclose(result, expected, atol=1e-6)
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-4)


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
def test_the_gradient_of_the_chip_lstm_follows_that_of_float(fidelity: str) -> None:
    torch.manual_seed(0)
    module = nn.LSTM(6, 10, batch_first=True)
    x = torch.randn(8, 12, 6)
    module(x)[0].square().sum().backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    calibrate(module, [x])
    with emulate(module, fidelity=fidelity):  # type: ignore[arg-type]
        module(x)[0].square().sum().backward()
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        cosine = torch.cosine_similarity(parameter.grad.flatten(), gradient.flatten(), 0)
        assert float(cosine) > 0.99


def test_streaming_in_chunks_equals_the_whole_sequence() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(6, 10, 2, batch_first=True)
    x = torch.randn(4, 12, 6)
    calibrate(module, [x])
    with torch.no_grad(), emulate(module):
        full, (h_n, c_n) = module(x)
        state, parts = None, []
        for chunk in x.split(3, 1):
            part, state = module(chunk, state)
            parts.append(part)
    assert torch.equal(torch.cat(parts, 1), full)
    assert torch.equal(state[0], h_n)
    assert torch.equal(state[1], c_n)


def test_packed_sequences_equal_each_sequence_alone() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(6, 10)
    lengths = torch.tensor([9, 7, 7, 2])
    x = torch.randn(9, 4, 6)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
    calibrate(module, [x])
    with emulate(module):
        together, (h_n, c_n) = module(packed)
        unpacked, _ = nn.utils.rnn.pad_packed_sequence(together)
        unpacked.sum().backward()
        for index, length in enumerate(lengths.tolist()):
            alone, (h, c) = module(x[:length, index])
            assert torch.equal(unpacked[:length, index], alone)
            assert torch.equal(h_n[:, index], h)
            assert torch.equal(c_n[:, index], c)
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())


def test_a_layer_that_the_chip_does_not_have_falls_back_and_is_reported() -> None:
    report = coverage(nn.Conv3d(6, 10, 1), torch.randn(5, 6, 2, 2, 2))
    assert [row.site for row in report.fallbacks] == ["./conv3d#0"]
    assert report.fallbacks[0].crossing_bytes > 0


def test_coverage_of_a_mixed_network_counts_the_bytes_that_cross() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(torch.logsumexp(self.layer(x), -1, keepdim=True))

    report = coverage(Mixed(), torch.randn(3, 4))
    assert [(row.operator, row.on_chip, row.crossing_bytes) for row in report.rows] == [
        ("fully_connected", True, 0),
        ("logsumexp", False, 3 * 10 + 3),
        ("tanh", True, 0),
    ]
    assert "logsumexp#0" in str(report)


def test_operators_that_a_spec_lacks_are_fallbacks() -> None:
    spec = {"name": "small", "operators": ["fully_connected"]}
    report = coverage(SmallNet(), torch.randn(2, 4), spec=spec)
    assert {row.operator for row in report.fallbacks} == {"add", "mul", "sigmoid", "tanh"}


def test_scripted_modules_are_reported(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    module = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 2)))
    recwarn.clear()  # torch.jit.script announces its own retirement.
    with caplog.at_level(logging.WARNING):
        report = coverage(module, torch.randn(2, 4))
    assert report.scripted == ("1",)
    assert "scripted modules run in float" in caplog.text
    assert "1: scripted, its operators cannot be seen" in str(report)


def test_another_chip_or_other_targets_need_strip_first() -> None:
    net = calibrated(SmallNet(), torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"is emulated on 'tflm-int8' .* already; call strip"):
        calibrate(net, [torch.randn(3, 4)], spec={"name": "four", "weight_bits": 4})
    strip(net)
    calibrate(net, [torch.randn(3, 4)], spec={"name": "four", "weight_bits": 4})


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"first\.weight is torch\.bfloat16.*bf16-mixed"):
        calibrate(SmallNet().bfloat16(), [])


def test_calibrating_on_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no forward was observed"):
        calibrate(SmallNet(), [])


def test_an_activation_that_is_not_finite_names_its_site() -> None:
    net = SmallNet()
    with torch.no_grad():
        net.second.bias[0] = float("inf")
    with pytest.raises(
        FloatingPointError, match=r"second/fully_connected#0: second.bias has a val"
    ):
        calibrate(net, [torch.randn(3, 4)])


def test_a_site_first_seen_after_calibration_warns_once_and_runs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor, extra: bool = False) -> Tensor:
            y = torch.tanh(x)
            return y + 0.5 if extra else y

    module, x = Branches(), torch.randn(50)
    calibrate(module, [x])
    with emulate(module), caplog.at_level(logging.WARNING):
        first, second = module(x, extra=True), module(x, extra=True)
    assert torch.equal(first, second)
    assert float((first - (torch.tanh(x) + 0.5)).abs().max()) < 0.03
    assert caplog.text.count("./add#0/output first ran after the ranges were frozen") == 1


def test_dropout_is_a_change_of_grid_that_needs_no_range() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 2))
    x = torch.randn(100, 4)
    with emulate(module) as chip:
        with chip.observing():
            module(x)
        assert not any("dropout" in key for key in chip.ranges.ranges)
        module.eval()
        y = module(x)
    assert float((y - module(x)).detach().abs().max()) < 0.05


def test_a_parameter_as_an_operand_is_a_constant() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor([0.3, -1.2]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x) + self.shift

    module, x = Shifted(), torch.randn(64, 2)
    with emulate(module) as chip:
        with chip.observing():
            module(3 * x)
        y = module(x)
        y.sum().backward()
    assert set(chip.ranges.ranges) == {"./tanh#0/input", "./add#0/output"}
    assert float((y - module(x)).detach().abs().max()) < 0.04
    assert torch.equal(module.shift.grad, torch.full((2,), 64.0))


def test_two_modules_in_nested_blocks_have_the_sites_that_each_has_alone() -> None:
    nets, x = [SmallNet(), SmallNet()], torch.randn(4, 4)
    alone = []
    for net in nets:
        calibrate(net, [x])
        with emulate(net):
            alone.append(net(x))
    with emulate(nets[0]), emulate(nets[1]):
        assert torch.equal(nets[0](x), alone[0])
        assert torch.equal(nets[1](x), alone[1])
