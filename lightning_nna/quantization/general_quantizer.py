"""``GeneralQuantizer``: low-bit weights with centroids that are trained, in the µ-law's domain.

Reference:
    Zhen et al., "Sub-8-bit quantization for on-device speech recognition: a regularization-free
    approach", SLT 2022, arXiv 2210.09188.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack, override

from lightning_nna.keyed_adam import KeyedAdam
from lightning_nna.non_finite import require_finite_weights
from lightning_nna.quantization.codebook_method import CodebookArguments, CodebookMethod
from lightning_nna.quantization.general_quantizer_transform import (
    GeneralQuantizerTransform,
    Scale,
    Start,
)
from lightning_nna.quantization.mu_law import require_mu
from lightning_nna.schedule import Schedule, require_end, require_time, step_of
from lightning_nna.weights.codebook import channels_of
from lightning_nna.weights.method import require_codebook_size
from lightning_nna.weights.pipeline import WeightTransform
from lightning_nna.weights.selection import groups_of

#: Sharpness, until weights are hard.
_ANNEALING = Schedule(4.0, 300.0, shape="geometric")
#: Steps from which on a run is long, and the fractions of a short and of a long run that are soft.
_LONG_RUN = 1000
_SHORT_SOFT, _LONG_SOFT = 0.75, 0.1


class GeneralQuantizer(CodebookMethod):
    """Train weights that take :math:`2^b` centroids, and the centroids.

    The gradients of weights, centroids and scales are computed in closed form in
    :mod:`lightning_nna.quantization.general_quantizer_transform`.

    Args:
        bits: Bits of the index of a weight, 1 to 8, of every selected tensor.
        mu: Strength of the µ-law's compression, at least 0; 0 for none.
        sharpness: Sharpness of the soft assignment over the run, a :class:`.Schedule` or its keys:
            about 1 is soft, 32 nearly hard; with few bits a gap to hard weights of a tenth of them
            is left at 32, and none to speak of at 300. None rises from 4 to 300, by equal factors
            in equal times, until weights are hard.
        hard_from: Time from which weights are at their centroids in training, too: a step (int) or
            a fraction of the run (float); the soft assignment gives their gradient. None for where
            ``sharpness`` has risen; where it is None or constant, for three quarters of a run of
            less than 1,000 steps, and a tenth of a longer one.
        gradient_sharpness: Greatest sharpness of the assignment that gives the gradient of hard
            weights: with a sharp one, weights near a centroid get none. None passes the gradient
            straight through, as the limit of a soft assignment does.
        train_sharpness: Whether each tensor has a sharpness of its own that is trained until
            weights are hard, from the start of ``sharpness``; its logarithm to base 2 has
            ``centroid_lr``.
        power: Power of the distance in the softmax, 1 or 2.
        start: First centroids: ``"lloyd_max"``, those of the least squared error, or ``"uniform"``
            with equal distances in the µ-law's domain.
        train_centroids: Whether centroids are trained: ``True``, ``False``, or ``"soft"`` until
            weights are hard, whose straight-through gradients move centroids without end
            (``docs/results/low_bits.md``).
        centroid_lr: Learning rate of the centroids' own Adam, in the µ-law's domain of [-1, 1]: a
            number, or a :class:`.Schedule` or its keys.
        scale: Clipping range at the start, which stays unless it is learned: the ``"largest"``
            weight, or the largest of the ``"centroids"``, beyond which weights get no gradient.
        learn_scale: Whether the scale is trained; its logarithm to base 2 has ``centroid_lr``.
        every_n_steps: Number of optimizer steps from one in which training transforms the weights
            to the next; evaluation always does.
        settings: Shared arguments of :class:`.CodebookMethod`: ``granularity``, ``grid_bits``,
            ``power_of_two_scales``, ``pin_zero``, ``max_entropy_bits``, ``codebook``, ``targets``,
            ``overrides``.

    Logs ``nna/general_quantizer/sharpness``, ``…/soft_hard_gap`` (root of the mean square of the
    distance between a weight in training and its centroid, relative to the weights; mean over
    tensors) and ``…/soft_hard_gap_max``.

    Raises:
        ValueError: If an argument is out of range or a pattern matches nothing.
        FloatingPointError: If a weight is not finite.

    Example:
        >>> import lightning.pytorch as pl
        >>> from lightning_nna.testing import SmallRecurrentModule
        >>> module = SmallRecurrentModule()
        >>> trainer = pl.Trainer(max_steps=4, callbacks=[GeneralQuantizer(2)], accelerator="cpu",
        ...     logger=False, enable_checkpointing=False, enable_progress_bar=False,
        ...     enable_model_summary=False)
        >>> trainer.fit(module)
        >>> len(module.lstm.weight_hh_l0.unique()) <= 4
        True

    The defaults are those of the recipe ``compression=gq``, chosen on validation speakers
    (``docs/results/low_bits.md``).

    Differs from the paper: the schedule of the sharpness, that the later steps of a run are hard
    with gradients straight through and centroids that stay, the start at Lloyd-Max points and the
    integer centroids are ours.
    """

    method = "general_quantizer"

    def __init__(
        self,
        bits: int,
        *,
        mu: float = 7.0,
        sharpness: Schedule | Mapping[str, Any] | float | None = None,
        hard_from: int | float | None = None,
        gradient_sharpness: float | None = None,
        train_sharpness: bool = False,
        power: int = 2,
        start: Start = "lloyd_max",
        train_centroids: bool | Literal["soft"] = "soft",
        centroid_lr: Schedule | Mapping[str, Any] | float = 1e-3,
        scale: Scale = "largest",
        learn_scale: bool = False,
        every_n_steps: int = 1,
        **settings: Unpack[CodebookArguments],
    ) -> None:
        super().__init__(bits, **settings)
        require_mu(mu)
        if hard_from is not None:
            require_time("hard_from", hard_from)
        self.sharpness = None if sharpness is None else Schedule.of(sharpness)
        annealing = self.sharpness or _ANNEALING
        if min(annealing.start, annealing.last, gradient_sharpness or 1.0) <= 0:
            raise ValueError("sharpness and gradient_sharpness must be positive")
        if power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {power}")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if scale not in ("largest", "centroids"):
            raise ValueError(f"scale must be 'largest' or 'centroids', got {scale!r}")
        if train_centroids not in (True, False, "soft"):
            raise ValueError(
                f"train_centroids must be True, False or 'soft', got {train_centroids!r}"
            )
        if start not in ("lloyd_max", "uniform"):
            raise ValueError(f"start must be 'lloyd_max' or 'uniform', got {start!r}")
        if start == "uniform" and (entropy := self.codebook_settings.max_entropy_bits) is not None:
            raise ValueError(
                f"start='uniform' places centroids without regard to the entropy, got "
                f"max_entropy_bits={entropy}: leave it out, or set start='lloyd_max'"
            )
        self.scale: Scale = scale
        self.start: Start = start
        self.train_sharpness = train_sharpness
        self.mu, self.hard_from, self.gradient_sharpness = mu, hard_from, gradient_sharpness
        self.power, self.every_n_steps = power, every_n_steps
        self.train_centroids, self.learn_scale = train_centroids, learn_scale
        self.centroid_lr = Schedule.of(centroid_lr)
        self._adam = KeyedAdam(self.centroid_lr.start)
        self._transforms: dict[str, GeneralQuantizerTransform] = {}
        self._saved: dict[str, Any] = {}

    @property
    def hard_step(self) -> float:
        """Step from which weights are hard; ``inf`` for a fraction of a run without an end."""
        return step_of(self._hard_from, self._total_steps)

    @override
    def settings(self) -> dict[str, Any]:
        own = {"mu": self.mu, "scale": self.scale, "train_sharpness": self.train_sharpness}
        return {**own, **super().settings()}

    @override
    def missed(self) -> list[str]:
        # Evaluation and deployment are hard, which a soft training has not seen.
        if self.steps >= self.hard_step:
            return []
        reason = (
            f"weights are at their centroids in training from step {self.hard_step:.0f} on "
            "(hard_from)"
        )
        now, last = f"{self._sharpness():.3g}", f"{self._annealing.last:.3g}"
        if self.train_sharpness:
            return [reason]
        return [reason if now == last else f"{reason}, and the sharpness is {now}, not {last}"]

    @override
    def forget(self) -> None:
        super().forget()
        self._transforms, self._saved = {}, {}
        self._adam = KeyedAdam(self.centroid_lr.start)

    @override
    def transforms(self) -> dict[str, WeightTransform]:
        return {**self._transforms}

    @override
    def prepare(self) -> None:
        assert self._module is not None, "a run has started"
        self._transforms = {}
        require_finite_weights(self._parameters)
        for name, parameter in self._parameters.items():
            settings = self.settings_of(name)
            transform = GeneralQuantizerTransform(
                parameter,
                self.bits[name],
                groups=groups_of(self._module, name, parameter, settings.granularity),
                mu=self.mu,
                power=self.power,
                train_centroids=self.train_centroids is not False,
                scale=self.scale,
                learn_scale=self.learn_scale,
                grid_bits=settings.grid_bits,
                power_of_two_scales=settings.power_of_two_scales,
                pin_zero=settings.pin_zero and self.bits[name] > 1,
                max_entropy_bits=settings.max_entropy_bits,
                channels=channels_of(
                    self._module, name, parameter, self.bits[name], settings.codebook
                ),
                start=self.start,
            )
            if self.train_sharpness:
                transform.train_sharpness(self._annealing.start)
            self._transforms[name] = transform
        self.rejoin()

    @override
    def rejoin(self) -> None:
        for name, state in self._saved.items():
            if name in self._transforms:
                transform = self._transforms[name]
                require_codebook_size(name, state["centroids"], transform.centroids)
                transform.load_state_dict(state)
        self._saved = {}
        self._schedule()

    @override
    def located(self) -> None:
        require_end("hard_from", self._hard_from, self._total_steps)
        self._schedule()

    @override
    def learn(self) -> None:
        self._adam.learning_rate = self.centroid_lr.at(self.steps, total=self._total_steps)
        if learned := self._learned():
            self._adam.update(learned)
        for transform in self._transforms.values():
            transform.clamp_centroids()
            if self.train_sharpness:
                transform.sharpness = transform.trained_sharpness

    @override
    def stepped(self) -> None:
        self._schedule()

    @override
    def metrics(self) -> dict[str, float]:
        gaps = [
            transform.soft_hard_gap(self._parameters[name])
            for name, transform in self._transforms.items()
        ]
        trained = [one.sharpness for one in self._transforms.values() if self.train_sharpness]
        return {
            "sharpness": sum(trained) / len(trained) if trained else self._sharpness(),
            "soft_hard_gap": sum(gaps) / len(gaps),
            "soft_hard_gap_max": max(gaps),
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        transforms = {name: transform.state_dict() for name, transform in self._transforms.items()}
        return {
            **super().state_dict(),
            "centroids": self._saved or transforms,
            "adam": self._adam.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = dict(state_dict["centroids"])
        self._adam.load_state_dict(state_dict["adam"])

    def _learned(self) -> dict[str, Tensor]:
        return {
            f"{name}:{key}": tensor
            for name, transform in self._transforms.items()
            for key, tensor in transform.learned().items()
        }

    @property
    def _hard_from(self) -> int | float:
        """Time from which weights are hard."""
        if self.hard_from is not None:
            return self.hard_from
        if self.sharpness is not None and self.sharpness.start != self.sharpness.last:
            return self.sharpness.until
        return _SHORT_SOFT if self._total_steps < _LONG_RUN else _LONG_SOFT

    @property
    def _annealing(self) -> Schedule:
        """Schedule of the sharpness."""
        return self.sharpness or replace(_ANNEALING, until=self._hard_from)

    def _sharpness(self) -> float:
        return self._annealing.at(self.steps, total=self._total_steps)

    def _schedule(self) -> None:
        """Set the sharpness of the transforms, and whether they are active in this step."""
        if self._annealing.needs_total and self._total_steps == math.inf:
            return  # Evaluation alone: weights are hard.
        is_hard = self.steps >= self.hard_step
        for transform in self._transforms.values():
            transform.sharpness = (
                transform.trained_sharpness if self.train_sharpness else self._sharpness()
            )
            transform.gradient_sharpness = self.gradient_sharpness
            transform.is_hard = is_hard
            if self.train_centroids == "soft":
                transform.train_centroids = not is_hard
            transform.is_active = self.steps % self.every_n_steps == 0
