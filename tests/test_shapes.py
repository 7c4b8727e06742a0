"""The check of shapes that every other test relies on."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_origin

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int, Shaped, TypeCheckError, jaxtyped
from torch import Tensor

from lightning_nna.emulation import emulator as engine
from lightning_nna.emulation.arithmetic import quantized_weight as weights
from lightning_nna.quantization import lloyd_max
from lightning_nna.quantization.optimal_cells import Line
from tests.shapes import check_shapes, matcher, mentions_shape, where_stated


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


HINTS = [
    Float[Tensor, ""],
    Float[Tensor, " n"],
    Float[Tensor, "n n"],
    Float[Tensor, "n k"],
    Float[Tensor, "2 n"],
    Float[Tensor, "..."],
    Float[Tensor, "n ... k"],
    Float[Tensor, "*n"],
    Float[Tensor, "*n k"],
    Float[Tensor, "k *n"],
    Int[Tensor, " n"],
    Shaped[Tensor, "n 1"],
    Float[np.ndarray, " n"],
    Float[Tensor, " n"] | None,
    Float[Tensor, "n 3"] | Int[Tensor, "n k"] | float,
    tuple[Float[Tensor, " n"], Tensor],
    tuple[Float[Tensor, " n"], ...],
    list[Float[Tensor, "*n"]],
    Mapping[str, Float[Tensor, " n"]],
]


def drawn(hint: Any, draw: random.Random) -> Any:
    """A value that may fit an annotation, of few axes and small sizes."""
    if get_origin(hint) in (tuple, list):
        kind = get_origin(hint)
        return kind(drawn(None, draw) for _ in range(draw.choice([1, 2, 2, 2])))
    if get_origin(hint) is Mapping:
        return {name: drawn(None, draw) for name in "ab"[: draw.randint(1, 2)]}
    x = torch.zeros(tuple(draw.choice([1, 2, 2, 3, 3]) for _ in range(draw.randint(0, 3))))
    kinds = [x, x, x, x.double(), x.long(), x.numpy(), x.numpy().astype(np.int8)]
    return draw.choice([*kinds, None] if get_origin(hint) else kinds)


@pytest.mark.parametrize("number", range(len(HINTS)))
def test_it_is_jaxtypings_check(number: int) -> None:
    """Arguments of two annotations and a result: refused in the same words, or by none."""
    first, draw = HINTS[number], random.Random(number)
    seen = set()
    for second in draw.sample(HINTS, 4):

        def function(a: Any, b: Any, result: Any) -> Any:
            return result

        function.__annotations__ = {"a": first, "b": second, "return": first}
        ours = where_stated(function, typechecker=check_shapes)
        theirs = jaxtyped(function, typechecker=check_shapes)
        for _ in range(8):
            arguments = drawn(first, draw), drawn(second, draw), drawn(first, draw)
            words = [refusal(check, arguments) for check in (ours, theirs)]
            assert words[0] == words[1]
            seen.add(words[0])
    assert len(seen) > 1


def refusal(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    try:
        function(*arguments)
    except TypeCheckError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("axes", ["n+1", "#n", "*#n", "_", "n=2", "?n"])
def test_other_axes_are_left_to_jaxtyping(axes: str) -> None:
    assert matcher(Float[Tensor, axes]) is None
    assert matcher(tuple[Float[Tensor, axes], Tensor]) is None


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
