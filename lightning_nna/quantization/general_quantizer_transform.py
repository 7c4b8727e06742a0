r"""The General Quantizer's transform of one parameter, and the gradients of its centroids.

.. math::
    x = \mathrm{clip}(w / r, -1, 1), \quad v = F_\mu(x), \quad
    \hat w = r\, F_\mu^{-1}\Big(\sum_j A_j(v)\, z_j\Big),

with centroids :math:`z` that are trained, the clipping range :math:`r`, and an assignment
:math:`A` that hardens; see :mod:`lightning_nna.quantization.mu_law`. Centroids are used as they are
deployed: as integers of at most :math:`n_{max}` times the scale :math:`s = r / n_{max}` (the
gradient passes this rounding unchanged).

Three units meet here. An example with :math:`\mu = 15`, :math:`r = 0.2` and :math:`n_{max} = 127`:

=============  ==========================  ===================================================
unit           centroid                    computed by
=============  ==========================  ===================================================
µ-law domain   :math:`z = 0.5`             trained
clipping       0.2                         :math:`F_\mu^{-1}(z) = (16^{0.5} - 1) / 15`
grid           25                          rounded from :math:`0.2 \cdot 127 = 25.4`
weight         0.0394                      :math:`25 \cdot s = 25 \cdot 0.2 / 127`
=============  ==========================  ===================================================

Hard weights whose gradients sum to 3.0 at that centroid give it the gradient

.. math::
    3.0\; r\, \frac{d F_\mu^{-1}}{d v}(z)
    = 3.0 \cdot 0.2 \cdot \frac{\ln 16}{15} (1 + 15 \cdot 25 / 127) = 0.438

with the slope at the rounded centroid; see ``_leave_centroid_gradient``. The optimizer of the
centroids is in :class:`.GeneralQuantizer`.

Channels with centroids of their own are computed together: each has its cells in one table, those
of the second after those of the first. With 4 centroids a channel has 1024 cells and two for what
lies outside, so that cell 5 of the third channel is entry 2 * 1026 + 5.
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
    best_centroids,
    from_grid_units,
    maximum_of,
    midpoints,
    narrowed_scales,
    relative_gap,
    scales_of,
    to_grid_units,
)
from lightning_nna.weights.pipeline import WeightGrid

Scale = Literal["largest", "centroids"]
#: First centroids: those of the least squared error, or equally spaced in the µ-law's domain.
Start = Literal["lloyd_max", "uniform"]
#: Of centroids: which tensor, and how often it has been changed.
_Version = tuple[int, int]


@dataclass(frozen=True)
class _Ascending:
    """Centroids in ascending order, rounded, and the index of each in ``centroids``."""

    on_grid: Tensor
    order: Tensor


@dataclass(frozen=True)
class _HardAssignment:
    """Assignment by cell: centroid in grid units, its index among the ascending ones, slope.

    Cells and ascending centroids are those of one channel after the other.
    """

    values: Tensor
    nearest: Tensor
    slopes: Tensor


class GeneralQuantizerTransform:
    """Transform of a parameter with trained centroids, see the module.

    Args:
        weight: Weight, shape ``(rows, …)``, finite: centroids start at its Lloyd-Max points, or the
            best ones of ``max_entropy_bits``, in the µ-law's domain.
        bits: Bits of an index, 1 to 8.
        groups: Number of scales, a divisor of the rows.
        mu: Strength of the µ-law's compression, at least 0; 0 for none.
        power: Power of the distance in the softmax, 1 or 2.
        train_centroids: Whether centroids get a gradient.
        scale: Clipping range at the start, which stays unless it is learned: the ``"largest"``
            weight, or the largest of the ``"centroids"``, beyond which weights get no gradient.
        learn_scale: Whether scales get a gradient.
        grid_bits: Width of integer centroids in bits; None for float centroids.
        power_of_two_scales: Whether scales are powers of two.
        pin_zero: Whether one centroid is zero and stays there.
        max_entropy_bits: Greatest entropy of the indices at the start, in bits a weight; None for
            any.
        channels: Number of channels with centroids of their own, a divisor of the rows; None for
            one set of centroids.
        start: First centroids: ``"lloyd_max"``, or ``"uniform"`` for :func:`uniform_centroids`.

    Attributes:
        centroids: Centroids in the µ-law's domain, in [-1, 1], shape ``(centroids,)``, or
            ``(channels, centroids)`` with ``channels``; trained.
        scale_log2: Logarithms to base 2 of the clipping ranges, shape ``(groups,)``; trained with
            ``learn_scale``.
        sharpness: Sharpness of the soft assignment, positive.
        sharpness_log2: Logarithm to base 2 of the sharpness, shape ``(1,)``, if it is trained; see
            :meth:`train_sharpness`.
        is_hard: Whether weights are at their centroids in training, too.
        is_active: Whether training transforms weights at all, in this step.
    """

    method = "general_quantizer"
    order = 1

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
        channels: int | None = None,
        start: Start = "lloyd_max",
    ) -> None:
        self.bits, self.mu, self.power, self.grid_bits = bits, mu, power, grid_bits
        self.train_centroids, self.learn_scale = train_centroids, learn_scale
        self.power_of_two_scales, self.pin_zero = power_of_two_scales, pin_zero
        self.sharpness, self.is_hard, self.is_active = 1.0, False, True
        self.gradient_sharpness: float | None = 1.0
        self.maximum = maximum_of(grid_bits or 8)
        steps = scales_of(weight, groups, grid_bits=grid_bits, power_of_two=power_of_two_scales)
        scaled = (to_grid_units(weight, steps) / self.maximum).clamp_(-1, 1)
        if start == "uniform":
            first = inverse_mu_law(uniform_centroids(bits, pin_zero=pin_zero), mu).to(weight.device)
            first = first if channels is None else first.repeat(channels, 1)
        else:
            first = best_centroids(
                scaled,
                bits,
                pin_zero=pin_zero,
                max_entropy_bits=max_entropy_bits,
                channels=channels,
            )
        if scale == "centroids":
            first, steps = _at_the_centroids(first, steps, power_of_two_scales)
        self.centroids = mu_law(first, mu).clamp_(-1, 1)
        self.sharpness_log2: Tensor | None = None
        self.scale_log2 = elementary.log2(steps.double() * self.maximum).float()
        self._ascending_cache: tuple[_Version, _Ascending] | None = None
        self._soft_cache: tuple[tuple[float, _Version], SoftAssignment] | None = None
        self._hard_cache: tuple[_Version, _HardAssignment] | None = None
        # Cells of the substituted weight, int32: as many bytes again as the weight has.
        self._cells: Tensor | None = None
        # Rounding the logarithm would move a scale that nobody learns.
        self._fixed_scales = steps

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: centroids and scales, without caches."""
        caches = ("_ascending_cache", "_soft_cache", "_hard_cache", "_cells")
        return {**self.__dict__, **dict.fromkeys(caches)}

    # --- codebook ------------------------------------------------------------------------------

    @property
    def scales(self) -> Float[Tensor, " groups"]:
        """Scales, float32, shape ``(groups,)``: clipping ranges over the largest integer."""
        if not self.learn_scale:
            return self._fixed_scales
        exponent = self.scale_log2.detach().double()
        if self.power_of_two_scales:
            return elementary.exp2(
                (exponent - elementary.log2(float(self.maximum))).round()
            ).float()
        return round_significands(elementary.exp2(exponent) / self.maximum).float()

    @property
    def grid(self) -> WeightGrid | None:
        """Quantization parameters of hard weights; None for float centroids."""
        return None if self.grid_bits is None else WeightGrid(self.scales, self.maximum)

    @property
    def codebook(self) -> Codebook:
        """Codebook of the deployed weights; its thresholds are half-way in the µ-law's domain."""
        z = self._ascending().on_grid
        centroids = self._in_grid_units(z)
        thresholds = inverse_mu_law(midpoints(z), self.mu) * self.maximum
        return Codebook(centroids, thresholds, self.scales, self.grid_bits)

    def _ascending(self) -> _Ascending:
        """Sort and round the centroids; cached while they do not change."""
        version = self._version
        if self._ascending_cache is None or self._ascending_cache[0] != version:
            z, order = self.centroids.detach().sort()
            if self.grid_bits is not None:
                z = mu_law(self._in_grid_units(z) / self.maximum, self.mu)
            self._ascending_cache = (version, _Ascending(z, order))
        return self._ascending_cache[1]

    def _in_grid_units(self, z: Tensor) -> Tensor:
        """Convert centroids from the µ-law's domain to grid units, integers if there is a grid."""
        centroids = inverse_mu_law(z, self.mu) * self.maximum
        return centroids if self.grid_bits is None else centroids.round()

    @property
    def _version(self) -> _Version:
        return id(self.centroids), self.centroids._version

    # --- transform ----------------------------------------------------------------------------

    @torch.no_grad()
    def apply(self, weight: Tensor, *, hard: bool) -> Tensor:
        """Quantize a weight; in training softly until ``is_hard``."""
        if not hard and not self.is_active:
            return weight
        cells = self._cells_of(weight)
        if not hard:
            self._cells = cells
        if hard or self.is_hard:
            return self._looked_up(cells, self._hard().values, self.scales).to(weight.dtype)
        values = self._soft(self.sharpness).values
        return self._looked_up(cells, values, self.scales * self.maximum).to(weight.dtype)

    @torch.no_grad()
    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Compute the gradient of the latent weight, and those of centroids and scales.

        The latter are assigned to ``centroids.grad`` and ``scale_log2.grad``.
        """
        if not self.is_active:
            return grad
        cells = self._cells_of(weight) if self._cells is None else self._cells
        self._cells = None
        straight = self.is_hard and self.gradient_sharpness is None
        assigned = self._hard() if straight else self._soft(self._slope_sharpness)
        slopes = assigned.slopes.index_select(0, cells.flatten()).view(weight.shape)
        if self.train_centroids:
            self._leave_centroid_gradient(cells, grad)
        if self.sharpness_log2 is not None and not self.is_hard:
            self._leave_sharpness_gradient(self.sharpness_log2, cells, grad)
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
        count = cells_for(self.centroids.shape[-1])
        cells = cell_of(weight.detach(), count, self.scales * self.maximum)
        if self.centroids.ndim == 1:
            return cells
        channels = torch.arange(len(self.centroids), dtype=cells.dtype, device=cells.device)
        rows = cells.reshape(len(channels), -1) + channels[:, None] * (count + 2)
        return rows.view(weight.shape)

    def _looked_up(self, cells: Tensor, table: Tensor, scales: Tensor) -> Tensor:
        if len(scales) == 1:
            return (table * scales).index_select(0, cells.flatten()).view(cells.shape)
        return from_grid_units(table.index_select(0, cells.flatten()).view(cells.shape), scales)

    def _soft(self, sharpness: float) -> SoftAssignment:
        """Compute the soft assignment; cached while neither centroids nor sharpness change."""
        key = (sharpness, self._version)
        if self._soft_cache is None or self._soft_cache[0] != key:
            z = self._ascending().on_grid
            soft = SoftAssignment(
                z,
                sharpness=sharpness,
                mu=self.mu,
                power=self.power,
                learns_sharpness=self.sharpness_log2 is not None,
            )
            self._soft_cache = (key, soft)
        return self._soft_cache[1]

    def _hard(self) -> _HardAssignment:
        """Assign each cell to the centroid nearest to its middle in the µ-law's domain; cached."""
        version = self._version
        if self._hard_cache is None or self._hard_cache[0] != version:
            z = self._ascending().on_grid
            nearest = nearest_by_cell(z, self.mu)
            slopes = torch.ones(z[..., 0].numel(), cells_for(z.shape[-1]) + 2, device=z.device)
            slopes[:, 0] = slopes[:, -1] = 0
            values = self._in_grid_units(z).flatten()[nearest]
            hard = _HardAssignment(values, nearest, slopes.flatten())
            self._hard_cache = (version, hard)
        return self._hard_cache[1]

    def _leave_centroid_gradient(self, cells: Tensor, grad: Tensor) -> None:
        """Assign the gradient of the centroids, see the example of the module.

        Args:
            cells: Cells of the weights, int32, in the shape of the weight.
            grad: Gradient of the quantized weight, in that shape.
        """
        # Weights of one cell have one result, so that their gradients are summed first. In the
        # module's example: 1.0 + 2.0 = 3.0, times r = 0.2 is 0.6, times the slope 0.731 of the
        # expansion is 0.438.
        scales = self.scales * self.maximum
        scaled = grad.float() if len(scales) == 1 else from_grid_units(grad.float(), scales)
        size = self.centroids.shape[-1]
        count = self.centroids.numel() // size * (cells_for(size) + 2)
        sums = torch.bincount(cells.flatten(), weights=scaled.flatten(), minlength=count).float()
        if len(scales) == 1:
            sums = sums * scales
        ascending = self._ascending()
        if self.is_hard:
            by_centroid = torch.zeros_like(ascending.on_grid)
            by_centroid.view(-1).index_add_(0, self._hard().nearest, sums)
            by_centroid *= inverse_mu_law_slope(ascending.on_grid, self.mu)
        else:
            by_centroid = self._soft(self.sharpness).centroid_gradient(sums)
        result = torch.empty_like(by_centroid).scatter_(-1, ascending.order, by_centroid)
        if self.pin_zero:
            result[self.centroids == 0] = 0
        self.centroids.grad = result

    def _leave_sharpness_gradient(self, log2: Tensor, cells: Tensor, grad: Tensor) -> None:
        """Assign the gradient of the sharpness's logarithm.

        Args:
            log2: That logarithm, shape ``(1,)``.
            cells: Cells of the weights, int32, in the shape of the weight.
            grad: Gradient of the quantized weight, in that shape.
        """
        # d/d(log2 S) is ln(2) d/d(ln S). Centroids -0.5 and 0.5, mu = 0 and p = 2 have the mean
        # g(v) = tanh(S v) / 2; with S = 4 and v = 0.25 its rise is S v (1 - tanh(1)^2) / 2 = 0.21,
        # so that a weight of 0.05 with r = 0.2 adds 0.2 * 0.21 * ln(2) = 0.029 times its gradient.
        slopes = self._soft(self.sharpness).sharpness_slopes
        rises = slopes.index_select(0, cells.flatten()).view(cells.shape).mul_(grad.float())
        total = from_grid_units(rises, self.scales * self.maximum).sum()
        log2.grad = (total * math.log(2)).reshape(1)

    def _leave_scale_gradient(self, weight: Tensor, slopes: Tensor, grad: Tensor) -> None:
        """Assign the gradient of the scales' logarithms.

        Args:
            weight: Latent weight, shape ``(rows, …)``.
            slopes: Slopes of the quantized by the latent weight, in that shape.
            grad: Gradient of the quantized weight, in that shape.
        """
        scales = self.scales * self.maximum
        x = to_grid_units(weight, scales)
        quantized = to_grid_units(self.apply(weight, hard=False), scales)
        terms = (grad.float() * from_grid_units(quantized - x * slopes, scales)).reshape(
            len(scales), -1
        )
        # LSQ's factor. d/d(log2 r) is r ln(2) d/dr, and the terms are r d/dr already: a weight
        # beyond r = 0.2 with slope 0 and gradient 3.0 adds 3.0 * 0.2 = 0.6.
        factor = math.log(2) / math.sqrt(terms.shape[1] * self.maximum)
        self.scale_log2.grad = terms.sum(1) * factor
        self._cells = None

    # --- state ------------------------------------------------------------------------------------

    def train_sharpness(self, start: float) -> None:
        """Train the sharpness from now on, by its logarithm, so that it stays positive.

        Args:
            start: First sharpness, positive.
        """
        first = elementary.log2(torch.tensor([start], dtype=torch.float64)).float()
        self.sharpness_log2 = first.to(self.centroids.device)

    @property
    def trained_sharpness(self) -> float:
        """Sharpness that :attr:`sharpness_log2` stands for."""
        assert self.sharpness_log2 is not None, "it is trained"
        return float(elementary.exp2(self.sharpness_log2.detach().double()))

    def learned(self) -> dict[str, Tensor]:
        """Return the trained tensors, by name."""
        tensors = {"centroids": self.centroids} if self.train_centroids else {}
        if self.sharpness_log2 is not None:
            tensors["sharpness"] = self.sharpness_log2
        return {**tensors, "scale": self.scale_log2} if self.learn_scale else tensors

    @torch.no_grad()
    def clamp_centroids(self) -> None:
        """Bring centroids back into [-1, 1] after an update."""
        self.centroids.clamp_(-1, 1)

    @torch.no_grad()
    def soft_hard_gap(self, weight: Tensor) -> float:
        """Distance of soft and hard weights: root of its mean square, relative to the weights."""
        cells = self._cells_of(weight)
        difference = self._soft(self.sharpness).values * self.maximum - self._hard().values
        return relative_gap(weight, self._looked_up(cells, difference, self.scales))

    def state_dict(self) -> dict[str, Any]:
        """Return copies of centroids, scales and a trained sharpness."""
        sharpness = self.sharpness_log2
        return {
            "centroids": self.centroids.detach().clone(),
            "scale_log2": self.scale_log2.detach().clone(),
            "scales": self.scales.clone(),
            **({} if sharpness is None else {"sharpness_log2": sharpness.detach().clone()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace centroids and scales by saved ones."""
        device = self.centroids.device
        self.centroids = state["centroids"].to(device).clone()
        self.scale_log2 = state["scale_log2"].to(device).clone()
        self._fixed_scales = state["scales"].to(device).clone()
        if "sharpness_log2" in state:
            self.sharpness_log2 = state["sharpness_log2"].to(device).clone()
        self._ascending_cache = self._soft_cache = self._hard_cache = None


def uniform_centroids(bits: int, *, pin_zero: bool = False) -> Float[Tensor, " centroids"]:
    """Return centroids with equal distances in the µ-law's domain, from -1 to 1.

    Args:
        bits: Bits of an index, 1 to 8.
        pin_zero: Whether one of them is zero; then they are signed integers of ``bits`` bits over
            the largest magnitude, and end below 1.

    Example:
        >>> uniform_centroids(2)
        tensor([-1.0000, -0.3333,  0.3333,  1.0000])
        >>> uniform_centroids(2, pin_zero=True)
        tensor([-1.0000, -0.5000,  0.0000,  0.5000])
    """
    indices = torch.arange(2**bits, dtype=torch.float64)
    if pin_zero:
        return (indices / 2 ** (bits - 1) - 1).float()
    return (2 * indices / (2**bits - 1) - 1).float()


def _at_the_centroids(start: Tensor, scales: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Return centroids and scales with the clipping range at the largest centroid.

    Args:
        start: Centroids as fractions of the range, shape ``(centroids,)`` or
            ``(channels, centroids)``.
        scales: Scales of the whole range, shape ``(groups,)``.
        power_of_two: Whether scales are rounded up to powers of two.
    """
    # One number for centroids or scales that are shared, else one of each channel.
    shared = start.ndim == 1 or len(scales) == 1
    fraction = start.abs().amax() if shared else start.abs().amax(1)
    narrower = narrowed_scales(
        scales, torch.where(fraction > 0, fraction, 1.0).double(), power_of_two
    )
    ratio = (scales / narrower).to(start.dtype)
    return start * (ratio[0] if shared else ratio[:, None]), narrower
