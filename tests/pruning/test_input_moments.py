"""Second moments against inputs that were kept, layer by layer and step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nna.pruning.input_moments import InputMoments


def seen_by(module: nn.Module, *inputs: Any) -> InputMoments:
    with InputMoments(dict(module.named_parameters())) as moments:
        module(*inputs)
    return moments


def moment(rows: Tensor) -> Tensor:
    flat = rows.flatten(0, -2)
    return flat.T @ flat / len(flat)


def test_linear_layers_and_functions() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.other = nn.Parameter(torch.randn(2, 3))
            self.idle = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.layer(x), self.other)

    module, x = Twice(), torch.randn(4, 6, 5)
    moments = seen_by(module, x)
    torch.testing.assert_close(moments.moment("layer.weight"), moment(x))
    torch.testing.assert_close(moments.moment("other"), moment(module.layer(x).detach()))
    assert moments.moment("idle.weight") is None
    moments.clear()
    assert moments.moment("other") is None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2},
        {"groups": 2},
        {"padding": "same"},
        {"padding": "valid"},
    ],
    ids=str,
)
@pytest.mark.parametrize("axes", [1, 2])
def test_convolutions(settings: dict[str, Any], axes: int) -> None:
    """What is seen gives the power of the output of every kernel."""
    kind = nn.Conv1d if axes == 1 else nn.Conv2d
    layer = kind(4, 6, 3, bias=False, **settings)
    x = torch.randn(2, 4, *[9] * axes)
    found = seen_by(layer, x).moment("weight")
    groups = settings.get("groups", 1)
    weight = layer.weight.detach().flatten(1)
    assert found is not None
    power = ((weight @ found) * weight).sum(1)
    outputs = layer(x).detach().transpose(0, 1).flatten(1).square().mean(1)
    mean = power.view(groups, -1).mean()
    torch.testing.assert_close(
        outputs.view(groups, -1).mean(), mean, rtol=0.2 * (groups > 1), atol=1e-5
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"stride": 3},
        {"padding": 2},
        {"padding": 4, "dilation": 2},
        {"stride": 2, "padding": 5, "dilation": 2, "output_padding": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("axes", [1, 2])
def test_transposed_convolutions(settings: dict[str, Any], axes: int, groups: int) -> None:
    """The power of an output is that of the rows of the weight on what is seen."""
    torch.manual_seed(0)
    kind = nn.ConvTranspose1d if axes == 1 else nn.ConvTranspose2d
    layer = kind(4, 6, 3, bias=False, groups=groups, **settings)
    # In every group the same: then their one moment is that of each.
    x = torch.randn(2, 4 // groups, *[9, 7][:axes]).repeat(1, groups, *[1] * axes)
    with InputMoments({"weight": layer.weight}, transposed_groups={"weight": groups}) as seen:
        outputs = layer(x).detach()
        layer(x[0])
    found = seen.moment("weight")
    rows = layer.weight.detach().unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    assert found is not None
    both = torch.cat([outputs, outputs[:1]]).transpose(0, 1).flatten(1)
    power = ((rows @ found) * rows).sum(1)
    torch.testing.assert_close(power, both.square().mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("settings", [{}, {"bidirectional": True}, {"batch_first": True}], ids=str)
def test_recurrent_layers(kind: type[nn.Module], settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = kind(3, 4, num_layers=2, dropout=0.0, **settings)
    x = torch.randn(5, 5, 3)
    moments = seen_by(layer, x)
    torch.testing.assert_close(moments.moment("weight_ih_l0"), moment(x))
    first = kind(3, 4, **settings)
    names = [name for name, _ in first.named_parameters()]
    first.load_state_dict({name: layer.get_parameter(name).detach() for name in names})
    between = first(x)[0].detach()
    torch.testing.assert_close(moments.moment("weight_ih_l1"), moment(between))
    torch.testing.assert_close(moments.moment("weight_hh_l0"), moment(between[..., :4]))
    last = layer(x)[0].detach()
    torch.testing.assert_close(moments.moment("weight_hh_l1"), moment(last[..., :4]))


@pytest.mark.parametrize("both", [False, True])
def test_packed_sequences(both: bool) -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4, num_layers=2, bidirectional=both)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 3), [5, 3, 1])
    moments = seen_by(layer, packed)
    torch.testing.assert_close(moments.moment("weight_ih_l0"), moment(packed.data))
    last = layer(packed)[0].data.detach()
    torch.testing.assert_close(moments.moment("weight_hh_l1"), moment(last[:, :4]))
    names = [n for n, _ in layer.named_parameters() if n.endswith("_l1_reverse")]
    found = [moments.moment(n) for n in names if n == "weight_hh_l1_reverse"]
    expected = [moment(last[:, 4:])] if both else []
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_attention_and_what_has_no_inputs_to_see() -> None:
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
    moments = seen_by(layer, x, x, x)
    torch.testing.assert_close(moments.moment("in_proj_weight"), moment(x))
    assert moments.moment("out_proj.weight") is not None
    table = seen_by(nn.Embedding(4, 2), torch.tensor([1, 3]))
    assert (table.moment("weight"), table.looked_up) == (None, {"weight"})
    bag = seen_by(nn.EmbeddingBag(4, 2), torch.tensor([[1, 3]]))
    assert (bag.moment("weight"), bag.looked_up) == (None, {"weight"})
    projected = seen_by(nn.LSTM(3, 4, proj_size=2), torch.randn(5, 1, 3))
    assert projected.moment("weight_hr_l0") is None
    assert projected.moment("weight_hh_l0").shape == (2, 2)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("shape", [(5, 3), (3,)], ids=["batch", "one"])
def test_cells(kind: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, h = torch.randn(*shape), torch.randn(*shape[:-1], 4)
    state = (h, torch.randn_like(h)) if kind is nn.LSTMCell else h
    moments = seen_by(kind(3, 4), x, state)
    torch.testing.assert_close(moments.moment("weight_ih"), moment(x.reshape(-1, 3)))
    torch.testing.assert_close(moments.moment("weight_hh"), moment(h.reshape(-1, 4)))


def test_gradients_and_results_are_as_without() -> None:
    torch.manual_seed(0)
    layer, x = nn.LSTM(3, 4, num_layers=2), torch.randn(5, 2, 3)
    plain = layer(x)[0]
    with InputMoments(dict(layer.named_parameters())):
        watched = layer(x)[0]
    assert torch.equal(watched, plain)
    grads = [torch.autograd.grad(y.sum(), list(layer.parameters())) for y in (plain, watched)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
