"""Kernels that Numba compiles for processors compute the bits of the reference."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nna.emulation.kernels import library, reference
from tests.emulation import compiled_kernels
from tests.emulation.compiled_kernels import KERNELS, OPERATORS, differences
from tests.emulation.kernel_cases import difference

pytest.importorskip("numba")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_compiled(name: str) -> None:
    assert library.compiled_kernel(name) is not None
    assert library.runs_kernel(name, torch.ones(1))


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiled_kernels_equal_the_reference(operator: str) -> None:
    cases = compiled_kernels.cases(operator)
    assert len(cases) >= 3
    told = {name: differences(name, arguments) for name, arguments in cases.items()}
    assert {name: text for name, text in told.items() if text} == {}


def test_compiled_kernels_equal_the_reference_in_other_shapes() -> None:
    cases = compiled_kernels.other_cases()
    told = {name: differences(name, arguments) for name, arguments in cases.items()}
    assert {name: text for name, text in told.items() if text} == {}


def _with_gaps(x: Any) -> Any:
    """Return a tensor of the same values, between whose elements others stand in memory."""
    return torch.stack([x, x + x], -1)[..., 0] if isinstance(x, Tensor) and x.dim() else x


@pytest.mark.parametrize("operator", OPERATORS)
def test_tensors_with_gaps_and_gradients(operator: str) -> None:
    name, arguments = next(iter(compiled_kernels.cases(operator).items()))
    # Tables have one axis and no gaps.
    first = _with_gaps(arguments[0])
    assert not first.is_contiguous()
    if first.is_floating_point():
        first.requires_grad_()
    results = compiled_kernels.compiled(operator, first, *arguments[1:])
    assert difference(getattr(reference, operator)(*arguments), results) == "", name


@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1e12])
def test_no_value_leads_out_of_a_table(special: float) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-128, 128, (4, 700), generator=generator).float()
    x[1, 5] = x[2, 690] = special
    table = torch.randn(65536, generator=generator)
    cases = {
        "look_up/first": (x, table[:256], None, 1.0, -128),
        "look_up_pair/first": (x, x.roll(1), table, None, 1.0, -128, 1.0, -128),
        "softmax_rows/first": (x, torch.arange(256, 0, -1) << 22, 1.0),
    }
    told = {name: differences(name, each) for name, each in cases.items()}
    assert told == dict.fromkeys(cases, "")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("operator", OPERATORS)
def test_any_number_of_threads_computes_the_same_bits(operator: str) -> None:
    cases = list(compiled_kernels.cases(operator).items())[:3]
    told = {name: differences(name, arguments) for name, arguments in cases}
    assert told == dict.fromkeys(told, "")


def _python(script: str, path: Path = ROOT, **environment: str) -> str:
    """Run a script in a process of its own; return what it prints."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    variables |= {"PYTHONPATH": str(path)} | environment
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=path, env=variables, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_WORKERS = """
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_nna.emulation.kernels import definitions

class Quantized(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, position):
        weight = torch.arange(200_000.0).view(200, 1000) + position
        # Of the kernel: those of PyTorch's own functions do not survive a fork.
        torch.set_num_threads(4)
        stored, _, _ = definitions.quantize_rows(weight, rows_per_scale=1, maximum=127)
        torch.set_num_threads(1)
        return stored

torch.set_num_threads(1)
own = torch.stack([Quantized()[k] for k in range(4)])
loader = DataLoader(Quantized(), batch_size=4, num_workers=2, multiprocessing_context="fork")
(loaded,) = loader
print(torch.equal(own, loaded))
"""


@pytest.mark.slow
def test_workers_that_are_forked_call_kernels() -> None:
    assert _python(_WORKERS).split() == ["True"]


_WITHOUT_NUMBA = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "numba":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())

import torch
from lightning_nna.emulation.kernels import library
from tests.emulation import compiled_kernels

assert library.compiled_kernel("requantize") is None
assert not library.runs_kernel("requantize", torch.ones(1))
print(json.dumps(compiled_kernels.digests()))
"""


@pytest.mark.slow
def test_without_numba_the_bits_are_the_same() -> None:
    assert json.loads(_python(_WITHOUT_NUMBA)) == compiled_kernels.digests()


_ONE_KERNEL = """
import torch
from lightning_nna.emulation.kernels import compiled_weights, definitions, library

x = definitions.dequantize(torch.ones(2, 3), torch.ones(3), None, scale=0.5, inner=1)
print(compiled_weights._dequantize_columns.stats.cache_path, x.sum().item())
"""


@pytest.mark.slow
def test_no_folder_for_the_cache_is_needed(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lightning_nna", tmp_path / "lightning_nna", ignore=ignored)
    # Where folders are expected, files stand: nobody can write there.
    (tmp_path / "lightning_nna/emulation/kernels/__pycache__").touch()
    (tmp_path / "home").touch()
    home = str(tmp_path / "home")
    told = _python(_ONE_KERNEL, tmp_path, HOME=home, XDG_CACHE_HOME=home)
    assert told.split() == ["None", "3.0"]


_CACHED = """
import torch
from lightning_nna.emulation.kernels import compiled

compiled._SOURCES += {change!r}

from lightning_nna.emulation.kernels import compiled_weights, definitions

definitions.dequantize(torch.ones(2, 3), torch.ones(3), None, scale=0.5, inner=1)
stats = compiled_weights._dequantize_columns.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


@pytest.mark.slow
def test_a_kernel_in_the_cache_is_of_the_same_sources(tmp_path: Path) -> None:
    """One that was compiled from other sources, of whatever kernel, is compiled anew."""
    told = [
        _python(_CACHED.format(change=change), NUMBA_CACHE_DIR=str(tmp_path)).split()
        for change in ("", "", "another")
    ]
    assert told == [["0", "1"], ["1", "0"], ["0", "1"]]


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["haswell", "generic"])
def test_other_processors_compute_the_same_bits(processor: str, tmp_path: Path) -> None:
    # In an empty cache, since Numba tells the machine code only of what it has compiled.
    variables = {"NUMBA_CPU_NAME": processor, "NUMBA_CACHE_DIR": str(tmp_path)}
    script = "from tests.emulation.compiled_kernels import main; main()"
    told = json.loads(_python(script, **variables))
    assert len(told["differences"]) > 100
    assert {name: text for name, text in told["differences"].items() if text} == {}
    kernels = {"_requantize_rows", "_requantize_columns", "_softmax_rows", "_normalize_rows"}
    kernels |= {"_quantize_groups", "_raised_scales", "_fold_rows", "_dequantize_rows"}
    assert kernels <= set(told["fused"])
    assert {name: code for name, code in told["fused"].items() if code} == {}
