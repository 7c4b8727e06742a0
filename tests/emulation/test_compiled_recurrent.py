"""Recurrent kernels that are compiled for processors compute the bits of their references."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("numba")

from lightning_nna.emulation.kernels import library
from tests.emulation.kernel_cases import differences

_KERNELS = ("lstm_step", "lstm_step_backward", "gru_step", "gru_step_backward")


def _run(operator: str, *arguments: Any) -> tuple[Any, ...]:
    kernel = library.compiled_kernel(operator)
    assert kernel is not None
    kernel(*arguments)
    return arguments


@pytest.mark.parametrize("operator", _KERNELS)
def test_a_kernel_has_the_bits_of_its_reference(operator: str) -> None:
    results = dict(differences(_run, operator))
    assert len(results) >= 3
    assert results == dict.fromkeys(results, "")
