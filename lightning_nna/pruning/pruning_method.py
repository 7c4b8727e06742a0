"""``PruningMethod``: the base of pruning callbacks, for plugins as well."""

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
from lightning_nna.pruning.masks import MaskTransform, MatrixLayout, global_sparsities
from lightning_nna.pruning.sparsity_pattern import SparsityPattern
from lightning_nna.resumed_settings import require_same
from lightning_nna.schedule import Schedule, require_end, require_time, step_of
from lightning_nna.weights.method import WeightMethod
from lightning_nna.weights.pipeline import WeightTransform, unseen
from lightning_nna.weights.selection import Sparsities, candidates_of, matches_path, read_numbers

Scope = Literal["layer", "global"]


class PruningMethod(WeightMethod, ABC):
    """Base of callbacks that zero more and more of each selected weight, until masks freeze.

    Sparsity is absolute: the fraction of all weights of a tensor that are zero. Every
    ``every_n_steps`` masks are selected again from the dense latent weights; from ``freeze_step``
    on they stay. In evaluation and after ``fit`` zeros are exact.

    A subclass sets ``method`` and implements :meth:`importance_scores`; it may override
    :meth:`measure`, :meth:`select_mask`, :attr:`is_comparable` and :meth:`shares_budget`, and any
    hook of :class:`.WeightMethod`.

    Args:
        sparsity: Sparsity at the end, of every selected tensor, at least 0 and below 1.
        schedule: Fraction of ``sparsity`` over the run: a :class:`.Schedule` or its keys.
        every_n_steps: Number of optimizer steps from one mask update to the next; an update within
            half of them before ``freeze_step``, the last one, is left out.
        freeze_step: Time from which masks stay: a step (int) or a fraction of the run (float).
        pattern: Pattern of the zeros: see :meth:`.SparsityPattern.of`. Neighbors of N:M and columns
            of a block are input channels of a convolution, at one position of its kernel.
        scope: Budget: ``"layer"`` prunes each tensor to its sparsity; ``"global"`` prunes the least
            weights of all tensors to the same mean, and keeps a hundredth of each. A weight that
            cannot be compared with others, as one without gradients if these decide, has its own
            sparsity.
        prices: What a zero of each weight saves, in one unit, with ``scope="global"``: numbers by
            pattern, or the path of a JSON file with them, as :func:`.prices_of_zeros` measures
            them. The budget is then what ``sparsity`` of each tensor would save, and is taken where
            it costs least; a tensor whose zeros save nothing keeps all of its weights. None for one
            price of all weights.
        revives: Whether zeroed weights are trained and may return until masks freeze.
        targets: Patterns of the selected weights: globs or ``re:…`` on the names of parameters, or
            of modules that have them. See :mod:`lightning_nna.weights.selection`.
        overrides: Sparsities by pattern, or the path of a JSON file with them.
        exclude: Patterns of weights that are not pruned.

    Raises:
        ValueError: If an argument is out of range, or a pattern matches nothing or does not divide
            a weight.
        FloatingPointError: If a weight is not finite.

    Example:
        >>> import torch
        >>> class OldestFirst(PruningMethod):
        ...     method = "oldest_first"
        ...     def importance_scores(self, name, weight):
        ...         return self.pattern.importance_scores(torch.ones_like(weight).cumsum(1))
        >>> OldestFirst(0.5).pattern.name
        'unstructured'
    """

    order = 0

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
        prices: Mapping[str, float] | str | Path | None = None,
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
                f"pattern {self.pattern.name!r} fixes the fraction of every group, which leaves no "
                f"budget to be shared: set scope='layer'"
            )
        if isinstance(prices, str | Path):
            prices = read_numbers(prices)
        if prices is not None and scope != "global":
            raise ValueError(
                f"prices share a budget, and scope={scope!r} has one for each tensor: set "
                f"scope='global'"
            )
        for pattern, price in (prices or {}).items():
            if isinstance(price, bool) or not isinstance(price, int | float) or not price >= 0:
                raise ValueError(f"prices[{pattern!r}] must not be negative, got {price!r}")
        self.prices = None if prices is None else dict(prices)
        self.scope, self.revives = scope, revives
        self.masks: dict[str, MaskTransform] = {}
        #: Layout of each selected weight as a matrix, once a run has started.
        self.layouts: dict[str, MatrixLayout] = {}
        self._saved: dict[str, Any] = {}
        # What a zero of each selected weight saves; empty without prices.
        self._price_of: dict[str, float] = {}
        # The last mask update has been done; masks stay.
        self._is_final = False

    # --- hooks of a method --------------------------------------------------------------------

    @abstractmethod
    def importance_scores(self, name: str, weight: Tensor) -> Tensor:
        """Compute the importance scores of the units of a weight.

        Units with the least scores are pruned, and budgets are shared by them.

        Args:
            name: Name of the parameter.
            weight: Latent weight as a matrix, float32, shape ``(rows, columns)``.

        Returns:
            Scores, not negative, in the shape of the pattern's units.
        """

    @property
    def is_comparable(self) -> bool:
        """True if the scores of different layers are in one unit."""
        return False

    def shares_budget(self, name: str) -> bool:
        """Tell whether a weight takes part in the global budget; else it has its own sparsity.

        Args:
            name: Name of the parameter.
        """
        return True

    def measure(self) -> None:
        """Measure the inputs of a mask update, before anything has changed."""

    def select_mask(self, name: str, weight: Tensor, sparsity: float) -> Tensor:
        """Select the mask of a weight at a sparsity: the units of the greatest scores.

        Args:
            name: Name of the parameter.
            weight: Latent weight as a matrix, float32, shape ``(rows, columns)``.
            sparsity: Fraction of zeros.

        Returns:
            Mask of shape ``(rows, columns)``, bool: True for kept weights.
        """
        shape = weight.shape[0], weight.shape[1]
        return self.pattern.mask(self.importance_scores(name, weight), sparsity, shape)

    # --- own ----------------------------------------------------------------------------------

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in all selected weights now; 0 before a run has started."""
        if not self.masks:
            return 0.0
        kept_count = sum(transform.kept_count for transform in self.masks.values())
        return 1 - kept_count / sum(transform.mask.numel() for transform in self.masks.values())

    @override
    def transforms(self) -> dict[str, WeightTransform]:
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
        # Until masks freeze, the next mask update follows the new settings.
        saved, now = self._saved_settings.get("sparsity", self.numbers), self.numbers
        tensors = {"tensors": sorted(saved)}, {"tensors": sorted(now)}
        require_same(type(self).__name__, *tensors)

    @override
    def missed(self) -> list[str]:
        if self._price_of:
            return self._missed_price()
        wanted = sum(
            self.numbers[n] * transform.mask.numel() for n, transform in self.masks.items()
        )
        wanted *= self.schedule.last
        zeros = sum(
            transform.mask.numel() - transform.kept_count for transform in self.masks.values()
        )
        weights = sum(transform.mask.numel() for transform in self.masks.values())
        # Less than one unit of a weight cannot be zeroed; with N:M, one weight of every group.
        units = 0.0
        for name, transform in self.masks.items():
            each = self.pattern.group or self.pattern.units(self.layouts[name].matrix_shape)
            units += transform.mask.numel() / each
        if wanted - zeros <= units:
            return []
        return [f"sparsity is {zeros / weights:.1%}, not {wanted / weights:.1%}"]

    def _missed_price(self) -> list[str]:
        wanted = saved = units = 0.0
        for name, transform in self.masks.items():
            price, count = self._price_of[name], transform.mask.numel()
            wanted += self.schedule.last * self.numbers[name] * count * price
            saved += (count - transform.kept_count) * price
            units += price * count / self.pattern.units(self.layouts[name].matrix_shape)
        if wanted - saved <= units:
            return []
        return [f"zeros save {saved:.4g} of the prices, not {wanted:.4g}"]

    @override
    def prepare(self) -> None:
        assert self._module is not None, "a run has started"
        self.layouts = {}
        require_finite_weights(self._parameters)
        for name, parameter in self._parameters.items():
            owner = self._module.get_submodule(name.rpartition(".")[0])
            self.layouts[name] = MatrixLayout.of(owner, parameter)
        self._require_fit()
        self._price_of = self._prices_by_name()
        self.masks = {
            name: MaskTransform(self.method, parameter, revives=self.revives)
            for name, parameter in self._parameters.items()
        }
        self.rejoin()

    @override
    def rejoin(self) -> None:
        for name, state in self._saved.items():
            if name in self.masks:
                self.masks[name].load_state_dict(state)
        self._saved = {}
        self._update_revival()

    @override
    def located(self) -> None:
        if self.steps < self._freezes() < math.inf:
            self._is_final = False  # The run has become longer.
        if self._is_final:
            require_same(type(self).__name__, self._saved_settings, self.settings())
        else:
            require_end("freeze_step", self.freeze_step, self._total_steps)
        self._update_revival()

    @override
    def forget(self) -> None:
        super().forget()
        self.masks, self.layouts, self._saved, self._is_final = {}, {}, {}, False

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.steps == 0:
            unseen(self._advance)()
            # A method that needs a measurement selects its masks after the first step.
            self._is_final = self._freezes() <= 0 and self.sparsity > 0
        self._update_revival()

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
        if self._steps_to_mask_update(self.steps - 1) <= 1:
            self._advance()
            self._is_final = self.steps >= self._freezes()
        self._update_revival()

    @override
    def metrics(self) -> dict[str, float]:
        return {"sparsity": self.sparsity}

    @override
    def state_dict(self) -> dict[str, Any]:
        masks = {name: transform.state_dict() for name, transform in self.masks.items()}
        return {**super().state_dict(), "masks": self._saved or masks, "final": self._is_final}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = dict(state_dict["masks"])
        self._is_final = bool(state_dict.get("final", False))

    def _warn_of_dense(self) -> None:
        """Warn if no mask was ever selected for the module."""
        wanted = any(self.numbers.values()) and self.schedule.last > 0
        if wanted and all(transform.keeps_all for transform in self.masks.values()):
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

    def _prices_by_name(self) -> dict[str, float]:
        """Look up what a zero of each selected weight saves; nothing without prices."""
        if self.prices is None:
            return {}
        assert self._module is not None, "a run has started"
        names = list(self._parameters)
        by_name: dict[str, float] = {}
        for pattern, price in self.prices.items():
            fitting = [n for n in candidates_of(self._module) if matches_path(pattern, n)]
            if not fitting:
                raise ValueError(
                    f"prices has {pattern!r}, which matches no weight; there are: "
                    f"{', '.join(names[:8])}{', …' if names[8:] else ''}"
                )
            by_name |= dict.fromkeys(fitting, float(price))
        unpriced = [name for name in names if name not in by_name]
        if unpriced:
            raise ValueError(
                f"prices has none for {', '.join(unpriced)}: add them, or exclude these weights"
            )
        if not any(by_name[name] for name in names):
            raise ValueError(
                "no zero saves anything by these prices: choose another unit, such as memory, or "
                "leave prices out"
            )
        return {name: by_name[name] for name in names}

    def _is_frozen(self) -> bool:
        return self._is_final or self.steps >= self._freezes()

    def _freezes(self) -> float:
        """Return the step of the last mask update; infinite without an end of the run."""
        freezes = step_of(self.freeze_step, self._total_steps)
        if not math.isfinite(freezes):
            return freezes
        return math.ceil(freezes - 1e-9)

    def _steps_to_mask_update(self, step: int) -> float:
        """Count the optimizer steps from ``step`` to the next mask update; the last one freezes.

        An update that was skipped, since the run has become shorter, is due at once.
        """
        if self._is_final:
            return math.inf
        freezes = self._freezes()
        if step >= freezes:
            return 1
        regular = self.every_n_steps - step % self.every_n_steps
        # An update just before the last one would be for nothing.
        is_late = freezes - (step + regular) < self.every_n_steps / 2
        return freezes - step if is_late else regular

    def _update_revival(self) -> None:
        """Stop zeroed weights from returning once masks are frozen."""
        for transform in self.masks.values():
            transform.revives = self.revives and not self._is_frozen()

    def _advance(self) -> None:
        fraction = self.schedule.at(self.steps, total=self._total_steps)
        wanted = {name: sparsity * fraction for name, sparsity in self.numbers.items()}
        if not any(wanted.values()):
            return
        require_finite_weights(self._parameters)
        self.measure()
        layouts = self.layouts
        weights = {n: layouts[n].to_matrix(p).float() for n, p in self._parameters.items()}
        if self.scope == "global":
            sharing = {name: w for name, w in weights.items() if self.shares_budget(name)}
            scores = {name: self.importance_scores(name, w) for name, w in sharing.items()}
            shapes = {name: (w.shape[0], w.shape[1]) for name, w in sharing.items()}
            if sharing:
                wanted = wanted | global_sparsities(
                    scores,
                    wanted,
                    self.pattern,
                    shapes,
                    relative=not self.is_comparable,
                    prices=self._price_of,
                )
        for name, weight in weights.items():
            mask = self.select_mask(name, weight, wanted[name])
            self.masks[name].set_mask(layouts[name].from_matrix(mask))
        rank_zero_info(f"{type(self).__name__}: {self.sparsity:.1%} of the weights are zero")
