"""Fused kernels compute the bits of the functions they replace, in plain PyTorch and in Triton."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nna.emulation.arithmetic.quantized_weight import quantize_weight
from lightning_nna.emulation.arithmetic.rescaling import Rescaler, RoundingKind, rescale, wrap
from lightning_nna.emulation.clipping import clip
from lightning_nna.emulation.kernels import definitions, library, reference
from lightning_nna.emulation.operators.call import quantize, stored_bytes
from lightning_nna.emulation.operators.elementwise import pairwise
from lightning_nna.emulation.operators.linear import integer_bias
from lightning_nna.emulation.operators.tables import LookedUp, Table
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import QParams, round_significand
from lightning_nna.emulation.spec import NNASpec
from tests.emulation import kernel_cases
from tests.emulation.kernel_cases import CASES, REQUANTIZATIONS, difference, requantization

ROOT = Path(__file__).resolve().parents[2]
_KERNELS = "lightning_nna.emulation.kernels.triton_"
_NAMES: dict[int, RoundingKind] = {
    number: name for name, number in definitions.ROUNDINGS.items() if name != "reference"
}


def _rescaled(arguments: tuple[Any, ...], reach: float) -> tuple[Tensor, Tensor]:
    """Apply :class:`Rescaler` and :func:`clip` to the arguments of a requantization."""
    sums, scales, bias, offset, before, after, out_scale, rounding, bits, saturates, *rest = (
        arguments
    )
    bias_bits, zero_point, low, high, fused_relu, _, _ = rest
    real = before * scales.double()
    added = offset + integer_bias(bias, real, bias_bits)
    limit = 2.0 ** (bits - 1)

    def settle(x: Tensor) -> Tensor:
        return x.clamp(-limit, limit - 1) if saturates else wrap(x, limit)

    rescaler = Rescaler(
        (real / after).view(-1, 1),
        rounding=_NAMES[rounding],
        largest=min(reach + float(added.abs().max()), limit),
        offset=added.view(-1, 1),
        settle=settle,
        zero_point=zero_point,
    )
    y = QParams(out_scale, zero_point, low + zero_point, high + zero_point, fused_relu)
    centered, clipped = clip(rescaler(sums.double().clone()), y, keep=True)
    mask = torch.zeros(sums.numel(), dtype=torch.bool)
    if clipped is not None:
        mask[clipped] = True
    return centered.mul_(out_scale), mask.view(sums.shape)


@pytest.mark.parametrize("name", REQUANTIZATIONS)
def test_requantize_equals_the_rescaler(name: str) -> None:
    settings = REQUANTIZATIONS[name]
    arguments = requantization(name, **settings)
    values, clipped = reference.requantize(*arguments)
    expected, mask = _rescaled(arguments, settings.get("reach", 2.0**31))
    assert values.numel() == 100_000
    assert torch.equal(values, expected)
    assert torch.equal(clipped, mask)
    # Neither all nor none is clipped, so that the comparison says something.
    assert 1000 < int(mask.sum()) < 99_000


@pytest.mark.parametrize("rounding", _NAMES.values())
def test_requantize_with_one_factor_equals_rescale(rounding: RoundingKind) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-40_000, 40_000, (100_000,), generator=generator)
    for factor in (1e-310, 0.0, 2.0**-32, 0.00713, 0.125, 0.75, 1 - 2.0**-53, 1.0, 1.9):
        values, clipped = definitions.requantize(
            x, scale_before=factor, scale_after=1.0, out_scale=1.0, rounding=rounding,
            zero_point=-7, low=-121, high=134, accumulator_bits=32,
        )  # fmt: skip
        rounded = rescale(x.double(), factor, rounding=rounding, largest=4e4, zero_point=-7)
        assert torch.equal(values, rounded.clamp(-121, 134).float())
        assert torch.equal(_mask(clipped, x), (rounded < -121) | (rounded > 134))


def _mask(clipped: Tensor | None, like: Tensor) -> Tensor:
    """A mask; none stands for nothing that was clipped."""
    return torch.zeros(like.shape, dtype=torch.bool) if clipped is None else clipped


def _quantized(x: Tensor, scale: float, low: int, high: int, fused_relu: bool) -> list[Tensor]:
    """Quantize, and tell which gradients are stopped."""
    leaf = x.float().requires_grad_()
    values = quantize(leaf, QParams(scale, 0, low, high, fused_relu))
    values.sum().backward()
    assert leaf.grad is not None
    return [values.detach(), leaf.grad == 0]


def _quantizations(*, finite: bool) -> list[Any]:
    """Cases of ``quantize``, with or without a quotient that is not finite."""
    return [
        pytest.param(arguments, id=name)
        for name, arguments in CASES["quantize"]()
        if bool(torch.isfinite(arguments[0].float() / arguments[1]).all()) == finite
    ]


@pytest.mark.parametrize("arguments", _quantizations(finite=False))
def test_quotients_that_are_not_finite_are_told(arguments: tuple[Any, ...]) -> None:
    *_, finite = reference.quantize(*arguments)
    assert not bool(finite)
    with pytest.raises(FloatingPointError, match="not finite"):
        _quantized(*arguments)


@pytest.mark.parametrize("arguments", _quantizations(finite=True))
def test_quantize_equals_the_operator(arguments: tuple[Any, ...]) -> None:
    *results, finite = reference.quantize(*arguments)
    assert bool(finite)
    assert difference(tuple(_quantized(*arguments)), tuple(results)) == ""


def _rows(*, finite: bool) -> list[Any]:
    """Cases of ``quantize_rows``, with or without a value that is not finite."""
    cases = dict(CASES["quantize_rows"]())
    selected = {
        name: arguments
        for name, arguments in cases.items()
        if name.startswith("quantize_rows/") and bool(arguments[0].isfinite().all()) == finite
    }
    return [pytest.param(*arguments, id=name) for name, arguments in selected.items()]


@pytest.mark.parametrize(("weight", "largest", "rows", "maximum", "power"), _rows(finite=False))
def test_rows_that_are_not_finite_are_told(
    weight: Tensor, largest: Tensor | None, rows: int, maximum: int, power: bool
) -> None:
    *_, finite = reference.quantize_rows(weight, largest, rows, maximum, power)
    assert not bool(finite)
    with pytest.raises(FloatingPointError, match="not finite"):
        quantize_weight(weight, rows_per_scale=rows, maximum=maximum, power_of_two=power)


@pytest.mark.parametrize(("weight", "largest", "rows", "maximum", "power"), _rows(finite=True))
def test_quantize_rows_equals_quantize_weight(
    weight: Tensor, largest: Tensor | None, rows: int, maximum: int, power: bool
) -> None:
    stored, scales, finite = reference.quantize_rows(weight, largest, rows, maximum, power)
    assert bool(finite)
    expected = quantize_weight(weight, rows_per_scale=rows, maximum=maximum, power_of_two=power)
    assert torch.equal(stored, expected.stored)
    assert torch.equal(scales, expected.scales)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_look_up_equals_a_table(bits: int, fused: bool) -> None:
    x = (
        QParams(round_significand(0.1), 5)
        if bits == 8
        else QParams(2.0**-11, 0, -(2**15), 2**15 - 1)
    )
    y = QParams(0.0625, -3, fused_relu=fused)
    generator = torch.Generator().manual_seed(6)
    low, high = x.bounds
    table = Table(torch.randint(-300, 300, (2**bits,), generator=generator).float(), y)
    integers = torch.randint(low, high + 1, (100, 1000), generator=generator)
    entries, mask = table.on(torch.device("cpu"), fused_relu=fused)
    results = definitions.look_up(integers * x.scale, entries, mask, scale=x.scale, first=low)
    expected = LookedUp(table, (Activation(integers * x.scale, x),)).clipped(y, keep=True)
    assert difference(expected, results) == ""


@pytest.mark.parametrize("kind", ["ADD", "SUB", "MUL"])
@pytest.mark.parametrize("shapes", kernel_cases._SHAPES[:-1])
def test_look_up_pair_equals_the_operators(kind: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    grids = QParams(0.1, 5), QParams(0.0234375, -90), QParams(0.05, 11)
    a, b, y = grids
    generator = torch.Generator().manual_seed(7)
    q_a, q_b = (
        torch.randint(q.bounds[0], q.bounds[1] + 1, shape, generator=generator).float()
        for q, shape in zip((a, b), shapes, strict=True)
    )
    every = (torch.arange(256.0) + a.bounds[0])[:, None], torch.arange(256.0) + b.bounds[0]
    spec = NNASpec()
    table = Table(pairwise(kind, *every, grids, spec).flatten(), y)
    entries, mask = table.on(torch.device("cpu"), fused_relu=False)
    values, clipped = definitions.look_up_pair(
        q_a * a.scale, q_b * b.scale, entries, mask,
        scale_a=a.scale, first_a=a.bounds[0], scale_b=b.scale, first_b=b.bounds[0],
    )  # fmt: skip
    rounded = pairwise(kind, q_a, q_b, grids, spec)
    low, high = y.bounds
    assert torch.equal(values, rounded.clamp(low, high).float() * y.scale)
    assert torch.equal(_mask(clipped, values), (rounded < low) | (rounded > high))


def test_centered_integers_equal_stored_bytes() -> None:
    for scale, zero_point in ((round_significand(0.1), -128), (0.0234375, 7), (2.0**-20, 127)):
        y = QParams(scale, zero_point)
        x = torch.arange(-128, 128).repeat(400).sub(zero_point) * scale
        computed = definitions.centered_integers(x, scale=scale, zero_point=zero_point)
        assert torch.equal(computed, stored_bytes(x, y))


class _Calls(TorchDispatchMode):
    """Names of the operators that PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_every_kernel_is_one_operator() -> None:
    with _Calls() as calls:
        definitions.quantize(torch.ones(3), scale=0.5, low=-3, high=3)
        definitions.quantize_rows(torch.ones(3, 2), rows_per_scale=1, maximum=7)
        definitions.centered_integers(torch.ones(3), scale=1.0, zero_point=0)
    kernels = [name for name in calls.names if "lightning_nna" in name]
    assert kernels == [
        f"lightning_nna.{name}.default"
        for name in ("quantize", "quantize_rows", "centered_integers")
    ]
    assert not [name for name in calls.names if "local_scalar" in name]


def test_without_triton_the_reference_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{_KERNELS}kernels", None)
    library.warn_without_triton.cache_clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            launch = library.on_cuda(
                "centered_integers", reference.centered_integers, "triton_kernels"
            )
            assert launch(torch.ones(2), 0.5, 1).tolist() == [3, 3]
    library.warn_without_triton.cache_clear()
    assert [str(each.message)[:37] for each in warned] == ["the package triton cannot be imported"]


def test_nothing_imports_triton_before_it_is_needed() -> None:
    sources = {path: path.read_text() for path in (ROOT / "lightning_nna").rglob("*.py")}
    importing = [path.name for path, text in sources.items() if "import triton" in text]
    kernels = [f"triton_{name}.py" for name in ("kernels", "layers", "normalization", "recurrent")]
    assert sorted(importing) == kernels
    others = [path.name for path, text in sources.items() if f"from {_KERNELS}" in text]
    assert sorted(others) == kernels[1:]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """Return differences by case; all in one process, since starting one takes longest."""
    pytest.importorskip("triton")
    command = [sys.executable, "-W", "ignore", "-m", "tests.emulation.kernel_cases"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("operator", CASES)
def test_triton_kernels_equal_the_reference(operator: str, interpreted: dict[str, str]) -> None:
    results = {name: text for name, text in interpreted.items() if name.startswith(f"{operator}/")}
    assert len(results) >= 3
    assert {name: text for name, text in results.items() if text} == {}


_VECTORS = "sums:fp32 scales:fp32 bias:fp32 offset:fp64 values:fp32 clipped:i1"
_BUFFERS = "state:fp32 outputs:fp32 gates:i16 cells:i16 tanh_cells:i16 flags:u8"
_OWN = "first before after rows size"
#: A kernel by module and name: pointers with their types, integers, numbers, constants.
_COMPILED: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "kernels._requantize": (
        _VECTORS,
        "numel inner channels zero_point low high",
        "scale_before:fp64 scale_after:fp64 out_scale:fp32",
        {
            **{"ROUNDING": 1, "ACCUMULATOR_BITS": 32, "SATURATES": False, "BIAS_BITS": 32},
            **{"FUSED_RELU": False, "WIDE": False, "HAS_SCALES": True, "HAS_BIAS": True},
            **{"HAS_OFFSET": True},
        },
    ),
    "kernels._quantize": (
        "x:fp32 values:fp32 clipped:i1 finite:i1",
        "numel low high",
        "scale:fp32",
        {"FUSED_RELU": False},
    ),
    "kernels._quantize_rows": (
        "weight:fp32 maxima:fp32 stored:i8 scales:fp32 finite:i1",
        "size row_size rows_per_scale parts",
        "maximum:fp64",
        {"POWER_OF_TWO": False, "HAS_MAXIMA": False, "CHUNKS_OF_MAXIMA": 1, "CHUNKS": 3},
    ),
    "kernels._largest": ("weight:fp32 largest:fp32", "size", "", {}),
    "kernels._raise_scales": (
        "stored:i8 scales:fp32 bias:fp32 raised:i8 raised_scales:fp32 finite:i1",
        "numel rows row_size rows_per_scale",
        "unit:fp64",
        {
            **{"POWER_OF_TWO": False, "BIASES": 64, "CHUNKS_OF_GROUP": 1, "CHUNKS_OF_BIAS": 2},
            **{"WEIGHTS": 256, "CHUNKS_OF_WEIGHT": 3, "CHUNKS_OF_ROW": 2},
        },
    ),
    "layers._fold_batch_norm": (
        "stored:i8 scales:fp32 layer_bias:fp32 mean:fp32 variance:fp32 weight:fp32 bias:fp32 "
        "folded:i8 folded_scales:fp32 shift:fp32 inverse:fp32",
        "row_size",
        "eps:fp32",
        {"HAS_LAYER_BIAS": True, "HAS_WEIGHT": True, "HAS_BIAS": True, "CHUNKS": 2},
    ),
    "layers._softmax_rows": (
        "x:fp32 table:i64 values:fp32",
        "columns",
        "scale:fp32",
        {"CHUNKS": 2},
    ),
    "layers._whole_numbers": ("x:fp32 values:fp32", "numel", "scale:fp32", {}),
    "layers._dequantize": (
        "sums:fp32 scales:fp32 bias:fp32 values:fp32",
        "numel inner channels",
        "scale:fp32",
        {"HAS_BIAS": True},
    ),
    "normalization._normalize_rows": (
        "x:fp32 gain:fp32 shift:fp32 table:i64 again_table:i64 values:fp32 clipped:i1",
        "columns entries groups channels inner epsilon mean_m mean_e first_m first_e again_m "
        "again_e low high",
        "scale:fp32 mean_factor:fp64 center_own:fp64 center_other:fp64 center_last:fp64 "
        "first_square:fp64 first_variance:fp64 first_product:fp64 epsilon_own:fp64 "
        "epsilon_other:fp64 epsilon_last:fp64 again_square:fp64 again_variance:fp64 "
        "again_product:fp64 gain_scale:fp32 gain_factor:fp64 shift_scale:fp32 shift_own:fp64 "
        "shift_other:fp64 shift_last:fp64 out_factor:fp64 out_scale:fp32",
        {
            **{"ROUNDING": 1, "SEGMENT_BITS": 7, "CENTERED": True, "HAS_EPSILON": True},
            **{"AGAIN": False, "HAS_GAIN": True, "HAS_SHIFT": True, "SAME_SCALE": False},
            **{"FUSED_RELU": False, "CHUNKS": 1},
        },
    ),
    "kernels._look_up": (
        "x:fp32 table:fp32 mask_table:i1 values:fp32 clipped:i1",
        "numel entries first",
        "scale:fp32",
        {"HAS_MASK": True},
    ),
    "kernels._look_up_pair": (
        "a:fp32 b:fp32 table:fp32 mask_table:i1 values:fp32 clipped:i1",
        "numel entries inner_a size_a inner_b size_b first_a first_b",
        "scale_a:fp32 scale_b:fp32",
        {"HAS_MASK": True},
    ),
    "kernels._centered_integers": ("x:fp32 integers:i8", "numel zero_point", "scale:fp32", {}),
    "recurrent._lstm_step": (
        f"sums:fp32 inputs:fp32 factors:fp64 offset:fp64 gate_table:i16 cell_table:i16 {_BUFFERS}",
        f"{_OWN} zero_point low high",
        "hidden_factor:fp64 scale:fp32",
        {
            **{"ROUNDING": 1, "ACCUMULATOR_BITS": 32, "SATURATES": False, "DIVIDES": False},
            **{"SATURATES_RECURRENT": True, "NEW_EXPONENT": -19, "NEW_FACTOR": 2.0**-19},
        },
    ),
    "recurrent._lstm_step_backward": (
        "grad:fp32 d_state:fp32 d_cell:fp32 gates:i16 cells:i16 tanh_cells:i16 flags:u8 "
        "d_input:fp32 d_recurrent:fp32",
        _OWN,
        "cell_scale:fp32",
        {},
    ),
    "recurrent._gru_step": (
        "sums:fp32 inputs:fp32 state_factors:fp64 offset:fp64 factors:fp64 sigmoid:i16 tanh:i16 "
        "state:fp32 states:i16 outputs:fp32 trace:i16",
        _OWN,
        "scale:fp32",
        {
            **{"PARTS": 2, "STATE_ROUNDING": 2, "ROUNDING": 1, "ACCUMULATOR_BITS": 64},
            **{"SATURATES": False},
        },
    ),
    "recurrent._gru_step_backward": (
        "grad:fp32 d_product:fp32 d_change:fp32 trace:i16 d_x:fp32 d_recurrent:fp32",
        "first rows size",
        "recurrent_scale:fp32 change_scale:fp32",
        {},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", _COMPILED)
def test_kernels_compile_and_round_as_ieee_754(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.backends.compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module, _, kernel = name.partition(".")
    function = getattr(importlib.import_module(_KERNELS + module), f"{kernel}_kernel")
    pointers, integers, numbers, constants = _COMPILED[name]
    types = dict(each.split(":") for each in numbers.split())
    types |= {key: f"*{kind}" for key, kind in (each.split(":") for each in pointers.split())}
    types |= dict.fromkeys(integers.split(), "i32")
    signature = {key: types.get(key, "constexpr") for key in function.arg_names}
    source = triton.compiler.ASTSource(function, signature, constants | {"BLOCK": 256})
    target = compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
    assert len(compiled.asm["cubin"]) > 1000
    # Neither fused nor approximate.
    assert not re.findall(r"\bfma\.|\bdiv\.(?:full|approx)|\brcp\.", compiled.asm["ptx"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("operator", CASES)
def test_kernels_of_a_gpu_equal_the_reference(operator: str) -> None:
    def run(name: str, *arguments: Any) -> Any:
        moved = [x.cuda() if isinstance(x, Tensor) else x for x in arguments]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Triton must be there.
            result = getattr(torch.ops.lightning_nna, name)(*moved)
        return moved if result is None else result

    results = dict(kernel_cases.differences(run, operator))
    assert {name: text for name, text in results.items() if text} == {}
