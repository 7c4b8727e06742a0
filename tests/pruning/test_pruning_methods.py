from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nna.callbacks import (
    CompressedSensingPruning,
    CompressionReport,
    GeneralQuantizer,
    HardCompression,
    L1Pruning,
    LotteryTicketPruning,
    MagnitudePruning,
    NNAEmulation,
    RandomPruning,
)
from lightning_nna.emulation.weight_grids import on_grid
from lightning_nna.pruning.pruning_method import PruningMethod
from lightning_nna.pruning.zero_prices import prices_of_zeros
from lightning_nna.schedule import Schedule
from lightning_nna.testing import SmallRecurrentModule
from lightning_nna.testing.contract import CHECKS, assert_same, module, trainer
from lightning_nna.weights.pipeline import pipeline_of

# Runs are stopped long before their schedules end; test_runs.py has the warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*missed its target")

#: In steps: a run that stops early has another length.
RAMP: dict[str, Any] = {
    "schedule": Schedule(0.0, 1.0, until=8, shape="cubic"),
    "every_n_steps": 2,
    "freeze_step": 10,
}
METHODS: dict[str, Callable[..., PruningMethod]] = {
    "csp": CompressedSensingPruning,
    "magnitude": MagnitudePruning,
    "random": RandomPruning,
    "l1": L1Pruning,
    "lottery": LotteryTicketPruning,
}


def made(method: str, sparsity: float = 0.75, **settings: Any) -> PruningMethod:
    return METHODS[method](sparsity, **(RAMP | settings))


def zeros(parameter: Tensor) -> float:
    return float((parameter == 0).float().mean())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_contract(method: str, check: Callable[..., None], tmp_path: Path) -> None:
    check(lambda: made(method), tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_is_absolute_and_exact(method: str) -> None:
    fitted = module()
    callback = made(method, overrides={"head.first": 0.5}, exclude=["head.second"])
    trainer(callback).fit(fitted)
    for name in callback.selected:
        wanted = 0.5 if name.startswith("head.first") else 0.75
        assert zeros(fitted.get_parameter(name)) == wanted
    assert zeros(fitted.head.second.weight) == 0
    assert "head.second.weight" not in callback.selected


def test_the_share_follows_the_schedule() -> None:
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(round(callback.sparsity, 4))

    callback = made("magnitude", schedule={"start": 0.0, "end": 1.0, "until": 8})
    trainer(Watch(), callback).fit(module())
    assert seen[1::2][:4] == pytest.approx([0.1875, 0.375, 0.5625, 0.75], abs=0.01)
    assert seen[8:] == [0.75] * len(seen[8:])


@pytest.mark.parametrize(
    ("every", "freeze", "expected"),
    [(10, 36, [10, 20, 30, 36]), (10, 34, [10, 20, 34]), (10, 30, [10, 20, 30]), (10, 4, [4])],
)
def test_the_last_choice_is_at_freezing_and_none_is_just_before(
    every: int, freeze: int, expected: list[int]
) -> None:
    class Noting(MagnitudePruning):
        def select_mask(self, name: str, weight: Tensor, sparsity: float) -> Tensor:
            chosen_at.append(self.steps)
            return super().select_mask(name, weight, sparsity)

    chosen_at: list[int] = []
    prune = Noting(0.5, every_n_steps=every, freeze_step=freeze, targets=["head.first.weight"])
    trainer(prune, max_steps=40).fit(SmallRecurrentModule())
    assert chosen_at == expected


@pytest.mark.parametrize("pattern", ["2:4", "1x4", "row"])
def test_patterns(pattern: str) -> None:
    fitted, callback = module(), made("csp", 0.5, pattern=pattern, targets=["lstm"])
    trainer(callback).fit(fitted)
    weight = fitted.lstm.weight_hh_l0.detach()
    groups = (weight != 0).view(-1, weight.shape[1] if pattern == "row" else 4).sum(1)
    full = weight.shape[1] if pattern == "row" else 4
    expected = {2} if pattern == "2:4" else {0, full}
    assert set(groups.tolist()) == expected
    assert zeros(weight) == 0.5


class Convolutions(SmallRecurrentModule):
    """Convolutions of every kind; the first two inputs of ``one`` rest."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(4, 8, 3, padding=1), nn.Conv2d(8, 8, (3, 1), padding=(1, 0))
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(8, 4, 3, padding=1, groups=2)
        self.depthwise = nn.Conv1d(4, 4, 3, padding=1, groups=4)
        self.kernel = nn.Parameter(torch.randn(4, 4, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        resting = torch.tensor([0.0, 0.0, 1.0, 1.0])
        y = self.two(self.one(x * resting[:, None])[..., None])[..., 0]
        x = x + self.depthwise(self.up(self.grouped(y)))
        x = nn.functional.conv2d(x[:, :, None], self.kernel, padding=(0, 1))[:, :, 0]
        return super().forward(x.transpose(1, 2))


@pytest.mark.parametrize("method", ["csp", "magnitude", "random"])
def test_n_of_m_are_input_channels_at_one_place_of_a_kernel(method: str) -> None:
    torch.manual_seed(0)
    fitted = Convolutions()
    callback = made(method, 0.5, pattern="2:4", exclude=["depthwise"])
    trainer(callback).fit(fitted)
    # (out, in / groups, *places): whatever the output and the place, two of four inputs stay.
    for weight in (
        *(fitted.one.weight, fitted.two.weight, fitted.grouped.weight, fitted.kernel),
        *(fitted.lstm.weight_ih_l0, fitted.lstm.weight_hh_l0, fitted.head.first.weight),
    ):
        kept = (weight != 0).unflatten(1, (-1, 4)).sum(2)
        assert bool((kept == 2).all())
    kept = (fitted.up.weight != 0).unflatten(0, (-1, 4)).sum(1)  # (in, out / groups, place)
    assert bool((kept == 2).all())


def test_the_error_of_a_kernel_is_measured_on_its_own_inputs() -> None:
    torch.manual_seed(0)
    fitted = Convolutions()
    trainer(made("csp", 0.5, pattern="2:4", targets=["one"])).fit(fitted)
    assert bool((fitted.one.weight[:, :2] == 0).all())  # What nothing ever reaches goes.
    assert bool((fitted.one.weight[:, 2:] != 0).all())


def test_columns_of_a_block_are_input_channels() -> None:
    torch.manual_seed(0)
    fitted = Convolutions()
    trainer(made("magnitude", 0.5, pattern="1x4", targets=["two", "grouped"])).fit(fitted)
    for weight in (fitted.two.weight, fitted.grouped.weight):
        kept = (weight != 0).unflatten(1, (-1, 4)).sum(2)
        assert set(kept.unique().tolist()) == {0, 4}
        assert zeros(weight) == 0.5


def test_kernels_that_a_pattern_does_not_divide_are_all_named() -> None:
    message = (
        r"'2:8' does not divide .*one\.weight \(8 rows of 4 input channels\), grouped\.weight "
        r"\(8 rows of 4 .*depthwise\.weight \(4 rows of 1 input channels\)"
    )
    with pytest.raises(ValueError, match=message):
        trainer(made("magnitude", 0.5, pattern="2:8")).fit(Convolutions())


def test_a_global_budget_takes_from_layers_that_can_spare() -> None:
    fitted = module()
    with torch.no_grad():
        fitted.head.first.weight[: fitted.head.first.weight.shape[0] // 2] *= 1e-3
    callback = made("magnitude", 0.5, scope="global", schedule=1.0, every_n_steps=1)
    trainer(callback, steps=11).fit(fitted)
    assert callback.sparsity == pytest.approx(0.5, abs=0.01)
    shares = {name: transform.sparsity for name, transform in callback.masks.items()}
    assert shares["head.first.weight"] == max(shares.values()) > 0.5


def priced(callback: PruningMethod, prices: dict[str, float]) -> tuple[dict[str, float], float]:
    """Train, and return zeros by name and the fraction of the price that they save."""
    fitted = module()
    trainer(callback).fit(fitted)
    fractions = {name: zeros(fitted.get_parameter(name)) for name in callback.selected}
    sizes = {name: fitted.get_parameter(name).numel() for name in callback.selected}
    saved = sum(fractions[name] * sizes[name] * prices[name] for name in fractions)
    return fractions, saved / sum(sizes[name] * prices[name] for name in fractions)


@pytest.mark.parametrize("method", ["csp", "magnitude"])
def test_a_price_moves_the_zeros_to_where_they_save(method: str, tmp_path: Path) -> None:
    names = made(method, scope="global")
    trainer(names).fit(module())
    prices = {name: 8.0 if "lstm" in name else 1.0 for name in names.selected}
    equal, _ = priced(made(method, scope="global", prices={"*": 3.0}), dict.fromkeys(prices, 1.0))
    plain, _ = priced(made(method, scope="global"), dict.fromkeys(prices, 1.0))
    assert equal == plain
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(prices))
    fractions, saved = priced(made(method, scope="global", prices=path), prices)
    assert saved == pytest.approx(0.75, abs=0.02)
    assert fractions != plain
    free = dict.fromkeys(prices, 1.0) | {names.selected[0]: 0.0}
    fractions, saved = priced(made(method, scope="global", prices=free), free)
    assert fractions[names.selected[0]] == 0.0
    assert saved == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prices": {"*": 1.0}}, "prices share a budget, and scope='layer'"),
        ({"prices": {"*": -1.0}, "scope": "global"}, r"prices\['\*'\] must not be negative"),
    ],
)
def test_prices_that_are_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made("magnitude", **settings)


@pytest.mark.parametrize(
    ("prices", "message"),
    [
        ({"lstm": 1.0}, "prices has none for head"),
        ({"*": 1.0, "nowhere": 1.0}, "'nowhere', which matches no weight; there are: "),
        ({"*": 0.0}, "no zero saves anything"),
    ],
)
def test_prices_that_do_not_fit_the_module(prices: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(made("magnitude", scope="global", prices=prices)).fit(module())


def test_a_price_that_is_missed_is_told() -> None:
    callback = made("magnitude", scope="global", prices={"*": 1.0}, freeze_step=4)
    with pytest.warns(UserWarning, match=r"missed its target: zeros save .* of the prices, not"):
        trainer(callback).fit(module())


class Blocks:
    """A closed form: bytes of blocks of four, and a surcharge for a weight with any zero."""

    unit = "bytes"

    def __init__(self, surcharge: str = "") -> None:
        self.surcharge = surcharge

    def __call__(self, name: str, weight: Tensor, grid: Any = None) -> float:
        blocks = weight.reshape(-1, 4).any(1).sum()
        dear = 100.0 * weight.numel() * bool((weight == 0).any()) * (name == self.surcharge)
        return 4.0 * float(blocks) + dear


def test_prices_of_zeros_are_what_they_save() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    before = copy.deepcopy(net.state_dict())
    assert prices_of_zeros(net, Blocks(), 0.5, pattern="1x4") == {"0.weight": 1.0, "1.weight": 1.0}
    anywhere = prices_of_zeros(net, Blocks(), 0.5)
    assert all(0 <= price < 0.5 for price in anywhere.values())
    assert list(prices_of_zeros(net, Blocks(), 0.5, exclude=["0"])) == ["1.weight"]
    with pytest.warns(UserWarning, match=r"'1x4' make these dearer, in bytes: 1.weight \(32 ->"):
        dear = prices_of_zeros(net, Blocks("1.weight"), 0.5, pattern="1x4")
    assert dear == {"0.weight": 1.0, "1.weight": 0.0}
    assert all(torch.equal(before[name], x) for name, x in net.state_dict().items())
    with pytest.raises(ValueError, match="sparsity must be above 0 and below 1, got 0"):
        prices_of_zeros(net, Blocks(), 0.0)


def test_zeroed_weights_may_return_until_masks_freeze() -> None:
    masks = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            masks.append({n: transform.mask.clone() for n, transform in callback.masks.items()})

    callback = made("csp", 0.5, schedule=1.0, freeze_step=20)
    trainer(callback, Watch(), steps=30).fit(SmallRecurrentModule(learning_rate=0.05))
    returned = [
        any(bool((after[n] & ~before[n]).any()) for n in after)
        for before, after in itertools.pairwise(masks)
    ]
    assert any(returned[3:19])
    assert not any(returned[20:])


def test_a_layer_waits_while_its_error_would_be_too_large() -> None:
    strict = made("csp", 0.9, most_nmse=1e-3)
    trainer(strict).fit(module())
    free = made("csp", 0.9)
    trainer(free).fit(module())
    assert strict.sparsity < 0.6 < free.sparsity
    assert max(strict.metrics()["nmse_max"], 1e-3) > 1e-3


def test_the_fit_of_survivors_makes_up_for_what_goes() -> None:
    torch.manual_seed(0)
    data = torch.randn(256, 16) @ torch.randn(16, 16)
    errors = {}
    for method, settings in (("csp", {}), ("csp_plain", {"refit": False}), ("magnitude", {})):
        layer = Still(data)
        kind = METHODS[method.split("_")[0]]
        callback = kind(0.5, schedule=1.0, every_n_steps=4, freeze_step=4, **settings)
        trainer(callback, steps=4).fit(layer)
        with torch.no_grad():
            errors[method] = float((layer.layer(data) - layer.target).square().mean())
    assert errors["csp"] < 0.5 * errors["csp_plain"]
    assert errors["csp_plain"] < errors["magnitude"]


class Still(pl.LightningModule):
    """One layer that does not learn."""

    def __init__(self, data: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16, bias=False)
        self.data, self.target = data, self.layer(data).detach()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return (self.layer(batch) * 0).sum()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.data, batch_size=64)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TwoOutputs(pl.LightningModule):
    """Two layers of one output each, on the same inputs; the loss takes one a hundred times."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(32, 1, bias=False), nn.Linear(32, 1, bias=False)
        self.quiet.load_state_dict(self.loud.state_dict())
        self.both = nn.Linear(32, 2, bias=False)
        self.both.weight.data[1] = self.both.weight.data[0]
        generator = torch.Generator().manual_seed(0)
        self.data = torch.randn(512, 32, generator=generator)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loud, quiet = self.both(batch).unbind(1)
        many = 10 * (self.loud(batch)[:, 0] + loud) + 0.1 * (self.quiet(batch)[:, 0] + quiet)
        return (many + torch.randn_like(many)).square().mean()

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, batch_size=64)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-12)


def kept_by_output(**settings: Any) -> dict[str, int]:
    """Weights that a prune of half leaves to each output of :class:`TwoOutputs`."""
    torch.manual_seed(0)
    fitted = TwoOutputs()
    prune = CompressedSensingPruning(0.5, schedule=1.0, every_n_steps=4, freeze_step=4, **settings)
    trainer(prune, steps=8).fit(fitted)
    tensors = {"loud": fitted.loud.weight, "quiet": fitted.quiet.weight}
    tensors |= dict(zip(("loud row", "quiet row"), fitted.both.weight, strict=True))
    return {name: int((x != 0).sum()) for name, x in tensors.items()}


def test_errors_count_what_they_cost_the_loss() -> None:
    """An error of the one output costs ten thousand times that of the other."""
    rows = {"loud row": 32, "quiet row": 0}
    assert kept_by_output() == {"loud": 16, "quiet": 16, **rows}
    shared = kept_by_output(scope="global")
    assert sum(shared.values()) == 64
    assert shared["quiet"] + shared["quiet row"] <= 1
    assert kept_by_output(weighting="equal") == dict.fromkeys(("loud", "quiet", *rows), 16)


@pytest.mark.filterwarnings("ignore:.*pruned weights are zero")
@pytest.mark.parametrize("quantizer", ["gq", "s8bqat"])
def test_it_composes_with_few_bits_and_the_chip_in_any_order(quantizer: str) -> None:
    def callbacks() -> list[pl.Callback]:
        few = (
            GeneralQuantizer(2, hard_from=0, sharpness=8.0)
            if quantizer == "gq"
            else HardCompression(2, every_n_steps=3)
        )
        return [NNAEmulation(calibration_steps=2), made("csp"), few]

    states = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        fitted, held = module(), callbacks()
        trainer(*(held[place] for place in order)).fit(fitted)
        states.append(fitted.state_dict())
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])
    weight = states[0]["lstm.weight_hh_l0"]
    assert zeros(weight) >= 0.75
    assert len(weight[weight != 0].unique()) <= 4


def test_masks_are_on_the_chip() -> None:
    fitted, chip = module(), NNAEmulation(calibration_steps=2)
    trainer(made("csp"), chip).fit(fitted)
    weight = fitted.head.first.weight
    quantized = on_grid(pipeline_of(fitted), weight, 1, chip.emulator.spec)
    assert zeros(weight) == zeros(fitted.lstm.weight_ih_l0) == 0.75
    assert not quantized.stored[weight == 0].any()
    # What is left is an integer of its own, unless it lies within half a step of zero.
    steps = weight.detach().abs() / quantized.scales[:, None]
    assert torch.equal(quantized.stored != 0, steps >= 0.5)


def test_lightnings_own_pruning_compounds_and_skips_what_ours_prunes() -> None:
    """Of `ModelPruning(amount=0.5)`: LSTM weights stay dense, and amounts compound."""
    theirs = module()
    trainer(ModelPruning("l1_unstructured", amount=0.5), steps=8).fit(theirs)
    assert zeros(theirs.lstm.weight_hh_l0) == 0
    compounded = module()
    trainer(
        ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False), steps=24
    ).fit(compounded)
    assert zeros(compounded.head.first.weight) > 0.8
    ours = module()
    trainer(MagnitudePruning(0.5, **RAMP), steps=24).fit(ours)
    assert zeros(ours.lstm.weight_hh_l0) == zeros(ours.head.first.weight) == 0.5


def test_lightnings_own_pruning_is_gone_after_a_resume_and_ours_is_not(tmp_path: Path) -> None:
    once = {"amount": 0.5, "apply_pruning": lambda epoch: epoch == 0}
    ended = {}
    for name, make in {
        "theirs": lambda: ModelPruning("l1_unstructured", **once),
        "ours": lambda: MagnitudePruning(0.5, schedule=1.0, every_n_steps=8, freeze_step=8),
    }.items():
        stopped = trainer(make(), steps=8)
        stopped.fit(module())
        stopped.save_checkpoint(tmp_path / f"{name}.ckpt")
        ended[name] = module()
        trainer(make(), steps=24).fit(ended[name], ckpt_path=tmp_path / f"{name}.ckpt")
    assert zeros(ended["theirs"].head.first.weight) == 0
    assert zeros(ended["ours"].head.first.weight) == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1, got 1.0"),
        ({"overrides": {"lstm": -0.5}}, r"overrides\['lstm'\] must be at least 0"),
        ({"pattern": "3:2"}, "N is over M"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1"),
        ({"freeze_step": 1.5}, "freeze_step is a fraction"),
        ({"scope": "all"}, "scope must be 'layer' or 'global'"),
        ({"scope": "global", "pattern": "2:4"}, "set scope='layer'"),
        ({"weighting": "hessian"}, "got 'hessian'"),
        ({"schedule": {"start": 1.0, "end": 0.0}}, "schedule must rise"),
        ({"schedule": {"start": 0.0, "end": 1.0, "begin": 9, "until": 3}}, "ends before it begins"),
        ({"measurement": "guess"}, "got 'guess'"),
        ({"measure_steps": 0}, "measure_steps and most_columns must be at least 1"),
        ({"most_nmse": 0.0}, "most_nmse must be positive"),
    ],
)
def test_wrong_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressedSensingPruning(**({"sparsity": 0.5} | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pattern": "1x5", "targets": ["*_ih_l0", "head.first"]},
            r"'1x5' does not divide lstm\.weight_ih_l0 \(32 rows of 4 weights\), "
            r"head\.first\.weight \(8 rows of 8 weights\): exclude",
        ),
        ({"targets": ["decoder"]}, "decoder"),
        ({"exclude": ["decoder"]}, "decoder"),
        ({"most_columns": 2}, "more than most_columns=2"),
    ],
)
def test_what_does_not_fit_the_module(settings: dict[str, Any], message: str) -> None:
    fitted = module()
    before = {name: x.clone() for name, x in fitted.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        trainer(CompressedSensingPruning(0.5, **settings), steps=2).fit(fitted)
    assert_same(dict(fitted.state_dict()), before)


class Unseen(SmallRecurrentModule):
    """Weights that are used in ways whose inputs cannot be seen, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.pos_embedding = nn.Parameter(torch.randn(1, 6, 4))
        self.lora_a, self.lora_b = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.product, self.idle = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)
        self.up = nn.Parameter(torch.randn(4, 4, 3))
        self.rows = nn.Embedding(6, 4)
        self.cells = nn.ModuleList([nn.LSTMCell(4, 4), nn.GRUCell(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token + self.pos_embedding + self.rows(torch.arange(6))
        x = x + x @ self.lora_a.T @ self.lora_b.T
        x = nn.functional.conv_transpose1d(x.mT, self.up, padding=1).mT
        first = torch.addmm(self.cells[0](x[:, 0])[0], self.cells[1](x[:, 0]), self.product)
        return super().forward(x + first[:, None])


@pytest.mark.parametrize("settings", [{}, {"scope": "global"}], ids=["layer", "global"])
def test_what_cannot_be_measured_is_measured_by_the_identity(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    fitted, callback = Unseen(), made("csp", **settings)
    token, positions = fitted.token.detach().clone(), fitted.pos_embedding.detach().clone()
    names = r"lora_a, lora_b, product, up, idle\.weight in the last 8 steps"
    with pytest.warns(UserWarning, match=f"saw no inputs of {names}") as caught:
        trainer(callback).fit(fitted)
    assert sum("saw no inputs" in str(each.message) for each in caught) == 1
    assert callback.sparsity == pytest.approx(0.75, abs=0.01)
    # Nothing is known of what idle weights cost: they have their own share.
    assert zeros(fitted.idle.weight) == pytest.approx(0.75)
    for now, before in ((fitted.token, token), (fitted.pos_embedding, positions)):
        assert bool((now != 0).all())
        assert not torch.equal(now, before)  # Trained, and not pruned.


@pytest.mark.parametrize("method", METHODS)
def test_frozen_layers_are_left_alone(method: str) -> None:
    fitted = module()
    fitted.lstm.requires_grad_(False)
    before = copy.deepcopy(dict(fitted.lstm.state_dict()))
    callback = made(method, scope="global")
    trainer(callback).fit(fitted)
    assert_same(dict(fitted.lstm.state_dict()), before)
    assert callback.selected == [n for n, p in fitted.head.named_parameters("head") if p.ndim == 2]
    assert callback.sparsity == pytest.approx(0.75, abs=0.02)


def test_a_frozen_layer_that_is_named_has_a_share_of_its_own() -> None:
    """No gradient says what its errors cost: in one budget the others would lose nearly all."""
    fitted = module()
    fitted.lstm.requires_grad_(False)
    callback = made("csp", scope="global", targets=["lstm", "head"])
    trainer(callback).fit(fitted)
    for name, parameter in fitted.lstm.named_parameters():
        assert zeros(parameter) == pytest.approx(0.75 * name.startswith("weight"), abs=0.02)
    held = [p for p in fitted.head.parameters() if p.ndim == 2]
    lost = sum(int((p == 0).sum()) for p in held) / sum(p.numel() for p in held)
    assert lost == pytest.approx(0.75, abs=0.02)


def test_a_layer_that_is_thawed_later_is_warned_of_and_stays_alone_on_resume(
    tmp_path: Path,
) -> None:
    class Thaw(pl.Callback):
        def on_train_batch_start(self, run: pl.Trainer, fitted: Any, *_: Any) -> None:
            fitted.lstm.requires_grad_(run.global_step >= 4)

    def frozen() -> SmallRecurrentModule:
        fitted = module()
        fitted.lstm.requires_grad_(False)
        return fitted

    first, again = made("magnitude"), made("magnitude")
    message = r"lstm\.weight_ih_l0, lstm\.weight_hh_l0.* was frozen when the run began"
    run = trainer(first, Thaw(), steps=6)
    with pytest.warns(UserWarning, match=message):
        run.fit(frozen())
    run.save_checkpoint(tmp_path / "6.ckpt")
    thawed = module()
    with pytest.warns(UserWarning, match=message):
        trainer(again, Thaw(), steps=12).fit(thawed, ckpt_path=tmp_path / "6.ckpt")
    assert again.selected == first.selected
    assert zeros(thawed.lstm.weight_hh_l0) == 0


def test_a_network_that_is_run_by_another_method_than_its_forward() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

        def transcribe(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    class Speech(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Encoder()

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            return self.model.transcribe(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self) -> DataLoader[torch.Tensor]:
            return DataLoader(torch.randn(128, 4), batch_size=8)

    fitted = Speech()
    trainer(CompressedSensingPruning(0.5, every_n_steps=2)).fit(fitted)
    assert float((fitted.model.inner[0].weight == 0).float().mean()) == 0.5


def test_weights_that_are_not_finite() -> None:
    fitted = module()
    with torch.no_grad():
        fitted.head.first.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"head\.first\.weight"):
        trainer(made("magnitude"), steps=2).fit(fitted)


@pytest.mark.filterwarnings("ignore:.*pruned weights are zero")
def test_the_report_knows_of_masks(tmp_path: Path) -> None:
    watch = CompressionReport(tmp_path, figures=False)
    fitted = module()
    trainer(made("csp"), GeneralQuantizer(3, hard_from=0, sharpness=8.0), watch).fit(fitted)
    for tensor in watch.snapshots[-1].tensors:
        assert tensor.values == len(fitted.get_parameter(tensor.name).unique())
