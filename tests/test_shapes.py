"""The check of shapes that every other test relies on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from lightning_nna.emulation import emulator as engine
from lightning_nna.emulation.arithmetic import quantized_weight as weights
from lightning_nna.quantization import lloyd_max
from lightning_nna.quantization.optimal_cells import Line
from tests.shapes import check_shapes, mentions_shape


@jaxtyped(typechecker=check_shapes)
def product(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"] | None = None) -> Float[Tensor, "n m"]:
    return a if b is None else a @ b


@jaxtyped(typechecker=check_shapes)
def first(parts: Sequence[Float[Tensor, " n"]], scale: float = 1) -> tuple[Tensor, float]:
    return parts[0] * scale, scale


def test_accepts_what_fits() -> None:
    assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert product(torch.ones(2, 3)).shape == (2, 3)
    assert first([torch.ones(3), torch.zeros(3)], 2)[1] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.ones(2, 3), torch.ones(4, 4)),
        (torch.ones(2), torch.ones(3, 4)),
        (torch.ones(2, 3, dtype=torch.int64), None),
    ],
    ids=["axes disagree", "an axis is missing", "integers"],
)
def test_refuses_a_wrong_argument(arguments: tuple[Tensor, Tensor | None]) -> None:
    with pytest.raises(TypeCheckError, match="parameters"):
        product(*arguments)


def test_refuses_a_wrong_element_and_a_wrong_result() -> None:
    with pytest.raises(TypeCheckError, match="parameters"):
        first([torch.ones(3), torch.zeros(4)])

    @jaxtyped(typechecker=check_shapes)
    def flat(a: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        return a.flatten()

    with pytest.raises(TypeCheckError, match="return value"):
        flat(torch.ones(2, 3))


def test_functions_that_state_a_shape_are_checked_and_no_others() -> None:
    """In the packages: functions, methods, properties and the constructors of dataclasses."""
    with pytest.raises(TypeCheckError, match="parameters"):
        lloyd_max.nearest(torch.ones(2), torch.ones(2, 2))
    with pytest.raises(TypeCheckError, match="parameters"):
        weights.QuantizedWeight(torch.ones(2, 2), torch.ones(2))
    assert mentions_shape(weights.QuantizedWeight.values)
    assert not mentions_shape(engine.Emulator.state_dict)
    assert not hasattr(engine.Emulator.state_dict, "__wrapped__")
    assert not mentions_shape(Line)
