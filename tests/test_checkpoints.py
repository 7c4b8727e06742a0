from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from lightning_nna import bake, emulate, load_deployed
from lightning_nna.callbacks import (
    GeneralQuantizer,
    HardCompression,
    MagnitudePruning,
    MRACosRegularization,
    NNAEmulation,
)
from lightning_nna.deploy import export_tflite
from lightning_nna.emulation.attachment import attached
from lightning_nna.testing import SmallRecurrentModule
from lightning_nna.testing.contract import assert_same, module, trainer


def pruned_and_quantized() -> list[Callback]:
    return [
        GeneralQuantizer(
            3, hard_from=2, granularity="per_channel", learn_scale=True, pin_zero=True
        ),
        MagnitudePruning(0.5, every_n_steps=2),
    ]


METHODS: dict[str, Callable[[], list[Callback]]] = {
    "gq under masks": pruned_and_quantized,
    "s8bqat": lambda: [
        MRACosRegularization(3, pin_zero=True),
        HardCompression(3, pin_zero=True, every_n_steps=2),
    ],
    "gq per channel": lambda: [GeneralQuantizer(2, codebook="per_channel", learn_scale=True)],
    "s8bqat per channel": lambda: [
        MRACosRegularization(3, codebook="per_channel"),
        HardCompression(3, codebook="per_channel", every_n_steps=2),
    ],
    "one bit": lambda: [GeneralQuantizer(1, mu=7.0, scale="centroids")],
    "float": list,
}


def run(folder: Path, *callbacks: Callback) -> tuple[SmallRecurrentModule, list[Path]]:
    """A fitted module, and the files that ModelCheckpoint and the Trainer write of it."""
    fitted = module()
    writer = ModelCheckpoint(folder, filename="within", every_n_train_steps=8)
    one = trainer(*callbacks, writer, steps=8, enable_checkpointing=True)
    one.fit(fitted)
    one.save_checkpoint(folder / "after.ckpt")
    return fitted, [folder / "within.ckpt", folder / "after.ckpt"]


@pytest.mark.parametrize("method", METHODS)
def test_every_checkpoint_is_loaded_as_it_is_deployed(method: str, tmp_path: Path) -> None:
    emulation = NNAEmulation(calibration_steps=2)
    fitted, paths = run(tmp_path, emulation, *METHODS[method]())
    x = torch.randn(4, 6, 4)
    with emulate(fitted), torch.no_grad():
        expected = fitted(x)
    for path in paths:
        # What Lightning itself loads is deployed, too.
        plain = SmallRecurrentModule.load_from_checkpoint(path, map_location="cpu")
        assert_same(dict(fitted.state_dict()), dict(plain.state_dict()))
        loaded = load_deployed(module(seed=1), path)
        assert_same(dict(fitted.state_dict()), dict(loaded.state_dict()))
        with emulate(loaded), torch.no_grad():
            assert torch.equal(loaded(x), expected)
        for name, rows in attached(loaded).state.used_weights.items():
            theirs, ours = (
                attached(net).state.weight(net.get_parameter(name), rows)
                for net in (fitted, loaded)
            )
            assert torch.equal(theirs.stored, ours.stored)
            assert torch.equal(theirs.scales, ours.scales)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # Of ModelCheckpoint.
def test_a_run_goes_on_from_either_file(tmp_path: Path) -> None:
    _, paths = run(tmp_path, *pruned_and_quantized())
    states = []
    for path in paths:
        resumed = module(seed=1)
        trainer(*pruned_and_quantized()).fit(resumed, ckpt_path=path)
        states.append(copy.deepcopy(dict(resumed.state_dict())))
    assert_same(*states)


@pytest.mark.parametrize("average_first", [True, False])
def test_averaged_weights_are_deployed(average_first: bool, tmp_path: Path) -> None:
    average = EMAWeightAveraging(decay=0.5)
    methods: list[Any] = [average, *pruned_and_quantized()]
    fitted, paths = run(tmp_path, *(methods if average_first else methods[::-1]))
    for path in paths:
        loaded = load_deployed(module(seed=1), path)
        for name in ("lstm.weight_hh_l0", "head.first.weight"):
            assert torch.equal(loaded.get_parameter(name), fitted.get_parameter(name))


def test_without_the_emulation(tmp_path: Path) -> None:
    _, paths = run(tmp_path, NNAEmulation(calibration_steps=2), GeneralQuantizer(2))
    loaded = load_deployed(module(seed=1), torch.load(paths[0], weights_only=True), emulation=False)
    assert attached(loaded) is None
    assert len(loaded.head.first.weight.unique()) <= 4


@pytest.mark.filterwarnings("ignore:.*0 of 2 .* ran emulated")  # It is stopped on purpose.
def test_ranges_that_were_not_frozen_are_warned_of(tmp_path: Path) -> None:
    one = trainer(NNAEmulation(calibration_steps=9), steps=2)
    one.fit(module())
    one.save_checkpoint(tmp_path / "early.ckpt")
    with pytest.warns(UserWarning, match="not frozen when the checkpoint was written, after 2 opt"):
        load_deployed(module(), tmp_path / "early.ckpt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {}}, "no 'state_dict'"),
        ({"state_dict": {}}, "weights alone"),
        (
            {"state_dict": None, "callbacks": {"GeneralQuantizer": {"latents": {}}}},
            "the state of GeneralQuantizer was written by an older version",
        ),
        ([], "no checkpoint of a Trainer: it holds a list"),
        ({"state_dict": Path("here")}, "holds objects other than tensors and plain"),
    ],
)
def test_what_cannot_be_loaded_says_why(content: Any, message: str, tmp_path: Path) -> None:
    net = module()
    if isinstance(content, dict) and content.get("state_dict", 0) is None:
        content = {**content, "state_dict": net.state_dict()}
    torch.save(content, tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match=message):
        load_deployed(net, tmp_path / "file.ckpt")


# --- copies ---------------------------------------------------------------------------------------


def pickled(original: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(original, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def emulated(one: nn.Module, x: Tensor, spec: str | None = None) -> Tensor:
    with emulate(one, spec), torch.no_grad():
        return cast(Tensor, one(x))


@pytest.mark.parametrize(
    ("method", "spec"),
    [
        ("gq under masks", "litert-int8"),
        ("gq under masks", "litert-int16x8"),
        ("s8bqat", "litert-int8"),
        ("one bit", "litert-int16x8"),
    ],
)
def test_a_copy_is_the_accelerators_original(method: str, spec: str, tmp_path: Path) -> None:
    run = trainer(NNAEmulation(spec, calibration_steps=2), *METHODS[method](), steps=6)
    fitted, x = module(), torch.randn(4, 6, 4)
    run.fit(fitted)
    run.save_checkpoint(tmp_path / "run.ckpt")
    fitted.trainer = None  # It is no part of a pickle.
    loaded = load_deployed(module(seed=1), tmp_path / "run.ckpt")
    copies = [
        copy.deepcopy(fitted),
        pickled(fitted),
        copy.deepcopy(pickled(loaded)),
    ]
    originals = [fitted, *copies]
    outputs = [emulated(one, x, spec) for one in originals]
    programs = []
    for number, one in enumerate(originals):
        path = tmp_path / f"{number}.tflite"
        export_tflite(one, [x], path)
        programs.append(path.read_bytes())
    weights = [bake(one).state_dict() for one in originals]
    for output, program, weight in zip(outputs[1:], programs[1:], weights[1:], strict=True):
        assert torch.equal(output, outputs[0])
        assert program == programs[0]
        assert_same(dict(weight), dict(weights[0]))


def test_a_copy_within_a_fit_is_emulated_as_the_original() -> None:
    class Copies(Callback):
        outputs: list[Tensor]

        def on_train_epoch_end(self, _: pl.Trainer, pl_module: pl.LightningModule) -> None:
            twin = copy.deepcopy(pl_module)
            self.outputs = [emulated(one, x) for one in (pl_module, twin)]

    x, copies = torch.randn(4, 6, 4), Copies()
    emulation = NNAEmulation(calibration_steps=2)
    trainer(emulation, *pruned_and_quantized(), copies, steps=6).fit(module())
    assert torch.equal(*copies.outputs)


@pytest.mark.parametrize("is_met", [True, False], ids=["after its first run", "before"])
def test_a_weight_of_a_copy_that_is_changed_is_a_plain_one(is_met: bool, tmp_path: Path) -> None:
    fitted, _ = run(tmp_path, NNAEmulation(calibration_steps=2), GeneralQuantizer(2))
    fitted.trainer = None
    twin, x = copy.deepcopy(fitted), torch.randn(4, 6, 4)
    before = emulated(twin, x) if is_met else None
    assert before is None or torch.equal(before, emulated(fitted, x))
    with torch.no_grad():
        twin.head.first.weight.add_(torch.randn_like(twin.head.first.weight))
    emulated(twin, x)
    bake(twin)
    assert len(twin.head.first.weight.unique()) > 8
    assert_same(twin.head.second.weight, fitted.head.second.weight)


def test_a_copy_is_made_used_and_compressed_in_inference_mode(tmp_path: Path) -> None:
    fitted, _ = run(tmp_path, NNAEmulation(calibration_steps=2), *pruned_and_quantized())
    fitted.trainer = None
    x = torch.randn(4, 6, 4)
    with torch.inference_mode():
        for twin in (copy.deepcopy(fitted), pickled(fitted)):
            assert torch.equal(emulated(twin, x), emulated(fitted, x))


def test_a_copy_is_compressed_anew(tmp_path: Path) -> None:
    fitted, _ = run(tmp_path, NNAEmulation(calibration_steps=2), GeneralQuantizer(3))
    twin = copy.deepcopy(fitted)
    attached(twin)
    trainer(HardCompression(1, every_n_steps=1), steps=2).fit(twin)
    assert len(twin.head.first.weight.unique()) == 2
