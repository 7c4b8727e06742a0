from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_nna.emulation.arithmetic.interpolated_tables import (
    interpolate,
    interpolation_table,
    inverse_square_root,
)
from tests import litert
from tests.litert import TensorSpec


@pytest.mark.exactness
@pytest.mark.parametrize(
    ("input_scale", "output_scale"),
    [(0.001, 0.002), (2.0**-12, 2.0**-9), (1 / 3000, 1 / 400), (1.0, 1e-4), (0.013, 2e-3)],
)
def test_the_inverse_square_root_of_every_positive_input(
    input_scale: float, output_scale: float
) -> None:
    x = np.arange(0, 2**15).astype(np.int16)
    program = litert.unary_model(
        "RSQRT",
        TensorSpec(x.shape, "int16", input_scale),
        TensorSpec(x.shape, "int16", output_scale),
    )
    (expected,) = litert.run_model(program, [x])
    table = interpolation_table(inverse_square_root, input_scale, output_scale)
    found = interpolate(table, torch.from_numpy(x.astype(np.int64)))
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("segments", [16, 256, 512, 65536])
def test_a_straight_line_is_exact_with_any_number_of_segments(segments: int) -> None:
    table = interpolation_table(lambda x, _: x, 1.0, 2.0, segments=segments)
    x = torch.arange(-(2**15), 2**15)
    assert len(table) == segments + 1
    assert int((interpolate(table, x) - (x / 2)).abs().max()) <= 1


@pytest.mark.parametrize("segments", [0, 1, 300, 2**17])
def test_a_number_of_segments_that_is_no_power_of_two_is_refused(segments: int) -> None:
    with pytest.raises(ValueError, match=f"power of two from 2 to 65536, got {segments}"):
        interpolation_table(inverse_square_root, 1.0, 1.0, segments=segments)
