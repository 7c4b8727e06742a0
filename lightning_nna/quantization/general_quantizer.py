"""``GeneralQuantizer``: weights of few values that find their own values, in the µ-law's domain.

Reference:
    Zhen et al., "Sub-8-bit quantization for on-device speech recognition: a regularization-free
    approach", SLT 2022, arXiv 2210.09188.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_nna.keyed_adam import KeyedAdam
from lightning_nna.non_finite import require_finite_weights
from lightning_nna.quantization.general_quantizer_transform import GeneralQuantizerStage, Scale
from lightning_nna.quantization.mu_law import require_mu
from lightning_nna.schedule import Schedule, require_time, step_of
from lightning_nna.weights.method import BitsMethod, require_levels
from lightning_nna.weights.pipeline import Stage
from lightning_nna.weights.selection import Granularity, groups_of


class GeneralQuantizer(BitsMethod):
    """Train weights that take :math:`2^b` values, and the values.

    Args:
        bits: Of every selected tensor, 1 to 8.
        mu: Of the µ-law; 0 for none.
        sharpness: Over the run, a :class:`.Schedule` or its keys: about 1 is soft, 32 nearly hard.
        hard_from: From this step (int) or share of the run (float) on weights take their values in
            training, too; the soft assignment gives their gradient.
        gradient_sharpness: Greatest sharpness of the assignment that gives the gradient once
            weights are hard: where it is sharp, weights at a value get none. None passes the
            gradient straight through, as the limit of a soft assignment does.
        power: Of the distance in the softmax, 1 or 2.
        train_centroids: Whether values are trained.
        centroid_lr: Learning rate of the values' own Adam, in the µ-law's domain of [-1, 1]: a
            number, or a :class:`.Schedule` or its keys.
        scale: Where the scale starts, and stays unless it is learned: at the ``"largest"`` weight,
            or at the largest of the ``"centroids"``, beyond which weights then get no gradient.
        learn_scale: Whether the scale is trained; its logarithm to base 2 has ``centroid_lr``.
        granularity: A scale for the ``"tensor"``, or for each ``"channel"`` as far as the chip's
            operators can have them; values are those of the tensor in any case.
        grid_bits: Values lie on the chip's grid of that many bits; None for anywhere.
        power_of_two_scales: Scales of the grid are powers of two, as chips without multiplier need.
        pin_zero: One value is zero and stays there. Not with 1 bit: zero and one other value cannot
            stand for weights of both signs.
        max_entropy_bits: Greatest mean entropy of a tensor's indices, in bits a weight: values are
            then those of :func:`.entropy_constrained`, which a chip that codes its weights reads in
            fewer bytes. It is that of the weights as the run starts. Tensors that ``overrides``
            gives other bits than ``bits`` keep Lloyd-Max values; None for all of them.
        every_n_steps: Weights are transformed in every n-th optimizer step, and in evaluation.
        targets: Globs or ``re:…`` on the names of parameters, or of modules that hold them.
        overrides: Bits by pattern, or the path of a JSON file with them.

    Logs ``nna/gq/sharpness``, ``nna/gq/soft_hard_gap`` (root of the mean square of what still lies
    between a weight and its value, relative to the weights; mean over tensors) and
    ``nna/gq/soft_hard_gap_max``.

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

    Differs from the paper: the schedule of the sharpness, hard values with a soft gradient, the
    start at Lloyd-Max points and the grid of the chip are ours.
    """

    method = "gq"

    def __init__(
        self,
        bits: int,
        *,
        mu: float = 15.0,
        sharpness: Schedule | Mapping[str, Any] | float = Schedule(  # noqa: B008
            1.0, 32.0, until=0.5, shape="geometric"
        ),
        hard_from: int | float = 0.5,
        gradient_sharpness: float | None = 2.0,
        power: int = 2,
        train_centroids: bool = True,
        centroid_lr: Schedule | Mapping[str, Any] | float = 1e-3,
        scale: Scale = "largest",
        learn_scale: bool = False,
        granularity: Granularity = "tensor",
        grid_bits: int | None = 8,
        power_of_two_scales: bool = False,
        pin_zero: bool = False,
        max_entropy_bits: float | None = None,
        every_n_steps: int = 1,
        targets: Sequence[str] = ("*",),
        overrides: Mapping[str, int] | str | Path = {},  # noqa: B006
    ) -> None:
        super().__init__(
            bits, targets=targets, overrides=overrides, max_entropy_bits=max_entropy_bits
        )
        require_mu(mu)
        require_time("hard_from", hard_from)
        self.sharpness = Schedule.of(sharpness)
        if min(self.sharpness.start, self.sharpness.last, gradient_sharpness or 1.0) <= 0:
            raise ValueError("sharpness and gradient_sharpness must be positive")
        if power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {power}")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if granularity not in ("tensor", "channel"):
            raise ValueError(f"granularity must be 'tensor' or 'channel', got {granularity!r}")
        if scale not in ("largest", "centroids"):
            raise ValueError(f"scale must be 'largest' or 'centroids', got {scale!r}")
        self.scale: Scale = scale
        self.mu, self.hard_from, self.gradient_sharpness = mu, hard_from, gradient_sharpness
        self.power, self.every_n_steps = power, every_n_steps
        self.train_centroids, self.learn_scale = train_centroids, learn_scale
        self.granularity: Granularity = granularity
        self.grid_bits, self.power_of_two_scales = grid_bits, power_of_two_scales
        self.pin_zero = pin_zero
        self.centroid_lr = Schedule.of(centroid_lr)
        self._adam = KeyedAdam(self.centroid_lr.start)
        self._stages: dict[str, GeneralQuantizerStage] = {}
        self._saved: dict[str, Any] = {}

    @override
    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "mu": self.mu,
            "scale": self.scale,
            "granularity": self.granularity,
            "grid_bits": self.grid_bits,
            "power_of_two_scales": self.power_of_two_scales,
            "pin_zero": self.pin_zero,
        }

    @override
    def missed(self) -> list[str]:
        # Evaluation and deployment are hard: what training was not, has never seen the loss.
        hard_from = step_of(self.hard_from, self._total_steps)
        if self.steps >= hard_from:
            return []
        told = f"weights take their values in training from step {hard_from:.0f} on (hard_from)"
        now, last = f"{self._sharpness():.3g}", f"{self.sharpness.last:.3g}"
        return [told if now == last else f"{told}, and the sharpness is {now}, not {last}"]

    @override
    def forget(self) -> None:
        super().forget()
        self._stages, self._saved = {}, {}
        self._adam = KeyedAdam(self.centroid_lr.start)

    @override
    def stages(self) -> dict[str, Stage]:
        return {**self._stages}

    @override
    def prepare(self) -> None:
        assert self._module is not None, "a run has started"
        self._stages = {}
        require_finite_weights(self._parameters)
        for name, parameter in self._parameters.items():
            stage = GeneralQuantizerStage(
                parameter,
                self.bits[name],
                groups=groups_of(self._module, name, parameter, self.granularity),
                mu=self.mu,
                power=self.power,
                train_centroids=self.train_centroids,
                scale=self.scale,
                learn_scale=self.learn_scale,
                grid_bits=self.grid_bits,
                power_of_two_scales=self.power_of_two_scales,
                pin_zero=self.pin_zero and self.bits[name] > 1,
                max_entropy_bits=self.rate_of(name),
            )
            self._stages[name] = stage
        self.rejoin()

    @override
    def rejoin(self) -> None:
        for name, state in self._saved.items():
            if name in self._stages:
                require_levels(name, len(state["centroids"]), self.bits[name])
                self._stages[name].load_state_dict(state)
        self._saved = {}
        self._schedule()

    @override
    def located(self) -> None:
        self._schedule()

    @override
    def learn(self) -> None:
        self._adam.learning_rate = self.centroid_lr.at(self.steps, total=self._total_steps)
        self._adam.update(self._learned())
        for stage in self._stages.values():
            stage.settle()

    @override
    def stepped(self) -> None:
        self._schedule()

    @override
    def figures(self) -> dict[str, float]:
        gaps = [stage.soft_hard_gap(self._parameters[name]) for name, stage in self._stages.items()]
        return {
            "sharpness": self._sharpness(),
            "soft_hard_gap": sum(gaps) / len(gaps),
            "soft_hard_gap_max": max(gaps),
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        stages = {name: stage.state_dict() for name, stage in self._stages.items()}
        return {
            **super().state_dict(),
            "centroids": self._saved or stages,
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
            for name, stage in self._stages.items()
            for key, tensor in stage.learned().items()
        }

    def _sharpness(self) -> float:
        return self.sharpness.at(self.steps, total=self._total_steps)

    def _schedule(self) -> None:
        """Tell the stages how sharp they are, and whether they work in this step."""
        if self.sharpness.needs_total and self._total_steps == float("inf"):
            return  # Evaluation alone: weights are hard.
        is_hard = self.steps >= step_of(self.hard_from, self._total_steps)
        for stage in self._stages.values():
            stage.sharpness = self._sharpness()
            stage.gradient_sharpness = self.gradient_sharpness
            stage.is_hard = is_hard
            stage.works = self.steps % self.every_n_steps == 0
