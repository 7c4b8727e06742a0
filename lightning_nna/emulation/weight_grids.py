"""Quantize weights to the accelerator's integers, after the weight pipeline."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_nna.emulation.arithmetic.quantized_weight import (
    SECOND_AXIS,
    QuantizedWeight,
    quantize_onto,
    quantize_weight,
)
from lightning_nna.emulation.spec import NNASpec
from lightning_nna.weights.pipeline import WeightGrid, WeightPipeline


def on_grid(
    pipeline: WeightPipeline, weight: Tensor, rows_per_scale: int, spec: NNASpec
) -> QuantizedWeight:
    """Quantize a weight, after the transforms of its methods.

    Args:
        pipeline: Weight pipeline of the module.
        weight: Weight of an operator, float32, shape ``(rows, …)``.
        rows_per_scale: Number of rows that share a scale, or :data:`.SECOND_AXIS`.
        spec: Accelerator.

    Raises:
        ValueError: If the accelerator does not support the centroids of a transform; the message
            says what to change.
        FloatingPointError: If a weight is not finite.
    """
    grid, weight = pipeline.grid_of(weight), pipeline.deployed(weight)
    if rows_per_scale != SECOND_AXIS:
        return _quantized(grid, weight, rows_per_scale, spec)
    if grid is not None and len(grid.scales) > 1:
        raise ValueError(
            f"a weight whose outputs are its second axis, as that of a transposed convolution, has "
            f"{len(grid.scales)} scales for its inputs: set granularity='per_tensor' on the method"
        )
    return _quantized(grid, weight.transpose(0, 1), 1, spec).turned()


def _quantized(
    grid: WeightGrid | None, weight: Tensor, rows_per_scale: int, spec: NNASpec
) -> QuantizedWeight:
    """Quantize a weight with a scale for so many of its rows."""
    if grid is not None:
        return quantize_onto(
            weight, _scales_of_rows(grid, weight, rows_per_scale, spec), maximum=spec.weight_max
        )
    return quantize_weight(
        weight,
        rows_per_scale=rows_per_scale,
        maximum=spec.weight_max,
        power_of_two=spec.power_of_two_scales,
    )


def _scales_of_rows(
    grid: WeightGrid, weight: Tensor, rows_per_scale: int, spec: NNASpec
) -> Float[Tensor, " rows"]:
    """Return the scale of every row, or raise if the accelerator does not support the scales."""
    rows, groups = weight.shape[0], len(grid.scales)
    if grid.maximum > spec.weight_max:
        raise ValueError(
            f"a weight has centroids in ±{grid.maximum}, the accelerator's weights are in "
            f"±{spec.weight_max}: set grid_bits={spec.weight_bits} on the method"
        )
    if (rows // groups) % rows_per_scale:
        raise ValueError(
            f"a weight of {rows} rows has {groups} scales, and an operator of the accelerator "
            f"needs one for every {rows_per_scale} rows: set granularity='per_tensor' on the method"
        )
    if spec.power_of_two_scales and bool((torch.frexp(grid.scales).mantissa != 0.5).any()):
        raise ValueError(
            "the accelerator's scales are powers of two and those of the centroids are not: set "
            "power_of_two_scales=True on the method"
        )
    return grid.scales.repeat_interleave(rows // groups)
