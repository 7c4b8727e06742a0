"""The table of all weights: figures that a reader can check, on paper and in the browser.

The page of a whole deployment is tested in :mod:`tests.deploy.test_deployment_report`.
"""

from __future__ import annotations

import csv
import io
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_nna import calibrate, emulate
from lightning_nna.deploy import layer_figures, write_report
from lightning_nna.deploy.vela import VelaOperator, VelaReport
from lightning_nna.weights.layers import LayerMetrics, as_csv, as_html, entropy_bits


class Net(nn.Module):
    """Two recurrent layers and a head, whose weights have two values and half zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(4, 8, batch_first=True)
        self.second = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 4)
        self.head.weight.data = torch.tensor([[0.0, 0.5]]).repeat(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x)[0])[0])


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    found, x = Net(), torch.randn(2, 5, 4)
    calibrate(found, [x])
    with emulate(found), torch.no_grad():
        found(x)
    return found


def report(*operators: tuple[str, str, int]) -> VelaReport:
    found = tuple(
        VelaOperator(name, kind, True, cycles, cycles, 1) for name, kind, cycles in operators
    )
    return VelaReport("ethos-u55-128", "s", "m", found, 1, 1, 1, 0, 1, 10, 5, 10, 0.1)


def test_every_weight_has_its_figures(net: nn.Module) -> None:
    rows = {row.name: row for row in layer_figures(net)}
    assert list(rows) == [name for name, x in net.named_parameters() if x.dim() > 1]
    head = rows["head.weight"]
    assert (head.bits, head.values, head.zeros, head.entropy_bits) == (1, 2, 0.5, 1.0)
    # A bit a weight, two levels or a mask and one, and a step for each row.
    assert head.packed_bytes <= 32 // 8 + 2 + 4 * 4
    assert head.sqnr_db > 100
    assert rows["first.weight_ih_l0"].sqnr_db > 30


def test_cycles_go_to_the_layers_that_they_are_of(net: nn.Module) -> None:
    lstm = "UnidirectionalSequenceLstm"
    found = report(
        ("first/lstm#0/layer0", lstm, 100),
        ("gate", lstm, 60),
        ("head/fully_connected#0", "FullyConnected", 7),
    )
    rows = {row.name: row for row in layer_figures(net, [found, found])}
    assert rows["head.weight"].cycles == 14
    mine = [rows[f"first.weight_{kind}_l0"].cycles for kind in ("ih", "hh")]
    assert sum(cycles or 0 for cycles in mine) == 320
    assert rows["second.weight_ih_l0"].cycles is None


def test_a_module_that_is_not_emulated() -> None:
    with pytest.raises(ValueError, match="has not run emulated"):
        layer_figures(nn.Linear(2, 2))


def test_entropy() -> None:
    x = torch.tensor([0.0] * 12 + [1.0] * 3 + [2.0])
    expected = sum(p * math.log2(1 / p) for p in (12 / 16, 3 / 16, 1 / 16))
    assert entropy_bits(x) == pytest.approx(expected)
    assert entropy_bits(torch.zeros(5)) == 0.0
    assert entropy_bits(torch.zeros(0)) == 0.0


ROWS = [
    LayerMetrics("a<b>", "gq", 5, 100, 32, 0.25, 4.5, 70, 31.0, 1000),
    LayerMetrics("c", "chip", 8, 300, 200, 0.0, 7.0, 400, math.inf, 3000),
]


def test_the_csv_reads_back() -> None:
    first, second = csv.DictReader(io.StringIO(as_csv(ROWS)))
    assert (first["name"], first["values"], first["cycles"]) == ("a<b>", "32", "1000")
    assert float(second["sqnr_db"]) == math.inf


class Checked(HTMLParser):
    """Open elements, texts, and what is asked for from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.elsewhere: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elsewhere += [str(value) for name, value in attrs if name in ("src", "href")]
        self.tags.add(tag)
        self.open += [] if tag in ("meta", "rect") else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elsewhere += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    page = Checked()
    page.feed(as_html(ROWS, title="A & B", notes=["one < two"]))
    assert (page.open, page.elsewhere) == ([], [])
    assert {"A & B", "one < two", "a<b>", "4,000", "7.25", "cycles"} <= set(page.texts)


def test_both_are_written(net: nn.Module, tmp_path: Path) -> None:
    rows = write_report(net, tmp_path, [report(("head/fully_connected#0", "FullyConnected", 7))])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.csv", "report.html"]
    assert len((tmp_path / "report.csv").read_text().splitlines()) == len(rows) + 1
    assert "ethos-u55-128" in (tmp_path / "report.html").read_text()
