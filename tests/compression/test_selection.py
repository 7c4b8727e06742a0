from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torchmetrics.regression import MeanSquaredError

from lightning_nna.compression.selection import BitWidths, groups_of, require_finite, weights_of


class Network(nn.Module):
    """One of everything that has or has no weights to compress."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(4, 6, proj_size=3)
        self.norm = nn.LayerNorm(3)
        self.conv = nn.Conv1d(3, 8, 3)
        self.table = nn.Parameter(torch.randn(5, 8))
        self.joint = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
        self.loss = nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2])
        self.error = MeanSquaredError()
        self.normed = parametrizations.weight_norm(nn.Linear(2, 2))


LSTM = ["encoder.weight_ih_l0", "encoder.weight_hh_l0", "encoder.weight_hr_l0"]


def test_weights_are_matrices_outside_losses_metrics_and_parametrisations() -> None:
    found = sorted(weights_of(Network()))
    assert found == sorted([*LSTM, "conv.weight", "table", "joint.0.weight", "joint.2.weight"])


def test_a_module_names_all_that_it_holds_and_the_last_override_counts() -> None:
    widths = BitWidths(5, ["encoder", "joint.*"], {"*.weight": 2, "joint.2": 7, "encoder": 3})
    assert widths.of(Network()) == {
        **dict.fromkeys(LSTM, 3),
        "joint.0.weight": 2,
        "joint.2.weight": 7,
    }


def test_one_pattern_needs_no_list_and_may_be_a_regular_expression() -> None:
    assert set(BitWidths(4, r"re:.*_hh_.*").of(Network())) == {"encoder.weight_hh_l0"}


def test_overrides_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "bits.json"
    for content in ('{"joint": 1}', '{"overrides": {"joint": 1}, "mean_bits": 1.0}'):
        path.write_text(content)
        assert BitWidths(8, ["joint"], path).of(Network())["joint.0.weight"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not a JSON file"), ("[1]", "holds no numbers by pattern, but list")],
)
def test_a_file_that_is_none(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bits.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        BitWidths(8, overrides=path)


@pytest.mark.parametrize("bits", [0, 9, True, 2.0, "4"])
def test_bits_are_one_to_eight(bits: object) -> None:
    with pytest.raises(ValueError, match=r"bits must be an int from 1 to 8, got"):
        BitWidths(bits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"overrides\['a'\] must be an int from 1 to 8"):
        BitWidths(4, overrides={"a": bits})  # type: ignore[dict-item]


def test_patterns_that_match_nothing() -> None:
    with pytest.raises(ValueError, match="decoder"):
        BitWidths(4, ["decoder.*"]).of(Network())
    with pytest.raises(ValueError, match="conv"):
        BitWidths(4, ["joint"], {"conv": 2}).of(Network())


def test_scales_by_channel_are_those_the_chip_can_have() -> None:
    network = Network()
    groups = {n: groups_of(network, n, p, "channel") for n, p in weights_of(network).items()}
    assert groups == {
        "encoder.weight_ih_l0": 4,
        "encoder.weight_hh_l0": 4,
        "encoder.weight_hr_l0": 1,
        "conv.weight": 8,
        "table": 1,
        "joint.0.weight": 4,
        "joint.2.weight": 2,
    }
    assert {groups_of(network, n, p, "tensor") for n, p in weights_of(network).items()} == {1}


def test_a_weight_that_is_not_finite_is_named() -> None:
    with pytest.raises(FloatingPointError, match=r"joint\.0\.weight"):
        require_finite("joint.0.weight", torch.tensor([[torch.nan]]))
