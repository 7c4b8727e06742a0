"""``LotteryTicketPruning``: after each mask update, weights return to their early values.

Reference:
    Frankle and Carbin, "The lottery ticket hypothesis", ICLR 2019, arXiv 1803.03635; Frankle et
    al., "Linear mode connectivity and the lottery ticket hypothesis", ICML 2020, arXiv 1912.05671.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_nna.pruning.magnitude_pruning import MagnitudePruning
from lightning_nna.resumed_settings import require_same


class LotteryTicketPruning(MagnitudePruning):
    """Prune by magnitude in rounds, with all parameters rewound after each of them.

    Args:
        sparsity: See :class:`.PruningMethod`.
        rewind_step: Optimizer step whose parameters are stored and restored, at least 0.
        settings: Other arguments of :class:`.PruningMethod`; ``every_n_steps`` is the length
            of a round.

    The optimizer's state is forgotten with each rewinding; its learning rate goes on.
    Logs ``nna/lottery_ticket_pruning/sparsity``.

    Raises:
        ValueError: As :class:`.MagnitudePruning`, or if ``rewind_step`` is negative.

    Example:
        >>> LotteryTicketPruning(0.8, every_n_steps=200).rewind_step
        0
    """

    method = "lottery_ticket_pruning"

    def __init__(self, sparsity: float, *, rewind_step: int = 0, **settings: Any) -> None:
        super().__init__(sparsity, **settings)
        if rewind_step < 0:
            raise ValueError(f"rewind_step must be at least 0, got {rewind_step}")
        self.rewind_step = rewind_step
        self._rewound: dict[str, Tensor] = {}

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "rewind_step": self.rewind_step}

    @override
    def require_settings(self, trainer: pl.Trainer | None) -> None:
        super().require_settings(trainer)
        if self._rewound and "rewind_step" in self._saved_settings:
            saved = {"rewind_step": self._saved_settings["rewind_step"]}
            require_same(type(self).__name__, saved, self.settings())

    @override
    def forget(self) -> None:
        super().forget()
        self._rewound = {}

    @override
    def step_begins(self, optimizer: Optimizer) -> None:
        if self.steps == self.rewind_step and not self._rewound:
            self._rewound = {n: p.detach().clone() for n, p in self._all().items()}

    @override
    def _advance(self) -> None:
        super()._advance()
        if not self._rewound:
            return
        for name, parameter in self._all().items():
            parameter.copy_(self._rewound[name])
        for optimizer in self._optimizers:
            optimizer.state.clear()

    def _all(self) -> dict[str, Tensor]:
        assert self._module is not None, "a run has started"
        return dict(self._module.named_parameters())

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rewound": dict(self._rewound)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._rewound = dict(state_dict["rewound"])
