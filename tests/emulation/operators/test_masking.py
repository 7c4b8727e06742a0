"""Attention as models write it by hand: masks hide what they mask, and LiteRT agrees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate, emulate
from lightning_nna.emulation.coverage import coverage
from lightning_nna.testing.operator_oracle import CHECKS, Check, Example, check_operator
from lightning_nna.testing.replay import replays
from tests.emulation.modules import Function

TIME = 24
BEFORE = torch.ones(TIME, TIME, dtype=torch.bool).tril()
ADDED = torch.zeros(TIME, TIME).masked_fill(~BEFORE, torch.finfo(torch.float32).min)
SLOPED = (torch.arange(TIME) - torch.arange(TIME)[:, None]).mul(0.1).where(BEFORE, -torch.inf)

MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "filled": lambda scores: scores.masked_fill(~BEFORE, float("-inf")),
    "filled in place": lambda scores: scores.masked_fill_(~BEFORE, -1e9),
    "filled with a tensor": lambda scores: scores.masked_fill(~BEFORE, torch.tensor(-1e4)),
    "chosen": lambda scores: torch.where(BEFORE, scores, torch.tensor(-torch.inf)),
    "chosen otherwise": lambda scores: torch.where(~BEFORE, -1e30, scores),
    "added": lambda scores: scores + ADDED,
    "added to": lambda scores: ADDED + scores,
    "sloped": lambda scores: scores + SLOPED,
}


class Written(nn.Module):
    """Self-attention with a mask of one's own."""

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.project, self.mask = nn.Linear(32, 96), mask

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).view(*x.shape[:2], 3, 4, 8)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        weights = F.softmax(self.mask(query @ key.transpose(-2, -1) / 8**0.5), dim=-1)
        return (weights @ value).transpose(1, 2).flatten(2)


def module_of(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Written(MASKS[name]), torch.randn(6, TIME, 32)


PADDED = torch.arange(TIME) >= TIME - 3
TWICE: dict[str, Callable[[Tensor], Tensor]] = {
    "filled twice": lambda scores: scores.masked_fill(~BEFORE, -1e8).masked_fill(PADDED, -1e8),
    "added, then filled": lambda scores: (scores + ADDED).masked_fill(PADDED, -torch.inf),
    "filled, then added": lambda scores: scores.masked_fill(PADDED, -torch.inf) + SLOPED,
}


@pytest.mark.exactness
@pytest.mark.parametrize("name", TWICE)
def test_a_second_mask_observes_the_scores_that_the_first_one_leaves(name: str) -> None:
    torch.manual_seed(0)
    module, x = Written(TWICE[name]), torch.randn(6, TIME, 32)
    expected = module(x)
    compared = replays(module, x, inputs=[2 * x], spec="litert-int8")
    assert compared["SELECT_V2"] == 2 * 6 * 4 * TIME**2
    with emulate(module), torch.no_grad():
        assert float((module(x) - expected).abs().mean()) < 0.01


@pytest.mark.exactness
@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
@pytest.mark.parametrize("name", MASKS)
def test_every_output_is_the_references(name: str, spec: str) -> None:
    module, x = module_of(name)
    compared = replays(module, x, inputs=[2 * x], spec=spec)
    assert compared["SELECT_V2"] == 6 * 4 * TIME**2
    assert ("ADD" in compared) == (name == "sloped")
    assert not coverage(module_of(name)[0], x, spec=spec).fallbacks


@pytest.mark.parametrize("name", MASKS)
def test_it_is_near_the_float_result(name: str) -> None:
    module, x = module_of(name)
    with torch.no_grad():
        expected = module(x)
        with emulate(module) as chip:
            with chip.observing():
                module(x)
            found = module(x)
    assert float((found - expected).abs().mean()) < 0.01


@pytest.mark.parametrize("name", MASKS)
def test_nothing_sees_what_comes_after_it(name: str) -> None:
    module, x = module_of(name)
    with torch.no_grad(), emulate(module) as chip:
        with chip.observing():
            module(x)
        before = module(x)
        x[:, TIME // 2 :] = 0.5
        after = module(x)
    assert torch.equal(before[:, : TIME // 2], after[:, : TIME // 2])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", ["filled", "chosen", "sloped"])
def test_the_gradient_is_near_the_float_one(name: str) -> None:
    module, x = module_of(name)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(module(x).square().sum(), list(module.parameters())))

    expected = gradients()
    with emulate(module) as chip:
        with chip.observing():
            module(1.1 * x)
        found = gradients()
    for mine, reference in zip(found, expected, strict=True):
        assert float(F.cosine_similarity(mine.flatten(), reference.flatten(), 0)) > 0.99


def test_a_batch_without_padding_where_calibration_saw_some(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Padded(nn.Module):
        def forward(self, scores: Tensor, padding: Tensor) -> Tensor:
            return torch.softmax(torch.relu(scores) + padding, -1)

    module, scores = Padded(), torch.randn(4, 10)
    padding = torch.tensor([0.0] * 8 + [-1e9] * 2)
    with emulate(module) as chip:
        with chip.observing():
            module(scores, padding)
        module(scores, torch.zeros(10))
        assert torch.equal(module(scores, padding)[:, 8:], torch.zeros(4, 2))
    assert not caplog.records


def test_masks_themselves_stay_in_float() -> None:
    class Building(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros_like(x).masked_fill(x > 0, -torch.inf)
            assert torch.equal(mask, torch.tensor([0.0, -torch.inf]))
            return torch.relu(x)

    module, x = Building(), torch.tensor([-128, 127]) / 64
    with emulate(module) as chip:
        with chip.observing():
            module(x)
        assert torch.equal(module(x), torch.relu(x))


def test_data_of_a_large_range_are_no_mask() -> None:
    class Residual(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.relu(x)

    torch.manual_seed(0)
    module, x = Residual(), 2e4 * torch.randn(1000)
    with emulate(module) as chip:
        with chip.observing():
            module(x)
        assert torch.allclose(module(x), x + torch.relu(x), rtol=0, atol=1e3)


def test_a_finite_choice_is_no_mask() -> None:
    module, x = Choosing(), torch.tensor([-128, 127]) / 64
    with emulate(module) as chip:
        with chip.observing():
            module(x)
        assert module(x).tolist() == [0.5, 127 / 64]


class Choosing(nn.Module):
    """``where`` with a number that is on no grid."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, torch.relu(x), 0.5)


ROWS, SQUARE = (120, 100), ((120, 100), (120, 100))
CONDITION = torch.arange(100) % 3 == 0
CHOICES = [
    Example(lambda: Function(lambda a, b: torch.where(CONDITION, a.tanh(), 2 * b)), SQUARE),
    Example(lambda: Function(lambda x: (x * 2).masked_fill(CONDITION, 0.3)), (ROWS,)),
    Example(lambda: Function(lambda x: torch.where(CONDITION[:, None], 0.5, x.T)), (ROWS,)),
]


@pytest.mark.exactness
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", CHOICES)
def test_oracle(example: Example, check: Check) -> None:
    check_operator("select", [example], checks=[check], runtime="litert")


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_a_number_that_fits_requantizes_nothing(spec: str) -> None:
    net = Function(lambda x: torch.where(CONDITION, torch.sigmoid(x), 0.0))
    compared = replays(net, torch.randn(4, 100), spec=spec)
    assert compared == {"QUANTIZE": 400, "LOGISTIC": 400, "SELECT_V2": 400}


def test_a_number_beyond_all_is_an_end_of_the_range() -> None:
    lowest = torch.finfo(torch.float32).min
    net, x = Function(lambda x: torch.where(CONDITION, torch.relu(x), -lowest)), torch.randn(4, 100)
    calibrate(net, [x])
    with emulate(net), torch.no_grad():
        y = net(x)
    assert float(y.max()) < 10
    assert torch.equal(y[:, ~CONDITION], y.max().expand(4, 66))


@pytest.mark.parametrize("lowest", [-1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_a_float_mask_of_an_argument_leaves_scores_out(lowest: float, spec: str) -> None:
    def function(scores: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(scores * 1.1 + (1.0 - mask) * lowest, -1)

    net, scores = Function(function), torch.randn(6, 10)
    mask = (torch.arange(10) < torch.arange(5, 11)[:, None]).float()
    calibrate(net, [[scores, mask]], forward=lambda net, batch: net(*batch), spec=spec)
    with emulate(net, spec), torch.no_grad():
        assert float((net(scores, mask) - function(scores, mask)).abs().max()) < 0.02
