from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torchmetrics.regression import MeanSquaredError

from lightning_nna.non_finite import require_finite_weights
from lightning_nna.weights.selection import (
    BitWidths,
    Sparsities,
    frozen_in,
    groups_of,
    operator_weights,
)


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


def test_weights_are_matrices_outside_losses_metrics_and_parametrizations() -> None:
    found = sorted(operator_weights(Network()))
    assert found == sorted([*LSTM, "conv.weight", "table", "joint.0.weight", "joint.2.weight"])


class Vision(nn.Module):
    """What transformers have beside weights of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embedding = nn.Parameter(torch.randn(1, 17, 8))
        self.relative_position_bias_table = nn.Parameter(torch.randn(9, 2))
        self.pos_bias_u = nn.Parameter(torch.randn(2, 4))
        self.query_tokens = nn.Parameter(torch.randn(5, 8))
        self.initial_state = nn.Parameter(torch.randn(2, 8))
        self.bias = nn.Parameter(torch.zeros(1, 1, 8))
        self.layer_scale = nn.Parameter(torch.ones(8, 1, 1))
        self.norm = nn.LayerNorm((17, 8))
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.lora_a, self.lora_b = (nn.Parameter(torch.randn(8, 2)) for _ in range(2))
        self.experts = nn.Parameter(torch.randn(4, 8, 8))
        self.positions, self.cell = nn.Embedding(17, 8), nn.LSTMCell(8, 8)
        self.up, self.head = nn.ConvTranspose2d(8, 3, 4), nn.Linear(8, 1)


OF_OPERATORS = [
    *("lora_a", "lora_b", "experts", "patches.weight", "attention.in_proj_weight"),
    *("attention.out_proj.weight", "positions.weight", "cell.weight_ih", "cell.weight_hh"),
    *("up.weight", "head.weight"),
]


def test_what_no_operator_multiplies_with_is_taken_where_it_is_named() -> None:
    network = Vision()
    assert list(operator_weights(network)) == OF_OPERATORS
    assert list(BitWidths(4).of(network)) == OF_OPERATORS
    assert BitWidths(4).left_alone(network) == {
        "no weights of operators": [
            *("cls_token", "pos_embedding", "relative_position_bias_table", "pos_bias_u"),
            *("query_tokens", "initial_state", "bias", "layer_scale", "norm.weight", "norm.bias"),
            *("attention.bias_k", "attention.bias_v"),
        ]
    }
    assert BitWidths(4, ["pos_embedding", "norm", "head"]).of(network).keys() == {
        *("pos_embedding", "norm.weight", "norm.bias", "head.weight")
    }
    # It was to be excluded once: a pattern that does so stays right.
    kept = Sparsities(0.5, exclude=["pos_embedding", "*token*"]).of(network)
    assert list(kept) == OF_OPERATORS
    assert "pos_embedding" not in str(Sparsities(0.5, exclude=["pos*"]).left_alone(network))


def test_frozen_weights_are_taken_where_they_are_named() -> None:
    network = Network()
    network.encoder.requires_grad_(False)
    network.joint[0].requires_grad_(False)
    assert list(BitWidths(4).of(network)) == ["table", "conv.weight", "joint.2.weight"]
    assert BitWidths(4).left_alone(network) == {"frozen": [*LSTM, "joint.0.weight"]}
    # A pattern takes what is trained of what it fits, and only without any the rest.
    assert list(BitWidths(4, ["joint"]).of(network)) == ["joint.2.weight"]
    assert list(BitWidths(4, ["encoder", "joint.0"]).of(network)) == [*LSTM, "joint.0.weight"]
    # What was frozen as the run began is what counts.
    frozen = frozen_in(network)
    network.requires_grad_(True)
    assert list(BitWidths(4).of(network, frozen)) == ["table", "conv.weight", "joint.2.weight"]
    network.requires_grad_(False)
    assert len(BitWidths(4).of(network)) == 7  # A whole module that is not to be trained.


def test_stars_name_nothing() -> None:
    network = Network()
    network.requires_grad_(False)
    network.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'\*' matches no weight of an operator that is trained"):
        BitWidths(4).of(network)
    with pytest.raises(ValueError, match=r"matches no weight.*\(none\)"):
        BitWidths(4).of(nn.Tanh())


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
    groups = {
        n: groups_of(network, n, p, "per_channel") for n, p in operator_weights(network).items()
    }
    assert groups == {
        "encoder.weight_ih_l0": 4,
        "encoder.weight_hh_l0": 4,
        "encoder.weight_hr_l0": 1,
        "conv.weight": 8,
        "table": 1,
        "joint.0.weight": 4,
        "joint.2.weight": 2,
    }
    assert {
        groups_of(network, n, p, "per_tensor") for n, p in operator_weights(network).items()
    } == {1}


def test_weights_that_are_not_finite_are_named() -> None:
    large = torch.full((4, 4), 3e38)  # Their sum passes float32, and they are finite.
    require_finite_weights({})
    require_finite_weights({"large": large, "half": torch.ones(2, 2, dtype=torch.float16)})
    for value in (torch.nan, torch.inf, -torch.inf):
        weights = {"large": large, "a.weight": torch.tensor([[1.0, value]]), "b": torch.ones(2, 2)}
        with pytest.raises(FloatingPointError, match=r"^a\.weight has weights that are not finite"):
            require_finite_weights(weights)
