r"""Masks of an attention: the scores that take part, and what is added to them.

A masked score becomes the lowest integer of the scores' grid. The grid reaches so far below the
smallest of the rows' maxima, as calibration saw them, that such a score adds nothing to the 8-bit
kernel's sum of exponentials, which has 19 fraction bits: by 14, since :math:`e^{-14} < 2^{-20}`. So
a key that is masked is a key that is absent, and streaming equals the whole, however many are
masked. The 16-bit kernel takes every exponent below -10 for -10: there a masked key adds two units
of :math:`2^{-15}` to the sum, on any grid. Ranges are those of the scores that take part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.deferred_checks import DEFERRED
from lightning_nna.emulation.arithmetic.on_host import in_memory
from lightning_nna.emulation.operators import elementwise
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.matmul import batch_matmul, matmul
from lightning_nna.emulation.operators.softmax import masked
from lightning_nna.emulation.ranges import PENDING

# At or below this, an additive mask does not mean a score but its absence.
ABSENT = -1e4
# How far a masked score lies below the largest of its row, by the width of the scores.
DEPTHS = {8: 14.0, 16: 12.0}


@dataclass(frozen=True)
class SeenMasks:
    """Kinds of masks that calibration has seen at a site.

    Args:
        site: Key of the call site.
        leave_out: Whether some left scores out.
        add: Whether some added to scores.
    """

    site: str
    leave_out: bool
    add: bool

    @classmethod
    def at(cls, call: Call) -> SeenMasks | None:
        """Return what calibration has seen at a call; None while it looks."""
        if call.observing:
            return None
        ranges = call.state.ranges
        biased = (f"{call.site}/{name}/output" in ranges for name in ("bias", "masked_bias"))
        return cls(call.site, f"{call.site}/row_maxima" in ranges, any(biased))

    def parts(self, mask: Tensor, keep: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Split a mask of numbers, any shape, without a look; what is new is an error later."""
        bias = mask.masked_fill(~keep, 0.0)
        if not self.leave_out:
            DEFERRED.require(keep.all(), self._unseen("leaves scores out"))
        if not self.add:
            DEFERRED.require(~bias.any(), self._unseen("adds to scores"))
        return keep if self.leave_out else None, bias if self.add else None

    def _unseen(self, what: str) -> Exception:
        return ValueError(
            f"{self.site}: a mask {what}, and calibration has seen none that does: calibrate with "
            f"batches that have such masks"
        )


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
        seen: SeenMasks | None = None,
    ) -> Mask:
        """Join masks, each of booleans or added to the scores.

        Args:
            masks: Tensors whose shapes broadcast with that of the scores, or None.
            true_is_masked: Whether True stands for a score that does not take part.
            constant: Tells whether a mask belongs to the program.
            seen: See :func:`parts_of`.

        Example:
            >>> mask = Mask.of([torch.tensor([0.0, -1.5, -torch.inf])])
            >>> mask.keep, mask.bias
            (tensor([ True,  True, False]), tensor([ 0.0000, -1.5000,  0.0000]))
        """
        present = [mask for mask in masks if mask is not None]
        keep: Tensor | None = None
        bias: Tensor | None = None
        for mask in present:
            where, added = parts_of(mask, true_is_masked, seen)
            keep = where if keep is None else keep if where is None else keep & where
            bias = added if bias is None else bias if added is None else bias + added
        return cls(keep, bias, all(constant(mask) for mask in present))


def masked_scores(call: Call, query: Tensor, keys: Tensor, mask: Mask) -> Tensor:
    """``query @ keys + bias``, with masked scores at the bottom of their grid.

    Args:
        call: The call.
        query: Shape ``(*batch, T, d)``.
        keys: Shape ``(*batch, d, S)``.
        mask: The mask.

    Returns:
        Scores of shape ``(*batch, T, S)``.
    """
    keep = mask.keep
    if keep is None and _only_masked_is_known(call):
        keep = torch.ones(1, 1, dtype=torch.bool, device=query.device)
    if keep is None:
        scores = matmul(call.child("scores"), query, keys)
        return (
            scores if mask.bias is None else elementwise.add(call.child("bias"), scores, mask.bias)
        )
    floor = 0.0
    if not call.observing:
        floor = _lowest_maximum(call, query, keys, mask.bias, keep) - DEPTHS[call.bits]
    if mask.bias is None:
        scores = _product(replace(call.child("masked_scores"), min_value=floor), query, keys, keep)
    else:
        scores = _product(call.child("masked_scores"), query, keys, keep)
        scores = biased(
            replace(call.child("masked_bias"), min_value=floor), scores, mask.bias, keep
        )
    if call.observing:
        call.observed(row_maxima(scores, keep), "row_maxima")
    return fill(call.child("mask"), scores, keep, mask.constant)


def parts_of(
    mask: Tensor, true_is_masked: bool = False, seen: SeenMasks | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Split a mask into the scores to keep and a bias; None for all and for zeros.

    Args:
        mask: Booleans, or numbers that are added to scores, any shape.
        true_is_masked: Whether True stands for a score that does not take part.
        seen: What calibration has seen, for a mask on a device that nobody may look at.
    """
    if mask.dtype == torch.bool:
        return ~mask if true_is_masked else mask, None
    keep = mask > ABSENT
    if seen is not None and not in_memory(mask):
        return seen.parts(mask, keep)
    everywhere = bool(keep.all())
    bias = mask if everywhere else mask.masked_fill(~keep, 0.0)
    return None if everywhere else keep, bias if bool(bias.any()) else None


def _only_masked_is_known(call: Call) -> bool:
    """Tell whether calibration saw masks here and this call, by chance, has none."""
    ranges = call.state.ranges
    had_masks = f"{call.site}/row_maxima" in ranges
    return had_masks and not call.observing and f"{call.site}/scores/output" not in ranges


def _lowest_maximum(
    call: Call, query: Tensor, keys: Tensor, bias: Tensor | None, keep: Tensor
) -> float:
    """The smallest of all rows' largest scores."""

    def in_float() -> Tensor:
        scores = torch.matmul(query, keys)
        return row_maxima(scores if bias is None else scores + bias, keep)

    call.output(in_float, "row_maxima")
    return call.state.ranges[f"{call.site}/row_maxima"].minimum


def _product(call: Call, query: Tensor, keys: Tensor, keep: Tensor) -> Tensor:
    """A matrix product whose range is that of the entries to keep."""
    a, b = call.operand(query, "input"), call.operand(keys, "other")
    if call.observing:
        return _observe(call, torch.matmul(query, keys), keep)
    y = call.output(lambda: kept(torch.matmul(query, keys), keep))
    return batch_matmul(call, a, b, y)


def biased(call: Call, scores: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
    """Add a bias to scores of a shape that broadcasts; the range is that of the entries to keep."""
    if not call.observing:
        return elementwise.add(call, scores, bias)
    call.operand(bias, "other")
    return _observe(call, scores + bias, keep)


def _observe(call: Call, scores: Tensor, keep: Tensor) -> Tensor:
    call.observed(kept(scores, keep))
    return call.with_qparams(scores, PENDING)


def kept(scores: Tensor, keep: Tensor) -> Tensor:
    """Select the scores that take part, flat, shape ``(n,)``; all of them where none does."""
    selected = scores[keep.expand(scores.shape)]
    return selected if selected.numel() else scores


def row_maxima(scores: Tensor, keep: Tensor) -> Tensor:
    """Return the largest score of every row in which any takes part, shape ``(rows,)``."""
    if not scores.numel():
        return scores.new_zeros(1)
    maxima = scores.masked_fill(~keep, -torch.inf).amax(-1)
    finite = maxima[maxima > -torch.inf]
    return finite if finite.numel() else scores.new_zeros(1)


def fill(
    call: Call, scores: Tensor, keep: Tensor, constant: bool, absent: Tensor | None = None
) -> Tensor:
    """Put the lowest value where ``keep``, a broadcast shape, is False; empty rows are level.

    ``absent`` is its opposite, if the program has it as a condition.
    """
    if call.observing:
        return call.with_qparams(scores.masked_fill(~keep, torch.finfo(scores.dtype).min), PENDING)
    x = call.operand(scores, "input")
    mask = ~keep if absent is None else absent
    return call.with_qparams(masked(call, x, mask, constant=constant).value, x.qparams)
