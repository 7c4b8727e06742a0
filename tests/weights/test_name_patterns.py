from __future__ import annotations

import pytest

from lightning_nna.weights.selection import matches, select

NAMES = ["encoder", "encoder.lstm", "encoder.lstm.weight_ih_l0", "joint.output"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*"], NAMES),
        (["encoder*"], NAMES[:3]),
        (["re:.*output|encoder"], ["encoder", "joint.output"]),
        (["joint.*", "encoder"], ["encoder", "joint.output"]),
    ],
)
def test_select(patterns: list[str], expected: list[str]) -> None:
    assert select(patterns, NAMES, what="module") == expected


def test_each_pattern_must_match() -> None:
    with pytest.raises(
        ValueError, match=r"pattern 'decoder\.\*' matches no module; there are: enc"
    ):
        select(["*", "decoder.*"], NAMES, what="module")


def test_a_bare_string_is_refused() -> None:
    with pytest.raises(TypeError, match="sequence of strings"):
        select("*", NAMES, what="module")


def test_a_broken_expression_is_named() -> None:
    with pytest.raises(ValueError, match=r"re:\(' is not a regular expression"):
        matches("re:(", "x")
