"""Methods of other libraries that ours are compared with: PARQ of torchao, Lightning's pruning.

Reference:
    Jin et al., "PARQ: piecewise-affine regularized quantization", ICML 2025, arXiv 2503.15748.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor

from recipes import require_extra


def parq(
    parameters: Iterable[Tensor],
    *,
    bits: int,
    total_steps: int,
    **adamw: Any,
) -> torch.optim.Optimizer:
    """PARQ of torchao around AdamW, for every weight of two axes or more.

    Args:
        parameters: Of the module.
        bits: 1 to 8.
        total_steps: Steps of the run; values are hard from 80 % of it on.
        adamw: Settings of ``torch.optim.AdamW``.

    Raises:
        ImportError: If torchao is missing; names the extra that has it.
    """
    require_extra("bench", "torchao")
    from torchao.prototype.parq import LSBQuantizer, ProxPARQ, QuantOptimizer, UnifQuantizer

    class AfterClosure(QuantOptimizer):
        """With the closure before the step: the forward is to see the quantized weights."""

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            super().step()
            return loss

    parameters = list(parameters)
    wide = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": wide, "quant_bits": bits}, {"params": others}]
    # As its authors have it: least-squares levels for one and two bits, uniform ones from three.
    quantizer = LSBQuantizer() if bits <= 2 else UnifQuantizer()
    prox = ProxPARQ(anneal_start=0, anneal_end=int(0.8 * total_steps), steepness=10)
    optimizer: torch.optim.Optimizer = AfterClosure(
        torch.optim.AdamW(groups, **adamw), quantizer, prox, quant_period=10
    )
    return optimizer


def model_pruning(amount: float) -> ModelPruning:
    """Lightning's ``ModelPruning``, applied once, after the first epoch.

    Applied in every epoch it would prune what is left again; of the modules it prunes those whose
    parameters are named ``weight`` and ``bias``.

    Args:
        amount: Share of zeros.
    """
    return ModelPruning(
        "l1_unstructured", amount=amount, apply_pruning=lambda epoch: epoch == 0, verbose=1
    )
