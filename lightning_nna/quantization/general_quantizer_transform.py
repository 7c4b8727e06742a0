r"""The General Quantizer's hold on one parameter.

.. math::
    x = \mathrm{clip}(w / s, -1, 1), \quad v = F_\mu(x), \quad
    \hat w = s\, F_\mu^{-1}\Big(\sum_j A_j(v)\, z_j\Big),

with centroids :math:`z` that are trained, and an assignment :math:`A` that hardens; see
:mod:`lightning_nna.quantization.mu_law`. Centroids are used as the chip will hold them: at the
nearest whole multiple of :math:`s / n_{max}` (the gradient passes this rounding unchanged).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_nna import elementary
from lightning_nna.emulation.arithmetic.quantized_weight import round_significands
from lightning_nna.quantization.mu_law import (
    SoftAssignment,
    cell_of,
    cells_for,
    inverse_mu_law,
    inverse_mu_law_slope,
    mu_law,
    nearest_by_cell,
)
from lightning_nna.weights.codebook import (
    Codebook,
    best_levels,
    in_steps,
    in_units,
    maximum_of,
    middles,
    narrowed,
    relative_gap,
    steps_of,
)
from lightning_nna.weights.pipeline import WeightGrid

Scale = Literal["largest", "centroids"]
#: Of centroids: which tensor, and how often it has been changed.
_Version = tuple[int, int]


@dataclass(frozen=True)
class _Ascending:
    """Centroids in ascending order, where the grid puts them, and the place that each is from."""

    on_grid: Tensor
    order: Tensor


@dataclass(frozen=True)
class _HardAssignment:
    """By cell: the value in steps, which of the ascending centroids it is, and a slope of one."""

    values: Tensor
    nearest: Tensor
    slopes: Tensor


class GeneralQuantizerStage:
    """A stage of the weight pipeline, see the module.

    Args:
        weight: Where centroids start: its Lloyd-Max points, or the best ones of
            ``max_entropy_bits``, in the µ-law's domain.
        bits: 1 to 8.
        groups: Scales.
        mu: Of the µ-law.
        power: Of the distance.
        train_centroids: Whether centroids get a gradient.
        scale: Where scales start, and stay unless they are learned: at the ``"largest"`` weight, or
            at the largest of the ``"centroids"``, beyond which weights then get no gradient.
        learn_scale: Whether scales get a gradient.
        grid_bits: Of the chip's grid; None for none.
        power_of_two_scales: Whether the grid's steps are powers of two.
        pin_zero: Whether one centroid is zero and stays there.
        max_entropy_bits: Greatest entropy of the indices at the start, in bits a weight; None for
            any.

    Attributes:
        centroids: In [-1, 1], shape ``(levels,)``; trained.
        scale_log2: Logarithms to base 2 of the scales, shape ``(groups,)``.
        sharpness: Of the assignment.
        is_hard: Whether weights take their values in training, too.
        works: Whether weights are transformed in training at all, in this step.
    """

    method = "GeneralQuantizer"
    place = 1

    def __init__(
        self,
        weight: Float[Tensor, "rows *rest"],
        bits: int,
        *,
        groups: int = 1,
        mu: float = 15.0,
        power: int = 2,
        train_centroids: bool = True,
        scale: Scale = "largest",
        learn_scale: bool = False,
        grid_bits: int | None = 8,
        power_of_two_scales: bool = False,
        pin_zero: bool = False,
        max_entropy_bits: float | None = None,
    ) -> None:
        self.bits, self.mu, self.power, self.grid_bits = bits, mu, power, grid_bits
        self.train_centroids, self.learn_scale = train_centroids, learn_scale
        self.power_of_two_scales, self.pin_zero = power_of_two_scales, pin_zero
        self.sharpness, self.is_hard, self.works = 1.0, False, True
        self.gradient_sharpness: float | None = 1.0
        self.maximum = maximum_of(grid_bits or 8)
        steps = steps_of(weight, groups, grid_bits=grid_bits, power_of_two=power_of_two_scales)
        scaled = (in_steps(weight, steps) / self.maximum).clamp_(-1, 1)
        found = best_levels(scaled, bits, pin_zero=pin_zero, max_entropy_bits=max_entropy_bits)
        if scale == "centroids" and bool(found.any()):
            narrower = narrowed(steps, float(found.abs().max()), power_of_two_scales)
            found *= (steps[0] / narrower[0]).to(found.dtype)
            steps = narrower
        self.centroids = mu_law(found, mu).clamp_(-1, 1)
        self.scale_log2 = elementary.log2(steps.double() * self.maximum).float()
        self._kept_ascending: tuple[_Version, _Ascending] | None = None
        self._kept: tuple[tuple[float, _Version], SoftAssignment] | None = None
        self._kept_hard: tuple[_Version, _HardAssignment] | None = None
        # Of the weight that is substituted; so many bytes again as the weight has.
        self._cells: Tensor | None = None
        # Rounding the logarithm would move a scale that nobody learns.
        self._fixed_steps = steps

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle has centroids and scales, not what is kept of them."""
        kept = ("_kept_ascending", "_kept", "_kept_hard", "_cells")
        return {**self.__dict__, **dict.fromkeys(kept)}

    # --- what the weight takes ------------------------------------------------------------------

    @property
    def steps(self) -> Float[Tensor, " groups"]:
        """Steps of the grid."""
        if not self.learn_scale:
            return self._fixed_steps
        exponent = self.scale_log2.detach().double()
        if self.power_of_two_scales:
            return elementary.exp2(
                (exponent - elementary.log2(float(self.maximum))).round()
            ).float()
        return round_significands(elementary.exp2(exponent) / self.maximum).float()

    @property
    def grid(self) -> WeightGrid | None:
        """Where hard weights lie."""
        return None if self.grid_bits is None else WeightGrid(self.steps, self.maximum)

    @property
    def codebook(self) -> Codebook:
        """The values as they are deployed; its borders are those of the µ-law's domain."""
        z = self._ascending().on_grid
        levels = self._levels(z)
        borders = inverse_mu_law(middles(z), self.mu) * self.maximum
        return Codebook(levels, borders, self.steps, self.grid_bits)

    def _ascending(self) -> _Ascending:
        """The centroids as they are used, kept while they do not change."""
        version = self._version
        if self._kept_ascending is None or self._kept_ascending[0] != version:
            z, order = self.centroids.detach().sort()
            if self.grid_bits is not None:
                z = mu_law(self._levels(z) / self.maximum, self.mu)
            self._kept_ascending = (version, _Ascending(z, order))
        return self._kept_ascending[1]

    def _levels(self, z: Tensor) -> Tensor:
        """Values in steps: on the grid, whole numbers."""
        levels = inverse_mu_law(z, self.mu) * self.maximum
        return levels if self.grid_bits is None else levels.round()

    @property
    def _version(self) -> _Version:
        return id(self.centroids), self.centroids._version

    # --- a stage --------------------------------------------------------------------------------

    @torch.no_grad()
    def transform(self, weight: Tensor, *, hard: bool) -> Tensor:
        """The quantized weight; soft in training until it is to be hard."""
        if not hard and not self.works:
            return weight
        cells = self._cells_of(weight)
        if not hard:
            self._cells = cells
        if hard or self.is_hard:
            return self._looked_up(cells, self._hard().values, self.steps).to(weight.dtype)
        values = self._soft(self.sharpness).values
        return self._looked_up(cells, values, self.steps * self.maximum).to(weight.dtype)

    @torch.no_grad()
    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the latent weight; those of centroids and scales are left with them."""
        if not self.works:
            return grad
        cells = self._cells_of(weight) if self._cells is None else self._cells
        self._cells = None
        straight = self.is_hard and self.gradient_sharpness is None
        assigned = self._hard() if straight else self._soft(self._slope_sharpness)
        slopes = assigned.slopes.index_select(0, cells.flatten()).view(weight.shape)
        if self.train_centroids:
            self._leave_centroid_gradient(cells, grad)
        if self.learn_scale:
            self._leave_scale_gradient(weight, slopes, grad)
        return slopes.to(grad.dtype).mul_(grad)

    @property
    def _slope_sharpness(self) -> float:
        """Sharpness of the assignment that gives the gradient."""
        if self.is_hard and self.gradient_sharpness is not None:
            return min(self.sharpness, self.gradient_sharpness)
        return self.sharpness

    def _cells_of(self, weight: Tensor) -> Tensor:
        return cell_of(weight.detach(), cells_for(len(self.centroids)), self.steps * self.maximum)

    def _looked_up(self, cells: Tensor, table: Tensor, scales: Tensor) -> Tensor:
        if len(scales) == 1:
            return (table * scales).index_select(0, cells.flatten()).view(cells.shape)
        return in_units(table.index_select(0, cells.flatten()).view(cells.shape), scales)

    def _soft(self, sharpness: float) -> SoftAssignment:
        """The soft assignment, kept while neither centroids nor sharpness change."""
        key = (sharpness, self._version)
        if self._kept is None or self._kept[0] != key:
            z = self._ascending().on_grid
            made = SoftAssignment(z, sharpness=sharpness, mu=self.mu, power=self.power)
            self._kept = (key, made)
        return self._kept[1]

    def _hard(self) -> _HardAssignment:
        """The nearest centroid in the µ-law's domain, from each cell's middle."""
        version = self._version
        if self._kept_hard is None or self._kept_hard[0] != version:
            z = self._ascending().on_grid
            nearest = nearest_by_cell(z, self.mu)
            slopes = torch.ones(len(nearest), device=z.device)
            slopes[0] = slopes[-1] = 0
            made = _HardAssignment(self._levels(z)[nearest], nearest, slopes)
            self._kept_hard = (version, made)
        return self._kept_hard[1]

    def _leave_centroid_gradient(self, cells: Tensor, grad: Tensor) -> None:
        scales = self.steps * self.maximum
        scaled = grad.float() if len(scales) == 1 else in_units(grad.float(), scales)
        count = cells_for(len(self.centroids)) + 2
        sums = torch.bincount(cells.flatten(), weights=scaled.flatten(), minlength=count).float()
        if len(scales) == 1:
            sums = sums * scales
        ascending = self._ascending()
        if self.is_hard:
            found = torch.zeros_like(ascending.on_grid).index_add_(0, self._hard().nearest, sums)
            found *= inverse_mu_law_slope(ascending.on_grid, self.mu)
        else:
            found = self._soft(self.sharpness).centroid_gradient(sums)
        result = torch.empty_like(found).index_copy_(0, ascending.order, found)
        if self.pin_zero:
            result[self.centroids == 0] = 0
        self.centroids.grad = result

    def _leave_scale_gradient(self, weight: Tensor, slopes: Tensor, grad: Tensor) -> None:
        scales = self.steps * self.maximum
        x = in_steps(weight, scales)
        value = in_steps(self.transform(weight, hard=False), scales)
        share = (grad.float() * in_units(value - x * slopes, scales)).reshape(len(scales), -1)
        # As LSQ scales it. d/d(log2 s) is s ln(2) d/ds, and the share is s d/ds already.
        factor = math.log(2) / math.sqrt(share.shape[1] * self.maximum)
        self.scale_log2.grad = share.sum(1) * factor
        self._cells = None

    # --- state ------------------------------------------------------------------------------------

    def learned(self) -> dict[str, Tensor]:
        """What is trained, by name."""
        found = {"centroids": self.centroids} if self.train_centroids else {}
        return {**found, "scale": self.scale_log2} if self.learn_scale else found

    @torch.no_grad()
    def settle(self) -> None:
        """Bring centroids back into [-1, 1] after an update."""
        self.centroids.clamp_(-1, 1)

    @torch.no_grad()
    def soft_hard_gap(self, weight: Tensor) -> float:
        """Root of the mean square of soft less hard weights, relative to that of the weights."""
        cells = self._cells_of(weight)
        away = self._soft(self.sharpness).values * self.maximum - self._hard().values
        return relative_gap(weight, self._looked_up(cells, away, self.steps))

    def state_dict(self) -> dict[str, Any]:
        """Centroids and scales."""
        return {
            "centroids": self.centroids.detach().clone(),
            "scale_log2": self.scale_log2.detach().clone(),
            "steps": self.steps.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace centroids and scales by saved ones."""
        device = self.centroids.device
        self.centroids = state["centroids"].to(device).clone()
        self.scale_log2 = state["scale_log2"].to(device).clone()
        self._fixed_steps = state["steps"].to(device).clone()
        self._kept_ascending = self._kept = self._kept_hard = None
