"""``MagnitudePruning`` and ``RandomPruning``: the least weights are pruned, or any.

Reference:
    Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
    compression", 2017, arXiv 1710.01878.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nna.pruning.pruning_method import PruningMethod


class MagnitudePruning(PruningMethod):
    """Prune gradually by magnitude: each mask update zeroes the least weights.

    Args:
        sparsity: See :class:`.PruningMethod`, whose other arguments it takes as well. In the paper
            zeroed weights do not return, and so it is here unless ``revives`` is set.

    Logs ``nna/magnitude_pruning/sparsity``.

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

    method = "magnitude_pruning"

    @override
    def importance_scores(self, name: str, weight: Tensor) -> Tensor:
        return self.pattern.importance_scores(weight)


class RandomPruning(MagnitudePruning):
    """Zero weights at random: the baseline of every other method.

    The arguments are those of :class:`.PruningMethod`. Every run prunes the same weights.

    Example:
        >>> RandomPruning(0.9).pattern.name
        'unstructured'
    """

    method = "random_pruning"

    @override
    def importance_scores(self, name: str, weight: Tensor) -> Tensor:
        # A number from the name, the same on every rank and in every process.
        seed = sum(position * byte for position, byte in enumerate(name.encode(), start=1))
        shape = self.pattern.importance_scores(torch.empty_like(weight)).shape
        drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        return drawn.to(weight.device)
