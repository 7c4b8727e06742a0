"""A recognizer of noise as programs: the same outputs, the same transcripts, and their cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from recipes.asr.deployed import DeployedTransducer, export_transducer
from recipes.deploy import check_asked, deploy, table
from recipes.train import train
from recipes.weights import TrainedWeights
from tests.recipes.asr.test_on_chip import conformer
from tests.recipes.test_train import overrides

Compose = Callable[..., DictConfig]
__all__ = ["overrides"]
HIGH_END = "[ethos-u55-128,Ethos_U55_High_End_Embedded,Shared_Sram]"


@pytest.mark.slow
@pytest.mark.exactness
@pytest.mark.filterwarnings("ignore:NNAEmulation. 0 of")  # Shorter than its calibration.
@pytest.mark.parametrize("compression", ["none", "nna8", "csp_gq"])
def test_the_programs_recognize_what_the_emulation_does(
    compression: str, compose_config: Compose, overrides: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("ethosu")
    trained = tmp_path / "trained"
    settings = [f"compression={compression}", "test=false", f"run_dir={trained}"]
    if compression == "csp_gq":
        settings += ["bits=4", "sparsity=0.5", "+callbacks.prune.measurement=identity"]
    train(compose_config("train", "experiment=an4_rnnt", *overrides, *settings))
    ckpt = trained / "checkpoints" / "last.ckpt"
    found = deploy(
        compose_config("deploy", f"ckpt={ckpt}", f"systems=[{HIGH_END}]", "calibration_batches=2")
    )
    assert (found["equal_outputs"], found["equal_transcripts"]) == (1.0, 1.0)
    assert found["wer"] == found["emulated"]["wer"]
    assert found["loss_per_token"] == pytest.approx(found["emulated"]["loss_per_token"], rel=1e-6)
    assert found["method"] == {"none": "chip"}.get(compression, compression)
    (system,) = found["systems"]
    assert system["cpu_operators"] == ["GatherV2"]
    assert 0 < system["encoded_bytes"] < system["memory_bytes"]
    assert len(table(found).splitlines()) == 8
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text()) == json.loads(json.dumps(found))
    assert {"programs", "report.csv", "report.html", "summary.json"} <= {
        path.name for path in run.iterdir()
    }
    with pytest.raises(ValueError, match="not as it was written"):
        _altered(run / "programs")


def _altered(programs: Path) -> DeployedTransducer:
    path = programs / "joint.tflite"
    path.write_bytes(path.read_bytes() + b"\0")
    return DeployedTransducer(programs)


def test_what_has_no_streaming_program(tmp_path: Path) -> None:
    class Recognizer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = conformer(1)

    with pytest.raises(ValueError, match="has a state that grows"):
        export_transducer(Recognizer(), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk_steps must be at least 1, got 0"):
        export_transducer(Recognizer(), tmp_path, chunk_steps=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (
            ["compression=csp"],
            r"compression=csp is not used: a\.ckpt was trained with compression=g",
        ),
        (["nna=ethos-u"], r"nna=ethos-u is not used: .* with nna=litert-int8"),
        (["compression=gq", "bits=3"], r"bits=3 is not used: .* with bits=2"),
    ],
)
def test_what_the_checkpoint_decides_is_not_asked_for(
    asked: list[str], complaint: str, compose_config: Compose
) -> None:
    recipe = {"method": "gq", "bits": 2, "callbacks": {"nna": {"spec": "litert-int8"}}}
    trained = TrainedWeights({}, {**recipe, "bit_overrides": {}}, {})
    check_asked(trained, compose_config("deploy", "ckpt=a.ckpt"))
    check_asked(trained, compose_config("deploy", "ckpt=a.ckpt", "compression=gq", "bits=2"))
    config = compose_config("deploy", "ckpt=a.ckpt", *asked)
    with pytest.raises(ValueError, match=complaint):
        check_asked(trained, config)
    check_asked(TrainedWeights({}, {"method": "float"}, {}), config)
