"""``CodebookMethod``: the base of callbacks that give each selected weight a codebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_nna.quantization.entropy_constrained import require_rate
from lightning_nna.weights.codebook import CodebookSettings
from lightning_nna.weights.method import BitsArguments, BitsMethod
from lightning_nna.weights.pipeline import Masking
from lightning_nna.weights.selection import Granularity


class CodebookArguments(BitsArguments, total=False):
    """Keyword arguments of :class:`CodebookMethod`, for the signatures of its subclasses."""

    granularity: Granularity
    grid_bits: int | None
    power_of_two_scales: bool
    pin_zero: bool
    max_entropy_bits: float | None
    codebook: Granularity


class CodebookMethod(BitsMethod):
    """Base of ``GeneralQuantizer``, ``HardCompression`` and ``MRACosRegularization``.

    Args:
        bits: Bits of the index of a weight, 1 to 8, of every selected tensor.
        granularity: Scales: ``"per_tensor"``, or ``"per_channel"`` as far as the operators of the
            accelerator have them.
        grid_bits: Width of integer centroids in bits, 2 to 8; None for float centroids.
        power_of_two_scales: Whether scales are powers of two, for accelerators without multiplier.
        pin_zero: Whether one centroid is zero and stays there; then weights that are pruned, too,
            take no further value. It does not hold for 1 bit: zero and one other centroid cannot
            stand for weights of both signs.
        max_entropy_bits: Greatest mean entropy of a tensor's indices, in bits a weight: centroids
            are then those of :func:`.entropy_constrained`, which an accelerator with coded weights
            reads in fewer bytes. It is the entropy of the weights when centroids are fitted.
            Tensors with other bits than ``bits``, by ``overrides``, have Lloyd-Max centroids; None
            gives these to all tensors.
        codebook: Centroids: one set of each tensor (``"per_tensor"``), or ``"per_channel"``: one of
            each row of a linear layer or convolution, of each gate of an LSTM, and of other
            tensors. A channel needs as many weights as centroids, and at most 7 bits; with
            ``max_entropy_bits``, an entropy of the whole tensor, it is an error.
        targets: Patterns of the selected weights: globs or ``re:…`` on the names of parameters, or
            of modules that have them. See :mod:`lightning_nna.weights.selection`.
        overrides: Bits by pattern, or the path of a JSON file with them.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        bits: int,
        *,
        granularity: Granularity = "per_tensor",
        grid_bits: int | None = 8,
        power_of_two_scales: bool = False,
        pin_zero: bool = False,
        max_entropy_bits: float | None = None,
        codebook: Granularity = "per_tensor",
        targets: Sequence[str] = ("*",),
        overrides: Mapping[str, int] | str | Path = {},  # noqa: B006
    ) -> None:
        super().__init__(bits, targets=targets, overrides=overrides)
        if max_entropy_bits is not None:
            require_rate(max_entropy_bits, bits)
        self.codebook_settings = CodebookSettings(
            granularity, grid_bits, power_of_two_scales, pin_zero, max_entropy_bits, codebook
        )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        beyond = [
            f"{name} ({2 ** self.bits[name] + 1} values of {self.bits[name]} bit(s))"
            for name in self.transforms()
            if not (self.codebook_settings.pin_zero and self.bits[name] > 1)
            and any(
                isinstance(transform, Masking)
                for transform in self.pipeline.transforms_of(self._parameters[name])
            )
        ]
        if beyond:
            rank_zero_warn(
                f"{type(self).__name__}: pruned weights are zero, which is a value beyond the "
                f"centroids of {', '.join(beyond)}; pass pin_zero=True, from 2 bits on"
            )

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **asdict(self.codebook_settings)}

    def settings_of(self, name: str) -> CodebookSettings:
        """Return the settings of a selected parameter, whose entropy depends on its bits.

        Args:
            name: Name of the parameter.
        """
        if self.bits[name] == self.selection.default:
            return self.codebook_settings
        return replace(self.codebook_settings, max_entropy_bits=None)
