"""What a device pays for a weight, by Vela on the weight's layer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import calibrate, emulate
from lightning_nna.deploy import CaptureError, VelaPrice, export_tflite, vela_report
from lightning_nna.pruning.zero_prices import prices_of_zeros
from lightning_nna.weights.allocation import allocate_bits
from lightning_nna.weights.codebook import Codebook
from lightning_nna.weights.price import Price

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ethosu") is None, reason="ethos-u-vela is not installed"
)

#: A slow flash: reading weights takes longer than computing with them.
SYSTEM = "Ethos_U55_Deep_Embedded"


class Recognizer(nn.Module):
    """Tokens, a recurrent layer, and an output; one time step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 128)
        self.lstm = nn.LSTM(128, 128, batch_first=True)
        self.head = nn.Linear(128, 256)
        # Rows of other ranges.
        self.head.weight.data *= torch.linspace(0.2, 1.0, 256)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0])


def low_bit(weight: Tensor, bits: int) -> tuple[Tensor, Any]:
    book = Codebook.fit(weight.detach(), bits)
    return book.project(weight.detach()), book.grid


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in net.named_parameters() if x.ndim > 1}


@pytest.mark.parametrize("budget", ["cycles", "memory"])
def test_prices_add_up_to_the_whole_program(budget: Any, tmp_path: Path) -> None:
    net, tokens = Recognizer(), torch.zeros(1, 1, dtype=torch.long)
    price = VelaPrice(net, [tokens], budget=budget, system=SYSTEM)
    assert isinstance(price, Price)
    assert price.unit == {"cycles": "cycles", "memory": "bytes"}[budget]
    weights = weights_of(net)
    apart = sum(price(name, x) for name, x in weights.items())
    assert price.together({n: (x, None) for n, x in weights.items()}) == pytest.approx(apart)
    calibrate(net, [tokens], spec="ethos-u")
    whole = vela_report(export_tflite(net, [tokens], tmp_path / "net.tflite").path, system=SYSTEM)
    expected = whole.cycles if budget == "cycles" else whole.flash_bytes + 20 * 128
    # Each program has commands and constants of its own.
    assert apart == pytest.approx(expected, rel=0.05 if budget == "cycles" else 0.1)


def test_few_values_are_few_cycles_and_both_weights_of_a_layer_add_up() -> None:
    net = Recognizer()
    price = VelaPrice(net, [torch.zeros(1, 1, dtype=torch.long)], system=SYSTEM)
    weights = weights_of(net)
    for name in ("lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"):
        prices = [price(name, weights[name])]
        prices += [price(name, *low_bit(weights[name], bits)) for bits in (5, 4, 2)]
        assert prices == sorted(prices, reverse=True)
    # Rows that get scales of their own have more values than the codebook.
    values, grid = low_bit(weights["head.weight"], 2)
    assert price("head.weight", values, grid) < price("head.weight", values)
    few = {name: low_bit(x, 3) for name, x in weights.items()}
    apart = sum(price(name, *each) for name, each in few.items())
    assert price.together(few) == pytest.approx(apart, rel=0.02)
    # The processor looks rows up, for which Vela has no cycles.
    assert price("embedding.weight", weights["embedding.weight"]) == 0.0


def test_a_layer_costs_as_often_as_it_is_called_and_is_stored_once() -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))

    def twice(module: nn.Module, x: Tensor) -> Tensor:
        return module[1](module[1](module[0](x)))

    x = torch.zeros(1, 32)
    for budget, factor in (("cycles", 2), ("memory", 1)):
        once = VelaPrice(net, [x], budget=budget)
        again = VelaPrice(net, [x], forward=twice, budget=budget)
        for number, times in ((0, 1), (1, factor)):
            name, weight = f"{number}.weight", net[number].weight
            assert again(name, weight) == times * once(name, weight)


def test_the_module_is_as_it_was_and_may_be_emulated() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(4, 8)
    calibrate(net, [x], spec="litert-int8")
    net[0].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with emulate(net):
        outputs = net(x)
    price = VelaPrice(net, [x])
    assert price("0.weight", torch.zeros(8, 8)) > 0
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert [part.training for part in net] == [False, True, True]
    with emulate(net):
        assert torch.equal(net(x), outputs)


def test_a_tied_weight_is_paid_wherever_it_is_used() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.Embedding(32, 32), nn.Linear(32, 32))
    net[1].weight = net[2].weight = net[0].weight

    def forward(module: nn.Module, x: Tensor, tokens: Tensor) -> Tensor:
        return module[2](module[0](x) + module[1](tokens))

    inputs = [torch.randn(1, 32), torch.zeros(1, dtype=torch.long)]
    price = VelaPrice(net, inputs, forward=forward)
    alone = VelaPrice(nn.Linear(32, 32), inputs[:1])("weight", net[0].weight)
    assert price("0.weight", net[0].weight) == 2 * alone


def test_attention_is_one_layer() -> None:
    torch.manual_seed(0)
    net = nn.MultiheadAttention(16, 2, batch_first=True)

    def attend(module: nn.Module, x: Tensor) -> Tensor:
        return module(x, x, x, need_weights=False)[0]

    price = VelaPrice(net, [torch.randn(1, 4, 16)], forward=attend, system=SYSTEM)
    dense = price("in_proj_weight", net.in_proj_weight)
    assert price("out_proj.weight", net.out_proj.weight) == dense
    assert price("in_proj_weight", torch.zeros_like(net.in_proj_weight)) < dense


def test_reports_are_read_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = nn.Linear(16, 16), torch.randn(1, 16)
    first = VelaPrice(net, [x], cache=tmp_path / "vela")
    price = first("weight", net.weight)
    files = list((tmp_path / "vela").iterdir())
    assert [file.suffix for file in files] == [".json"]

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr("lightning_nna.deploy.vela._compiled", fail)
    again = VelaPrice(net, [x], cache=tmp_path / "vela")
    assert again("weight", net.weight) == price
    memory = VelaPrice(net, [x], cache=tmp_path / "vela", budget="memory")
    assert memory("weight", net.weight) > 256
    with pytest.raises(AssertionError, match="compiled again"):
        again("weight", torch.zeros(16, 16))
    other = VelaPrice(net, [x], cache=tmp_path / "vela", system=SYSTEM)
    with pytest.raises(AssertionError, match="compiled again"):
        other("weight", net.weight)


def test_bits_are_allocated_by_cycles() -> None:
    """A layer that is called often gets fewer bits than the same layer that is called once."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    net[1].weight.data.copy_(net[0].weight)
    whole = [layer.weight.detach().clone() for layer in net]

    def often(module: nn.Module, x: Tensor) -> Tensor:
        for _ in range(8):
            module[1](x)
        return module[0](x)

    def loss(module: nn.Module) -> Tensor:
        return sum((m.weight - w).square().sum() for m, w in zip(module, whole, strict=True)) + 1.0

    price = VelaPrice(net, [torch.randn(1, 64)], forward=often, system=SYSTEM)
    found = allocate_bits(*(net, loss), price=price, target_price_ratio=0.7, candidates=(2, 4, 8))
    assert found.unit == "cycles"
    assert found.bits["1.weight"] < found.bits["0.weight"]
    together = price.together(
        {name: low_bit(net.get_parameter(name), bits) for name, bits in found.bits.items()}
    )
    assert together == pytest.approx(found.price)
    widest = sum(row[8] for row in found.prices.values())
    assert together <= 0.7 * widest


def test_zeros_save_where_weights_are_read() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))

    def often(module: nn.Module, x: Tensor) -> Tensor:
        for _ in range(5):
            x = module[0](x)
        return module[1](x)

    price = VelaPrice(net, [torch.randn(1, 64)], forward=often, system=SYSTEM)
    saved = prices_of_zeros(net, price, 0.8)
    assert saved["0.weight"] == pytest.approx(5 * saved["1.weight"], rel=0.1)
    assert saved["1.weight"] > 0


def test_zeros_that_cost_time_are_warned_of() -> None:
    """On small images a U85 computes a convolution with zeros anywhere in another way."""
    torch.manual_seed(0)
    net = nn.Conv2d(64, 64, 3, padding=1)
    x = torch.randn(1, 64, 16, 16)
    price = VelaPrice(net, [x], accelerator="ethos-u85-256", system="Ethos_U85_SYS_DRAM_High")
    with pytest.warns(UserWarning, match=r"'unstructured' make these dearer, in cycles: weight \("):
        assert prices_of_zeros(net, price, 0.5) == {"weight": 0.0}
    assert prices_of_zeros(net, price, 0.5, pattern="2:4")["weight"] > 0


def test_what_has_no_price() -> None:
    class Partly(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)

    class Rooted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(super().forward(x)).real

    net = Partly(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="budget must be 'cycles' or 'memory', got 'joules'"):
        VelaPrice(net, [torch.randn(1, 8)], budget="joules")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"2.weight has no price: no module that has it was call"):
        VelaPrice(net, [torch.randn(1, 8)])("2.weight", torch.zeros(8, 8))
    net = nn.Sequential(Rooted(8, 8))
    with pytest.raises(CaptureError, match="0 has no price: "):
        VelaPrice(net, [torch.randn(1, 8)])("0.weight", torch.zeros(8, 8))
