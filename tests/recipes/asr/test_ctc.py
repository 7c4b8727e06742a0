"""The plain CTC recognizer: its loss, its paths, its padding, and its recipe to the programs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from recipes.asr.batches import Batch
from recipes.asr.ctc import CTCEncoder, CTCRecognizer, ctc_losses, labels_of
from recipes.asr.vocabulary import Vocabulary
from recipes.deploy import deploy, table
from recipes.train import train
from tests.recipes.conftest import compose_config, small_an4

__all__ = ["compose_config", "small_an4"]


def _batch(frames: int = 12) -> Batch:
    targets = torch.tensor([[1, 2], [3, 0]])
    lengths = torch.tensor([frames, 8])
    features = torch.randn(2, frames, 4) * (torch.arange(frames) < lengths[:, None])[..., None]
    return Batch(features, lengths, targets, torch.tensor([2, 1]), ("a", "b"), ("AB", "C"))


def _recognizer(**settings: Any) -> CTCRecognizer:
    return CTCRecognizer(
        network=partial(CTCEncoder, channels=8, kernel_size=3, blocks=1),
        vocabulary=Vocabulary(("A", "B", "C"), "character"),
        num_mels=4,
        optimizer=torch.optim.AdamW,
        **settings,
    )


def test_the_loss_is_the_sum_over_all_paths() -> None:
    logits = torch.randn(1, 2, 3)
    rows = logits[0].log_softmax(1).exp()
    one = torch.tensor([1])
    batch = Batch(torch.zeros(1, 8, 4), torch.tensor([8]), one[:, None], one, ("a",), ("A",))
    paths = rows[0, 1] * rows[1, 1] + rows[0, 0] * rows[1, 1] + rows[0, 1] * rows[1, 0]
    torch.testing.assert_close(ctc_losses(logits, batch), -paths.log()[None])


def test_a_path_becomes_labels() -> None:
    assert labels_of(torch.tensor([2, 2, 0, 2, 1, 1, 0])) == [2, 2, 1]
    assert labels_of(torch.tensor([0, 0])) == []


def test_validation_pads_as_the_program_does() -> None:
    padded, plain = _recognizer(frames=20).eval(), _recognizer().eval()
    plain.load_state_dict(padded.state_dict())
    features = _batch().features
    longer = torch.nn.functional.pad(features, (0, 0, 0, 8))
    assert padded(features).shape == (2, 5, 4)
    assert torch.equal(padded(features), plain(longer))
    assert padded.train()(features).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="has 24 frames, and the recognizer pads to 20"):
        padded.eval()(torch.zeros(1, 24, 4))


@pytest.mark.slow
@pytest.mark.exactness
@pytest.mark.filterwarnings("ignore:NNAEmulation. 0 of")
def test_its_words_come_out_of_the_program(
    small_an4: Path, compose_config: Callable[..., DictConfig], tmp_path: Path
) -> None:
    trained = tmp_path / "trained"
    settings = [
        *("experiment=digits_ctc", "data=an4", f"data.root={small_an4}", "data.num_mels=8"),
        *(f"data.cache_dir={tmp_path / 'cache'}", "data.validation_fraction=0.2"),
        *("model.network.channels=8", "model.network.blocks=1", "model.frames=64"),
        *("data.spec_augment=null", "data.num_buckets=2", "data.batch_seconds=2"),
        *("trainer.max_epochs=2", "trainer.accelerator=cpu", "callbacks.progress=null"),
        *("compression=gq", "bits=4", "callbacks.nna.calibration_steps=2", f"run_dir={trained}"),
        "callbacks.average=null",
    ]
    summary = train(compose_config("train", *settings))
    assert summary["bits"] == 4.0
    ckpt = f"ckpt={trained / 'checkpoints' / 'last.ckpt'}"
    deployed = deploy(compose_config("deploy", ckpt, "systems=[]", "score_float=false"))
    assert (deployed["equal_outputs"], deployed["examples"]) == (1.0, 6)
    for name in ("wer", "loss_per_token"):
        assert deployed[name] == deployed["emulated"][name] == summary[name], name
    assert "WER, %" in table(deployed)
