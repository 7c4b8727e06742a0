"""A training step on a simulated device: no waits, the processor's bits, errors that come later."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import calibrate, emulate
from lightning_nna.emulation.arithmetic.deferred_checks import DeferredChecks
from lightning_nna.emulation.arithmetic.on_host import as_on_a_device
from recipes.benchmark.workloads import WORKLOADS
from tests.emulation.training_on_a_device import CASES

# The device is registered in a process once and for good, so that each count has its own.
_COUNT = """
import json, sys
from recipes.benchmark.launches import count
print(json.dumps(count(*sys.argv[1:])))
"""


def _counted(*arguments: str) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-c", _COUNT, *arguments], check=True, capture_output=True, text=True
    )
    row: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return row


# Each of the others has layers of its own.
_WORKS = ("conv1d", "lstm", "gru", "conformer", "rnnt")


@pytest.mark.parametrize("work", ["mlp", "conformer", "rnnt", "kws"])
def test_nothing_waits_for_a_device_in_fast_fidelity(work: str) -> None:
    row = _counted(work, "fast")
    assert row["synchronizations"] == row["float_synchronizations"], row["places"]


@pytest.mark.parametrize(
    ("work", "preset"),
    [*((work, "litert-int8") for work in WORKLOADS), *((work, "tflm-int16x8") for work in _WORKS)],
)
def test_nothing_waits_for_a_device_and_results_are_those_of_the_processor(
    work: str, preset: str
) -> None:
    row = _counted(work, "exact", preset)
    assert row["synchronizations"] == row["float_synchronizations"], row["places"]
    # One copy tells whether all was finite, one the scales of constants.
    assert row["between_steps"] <= 2
    assert row["equal_output"]
    # Sums of float32 have another order.
    assert row["gradient_distance"] < 1e-6


@pytest.mark.parametrize("work", ["lstm", "gru"])
def test_a_step_of_a_recurrent_layer_is_two_launches(work: str) -> None:
    row = _counted(work, "exact")
    assert row["forward_launches_per_step"] == row["backward_launches_per_step"] == 2


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 3), nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


def _calibrated() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    module, x = Gated(), torch.randn(5, 4)
    calibrate(module, [x], spec="litert-int8")
    return module, x


@pytest.mark.parametrize(
    ("parameter", "site"), [("layer.weight", "fully_connected"), ("layer.bias", "fully_connected")]
)
def test_a_value_that_is_not_finite_is_an_error_when_the_block_ends(
    parameter: str, site: str
) -> None:
    module, x = _calibrated()
    results: list[Tensor] = []
    module.get_parameter(parameter).data.view(-1)[0] = torch.nan
    with (
        pytest.raises(FloatingPointError, match=f"{site}.*{parameter} has a value"),
        as_on_a_device(),
        emulate(module),
    ):
        results.append(module(x))
    assert len(results) == 1


def test_an_input_that_is_not_finite_names_its_site() -> None:
    module, x = _calibrated()
    with (
        pytest.raises(FloatingPointError, match=r"layer/fully_connected#0/input produced a value"),
        as_on_a_device(),
        emulate(module),
    ):
        module(x.index_fill(0, torch.tensor([1]), torch.inf))


def test_another_error_is_not_hidden() -> None:
    module, x = _calibrated()

    def fail() -> None:
        module(x * torch.nan)
        raise KeyError("own")

    with pytest.raises(KeyError, match="own"), as_on_a_device(), emulate(module):
        fail()
    # What waited is gone with it.
    with as_on_a_device(), emulate(module):
        module(x)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


@pytest.mark.parametrize(
    ("value", "message"), [(-torch.inf, "leaves scores out"), (0.5, "adds to scores")]
)
def test_a_mask_that_calibration_has_not_seen_is_an_error(value: float, message: str) -> None:
    torch.manual_seed(0)
    module, x, zeros = Masked(), torch.randn(2, 3, 4), torch.zeros(3, 3)
    calibrate(module, [(x, zeros)], forward=lambda module, batch: module(*batch))
    mask = zeros.clone()
    mask[0, 2] = value
    with pytest.raises(ValueError, match=message), as_on_a_device(), emulate(module):
        module(x, mask)
    with as_on_a_device(), emulate(module):
        module(x, zeros)


def test_masks_on_a_device_give_the_bits_of_a_processor() -> None:
    torch.manual_seed(0)
    module, x, mask = Masked(), torch.randn(2, 3, 4), torch.randn(3, 3)
    mask[0, 2] = -torch.inf
    calibrate(module, [(x, mask)], forward=lambda module, batch: module(*batch))
    with emulate(module):
        expected = module(x, mask)
    with as_on_a_device(), emulate(module):
        assert torch.equal(module(x, mask), expected)


def test_many_checks_are_read_before_the_block_ends() -> None:
    checks = DeferredChecks()
    with as_on_a_device(), pytest.raises(FloatingPointError, match="third"):  # noqa: PT012
        for number in range(5000):
            checks.require(torch.tensor(number != 3), FloatingPointError("third"))


def test_training_with_every_method_gives_the_weights_of_the_processor() -> None:
    command = [sys.executable, "-m", "tests.emulation.training_on_a_device", *CASES]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(result.stdout.splitlines()[-1]) == {case: [] for case in CASES}
