from __future__ import annotations

import copy
import logging
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode

from lightning_nna import calibrate, emulate, strip
from lightning_nna.callbacks import NNAEmulation
from lightning_nna.emulation.attachment import attached
from lightning_nna.testing import SmallRecurrentModule
from lightning_nna.testing.contract import (
    CHECKS,
    _SaveState,
    accumulation_counts_optimizer_steps,
    assert_same,
    averaged_weights_are_evaluated,
    checkpointed_activations_change_nothing,
    copies_carry_on,
    is_unhooked,
    module,
    own_process_group,
    resume_equals_uninterrupted,
    resume_with_dropout,
    resume_within_calibration,
    runs_under_bf16_mixed,
    trainer,
    two_processes,
    two_processes_agree,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[..., None], tmp_path: Path) -> None:
    check(lambda: NNAEmulation(calibration_steps=2), tmp_path)


@pytest.mark.parametrize("check", [resume_within_calibration, two_processes_agree])
def test_contract_with_a_margin(check: Callable[..., None], tmp_path: Path) -> None:
    check(lambda: NNAEmulation(calibration_steps=2, range_margin=0.25), tmp_path)


@pytest.mark.parametrize(
    "check",
    [
        accumulation_counts_optimizer_steps,
        averaged_weights_are_evaluated,
        checkpointed_activations_change_nothing,
        resume_equals_uninterrupted,
        resume_with_dropout,
        runs_under_bf16_mixed,
    ],
    ids=lambda check: check.__name__,
)
def test_contract_of_fast_fidelity(check: Callable[..., None], tmp_path: Path) -> None:
    """Run the checks that depend on the arithmetic of training."""
    check(lambda: NNAEmulation(calibration_steps=2, fidelity="fast"), tmp_path)


def _has_bfloat16_lstm() -> bool:
    """Tell whether oneDNN has the layer on this processor; PyTorch itself cannot train it."""
    with torch.autocast("cpu", torch.bfloat16):
        try:
            nn.LSTM(4, 8)(torch.zeros(2, 1, 4))[0].sum().backward()
        except RuntimeError:
            return False
    return True


@pytest.mark.skipif(not _has_bfloat16_lstm(), reason="this processor has no LSTM in bfloat16")
@pytest.mark.parametrize("fidelity", ["exact", "fast"])
def test_an_lstm_trains_under_bf16_mixed(fidelity: str) -> None:
    mixed = module()
    before = {name: value.clone() for name, value in mixed.state_dict().items()}
    callback = NNAEmulation(calibration_steps=2, fidelity=fidelity)  # type: ignore[arg-type]
    trainer(callback, precision="bf16-mixed").fit(mixed)
    for name, value in mixed.state_dict().items():
        assert value.dtype == torch.float32
        assert bool(torch.isfinite(value).all())
        assert not torch.equal(value, before[name])


def test_the_contract_notices_a_callback_that_loses_its_state(tmp_path: Path) -> None:
    class Forgetful(NNAEmulation):
        def load_state_dict(self, state_dict: dict[str, object]) -> None:
            """Lose everything."""

    with pytest.raises(AssertionError):
        resume_equals_uninterrupted(lambda: Forgetful(calibration_steps=2), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration_steps": -1}, "calibration_steps must be at least 0, got -1"),
        ({"range_margin": -0.5}, "range_margin must be at least 0 and finite, got -0.5"),
        ({"range_margin": math.inf}, "range_margin must be at least 0 and finite, got inf"),
        ({"fidelity": "rough"}, "fidelity must be 'exact' or 'fast', got 'rough'"),
        ({"spec": "int7"}, "'int7' is neither a preset"),
    ],
)
def test_wrong_arguments_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NNAEmulation(**settings)


def test_a_target_that_matches_nothing_raises() -> None:
    with pytest.raises(ValueError, match="pattern 'decoder' matches no module"):
        trainer(NNAEmulation(targets=["decoder"])).fit(module())


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_without_ranges_says_what_to_do(stage: str) -> None:
    run = trainer(NNAEmulation())
    recognizer = module()
    with pytest.raises(RuntimeError, match=r"needs ranges.*calibrate\(module"):
        getattr(run, stage)(recognizer, recognizer.test_dataloader())


def test_a_fit_shorter_than_its_calibration_is_evaluated_with_what_it_saw() -> None:
    recognizer, chip = module(), NNAEmulation(calibration_steps=100)
    with pytest.warns(UserWarning, match=r"0 of 3 optimizer steps .* calibration_steps=100 steps"):
        trainer(chip, steps=3).fit(recognizer)
    assert not chip.emulator.calibrated
    trainer(chip).test(recognizer, verbose=False)
    assert chip.emulator.calibrated


def test_no_calibration_steps_and_no_ranges() -> None:
    with pytest.raises(RuntimeError, match="calibration_steps=0, and no ranges"):
        trainer(NNAEmulation(calibration_steps=0)).fit(module())


def test_calibrated_beforehand_it_evaluates_on_the_chip() -> None:
    recognizer = module()
    (plain,) = trainer().test(recognizer, verbose=False)
    calibrate(recognizer, recognizer.train_dataloader(), lambda net, batch: net(batch[0]))
    (chip,) = trainer(NNAEmulation()).test(recognizer, verbose=False)
    assert chip["test/loss"] != plain["test/loss"]
    assert chip["test/loss"] == pytest.approx(plain["test/loss"], rel=0.05)
    trainer(NNAEmulation(calibration_steps=0)).fit(recognizer)


def test_selected_modules_alone_are_emulated() -> None:
    recognizer = module()
    chip = NNAEmulation(targets=["head"], calibration_steps=1)
    trainer(chip, steps=3).fit(recognizer)
    assert {key.split("/")[0] for key in chip.emulator.ranges.ranges} == {
        "head",
        "head.first",
        "head.second",
        "head.third",
    }


def test_ranges_are_frozen_after_the_calibration_steps_and_training_goes_on() -> None:
    recognizer, chip = module(), NNAEmulation(calibration_steps=3)
    trainer(chip, steps=4).fit(recognizer)
    frozen = chip.emulator.ranges.state_dict()
    weights = recognizer.head.first.weight.detach().clone()
    trainer(chip, steps=8).fit(recognizer)
    assert chip.emulator.ranges.state_dict() == frozen
    assert not torch.equal(weights, recognizer.head.first.weight)


def test_training_on_the_chip_learns() -> None:
    """A trained float module goes on learning emulated, at a small learning rate."""
    recognizer = module()
    trainer(steps=40).fit(recognizer)
    chip = NNAEmulation(calibration_steps=8, fidelity="fast")
    recognizer.learning_rate = 0.001
    trainer(chip, steps=9).fit(recognizer)
    (before,) = trainer(chip).test(recognizer, verbose=False)
    trainer(chip, steps=40).fit(recognizer)
    (after,) = trainer(chip).test(recognizer, verbose=False)
    assert after["test/loss"] < 0.95 * before["test/loss"]


class Growing(SmallRecurrentModule):
    """Learns a probability that none of its first outputs reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Sigmoid())
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, 0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (1 - self(batch[0])).square().mean()
        self.losses.append(float(loss.detach()))
        return loss


def losses_of_growing(*callbacks: NNAEmulation) -> list[float]:
    torch.manual_seed(0)
    growing = Growing()
    growing.learning_rate = 0.01
    trainer(*callbacks, steps=16).fit(growing)
    return growing.losses


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_a_margin_lets_activations_grow(spec: str) -> None:
    """Without it the outputs reach the end of their range, where no gradient passes."""
    exact = losses_of_growing()
    narrow = losses_of_growing(NNAEmulation(spec, calibration_steps=4))
    wide = losses_of_growing(NNAEmulation(spec, calibration_steps=4, range_margin=1.0))
    assert narrow[-1] > 1.05 * exact[-1]
    assert wide[-1] == pytest.approx(exact[-1], rel=0.01)


def test_a_margin_widens_every_range_once() -> None:
    """Those of a fused ReLU still begin at 0."""
    ranges = []
    for margin in (0.0, 0.25):
        chip = NNAEmulation(calibration_steps=2, range_margin=margin)
        losses_of_growing(chip)
        ranges.append(chip.emulator.ranges)
    observed, wide = ranges
    assert wide.ranges.keys() == observed.ranges.keys()
    for key, each in observed.ranges.items():
        assert wide[key].minimum == pytest.approx(1.25 * each.minimum)
        assert wide[key].maximum == pytest.approx(1.25 * each.maximum)
    assert wide["net.0/fully_connected#0/output"].minimum == 0


class OptimizerFromTheStart(SmallRecurrentModule):
    """Builds its optimizer in ``__init__``, and layers in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.extra: nn.Module | None = None
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_model(self) -> None:
        if self.extra is None:
            self.extra = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert self.extra is not None
        return self.extra(super().forward(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


def test_layers_of_configure_model_and_an_early_optimizer_are_seen() -> None:
    chip = NNAEmulation(calibration_steps=1)
    trainer(chip, steps=3).fit(OptimizerFromTheStart())
    assert "extra/fully_connected#0/output" in chip.emulator.ranges
    assert chip.steps == 3


class TwoOptimizers(SmallRecurrentModule):
    """Steps the second optimizer every other batch, by hand."""

    def __init__(self) -> None:
        super().__init__(manual=True)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        first, second = self.optimizers()
        loss = self.loss(self(batch[0]), batch[1])
        self.manual_backward(loss)
        first.step()
        if batch_index % 2:
            second.step()
        self.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.lstm, self.head)]


def test_several_optimizers_count_as_the_one_that_steps_most() -> None:
    chip = NNAEmulation(calibration_steps=4)
    trainer(chip, max_steps=-1, max_epochs=1).fit(TwoOptimizers())
    assert chip.steps == 8
    assert chip.emulator.calibrated


class Failing(SmallRecurrentModule):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        loss = super().training_step(batch, batch_index)
        if batch_index == 4:
            raise KeyError("a bug of the user's")
        return loss


def test_after_an_exception_the_module_is_a_float_module_again() -> None:
    failing, chip = Failing(), NNAEmulation(calibration_steps=1)
    x = torch.randn(3, 6, 4)
    with pytest.raises(KeyError):
        trainer(chip).fit(failing)
    on_leaving = failing(x)
    assert torch.equal(on_leaving, strip(failing)(x))
    assert is_unhooked(failing)


def test_the_emulator_before_a_run() -> None:
    with pytest.raises(RuntimeError, match="has no module yet"):
        _ = NNAEmulation().emulator


def test_it_works_in_a_trainer_of_pytorch_lightning() -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Module(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

        def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
            return torch.sigmoid(self.net(batch[0])).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    chip = NNAEmulation(calibration_steps=2)
    data = torch.utils.data.TensorDataset(torch.randn(32, 4))
    run = other.Trainer(
        max_steps=4,
        callbacks=[chip],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(Module(), torch.utils.data.DataLoader(data, batch_size=8))
    assert sorted(chip.emulator.sites.locations) == [
        "net.0/fully_connected",
        "net.1/tanh",
        "net.2/fully_connected",
    ]


def test_two_fits_with_one_seed_are_equal() -> None:
    results = []
    for _ in range(2):
        recognizer = module(dropout=0.3)
        torch.manual_seed(3)
        trainer(NNAEmulation(calibration_steps=2)).fit(recognizer)
        results.append(dict(recognizer.state_dict()))
    assert_same(*results)


@pytest.mark.filterwarnings("ignore:NNAEmulation. . of 8 sites clip")
def test_telemetry_is_logged_and_summed_by_site(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    callback = NNAEmulation(calibration_steps=2, telemetry_every_n_steps=4)
    run = trainer(callback, steps=16, log_every_n_steps=1)
    run.fit(module())
    sites = set(callback.telemetry.sites)
    assert {"lstm/lstm#0", "head.first/fully_connected#0", "head/tanh#0"} <= sites
    rows = callback.telemetry.rows()
    assert all(0 <= row["clip_rate"] <= 1 for row in rows.values())
    assert rows["head.first/fully_connected#0"]["sqnr_db"] > 10
    # Every figure of every site, the worst of each, and nothing else's.
    logged = {key.removeprefix("nna/emulation/") for key in run.logged_metrics}
    for figure in ("clip_rate", "overflow_rate", "sqnr_db"):
        assert {f"{figure}/{site}" for site in sites} <= logged
    assert {"clip_rate", "clip_rate_max", "overflow_rate_max", "sqnr_db", "sqnr_db_min"} <= logged
    table = next(
        message for message in caplog.messages if "errors of the emulated arithmetic" in message
    )
    assert "clipped  overflowed  SQNR dB" in table
    assert all(site in table for site in sites)
    assert 0 <= run.logged_metrics["nna/emulation/clip_rate_max"] <= 1
    # Steps 4, 8 and 12, eight rows each; two layers' worth of results of eight units.
    assert callback.telemetry["head/tanh#0"].results == 3 * 8 * 8


@pytest.mark.filterwarnings("ignore:NNAEmulation. . of 8 sites clip")
def test_telemetry_changes_nothing() -> None:
    with_telemetry, without = module(dropout=0.2), module(dropout=0.2)
    torch.manual_seed(3)
    trainer(NNAEmulation(calibration_steps=2, telemetry_every_n_steps=1)).fit(with_telemetry)
    torch.manual_seed(3)
    trainer(NNAEmulation(calibration_steps=2, telemetry_every_n_steps=0)).fit(without)
    assert_same(dict(with_telemetry.state_dict()), dict(without.state_dict()))


@pytest.mark.filterwarnings("ignore:NNAEmulation. 0 of")  # As short as its calibration.
@pytest.mark.parametrize("observer", ["moving_average", "percentile", "mse"])
def test_a_run_with_another_observer_resumes_within_its_calibration(
    observer: str, tmp_path: Path
) -> None:
    for check in (resume_within_calibration, two_processes_agree):
        check(lambda: NNAEmulation(calibration_steps=3, observer=observer), tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"observer": "median"}, "observer must be one of"), ({"telemetry_every_n_steps": -1}, "-1")],
)
def test_a_wrong_setting_is_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        NNAEmulation(**settings)


def test_copies_of_module_and_callback_carry_on(tmp_path: Path) -> None:
    copies_carry_on(lambda: NNAEmulation(calibration_steps=2, learned_scales="all"), tmp_path)


@pytest.mark.filterwarnings("ignore:.*sync_dist=True")
def test_two_processes_observe_what_one_does(tmp_path: Path) -> None:
    """On the same batches, with weights that stay: the same sites and ranges, to the bit."""
    still, callbacks = module(learning_rate=0.0), [NNAEmulation(calibration_steps=2)]
    saved = _SaveState(str(tmp_path))
    with own_process_group():
        trainer(*callbacks, saved, steps=3, devices=2, strategy=two_processes()).fit(still)
    one = NNAEmulation(calibration_steps=4)
    trainer(one, steps=5).fit(module(learning_rate=0.0))
    for rank in range(2):
        state = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)["callbacks"][0]
        assert state["emulator"] == one.state_dict()["emulator"]


# --- a second module ----------------------------------------------------------------------------


@pytest.mark.parametrize("learned", ["none", "all"])
def test_a_copy_of_a_used_callback_begins_anew_with_another_module(learned: str) -> None:
    settings: dict[str, Any] = {"calibration_steps": 2, "learned_scales": learned}
    used, fresh = NNAEmulation(**settings), NNAEmulation(**settings)
    trainer(used, steps=5).fit(module())
    twins = [copy.deepcopy(used), pickle.loads(pickle.dumps(used)), fresh]
    states = []
    for callback in twins:
        other = module(seed=1)
        trainer(callback, steps=5).fit(other)
        states.append((dict(other.state_dict()), callback.state_dict()))
    assert_same(states[0], states[2])
    assert_same(states[1], states[2])


def test_a_second_module_starts_anew_and_the_first_keeps_its_own() -> None:
    used, fresh, first = (
        NNAEmulation(calibration_steps=2),
        NNAEmulation(calibration_steps=2),
        module(),
    )
    trainer(used, steps=5).fit(first)
    own = used.emulator.state_dict()
    second, other = module(seed=1), module(seed=1)
    trainer(used, steps=5).fit(second)
    trainer(fresh, steps=5).fit(other)
    assert_same(dict(second.state_dict()), dict(other.state_dict()))
    assert_same(used.state_dict(), fresh.state_dict())
    assert attached(first).state_dict() == own
    # Back to the first: its ranges are there, and nothing is observed again.
    trainer(used).test(first, verbose=False)
    assert used.emulator.state_dict() == own


def test_another_module_is_not_evaluated_in_float() -> None:
    chip = NNAEmulation(calibration_steps=2)
    trainer(chip, steps=5).fit(module())
    with pytest.raises(RuntimeError, match="test needs ranges, and none were observed"):
        trainer(chip).test(module(seed=1), verbose=False)


def test_what_a_checkpoint_holds_goes_to_the_module_it_is_loaded_for(tmp_path: Path) -> None:
    chip, first = NNAEmulation(calibration_steps=2), module()
    trainer(chip, steps=5).fit(first)
    own = chip.emulator.state_dict()
    run = trainer(NNAEmulation(calibration_steps=3), steps=5)
    run.fit(module(seed=1))
    run.save_checkpoint(tmp_path / "second.ckpt")
    (expected,) = run.test(run.lightning_module, verbose=False)
    other = module(seed=2)
    (metrics,) = trainer(chip).test(other, ckpt_path=tmp_path / "second.ckpt", verbose=False)
    assert metrics == expected
    assert attached(first).state_dict() == own
    assert attached(other) is chip.emulator


def test_a_module_that_was_stripped_is_emulated_with_the_same_ranges() -> None:
    chip, fitted = NNAEmulation(calibration_steps=2), module()
    trainer(chip, steps=5).fit(fitted)
    (expected,) = trainer(chip).test(fitted, verbose=False)
    strip(fitted)
    assert trainer(chip).test(fitted, verbose=False) == [expected]


def test_a_run_inside_a_block_leaves_the_block_as_it_was() -> None:
    chip, fitted, x = NNAEmulation(calibration_steps=2), module(), torch.randn(3, 6, 4)
    trainer(chip, steps=5).fit(fitted)
    fitted.eval()
    with emulate(fitted), torch.no_grad():
        expected = fitted(x)
        trainer(chip).test(fitted, verbose=False)
        assert torch.equal(fitted(x), expected)
    assert not torch.equal(fitted(x), expected)


class SkipsTheRest(SmallRecurrentModule):
    """Ends the epoch at its third batch, so that the batch's end is never announced."""

    def on_train_batch_start(self, batch: object, batch_index: int) -> int | None:
        return -1 if batch_index == 3 else None


def test_a_skipped_epoch_leaves_no_mode_behind() -> None:
    chip = NNAEmulation(calibration_steps=1)
    trainer(chip, max_steps=-1, max_epochs=2).fit(SkipsTheRest())
    assert _get_current_function_mode() is None
    assert chip.emulator.mode.phase == "float"


# --- what a fit says at its end -----------------------------------------------------------------


def test_a_fit_says_how_much_of_it_ran_emulated(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer(NNAEmulation(calibration_steps=2), steps=5).fit(module())
    assert "3 of 5 optimizer steps of this fit ran emulated" in caplog.text


def test_a_fit_says_that_it_uses_earlier_ranges(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fitted = module()
    said = "already and this fit observes none, so that calibration_steps=2 and range_margin=0.5"
    first = NNAEmulation(calibration_steps=2, range_margin=0.5)
    trainer(first, steps=4).fit(fitted)
    trainer(first, steps=8).fit(fitted)  # The same callback carries on with ranges of its own.
    assert said not in caplog.text
    trainer(NNAEmulation(calibration_steps=2, range_margin=0.5), steps=4).fit(fitted)
    assert said in caplog.text


def test_sites_that_clip_much_are_named_once() -> None:
    fitted = module()
    calibrate(fitted, [0.02 * torch.randn(8, 6, 4)])
    chip = NNAEmulation(calibration_steps=0, telemetry_every_n_steps=1)
    with pytest.warns(UserWarning, match="sites clip more than 5%") as caught:
        trainer(chip, steps=8).fit(fitted)
    (message,) = [str(w.message) for w in caught if "sites clip" in str(w.message)]
    assert "head.first/fully_connected#0" in message
    assert "frozen too early: call lightning_nna.strip(module) before the fit, set" in message
    assert chip.telemetry["head.first/fully_connected#0"].clip_rate > 0.05


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"spec": "litert-int16x8"}, r"spec\['activation_bits'\] is 8 there and 16 here"),
        ({"observer": "percentile"}, "observer is 'min_max' there and 'percentile' here"),
        ({"targets": ["head"]}, r"targets is \['\*'\] there and \['head'\] here"),
        ({"calibration_steps": 6}, "calibration_steps is 2 there and 6 here"),
        ({"range_margin": 0.25}, "range_margin is 0.0 there and 0.25 here"),
    ],
)
def test_what_a_checkpoint_has_fixed_cannot_be_changed(
    changed: dict[str, Any], named: str, tmp_path: Path
) -> None:
    first = trainer(NNAEmulation(calibration_steps=2), steps=5)
    first.fit(module())
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    with pytest.raises(ValueError, match=named):
        trainer(NNAEmulation(**({"calibration_steps": 2} | changed))).fit(
            module(), ckpt_path=tmp_path / "stopped.ckpt"
        )


def test_ranges_of_a_checkpoint_need_no_calibration_steps(tmp_path: Path) -> None:
    first = trainer(NNAEmulation(calibration_steps=2), steps=5)
    first.fit(module())
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    again = NNAEmulation(calibration_steps=0, fidelity="fast", learned_scales="all")
    trainer(again).fit(module(), ckpt_path=tmp_path / "stopped.ckpt")
    assert again.emulator.calibrated
    assert again.emulator.scales.tensors()
