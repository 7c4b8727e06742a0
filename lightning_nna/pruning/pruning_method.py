"""What every pruning callback shares: ``PruningMethod``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_nna.non_finite import require_finite_weights
from lightning_nna.pruning.masks import MaskStage, MatrixLayout, global_sparsities
from lightning_nna.pruning.sparsity_pattern import SparsityPattern
from lightning_nna.resumed_settings import require_same
from lightning_nna.schedule import Schedule, require_time, step_of
from lightning_nna.weights.method import WeightMethod
from lightning_nna.weights.pipeline import Stage, unseen
from lightning_nna.weights.selection import Sparsities

Scope = Literal["layer", "global"]


class PruningMethod(WeightMethod, ABC):
    """Zeroes more and more of each selected weight, as a schedule says, until masks freeze.

    Sparsity is absolute: the share of all weights of a tensor that are zero. Every
    ``every_n_steps`` masks are chosen anew from the dense weights, which live on under them; from
    ``freeze_step`` on they stay. In evaluation and after ``fit`` zeros are exact.

    Args:
        sparsity: At the end, of every selected tensor, at least 0 and below 1.
        schedule: Of the share of ``sparsity`` that is reached: a :class:`.Schedule` or its keys.
        every_n_steps: Optimizer steps from one choice of masks to the next; one within half of them
            before ``freeze_step``, where the last is, is left out.
        freeze_step: From then on masks stay: a step (int) or a share of the run (float).
        pattern: Where zeros may lie: see :meth:`.SparsityPattern.of`. Neighbors of N:M and columns
            of a block are input channels of a convolution, at one place of its kernel.
        scope: Whether each ``"layer"`` loses its share, or the ``"global"`` least weights go, with
            the same share of all selected weights; a layer keeps a hundredth at least. A weight
            that cannot be compared with others, as one without gradients where these decide, loses
            its own share.
        revives: Whether zeroed weights are trained on and may return until masks freeze.
        targets: Globs or ``re:…`` on the names of parameters, or of modules that hold them.
        overrides: Sparsities by pattern, or the path of a JSON file with them.
        exclude: Patterns of weights that are left alone.
    """

    place = 0

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
        super().__init__(Sparsities(sparsity, targets, overrides, exclude))
        self.schedule = Schedule.of(schedule)
        if not 0 <= self.schedule.start <= self.schedule.last <= 1:
            raise ValueError(
                f"schedule must rise from 0 or more to 1 or less, got {self.schedule.start} to "
                f"{self.schedule.last}"
            )
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        require_time("freeze_step", freeze_step)
        if scope not in ("layer", "global"):
            raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}")
        self.every_n_steps, self.freeze_step = every_n_steps, freeze_step
        self.pattern = SparsityPattern.of(pattern)
        if scope == "global" and self.pattern.group:
            raise ValueError(
                f"pattern {self.pattern.name!r} fixes the share of every group, which leaves no "
                f"budget to be shared: set scope='layer'"
            )
        self.scope, self.revives = scope, revives
        self.masks: dict[str, MaskStage] = {}
        #: How each selected weight is seen as a matrix, once a run has started.
        self.layouts: dict[str, MatrixLayout] = {}
        self._saved: dict[str, Any] = {}
        # The last choice of masks was made; nothing changes them any more.
        self._is_final = False

    # --- what a method says -------------------------------------------------------------------

    @abstractmethod
    def energies(self, name: str, weight: Tensor) -> Tensor:
        """What each unit of a weight is worth, for the budget and for the choice.

        Args:
            name: Of the parameter.
            weight: As a matrix, float32.
        """

    @property
    def is_comparable(self) -> bool:
        """Whether energies of different layers are in one unit."""
        return False

    def shares_budget(self, name: str) -> bool:
        """Tell whether a weight takes part in the budget of all; else it loses its own share."""
        return True

    def measure(self) -> None:
        """Look at what the choice of masks needs; nothing has changed yet, and errors are early."""

    def choose(self, name: str, weight: Tensor, sparsity: float) -> Tensor:
        """The mask of a weight at a sparsity: the units of greatest energy.

        Args:
            name: Of the parameter.
            weight: As a matrix, float32.
            sparsity: Share of zeros.
        """
        shape = weight.shape[0], weight.shape[1]
        return self.pattern.mask(self.energies(name, weight), sparsity, shape)

    # --- own ----------------------------------------------------------------------------------

    @property
    def sparsity(self) -> float:
        """Share of zeros in all selected weights now; 0 before a run has started."""
        if not self.masks:
            return 0.0
        kept = sum(stage.kept for stage in self.masks.values())
        return 1 - kept / sum(stage.mask.numel() for stage in self.masks.values())

    @override
    def stages(self) -> dict[str, Stage]:
        return {**self.masks}

    @override
    def settings(self) -> dict[str, Any]:
        schedule = self.schedule
        return {
            "sparsity": dict(self.numbers),
            "pattern": self.pattern.name,
            "scope": self.scope,
            "schedule": [schedule.start, schedule.last],
        }

    @override
    def require_settings(self, trainer: pl.Trainer | None) -> None:
        if trainer is None:
            super().require_settings(trainer)
            return
        # Until masks freeze the next choice of masks honors what has changed.
        saved, now = self._saved_settings.get("sparsity", self.numbers), self.numbers
        tensors = {"tensors": sorted(saved)}, {"tensors": sorted(now)}
        require_same(type(self).__name__, *tensors)

    @override
    def missed(self) -> list[str]:
        wanted = sum(self.numbers[n] * stage.mask.numel() for n, stage in self.masks.items())
        wanted *= self.schedule.last
        zeros = sum(stage.mask.numel() - stage.kept for stage in self.masks.values())
        weights = sum(stage.mask.numel() for stage in self.masks.values())
        # Less than one unit of a weight cannot be zeroed; with N:M, one weight of every group.
        units = 0.0
        for name, stage in self.masks.items():
            each = self.pattern.group or self.pattern.units(self.layouts[name].matrix_shape)
            units += stage.mask.numel() / each
        if wanted - zeros <= units:
            return []
        return [f"sparsity is {zeros / weights:.1%}, not {wanted / weights:.1%}"]

    @override
    def prepare(self) -> None:
        assert self._module is not None, "a run has started"
        self.layouts = {}
        require_finite_weights(self._parameters)
        for name, parameter in self._parameters.items():
            owner = self._module.get_submodule(name.rpartition(".")[0])
            self.layouts[name] = MatrixLayout.of(owner, parameter)
        self._require_fit()
        self.masks = {
            name: MaskStage(self.method, parameter, revives=self.revives)
            for name, parameter in self._parameters.items()
        }
        self.rejoin()

    @override
    def rejoin(self) -> None:
        for name, state in self._saved.items():
            if name in self.masks:
                self.masks[name].load_state_dict(state)
        self._saved = {}
        self._settle()

    @override
    def located(self) -> None:
        if self.steps < self._freezes() < math.inf:
            self._is_final = False  # The run has become longer.
        if self._is_final:
            require_same(type(self).__name__, self._saved_settings, self.settings())
        self._settle()

    @override
    def forget(self) -> None:
        super().forget()
        self.masks, self.layouts, self._saved, self._is_final = {}, {}, {}, False

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.steps == 0:
            unseen(self._advance)()
            # What needs a measurement chooses its masks after the first step.
            self._is_final = self._freezes() <= 0 and self.sparsity > 0
        self._settle()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if trainer.state.fn != "fit":
            self._warn_of_dense()

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_test_start(trainer, pl_module)
        self._warn_of_dense()

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_predict_start(trainer, pl_module)
        self._warn_of_dense()

    @override
    def stepped(self) -> None:
        if self._steps_to_choice(self.steps - 1) <= 1:
            self._advance()
            self._is_final = self.steps >= self._freezes()
        self._settle()

    @override
    def figures(self) -> dict[str, float]:
        return {"sparsity": self.sparsity}

    @override
    def state_dict(self) -> dict[str, Any]:
        masks = {name: stage.state_dict() for name, stage in self.masks.items()}
        return {**super().state_dict(), "masks": self._saved or masks, "final": self._is_final}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = dict(state_dict["masks"])
        self._is_final = bool(state_dict.get("final", False))

    def _warn_of_dense(self) -> None:
        """Say so where no mask was ever chosen for the module."""
        wanted = any(self.numbers.values()) and self.schedule.last > 0
        if wanted and all(stage.keeps_all for stage in self.masks.values()):
            rank_zero_warn(
                f"{type(self).__name__} has no masks for this module, which is evaluated dense: "
                f"fit it first, or pass ckpt_path of a run with the callback"
            )

    def _require_fit(self) -> None:
        """Raise unless the pattern divides every weight; name all that it does not divide."""
        wrong = []
        for name, layout in self.layouts.items():
            if not self.pattern.fits(layout.matrix_shape, layout.channels):
                what = "input channels" if layout.is_kernel else "weights"
                rows = layout.matrix_shape[0]
                wrong.append(f"{name} ({rows} rows of {layout.channels} {what})")
        if wrong:
            raise ValueError(
                f"pattern {self.pattern.name!r} does not divide {', '.join(wrong)}: exclude what "
                f"it does not divide, or choose another pattern"
            )

    def _is_frozen(self) -> bool:
        return self._is_final or self.steps >= self._freezes()

    def _freezes(self) -> float:
        """The step of the last choice of masks."""
        freezes = step_of(self.freeze_step, self._total_steps)
        if not math.isfinite(freezes):
            return freezes
        return math.ceil(freezes - 1e-9)

    def _steps_to_choice(self, step: int) -> float:
        """Optimizer steps from ``step`` to the next choice of masks; the last is at freezing.

        One that was jumped over, since the run has become shorter, is due at once.
        """
        if self._is_final:
            return math.inf
        freezes = self._freezes()
        if step >= freezes:
            return 1
        regular = self.every_n_steps - step % self.every_n_steps
        # One just before the last would be for nothing.
        is_late = freezes - (step + regular) < self.every_n_steps / 2
        return freezes - step if is_late else regular

    def _settle(self) -> None:
        """Frozen masks let nothing return."""
        for stage in self.masks.values():
            stage.revives = self.revives and not self._is_frozen()

    def _advance(self) -> None:
        share = self.schedule.at(self.steps, total=self._total_steps)
        wanted = {name: sparsity * share for name, sparsity in self.numbers.items()}
        if not any(wanted.values()):
            return
        require_finite_weights(self._parameters)
        self.measure()
        layouts = self.layouts
        weights = {n: layouts[n].to_matrix(p).float() for n, p in self._parameters.items()}
        if self.scope == "global":
            sharing = {name: w for name, w in weights.items() if self.shares_budget(name)}
            energies = {name: self.energies(name, weight) for name, weight in sharing.items()}
            shapes = {name: (w.shape[0], w.shape[1]) for name, w in sharing.items()}
            if sharing:
                wanted = wanted | global_sparsities(
                    energies, wanted, self.pattern, shapes, relative=not self.is_comparable
                )
        for name, weight in weights.items():
            mask = self.choose(name, weight, wanted[name])
            self.masks[name].set_mask(layouts[name].from_matrix(mask))
        rank_zero_info(f"{type(self).__name__}: {self.sparsity:.1%} of the weights are zero")
