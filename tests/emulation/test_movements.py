"""Data movement keeps quantization parameters, and a program lays out every form of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import get_testing_overrides

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.emulation.dispatch import _kind_of
from lightning_nna.emulation.operators.catalog import operator_of
from tests.emulation.modules import Function

MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "type_as": lambda y: y.type_as(torch.zeros(2)),
    "type": lambda y: y.type(torch.float32),
    "to another": lambda y: y.to(torch.zeros(2)),
    "through float64": lambda y: y.double().float(),
    "reflected": lambda y: F.pad(y, (2, 1), mode="reflect"),
    "reflected on two sides": lambda y: nn.ReflectionPad2d((1, 2, 1, 0))(y[None, None])[0, 0],
    "replicated": lambda y: nn.ReplicationPad1d(2)(y),
    "circular": lambda y: F.pad(y, (1, 2), mode="circular"),
    "zeros": lambda y: nn.ZeroPad2d(1)(y[None])[0],
    "zeros by the function": lambda y: torch.constant_pad_nd(y, (1, 1), 0.0),
    "flipped": lambda y: y.fliplr().flipud(),
    "rotated": lambda y: y.rot90(1, (0, 1)),
    "rolled": lambda y: y.roll((1, 2), (0, 1)),
    "a diagonal": lambda y: y.diagonal(1),
    "on a diagonal": lambda y: torch.diag_embed(y[0]),
    "unfolded": lambda y: y.unfold(1, 3, 1),
    "repeated unevenly": lambda y: y.repeat_interleave(torch.tensor([1, 2, 0, 3]), 0),
    "a grid": lambda y: torch.meshgrid(y[0], y[1], indexing="ij")[1],
    "broadcast": lambda y: torch.broadcast_tensors(y[:1], y)[0],
    "selected": lambda y: y.masked_select(torch.arange(6) % 2 == 0),
    "taken": lambda y: y.take(torch.tensor([1, 5, 2])),
    "gathered": lambda y: y.gather(1, torch.tensor([[1], [0], [2], [5]])),
    "parts": lambda y: torch.cat(list(reversed(y.unsafe_split(2))), 1),
    "chunks": lambda y: torch.hstack(list(reversed(y.chunk(2, 1)))),
    "rows": lambda y: torch.vstack(list(reversed(y.unbind(0)))),
    "columns": lambda y: torch.column_stack([y, y[:, 0]]),
    "depth": lambda y: torch.dstack([y, y]),
    "blocks": lambda y: torch.block_diag(y[:, :2], y[:1]),
    "unflattened": lambda y: y.unflatten(1, (2, 3)).movedim(0, -1),
    "reversed": lambda y: y.__reversed__(),
    "indexed": lambda y: y[[2, 0], 1:],
}


@pytest.mark.parametrize("name", MOVED)
def test_values_move_unchanged(name: str, tmp_path: Path) -> None:
    net = Function(lambda x: torch.tanh(MOVED[name](torch.tanh(x))))
    x = torch.linspace(-2, 2, 24).reshape(4, 6)
    report = coverage(net, x)
    assert not report.fallbacks
    calibrate(net, [x])
    with emulate(net) as chip, torch.no_grad():
        # One operand is quantized, the input: the second function reads integers.
        assert [key for key in chip.ranges.ranges if key.endswith("input")] == ["./tanh#0/input"]
        assert net(x).shape == net.function(x).shape
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0


def test_the_gradient_moves_back() -> None:
    net = Function(lambda x: F.pad(torch.tanh(x), (1, 1), mode="reflect").type_as(x) * 2)
    x = torch.randn(3, 4, requires_grad=True)
    calibrate(net, [x.detach()])
    with emulate(net):
        net(x).sum().backward()
    expected = torch.autograd.grad(net.function(x).sum(), x)[0]
    assert x.grad is not None
    assert float(F.cosine_similarity(x.grad.flatten(), expected.flatten(), 0)) > 0.99


def test_tensors_of_several_parameters_keep_their_own() -> None:
    def function(x: Tensor) -> Tensor:
        first, second = torch.broadcast_tensors(torch.sigmoid(x[:1]), 5 * x)
        return torch.tanh(first) + torch.tanh(second)

    net, x = Function(function), torch.linspace(-3, 3, 24).reshape(4, 6)
    calibrate(net, [x])
    with emulate(net) as chip, torch.no_grad():
        assert not [key for key in chip.ranges.ranges if "tanh" in key]
        assert float((net(x) - function(x)).abs().max()) < 0.05


@pytest.mark.parametrize(
    "join",
    [
        torch.hstack,
        torch.vstack,
        torch.dstack,
        torch.column_stack,
        lambda parts: torch.block_diag(*parts),
    ],
)
@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_parts_of_several_parameters_are_requantized(
    join: Callable[[list[Tensor]], Tensor], spec: str, tmp_path: Path
) -> None:
    net = Function(lambda x: join([torch.sigmoid(x), 5 * x]))
    x = torch.linspace(-3, 3, 24).reshape(4, 6)
    assert not coverage(net, x, spec=spec).fallbacks
    calibrate(net, [x], spec=spec)
    with emulate(net, spec), torch.no_grad():
        assert float((net(x) - net.function(x)).abs().max()) < 0.1
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0


def test_a_mask_takes_the_type_of_data_and_stays_a_constant() -> None:
    def function(x: Tensor) -> Tensor:
        y = torch.tanh(x)
        mask = (torch.arange(6) < 4).type_as(y)
        return y * mask.expand_as(y)

    net, x = Function(function), torch.randn(4, 6)
    calibrate(net, [x])
    with emulate(net) as chip:
        assert set(chip.ranges.ranges) == {"./tanh#0/input", "./mul#0/output"}
        assert not net(x)[:, 4:].any()


# Functions that return their input's values with the arguments tried here, and are no movement.
NO_MOVEMENTS = {
    "it computes, and the input happens to be a fixed point": """
        alpha_dropout avg_pool1d chain_matmul clamp clamp_max clamp_min clip conj_physical copysign
        diff feature_alpha_dropout fmax fmin linalg_matrix_power matrix_power max_pool1d maximum
        minimum msort nan_to_num nextafter pow special_chebyshev_polynomial_t
        special_hermite_polynomial_he special_legendre_polynomial_p unique unique_consecutive
        """,
    "it depends on the arguments": "constant_pad_nd pad slice_scatter",
    "it belongs to autograd, to sparse tensors or to loading": """
        alias_copy dequantize detach_copy module_load resize_as slice_copy slice_inverse
        squeeze_copy t_copy to_dense transpose_copy unsqueeze_copy
        """,
}


@pytest.mark.filterwarnings("ignore")
def test_every_movement_of_torch_is_known() -> None:
    """Data-movement functions are those whose result holds the values of its input."""
    listed = {name for names in NO_MOVEMENTS.values() for name in names.split()}
    x = torch.tensor([0.3, -7.1, 2.6, 1.9, 5.2, -0.8, -3.3, 9.4, 4.5]).reshape(3, 3)
    missing = []
    for function in get_testing_overrides():
        name = getattr(function, "__name__", "")
        known = _kind_of(function)[1] or operator_of(name) or name in listed
        if known or name.startswith(("_", "fft", "quantized", "fbgemm")) or name.endswith("_"):
            continue
        for arguments in ((x,), (x, 1), (x, 0, 1), (x, (1, 1)), ([x, x],), (x, x)):
            try:
                result = function(*(y.clone() if y is x else y for y in arguments))
                values = set(result.flatten().tolist())
            except Exception:
                continue
            is_moved = {*x.flatten().tolist()} <= values <= {*x.flatten().tolist(), 0.0}
            if is_moved and result.dtype == x.dtype:
                missing.append(name)
                break
    assert not missing
