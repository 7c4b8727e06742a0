r"""Which scores of an attention take part, and what is added to them.

A masked score becomes the lowest integer of the scores' grid, and the grid reaches so far down that
its weight is zero: as far below the smallest of the rows' maxima, seen in calibration, as

.. math:: e^{-8} < \tfrac12 \cdot 2^{-8}

of 8-bit weights asks. Ranges are those of the scores that take part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_nna.emulator.operators import elementwise
from lightning_nna.emulator.operators.call import Activation, Call, float32_arithmetic
from lightning_nna.emulator.operators.matmul import batch_matmul, matmul
from lightning_nna.emulator.program import Stored
from lightning_nna.emulator.ranges import PENDING

# At or below this, an additive mask does not mean a score but its absence.
_ABSENT = -1e4
# How far a masked score lies below the largest of its row, by the width of the weights.
_DEPTHS = {8: 8.0, 16: 12.0}


@dataclass(frozen=True)
class Mask:
    """A mask that broadcasts against scores of shape ``(*batch, T, S)``.

    Args:
        keep: Where scores take part; None for everywhere.
        bias: What is added to them, or None.
        constant: Whether ``keep`` belongs to the program and not to the data.
    """

    keep: Tensor | None = None
    bias: Tensor | None = None
    constant: bool = False

    @classmethod
    def causal(cls, queries: int, keys: int, device: torch.device) -> Mask:
        """Every query sees the keys up to its own place.

        Example:
            >>> Mask.causal(2, 3, torch.device("cpu")).keep
            tensor([[ True, False, False],
                    [ True,  True, False]])
        """
        everywhere = torch.ones(queries, keys, dtype=torch.bool, device=device)
        return cls(everywhere.tril(), constant=True)

    @classmethod
    def of(
        cls,
        masks: Sequence[Tensor | None],
        *,
        true_is_masked: bool = False,
        constant: Callable[[Tensor], bool] = lambda mask: False,
    ) -> Mask:
        """Join masks, each of booleans or added to the scores.

        Args:
            masks: What broadcasts against the scores, or None.
            true_is_masked: Whether True stands for a score that does not take part.
            constant: Tells whether a mask belongs to the program.

        Example:
            >>> mask = Mask.of([torch.tensor([0.0, -1.5, -torch.inf])])
            >>> mask.keep, mask.bias
            (tensor([ True,  True, False]), tensor([ 0.0000, -1.5000,  0.0000]))
        """
        given = [mask for mask in masks if mask is not None]
        keep: Tensor | None = None
        bias: Tensor | None = None
        for mask in given:
            kept, added = _parts(mask, true_is_masked)
            keep = kept if keep is None else keep if kept is None else keep & kept
            bias = added if bias is None else bias if added is None else bias + added
        return cls(keep, bias, all(constant(mask) for mask in given))


def masked_scores(call: Call, query: Tensor, keys: Tensor, mask: Mask) -> Tensor:
    """``query @ keys + bias``, with masked scores at the bottom of their grid.

    Args:
        call: The call.
        query: Shape ``(*batch, T, d)``, scaled.
        keys: Shape ``(*batch, d, S)``.
        mask: The mask.

    Returns:
        Scores of shape ``(*batch, T, S)``.
    """
    keep = mask.keep
    if keep is None and _only_masked_is_known(call):
        keep = torch.ones(1, 1, dtype=torch.bool, device=query.device)
    if keep is None:
        scores = matmul(call.part("scores"), query, keys)
        return (
            scores if mask.bias is None else elementwise.add(call.part("bias"), scores, mask.bias)
        )
    floor = 0.0 if call.observing else _floor(call, query, keys, mask.bias, keep)
    if mask.bias is None:
        scores = _product(replace(call.part("masked_scores"), floor=floor), query, keys, keep)
    else:
        scores = _product(call.part("masked_scores"), query, keys, keep)
        scores = _biased(replace(call.part("masked_bias"), floor=floor), scores, mask.bias, keep)
    if call.observing:
        call.observed(_row_maxima(scores, keep), "row_maxima")
    return _fill(call.part("mask"), scores, keep, mask.constant)


def _parts(mask: Tensor, true_is_masked: bool) -> tuple[Tensor | None, Tensor | None]:
    """Where scores take part and what is added there; None for everywhere, and for nothing."""
    if mask.dtype == torch.bool:
        return ~mask if true_is_masked else mask, None
    keep = mask > _ABSENT
    everywhere = bool(keep.all())
    bias = mask if everywhere else mask.masked_fill(~keep, 0.0)
    return None if everywhere else keep, bias if bool(bias.any()) else None


def _only_masked_is_known(call: Call) -> bool:
    """Whether calibration saw masks here and this call, by chance, has none."""
    ranges = call.host.ranges
    seen = f"{call.site}/row_maxima" in ranges
    return seen and not call.observing and f"{call.site}/scores/output" not in ranges


def _floor(call: Call, query: Tensor, keys: Tensor, bias: Tensor | None, keep: Tensor) -> float:
    """A score whose weight is zero in every row."""

    def in_float() -> Tensor:
        scores = torch.matmul(query, keys)
        return _row_maxima(scores if bias is None else scores + bias, keep)

    call.output(in_float, "row_maxima")
    return call.host.ranges[f"{call.site}/row_maxima"].minimum - _DEPTHS[call.bits]


def _product(call: Call, query: Tensor, keys: Tensor, keep: Tensor) -> Tensor:
    """A matrix product whose range is that of the entries to keep."""
    a, b = call.operand(query, "input"), call.operand(keys, "other")
    if call.observing:
        return _observe(call, torch.matmul(query, keys), keep)
    y = call.output(lambda: _kept(torch.matmul(query, keys), keep))
    return batch_matmul(call, a, b, y)


def _biased(call: Call, scores: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
    """A sum whose range is that of the entries to keep."""
    if not call.observing:
        return elementwise.add(call, scores, bias)
    call.operand(bias, "other")
    return _observe(call, scores + bias, keep)


def _observe(call: Call, scores: Tensor, keep: Tensor) -> Tensor:
    call.observed(_kept(scores, keep))
    return call.tagged(scores, PENDING)


def _kept(scores: Tensor, keep: Tensor) -> Tensor:
    """The scores that take part; all of them where none does."""
    kept = scores[keep.expand(scores.shape)]
    return kept if kept.numel() else scores


def _row_maxima(scores: Tensor, keep: Tensor) -> Tensor:
    """The largest score of every row in which any takes part."""
    maxima = scores.masked_fill(~keep, -torch.inf).amax(-1)
    finite = maxima[maxima > -torch.inf]
    return finite if finite.numel() else scores.new_zeros(1)


def _fill(call: Call, scores: Tensor, keep: Tensor, constant: bool) -> Tensor:
    """Put the lowest of the grid where ``keep`` is False; a row without any score is level."""
    qparams = call.host.tag_of(scores)
    assert qparams is not None, "scores come from an operator of the chip"
    if call.observing:
        return call.tagged(scores.masked_fill(~keep, torch.finfo(scores.dtype).min), PENDING)
    with float32_arithmetic(scores):
        result = scores.masked_fill(~keep, qparams.bounds[0] * qparams.scale)
    if call.recording:
        x, y = (Activation(value, qparams).stored() for value in (scores, result))
        lowest = replace(x, integers=torch.tensor(qparams.low), constant=True)
        condition = Stored(keep, "bool", constant=constant)
        call.record("SELECT_V2", [condition, x, lowest], [y])
    return call.tagged(result, qparams)
