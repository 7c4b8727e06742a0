"""The life cycle of a callback whose state belongs to one module: ``ModuleBoundCallback``."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any
from weakref import ReferenceType, ref

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_nna.weights.pipeline import digest_of

#: Strategies whose processes have a part of the parameters each.
_SHARDING = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


class ModuleBoundCallback(Callback):
    """Base of callbacks whose state (ranges, centroids, masks, counts) belongs to one module.

    A callback that meets a second module forgets its state and begins again there, unless a
    checkpoint was loaded for that module: a loaded state is *deferred* until a run starts. A copy
    or pickle of a callback has the state, and carries on with a module whose weights are, in every
    bit, those that the callback's module had when it was copied; with any other module it begins
    again, and says so.
    """

    def __init__(self) -> None:
        self._module_ref: ReferenceType[pl.LightningModule] | None = None
        # Only in a copy that has met no module yet: digests of the weights that its state is of.
        self._copied_with: dict[str, str] | None = None

    @property
    def _module(self) -> pl.LightningModule | None:
        """The module of the runs so far; None before the first."""
        return None if self._module_ref is None else self._module_ref()

    # --- hooks of a subclass ------------------------------------------------------------------

    @abstractmethod
    def forget(self) -> None:
        """Drop the state of the module and its runs: another module comes."""

    @property
    @abstractmethod
    def has_deferred_state(self) -> bool:
        """True if a state was loaded and no run has taken it yet."""

    def carry_on(self) -> None:
        """Defer the state of a copy, which has met a module with the weights of its own."""

    def digests(self, module: pl.LightningModule) -> dict[str, str]:
        """Compute digests by which a copy knows the weights of its module.

        Args:
            module: Module whose parameters are read.

        Returns:
            Digests by the names of the parameters.
        """
        return {name: digest_of(parameter) for name, parameter in module.named_parameters()}

    # --- meeting a module ---------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise if the Trainer's strategy splits parameters among processes.

        Raises:
            ValueError: Names the callback and the strategy.
        """
        strategy = type(trainer.strategy).__name__
        if strategy in _SHARDING:
            raise ValueError(
                f"{type(self).__name__} works on whole parameters, and {strategy} splits them "
                f"among processes: use strategy='ddp'"
            )

    def _meet(self, pl_module: pl.LightningModule) -> bool:
        """Bind the callback to the module of a run that starts.

        Args:
            pl_module: Module of the run.

        Returns:
            True if it is another module than that of the run before.
        """
        if self._module_ref is not None and self._module_ref() is pl_module:
            return False
        if self._copied_with is not None:
            if self._copied_with == self.digests(pl_module):
                self.carry_on()
            else:
                self.forget()
                rank_zero_info(
                    f"{type(self).__name__} is a copy and begins again: the weights of this module "
                    f"are not those that it was copied with; pass ckpt_path of the run to go on "
                    f"from there"
                )
        elif self._module_ref is not None and not self.has_deferred_state:
            self.forget()
        self._copied_with = None
        self._module_ref = ref(pl_module)
        return True

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: without the module, with digests of its weights."""
        state = {**self.__dict__, "_module_ref": None}
        module = self._module
        if module is not None and not self.has_deferred_state:
            state["_copied_with"] = self.digests(module)
        return state
