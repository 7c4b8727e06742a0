"""The measured table of kernels, and what becomes of operators whose kernels a runtime lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_nna import coverage, emulate
from lightning_nna.deploy import export_tflite
from lightning_nna.emulation import calibrate
from lightning_nna.emulation.modes import FIDELITIES
from lightning_nna.emulation.program import Instruction
from lightning_nna.emulation.runtime_kernels import table
from lightning_nna.testing.replay import check_instructions
from recipes.benchmark.kernels import MEASURED, kernel_types, read_probes
from tests.emulation.operators.examples import Calling


@pytest.mark.exactness
@pytest.mark.parametrize("runtime", MEASURED)
def test_the_table_is_what_the_runtime_has(runtime: str) -> None:
    measured = kernel_types(read_probes(), runtime)
    assert {name: tuple(types) for name, types in measured.items()} == table()[runtime]


def test_known_kernels() -> None:
    assert table()["litert"]["TOPK_V2"] == ("int16", "int8")
    assert table()["tflm"]["TOPK_V2"] == ()
    assert table()["tflm"]["REDUCE_MAX"] == ("int8",)
    lstm = {runtime: table()[runtime]["UNIDIRECTIONAL_SEQUENCE_LSTM"] for runtime in MEASURED}
    assert lstm == {"litert": ("int8",), "tflm": ("int8",), "tosa": ()}


@pytest.mark.exactness
@pytest.mark.parametrize("spec", ["tflm-int8", "tflm-int16x8"])
@pytest.mark.parametrize(
    "function", [lambda x: x.exp(), lambda x: (x * x + 1).log(), lambda x: (x * x).sqrt(), F.mish]
)
def test_a_function_without_a_kernel_is_a_table(function: object, spec: str) -> None:
    recorded: list[Instruction] = []
    module, x = Calling(function), torch.linspace(-3, 2, 800).view(20, 40)
    assert not coverage(module, x, spec=spec).fallbacks
    with emulate(module, spec) as chip, torch.no_grad():
        with chip.observing():
            module(x)
        with chip.running(recorder=recorded.append):
            module(x)
    assert "GATHER" in [each.operator for each in recorded]
    assert check_instructions(recorded, "tflm")["GATHER"] >= 800


def test_what_is_lacking_runs_in_float_and_nothing_of_it_is_recorded() -> None:
    recorded: list[Instruction] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        # Of the second the product with 2 is an instruction, and the largest value has no kernel.
        return torch.tanh(x) + F.embedding_bag(
            torch.zeros(4, 2, dtype=torch.long), 2 * x[:, :40], mode="max"
        )

    module, x = Calling(function), torch.randn(4, 40)
    results = []
    with emulate(module, "tflm-int16x8") as chip, torch.no_grad():
        with chip.observing():
            module(x)
        for fidelity in FIDELITIES:
            with chip.running(fidelity=fidelity, recorder=recorded.append):
                results.append(module(x))
    assert torch.equal(*results)
    assert "REDUCE_MAX" not in [each.operator for each in recorded]
    check_instructions(recorded, "tflm")


def test_an_export_names_the_runtime_and_the_kernel(tmp_path: Path) -> None:
    module, x = Calling(lambda x: x.tanh().topk(2).values), torch.randn(4, 9)
    calibrate(module, [x], spec="tflm-int8")
    with pytest.raises(ValueError, match=r"TFLite-Micro has no kernel TOPK_V2 of int8: choose"):
        export_tflite(module, [x], tmp_path / "network.tflite")
