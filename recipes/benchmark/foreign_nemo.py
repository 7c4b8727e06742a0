r"""Recognizers of NeMo, in an environment of their own: NeMo pins Lightning 2.4.

    uv venv .cache/nemo
    uv pip install --python .cache/nemo/bin/python \
        "nemo_toolkit[asr]" "torch<2.15" -e ".[asr,deploy]"
    .cache/nemo/bin/python -m recipes.benchmark.foreign --modules nemo_ctc nemo_rnnt

Without NeMo the page reports the rows that were measured.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from recipes.benchmark.foreign_module import ForeignModule, ForeignProgram, first

_FEATURES, _FRAMES, _WIDTH, _UNITS = 20, 101, 32, 24
_ALPHABET = [" ", *"abcdefghijklmnopqrstuvwxyz", "'"]
_BLANK = len(_ALPHABET)


def _settings() -> dict[str, Any]:
    """Return what both recognizers share: a small Conformer on log-mel features."""
    return {
        "sample_rate": 16_000,
        "labels": _ALPHABET,
        "spec_augment": None,
        "preprocessor": {
            "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
            "features": _FEATURES,
            "dither": 0.0,
            "pad_to": 0,
        },
        "encoder": {
            "_target_": "nemo.collections.asr.modules.ConformerEncoder",
            "feat_in": _FEATURES,
            "n_layers": 2,
            "d_model": _WIDTH,
            "subsampling_conv_channels": 8,
            "n_heads": 2,
            "conv_kernel_size": 7,
            **dict.fromkeys(("dropout", "dropout_emb", "dropout_att", "dropout_pre_encoder"), 0.0),
        },
    }


class NemoRecognizer(nn.Module):
    """The emulated parts of a recognizer: all but the log-mel front end.

    Args:
        model: ``EncDecCTCModel`` or ``EncDecRNNTModel``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = model.encoder, model.decoder
        self.joint = getattr(model, "joint", None)
        self.encoder.sync_max_audio_length = False

    def encode(self, features: Tensor) -> Tensor:
        """Encode features ``(batch, features, frames)`` as ``(batch, width, steps)``."""
        lengths = torch.full((len(features),), features.shape[-1])
        result: Tensor = self.encoder(audio_signal=features, length=lengths)[0]
        return result

    def predict(self, labels: Tensor) -> Tensor:
        """Compute the prediction network's outputs ``(batch, labels + 1, units)``."""
        result: Tensor = self.decoder.predict(labels, state=None, add_sos=True)[0]
        return result

    @override
    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Compute log probabilities; those of an RNN-T have axes of steps and of labels."""
        encoded = self.encode(features)
        if self.joint is None:
            return self.decoder(encoder_output=encoded)
        return self.joint.joint(encoded.transpose(1, 2), self.predict(labels))


def _recognizer(kind: str) -> nn.Module:
    """Make a recognizer with random weights."""
    from nemo.collections.asr.models import EncDecCTCModel, EncDecRNNTModel
    from omegaconf import OmegaConf

    package, settings = "nemo.collections.asr.modules.", _settings()
    if kind == "ctc":
        settings["decoder"] = {
            "_target_": f"{package}ConvASRDecoder",
            "feat_in": _WIDTH,
            "num_classes": _BLANK,
            "vocabulary": _ALPHABET,
        }
        return NemoRecognizer(EncDecCTCModel(cfg=OmegaConf.create(settings)))
    units = {"encoder_hidden": _WIDTH, "pred_hidden": _UNITS, "joint_hidden": _UNITS}
    settings["model_defaults"] = {"enc_hidden": _WIDTH, **units}
    settings["decoder"] = {
        "_target_": f"{package}RNNTDecoder",
        "vocab_size": _BLANK,
        "blank_as_pad": True,
        "prednet": {"pred_hidden": _UNITS, "pred_rnn_layers": 1, "t_max": None, "dropout": 0.0},
    }
    settings["joint"] = {
        "_target_": f"{package}RNNTJoint",
        "num_classes": _BLANK,
        "vocabulary": _ALPHABET,
        "jointnet": {**units, "activation": "relu", "dropout": 0.0},
    }
    settings["decoding"] = {"strategy": "greedy", "greedy": {"max_symbols": 5}}
    settings["loss"] = {"loss_name": "pytorch", "pytorch_kwargs": {}}
    return NemoRecognizer(EncDecRNNTModel(cfg=OmegaConf.create(settings)))


def _batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2, _FEATURES, _FRAMES), torch.randint(0, _BLANK, (2, 6))


_LABELS = _batch()[1]


def _ctc_loss(log_probabilities: Tensor) -> Tensor:
    """Compute the CTC loss of fixed labels from ``(batch, steps, labels)``."""
    steps = torch.full((2,), log_probabilities.shape[1])
    lengths = torch.full((2,), _LABELS.shape[1])
    return F.ctc_loss(log_probabilities.transpose(0, 1), _LABELS, steps, lengths, blank=_BLANK)


def _rnnt_loss(joint: Tensor) -> Tensor:
    """Compute the transducer loss of fixed labels from ``(batch, steps, labels + 1, labels)``."""
    from nemo.collections.asr.losses.rnnt import RNNTLoss

    loss = RNNTLoss(num_classes=_BLANK, loss_name="pytorch")
    steps, lengths = torch.full((2,), joint.shape[1]), torch.full((2,), _LABELS.shape[1])
    result: Tensor = loss(
        log_probs=joint, targets=_LABELS, input_lengths=steps, target_lengths=lengths
    )
    return result


_PROGRAMS = (
    ForeignProgram(
        lambda network, features: network.encode(features),
        lambda network, features, labels: (first(features),),
        "encoder",
    ),
    ForeignProgram(
        lambda network, labels: network.predict(labels),
        lambda network, features, labels: (first(labels),),
        "prediction network",
    ),
    ForeignProgram(
        lambda network, encoded, predicted: network.joint.joint(encoded, predicted),
        lambda network, features, labels: (
            network.encode(first(features)).transpose(1, 2).detach(),
            network.predict(first(labels)).detach(),
        ),
        "joint network",
    ),
)

#: Whether they can be made here.
HAS_NEMO = find_spec("nemo") is not None
NEMO: dict[str, ForeignModule] = {
    "nemo_ctc": ForeignModule(
        "Conformer CTC", "NeMo", lambda: _recognizer("ctc"), _batch, _ctc_loss
    ),
    "nemo_rnnt": ForeignModule(
        "Conformer RNN-T",
        "NeMo",
        lambda: _recognizer("rnnt"),
        _batch,
        _rnnt_loss,
        programs=_PROGRAMS,
        warmup_steps=60,
    ),
}
