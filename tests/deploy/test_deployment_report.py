"""The report of a deployment: what it says, what it says is missing, and that it does no harm."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_nna import calibrate, emulate
from lightning_nna.deploy import (
    Deployment,
    ExportedProgram,
    Metric,
    Origin,
    RuntimeCheck,
    VelaReport,
    activation_metrics,
    check_runtimes,
    export_tflite,
    measure_deployment,
    write_report,
)
from lightning_nna.deploy.vela import VelaOperator
from lightning_nna.html_page import Column, table
from tests.deploy.test_report import Checked

NASTY = """<script>alert('1')</script>" onload="x"""
FAKE_ORIGIN = Origin("2020-01-01 00:00 UTC", f"python {NASTY}", None, True, {NASTY: "1"}, "m")


class Convolutional(nn.Module):
    """A convolution that is folded into its batch norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def calibrated(net: nn.Module, x: torch.Tensor) -> nn.Module:
    calibrate(net.eval(), [x])
    return net


def exported(net: nn.Module, x: torch.Tensor, folder: Path, name: str = "net") -> ExportedProgram:
    return ExportedProgram(name, export_tflite(net, [x], folder / "net.tflite"), [x], calls=2.0)


def estimate(*operators: VelaOperator) -> VelaReport:
    numbers = (10, 5, 100, 20, 300, 40, 30, 10, 0.5)
    return VelaReport("ethos-u55-128", NASTY, "Shared_Sram", operators, *numbers)


def read(folder: Path) -> tuple[str, Checked]:
    text, page = (folder / "report.html").read_text(encoding="utf-8"), Checked()
    page.feed(text)
    return text, page


def explained(text: str) -> list[tuple[list[str], list[str]]]:
    """Return the heads of each table, and the columns that the paragraph below explains."""
    parts = text.split("<thead>")[1:]
    return [
        (
            re.findall(r"<th[^>]*>(.*?)</th>", part),
            re.findall(r"<b>(.*?)</b>: ", re.findall(r'<p class="legend">(.*?)</p>', part)[0]),
        )
        for part in parts
    ]


@pytest.fixture
def full(tmp_path: Path) -> str:
    """The page of a module, a program, a system and metrics whose names hold markup."""
    net = nn.Sequential()
    net.add_module(NASTY, nn.Linear(8, 4))
    x = torch.randn(2, 8)
    program = exported(calibrated(net, x), x, tmp_path, NASTY)
    operators = (
        VelaOperator(f"{NASTY}/fully_connected#0", "FullyConnected", True, 40, 30, 64),
        VelaOperator(NASTY, NASTY, False, 0, 0, 0),
    )
    deployment = Deployment(
        [program],
        [Metric(NASTY, 0.06, (0.05, 0.07), 0.05, is_fraction=True)],
        [
            RuntimeCheck("a & b", "1", (NASTY,), NASTY, 2_000_000, 1_999_999, True),
            RuntimeCheck(NASTY, None, (NASTY,), NASTY, 0, 0, False, f"no {NASTY}"),
        ],
        [{NASTY: estimate(*operators)}],
        activations=activation_metrics(net, lambda: net(x)),
        float_bytes=144,
        unit=NASTY,
        firmware={NASTY: {"flash_bytes": 9, "arena_bytes": None, "equal_outputs": 1.0}},
        origin=FAKE_ORIGIN,
        configuration=NASTY,
    )
    write_report(net, tmp_path, deployment=deployment)
    text, page = read(tmp_path)
    assert page.open == []
    assert page.elsewhere == []
    assert "script" not in page.tags
    return text


def test_names_from_outside_do_no_harm(full: str) -> None:
    assert "<script" not in full
    assert full.count("&lt;script&gt;") > 10
    # A quote would end an attribute, as that of a histogram's description.
    assert not re.search(r'<[^>]*onload="x', full)
    assert "default-src 'none'" in full
    assert not re.search(r"https?:|url\(|@import", full)


def test_every_column_is_explained(full: str) -> None:
    pairs = explained(full)
    assert len(pairs) == 10
    assert [heads for heads, _ in pairs] == [columns for _, columns in pairs]


def test_the_numbers_are_those_that_were_measured(full: str) -> None:
    cells = Counter(re.findall(r"<td[^>]*>([^<]*)</td>", full))
    # 36 parameters of 4 bytes; two calls of 40 cycles and 0.5 ms; one of two million differs.
    expected = ["144", "5.00 %", "5.00 to 7.00 %", "6.00 %", "1.20", "80", "1", "99.9999 %", "CPU"]
    assert {number: cells[number] > 0 for number in expected} == dict.fromkeys(expected, True)
    assert "with uncommitted changes" in full


def test_nothing_is_left_out_silently(tmp_path: Path) -> None:
    net, x = nn.Linear(8, 4), torch.randn(2, 8)
    calibrated(net, x)
    with emulate(net), torch.no_grad():
        net(x)
    write_report(net, tmp_path)
    text, _ = read(tmp_path)
    missing = re.findall(r'<p class="missing">(.*?)</p>', text)
    for subject in (
        *("accuracy", "output", "time on this CPU", "size compared", "device", "program"),
        *("operators", "firmware", "activations", "commit", "configuration"),
    ):
        assert any(subject in each.lower() or subject in each for each in missing), subject


@pytest.mark.exactness
def test_a_module_is_measured_on_every_runtime(tmp_path: Path) -> None:
    pytest.importorskip("ethosu")
    net, x = Convolutional(), torch.randn(1, 1, 8, 8)
    program = exported(calibrated(net, x), x, tmp_path)
    metric = Metric("accuracy", 0.9, float_value=0.95, is_fraction=True)
    deployment = measure_deployment(net, [program], metrics=[metric], runtimes=["litert", "tflm"])
    assert [check.is_promised for check in deployment.checks] == [False, True]
    promised = deployment.checks[1]
    # The example and four random inputs, three results each.
    assert (promised.outputs, promised.equal_outputs) == (15, 15)
    assert deployment.float_bytes == 4 * sum(p.numel() for p in net.parameters())
    assert deployment.timing is not None
    assert deployment.timing.float_ms is not None
    assert min(deployment.timing.float_ms, deployment.timing.program_ms) > 0
    (totals,) = deployment.totals
    (report,) = deployment.systems[0].values()
    assert totals.cycles == 2 * report.cycles
    rows = {row.name: row for row in write_report(net, tmp_path, deployment=deployment)}
    text, _ = read(tmp_path)
    assert "No metric has a confidence interval".lower() in text.lower()
    # The convolution has no operator of its own: its cycles are those of the batch norm.
    assert deployment.activations.folded == {"conv/convolution#0": "norm/batch_norm#0"}
    assert (rows["conv.weight"].cycles or 0) > 0
    assert (rows["head.weight"].cycles or 0) > 0
    with (tmp_path / "activations.csv").open(newline="", encoding="utf-8") as file:
        sites = [row["site"] for row in csv.DictReader(file)]
    assert "conv/convolution#0" not in sites
    assert {"norm/batch_norm#0", "head/fully_connected#0"} <= set(sites)


def test_activations_are_those_of_the_emulated_module() -> None:
    net, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU()), torch.randn(64, 16)
    calibrated(net, x)
    with emulate(net), torch.no_grad():
        expected = net(x).numpy()
    rows = {row.site: row for row in activation_metrics(net, lambda: [net(x), net(x)]).rows}
    row = rows["1/relu#0"]
    assert (row.calls, row.elements, row.bits, row.size_bytes) == (2, 2048, 8, 2048)
    assert row.zeros == np.mean(expected == 0)
    _, counts = np.unique(expected, return_counts=True)
    shares = counts / counts.sum()
    assert row.entropy_bits == pytest.approx(-np.sum(shares * np.log2(shares)))
    assert sum(row.histogram) == 2 * expected.size
    assert row.clip_rate == 0.0
    assert rows["0/fully_connected#0"].sqnr_db == pytest.approx(45, abs=10)


def test_operators_in_float_are_listed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.lgamma(self.linear(x))

    net, x = Net(), torch.rand(3, 4) + 1
    calibrated(net, x)
    rows = activation_metrics(net, lambda: net(x)).rows
    assert [(row.where, row.bits) for row in rows] == [("emulated", 8), ("fallback", 32)]
    assert rows[1].sqnr_db is None


def test_a_runtime_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_NNA_RUNTIMES", str(tmp_path / "nothing"))
    net, x = nn.Linear(8, 4), torch.randn(1, 8)
    program = exported(calibrated(net, x), x, tmp_path)
    (check,) = check_runtimes(net, [program], ["tosa"])
    assert (check.outputs, check.is_promised) == (0, False)
    assert "lightning_nna.deploy.runtimes.environment" in str(check.problem)
    with pytest.raises(ValueError, match="runtime must be one of"):
        check_runtimes(net, [program], ["onnx"])


def test_a_row_has_a_cell_for_each_column() -> None:
    with pytest.raises(ValueError, match="a row has 2 cells, and the table 1 columns"):
        table([Column("a", "A")], [["1", "2"]])


@pytest.mark.parametrize(
    ("metric", "ratio"),
    [
        (Metric("a", 0.06, float_value=0.05), 1.2),
        (Metric("a", 0.06), None),
        (Metric("a", 0.06, float_value=0.0), None),
    ],
)
def test_ratio_to_the_float_baseline(metric: Metric, ratio: float | None) -> None:
    assert metric.ratio == (None if ratio is None else pytest.approx(ratio))


def test_the_origin_of_a_checkout_and_of_a_folder(tmp_path: Path) -> None:
    outside = Origin.of_process(tmp_path, command="c", packages=("torch", "no-such-package"))
    versions: Mapping[str, str] = outside.versions
    assert (outside.commit, outside.is_changed, outside.command) == (None, False, "c")
    assert list(versions) == ["python", "torch"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", outside.date)
