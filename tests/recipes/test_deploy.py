"""A recognizer of noise as programs: equal outputs, equal transcripts, and their cost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from lightning_nna.deploy.runtimes import runtime_of
from lightning_nna.emulation import calibrate, emulate
from lightning_nna.emulation.spec import resolve_spec
from recipes.asr.decoding import greedy_decode
from recipes.asr.deployed import DeployedTransducer, export_transducer
from recipes.asr.rnnt import Transducer
from recipes.deploy import check_method, check_systems, check_target, deploy, table
from recipes.train import train
from recipes.weights import TrainedWeights
from tests.conftest import ROOT
from tests.recipes.asr.test_emulated import batch, conformer, recurrent
from tests.recipes.test_train import overrides

Compose = Callable[..., DictConfig]
__all__ = ["overrides"]
CONFORMER_IN_SECONDS = [
    "model.network.encoder_size=8",
    "model.network.feed_forward_size=16",
    "model.network.encoder_layers=1",
    "model.network.num_heads=2",
    "model.network.kernel_size=3",
    "model.network.left_context=3",
    "model.network.embedding_size=8",
    "model.network.predictor_size=8",
    "model.network.joint_size=8",
]
NPU = "ethos-u55-128"
HIGH_END = "[ethos-u55-128,Ethos_U55_High_End_Embedded,Shared_Sram]"


@pytest.mark.slow
@pytest.mark.exactness
@pytest.mark.filterwarnings("ignore:NNAEmulation. 0 of")  # Shorter than its calibration.
@pytest.mark.parametrize(
    ("compression", "target"),
    [("none", None), ("nna8", None), ("csp_gq", None), ("nna8", "tflm"), ("nna8", NPU)],
)
def test_the_programs_equal_the_emulation(
    compression: str,
    target: str | None,
    compose_config: Compose,
    overrides: list[str],
    tmp_path: Path,
) -> None:
    pytest.importorskip("ethosu")
    trained = tmp_path / "trained"
    settings = [f"compression={compression}", "test=false", f"run_dir={trained}"]
    if compression == "csp_gq":
        settings += ["bits=4", "sparsity=0.5", "+callbacks.prune.measurement=identity"]
    if target == NPU:
        settings.append("nna=ethos-u")
    train(compose_config("train", "experiment=an4_rnnt", *overrides, *settings))
    ckpt = trained / "checkpoints" / "last.ckpt"
    settings = [f"ckpt={ckpt}", f"systems=[{HIGH_END}]", "calibration_batches=2"]
    summary = deploy(compose_config("deploy", *settings, f"target={target or 'null'}"))
    assert (summary["equal_outputs"], summary["equal_transcripts"]) == (1.0, 1.0)
    assert summary["wer"] == summary["emulated"]["wer"]
    assert summary["loss_per_token"] == pytest.approx(
        summary["emulated"]["loss_per_token"], rel=1e-6
    )
    assert summary["method"] == {"none": "chip"}.get(compression, compression)
    (system,) = summary["systems"]
    assert system["cpu_operators"] == ["GatherV2"]
    assert 0 < system["encoded_bytes"] < system["memory_bytes"]
    firmware = ["encoder", "predictor", "joint"] if target else []
    assert list(summary["firmware"]) == firmware
    assert [each["equal_outputs"] for each in summary["firmware"].values()] == [1.0] * len(firmware)
    text = table(summary)
    assert len(text.splitlines()) == 8 + len(firmware)
    assert "None" not in text
    memory = {None: "", "tflm": r"arena \d+ bytes", NPU: r"tensors \d+ bytes by Vela's estimate"}
    assert len(re.findall(f", {memory[target]}$", text, re.MULTILINE)) == len(firmware)
    run = tmp_path / "run"
    assert [(run / "firmware" / each / f"{each}_data.cc").is_file() for each in firmware] == [
        True for _ in firmware
    ]
    assert json.loads((run / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert {"activations.csv", "programs", "report.csv", "report.html", "summary.json"} <= {
        path.name for path in run.iterdir()
    }
    # The test set, and LiteRT, TFLite-Micro and TOSA as far as each has the programs.
    promised = [check for check in summary["checks"] if check["is_promised"]]
    assert [check["outputs"] == check["equal_outputs"] for check in promised] == [True, True]
    assert summary["timing"]["float_ms"] > 0
    report = (run / "report.html").read_text(encoding="utf-8")
    for text in ("WER", "per second of speech", "GatherV2", "TOSA", summary["commit"]):
        assert text in report
    assert ("No firmware".lower() in report.lower()) == (not firmware)
    with pytest.raises(ValueError, match="not as it was written"):
        _altered(run / "programs")


def _altered(programs: Path) -> DeployedTransducer:
    path = programs / "joint.tflite"
    path.write_bytes(path.read_bytes() + b"\0")
    return DeployedTransducer(programs)


def test_encoders_without_a_streaming_program(tmp_path: Path) -> None:
    class Recognizer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = conformer(1)

    with pytest.raises(ValueError, match=r"has a state that grows.*: give utterance_frames"):
        export_transducer(Recognizer(), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="utterance_frames must be at least 1, got 0"):
        export_transducer(Recognizer(), tmp_path, utterance_frames=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk_steps must be at least 1, got 0"):
        export_transducer(Recognizer(), tmp_path, chunk_steps=0)  # type: ignore[arg-type]


def test_a_conformer_whose_steps_see_padding_has_no_program(tmp_path: Path) -> None:
    class Recognizer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = conformer(2)

    with pytest.raises(ValueError, match="with chunk_size=2 steps see the padding"):
        export_transducer(Recognizer(), tmp_path, utterance_frames=8)  # type: ignore[arg-type]


@pytest.mark.exactness
@pytest.mark.parametrize(
    ("model", "sizes"),
    [(recurrent, {"chunk_steps": 3}), (partial(conformer, 1), {"utterance_frames": 32})],
    ids=["rnnt", "conformer"],
)
def test_programs_return_the_steps_of_each_utterance(
    model: Callable[[], Transducer], sizes: dict[str, int], tmp_path: Path
) -> None:
    class Recognizer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model()

    recognizer = Recognizer().eval()
    features, _, labels, counts = batch()
    lengths = torch.tensor([24, 14, 5])
    features = features[:, :24] * (torch.arange(24) < lengths[:, None])[..., None]

    def score(module: Any, sound: Tensor) -> Tensor:
        encodings, steps = module.model.transcribe(sound, lengths)
        predictions, _, _ = module.model.predict(labels, counts, None)
        module.model.predict(labels[:, :1], counts, None)
        return torch.as_tensor(module.model.join(encodings, steps, predictions, counts)[0])

    calibrate(recognizer, [features], forward=score)
    with emulate(recognizer), torch.no_grad():
        emulated, steps = recognizer.model.transcribe(features, lengths)
    export_transducer(recognizer, tmp_path, **sizes)  # type: ignore[arg-type]
    deployed = DeployedTransducer(tmp_path)
    encodings, deployed_steps = deployed.transcribe(features, lengths)
    assert torch.equal(deployed_steps, steps)
    assert encodings.shape == (3, int(steps.max()), 8)
    decoded = greedy_decode(deployed, features, lengths, max_labels_per_step=3)
    calls = dict(deployed.calls)
    assert decoded == [
        greedy_decode(deployed, row[None], length[None], max_labels_per_step=3)[0]
        for row, length in zip(features, lengths, strict=True)
    ]
    assert any(decoded)
    assert calls["predictor"] > len(features)
    for row, expected, count in zip(encodings, emulated, steps.tolist(), strict=True):
        assert torch.equal(row[:count], expected[:count])


def test_an_utterance_longer_than_a_conformers_program_is_an_error(tmp_path: Path) -> None:
    class Recognizer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = conformer(1)

    recognizer = Recognizer().eval()
    features, lengths, labels, counts = batch()

    def score(module: Any, sound: Tensor) -> Tensor:
        encodings, steps = module.model.transcribe(sound, lengths)
        predictions, _, _ = module.model.predict(labels, counts, None)
        return torch.as_tensor(module.model.join(encodings, steps, predictions, counts)[0])

    calibrate(recognizer, [features], forward=score)
    export_transducer(recognizer, tmp_path, utterance_frames=22)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most 24 frames, got one of 32: export it with a"):
        DeployedTransducer(tmp_path).transcribe(features, lengths)


@pytest.mark.slow
@pytest.mark.exactness
@pytest.mark.filterwarnings("ignore:NNAEmulation. 0 of")  # Shorter than its calibration.
@pytest.mark.parametrize(
    ("model", "specs"),
    [
        ("rnnt", ["tflm-int8", "tosa-int8", "litert-int8"]),
        ("conformer", ["tflm-int8", "litert-int8"]),
    ],
)
def test_one_checkpoint_on_every_runtime(
    model: str, specs: list[str], compose_config: Compose, overrides: list[str], tmp_path: Path
) -> None:
    trained = tmp_path / "trained"
    settings = ["compression=gq", "bits=4", "nna=tflm-int8", "test=false", f"run_dir={trained}"]
    if model == "conformer":
        small = CONFORMER_IN_SECONDS
        overrides = [*small, *overrides[overrides.index("data=an4") :]]
    train(compose_config("train", f"experiment=an4_{model}", *overrides, *settings))
    ckpt = trained / "checkpoints" / "last.ckpt"
    titles = []
    for spec in specs:
        run_dir = tmp_path / spec
        settings = [f"ckpt={ckpt}", "systems=[]", "calibration_batches=2", f"run_dir={run_dir}"]
        again = ["recalibrate=true", f"nna={spec}"] if spec != "tflm-int8" else []
        summary = deploy(compose_config("deploy", *settings, *again))
        assert (summary["equal_outputs"], summary["equal_transcripts"]) == (1.0, 1.0)
        titles.append(summary["runtime"])
    assert titles == [runtime_of(resolve_spec(spec).runtime).title for spec in specs]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["compression=csp"],
            r"compression=csp is not used: a\.ckpt was trained with compression=g",
        ),
        (["nna=ethos-u"], r"nna=ethos-u is not used: .* with nna=litert-int8"),
        (["compression=gq", "bits=3"], r"bits=3 is not used: .* with bits=2"),
    ],
)
def test_settings_that_differ_from_the_checkpoint_are_an_error(
    overrides: list[str], complaint: str, compose_config: Compose
) -> None:
    recipe = {"method": "gq", "bits": 2, "callbacks": {"nna": {"spec": "litert-int8"}}}
    trained = TrainedWeights({}, {**recipe, "bit_overrides": {}}, {})
    check_method(trained, compose_config("deploy", "ckpt=a.ckpt"))
    check_method(trained, compose_config("deploy", "ckpt=a.ckpt", "compression=gq", "bits=2"))
    config = compose_config("deploy", "ckpt=a.ckpt", *overrides)
    with pytest.raises(ValueError, match=complaint):
        check_method(trained, config)
    check_method(TrainedWeights({}, {"method": "float"}, {}), config)


@pytest.mark.parametrize(
    ("systems", "complaint"),
    [
        (["ethos-u55-128"], r"systems has ethos-u55-128: each is a list"),
        ([["ethos-u55-128", "Ethos_U55_Deep_Embedded"]], r"each is a list of an accelerator, a"),
        ([["foo", "bar", "baz"]], "accelerator must be one of ethos-u55-32.*; got 'foo'"),
    ],
)
def test_systems_are_checked_before_anything_runs(systems: list[Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_systems(systems)


def test_runtimes_are_checked_before_anything_runs(compose_config: Compose, tmp_path: Path) -> None:
    pretrained = ROOT / "recipes" / "pretrained" / "keywords.safetensors"
    settings = [f"ckpt={pretrained}", "runtimes=[onnx]", f"run_dir={tmp_path}"]
    with pytest.raises(ValueError, match=r"runtime must be one of litert, .*; got 'onnx'"):
        deploy(compose_config("deploy", *settings))


@pytest.mark.parametrize(
    ("trained", "overrides", "complaint"),
    [
        (
            None,
            ["target=cmsis"],
            "target=cmsis is no device: it is tflm, null .*, or an Ethos-U; .* got 'cmsis'",
        ),
        (None, ["target=ethos-u99"], "target=ethos-u99 is no device.*ethos-u85-2048; got"),
        (
            None,
            ["target=tflm", "nna=litert-int8"],
            "litert-int8 has others: add nna=tflm-int8, or leave target out",
        ),
        (
            "litert-int8",
            ["target=ethos-u55-128"],
            "litert-int8 has others: add recalibrate=true nna=ethos-u, or leave",
        ),
        (None, ["target=ethos-u55-128"], "kernel, which tflm-int8 has: add nna=ethos-u, with"),
    ],
)
def test_a_device_needs_its_integers(
    trained: str | None, overrides: list[str], complaint: str, compose_config: Compose
) -> None:
    recipe = {"callbacks": {"nna": {"spec": trained}}} if trained else {}
    weights = TrainedWeights({}, recipe, {})
    with pytest.raises(ValueError, match=complaint):
        check_target(weights, compose_config("deploy", "ckpt=a.ckpt", *overrides))


@pytest.mark.parametrize(
    ("trained", "overrides"),
    [
        (None, ["target=tflm"]),
        (None, ["target=ethos-u55-128", "nna=ethos-u"]),
        ("ethos-u", ["target=ethos-u85-256"]),
        ("tflm-int8", ["target=tflm"]),
        ("litert-int8", []),
    ],
)
def test_a_device_with_its_integers(
    trained: str | None, overrides: list[str], compose_config: Compose
) -> None:
    recipe = {"callbacks": {"nna": {"spec": trained}}} if trained else {}
    config = compose_config("deploy", "ckpt=a.ckpt", *overrides)
    check_target(TrainedWeights({}, recipe, {}), config)
    assert config.target == dict(each.split("=") for each in overrides).get("target")
