"""Write selections by masks of the program in a form that stays on the accelerator.

A condition that is part of the program, as a causal mask is, needs no ``SELECT_V2``, which an
Ethos-U55 leaves to the CPU. One that holds nowhere is no instruction. Where the lowest integer is
filled in, the lower of two integers is the same:

    SELECT_V2(mask, -128, scores)  =  MINIMUM(scores, limit),  limit = -128 where the mask is True,
                                                               127 elsewhere
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lightning_nna.deploy.element_order import Arrangement, Operand


def without_constant_mask(operator: str, instruction: Arrangement) -> tuple[str, Arrangement]:
    """Return a kernel and an instruction that select by a mask of the program without a condition.

    Args:
        operator: Name of the kernel.
        instruction: Its operands and results.

    Returns:
        ``MINIMUM`` and its operands, or what was passed where the mask is computed from the data or
        another value than the lowest one is filled in.
    """
    if operator != "SELECT_V2":
        return operator, instruction
    condition, filled, scores = instruction.operands
    assert condition is not None
    assert filled is not None
    if scores is None or _has_data(condition) or _has_data(filled):
        return operator, instruction
    limits = np.iinfo(filled.form.dtype)
    if not bool((filled.values == limits.min).all()):
        return operator, instruction
    bounds = np.where(condition.values.astype(bool), limits.min, limits.max).astype(np.int64)
    limit = replace(filled, name=f"{filled.name}/limit").of(bounds, None)
    return "MINIMUM", Arrangement((scores, limit), instruction.results, {})


def selects_nothing(operator: str, instruction: Arrangement) -> bool:
    """Tell if a mask of the program keeps all elements of the last operand, in its shape.

    Args:
        operator: Name of the kernel.
        instruction: Its operands and results.
    """
    if operator != "SELECT_V2":
        return False
    condition, _, other = instruction.operands
    assert condition is not None
    if other is None or _has_data(condition) or condition.values.any():
        return False
    return other.codes is not None and other.values.shape == instruction.results[0].values.shape


def _has_data(operand: Operand) -> bool:
    return operand.codes is not None and bool((operand.codes >= 0).any())
