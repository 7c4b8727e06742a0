"""``MagnitudePruning`` and ``RandomPruning``: the least weights go, or any.

Reference:
    Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
    compression", 2017, arXiv 1710.01878.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nna.callbacks.pruning_method import PruningMethod, Scope
from lightning_nna.functional.schedule import Schedule
from lightning_nna.functional.sparsity_pattern import SparsityPattern


class MagnitudePruning(PruningMethod):
    """Gradual magnitude pruning: at each choice the least weights are zeroed.

    Args:
        sparsity: See :class:`.PruningMethod`.
        schedule: See :class:`.PruningMethod`.
        every_n_steps: See :class:`.PruningMethod`.
        freeze_step: See :class:`.PruningMethod`.
        pattern: See :class:`.PruningMethod`.
        scope: See :class:`.PruningMethod`.
        revives: Whether zeroed weights are trained on; in the paper they are not.
        targets: See :class:`.PruningMethod`.
        overrides: See :class:`.PruningMethod`.
        exclude: See :class:`.PruningMethod`.

    Logs ``nna/magnitude/sparsity``.

    Raises:
        ValueError: If an argument is out of range, or a pattern matches nothing or does not divide
            a weight.
        FloatingPointError: If a weight is not finite.

    Example:
        >>> import lightning.pytorch as pl
        >>> from lightning_nna.testing import SmallRecurrentModule
        >>> module = SmallRecurrentModule()
        >>> prune = MagnitudePruning(0.5, every_n_steps=2, exclude=["head"])
        >>> trainer = pl.Trainer(max_steps=8, callbacks=[prune], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(module)
        >>> round(prune.sparsity, 2)
        0.5
    """

    method = "magnitude"

    def __init__(
        self,
        sparsity: float,
        *,
        schedule: Schedule | Mapping[str, Any] | float = Schedule(  # noqa: B008
            0.0, 1.0, until=0.5, shape="cubic"
        ),
        every_n_steps: int = 50,
        freeze_step: int | float = 0.75,
        pattern: str | SparsityPattern = "unstructured",
        scope: Scope = "layer",
        revives: bool = False,
        targets: Sequence[str] = ("*",),
        overrides: Mapping[str, float] | str | Path = {},  # noqa: B006
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__(
            sparsity,
            schedule=schedule,
            every_n_steps=every_n_steps,
            freeze_step=freeze_step,
            pattern=pattern,
            scope=scope,
            revives=revives,
            targets=targets,
            overrides=overrides,
            exclude=exclude,
        )

    @override
    def energies(self, name: str, weight: Tensor) -> Tensor:
        return self.pattern.energies(weight)


class RandomPruning(MagnitudePruning):
    """Zero weights at random: what any other choice has to beat.

    The arguments are those of :class:`MagnitudePruning`. Which weights go is the same in every run.

    Example:
        >>> RandomPruning(0.9).pattern.name
        'unstructured'
    """

    method = "random"

    @override
    def energies(self, name: str, weight: Tensor) -> Tensor:
        # A number from the name, the same on every rank and in every process.
        seed = sum(place * byte for place, byte in enumerate(name.encode(), start=1))
        shape = self.pattern.energies(torch.empty_like(weight)).shape
        drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        return drawn.to(weight.device)
