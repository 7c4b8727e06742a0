"""The code reads as the project's words ask: limits for what :mod:`tests.house` measures."""

from __future__ import annotations

from tests.house import Figures, measure, measure_text


def test_names_and_docstrings_say_what_things_are() -> None:
    figures = measure("lightning_nna", "recipes")
    assert figures.question_share < 0.02, figures.questions
    assert figures.vague_share < 0.005, figures.vague
    assert figures.shape_share > 0.8, figures.shapeless
    assert figures.comment_share >= 0.04


SOURCE = """
def rescale(x: Tensor) -> Tensor:
    '''Where values go.'''
    found, result = x, x  # Both.
    return result
"""


def test_offenders_are_noticed() -> None:
    figures = Figures()
    measure_text(figures, "lightning_nna/emulation/arithmetic/a.py", SOURCE)
    assert (figures.question_share, figures.vague_share) == (1.0, 0.5)
    assert (figures.shape_share, figures.comment_share) == (0.0, 0.25)
