"""The registry of operators: what it rejects, and that an operator from outside is one like any."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import Emulator, NNASpec, calibrate, coverage, emulate
from lightning_nna.emulation.operators import activation, record
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.record import (
    Form,
    Kernel,
    Operator,
    kernels,
    operator_of,
    operators,
    register_kernel,
    register_operator,
)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove the records that a test has registered."""
    registers = (record._OPERATORS, record._BY_FUNCTION, record._KERNELS)
    before = [dict(each) for each in registers]
    yield
    for each, entries in zip(registers, before, strict=True):
        each.clear()
        each.update(entries)


def softsign(call: Call, input: Tensor) -> Tensor:
    return activation.tanh(call, input)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.atan(self.linear(x))


def test_an_operator_from_outside_is_emulated_under_a_preset() -> None:
    net, x = Net(), torch.randn(3, 4)
    assert [site.operator for site in coverage(net, x).fallbacks] == ["atan"]
    register_operator(Operator("arctangent", torch=(torch.atan,), emulate=softsign))
    assert not coverage(net, x).fallbacks
    calibrate(net, [x])
    with emulate(net):
        assert net(x).abs().max() < 1


def test_the_state_of_a_network_without_a_new_operator_still_loads() -> None:
    net, x = nn.Linear(4, 4), torch.randn(3, 4)
    saved = calibrate(net, [x]).state_dict()
    register_operator(Operator("arctangent", torch=(torch.atan,), emulate=softsign))
    Emulator(nn.Linear(4, 4)).load_state_dict(saved)
    assert "arctangent" not in saved["arithmetic"]["operators"]


def test_a_state_of_other_operators_does_not_load() -> None:
    net, x = Net(), torch.randn(3, 4)
    saved = calibrate(net, [x]).state_dict()
    with pytest.raises(ValueError, match="operators is"):
        Emulator(Net(), spec=NNASpec(operators=("add",))).load_state_dict(saved)


def test_a_state_in_which_a_new_operator_ran_in_float_does_not_load() -> None:
    saved = calibrate(Net(), [torch.randn(3, 4)]).state_dict()
    register_operator(Operator("arctangent", torch=(torch.atan,), emulate=softsign))
    with pytest.raises(ValueError, match="operators is"):
        Emulator(Net()).load_state_dict(saved)


def test_a_spec_with_a_list_does_not_have_what_is_registered_later() -> None:
    listed = NNASpec(operators=tuple(operators()))
    assert listed.arithmetic == NNASpec().arithmetic
    register_operator(Operator("arctangent", torch=(torch.atan,), emulate=softsign))
    assert NNASpec().has_operator("arctangent")
    assert not listed.has_operator("arctangent")


def test_a_name_registered_twice_is_an_error_that_names_both() -> None:
    operator = Operator("tanh", torch=("hyperbolic",), emulate=softsign)
    with pytest.raises(ValueError, match=r"two operators 'tanh': of the .*tanh, .* hyperbolic"):
        register_operator(operator)


@pytest.mark.parametrize("function", ["add_", "rsub", torch.mv])
def test_a_torch_function_registered_twice_is_an_error_that_names_both(function: object) -> None:
    operator = Operator("mine", torch=(), forms=(Form((function,), softsign),), emulate=softsign)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'mine' wants the torch function '\w+', which '\w+' has"):
        register_operator(operator)
    assert "mine" not in operators()


def test_two_kernels_of_one_name_are_an_error() -> None:
    register_kernel(kernels()["TANH"])
    with pytest.raises(ValueError, match="two kernels 'TANH'"):
        register_kernel(Kernel("TANH", versions={"int8": 9}))


def test_an_operator_without_arithmetic_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs float and integers, or emulate"):
        register_operator(Operator("empty", torch=("empty_like",)))


def test_names_are_sorted_and_functions_lead_to_their_form() -> None:
    assert list(operators()) == sorted(operators())
    assert list(kernels()) == sorted(kernels())
    divided, product = operator_of("div"), operator_of("mul")
    assert divided is not None
    assert product is not None
    assert divided.name == product.name == "mul"
    assert divided.emulate is not product.emulate
    assert operator_of("atan") is None
