"""The networks of the demo: how each is trained, scored and deployed, in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from lightning_nna import calibrate, emulate
from recipes.deploy import deploy
from recipes.evaluate import evaluate
from recipes.program import composed
from recipes.side_by_side import advance
from recipes.train import train

#: Float recognizer that a checkout has.
START = Path("recipes/pretrained/commands_rnnt.safetensors")
_SYSTEM = "[ethos-u55-128,Ethos_U55_High_End_Embedded,Shared_Sram]"
#: Runtimes whose integers the programs have, by preset. They compute LSTMs differently, so each
#: runtime gets programs of its own, of the same weights.
_PRESETS = {"tflm-int8": "TFLite-Micro", "litert-int8": "LiteRT"}
# Amounts of work, in training steps that take as long.
_SCORE_WORK, _DEPLOYMENT_WORK = 200.0, 300.0
_QUIET = (
    "threads=1",
    "trainer.enable_progress_bar=false",
    "trainer.limit_val_batches=0",
    "~callbacks.progress",
    "+callbacks.steps._target_=recipes.side_by_side.StepProgress",
)


@dataclass(frozen=True)
class Scale:
    """Size of the demo: its data, and how long it trains.

    Attributes:
        data: Overrides of the data of all runs, without signs.
        epochs: Epochs of a fine-tuning.
        epoch_batches: Batches of each of them.
        fine_tuning: Further overrides of every fine-tuning.
        float_training: Overrides of the training of the float recognizer.
        compared_batches: Batches of the test set whose outputs are compared.
    """

    data: tuple[str, ...]
    epochs: int
    epoch_batches: int
    fine_tuning: tuple[str, ...] = ()
    float_training: tuple[str, ...] = ()
    compared_batches: int = 3


#: The start was trained on 8,000 utterances, of which these are the first.
SCALE = Scale(
    data=("data.train_size=3000", "data.validation_size=50", "data.test_size=2000"),
    epochs=4,
    epoch_batches=240,
)


@dataclass(frozen=True)
class Network:
    """A form of the recognizer.

    Attributes:
        title: Name in the table and the figure.
        training: Overrides of ``recipes.train`` that train it; none for the float weights.
        chip: Settings of the accelerator that differ from the preset's, as ``weight_bits:4``.
        is_float: Whether it runs in float, on a CPU.
    """

    title: str
    training: tuple[str, ...] = ()
    chip: str = ""
    is_float: bool = False

    def spec(self, preset: str) -> str:
        """Return the override of the accelerator, with the integers of a preset.

        Example:
            >>> Network("4 bits", chip="weight_bits:4").spec("tflm-int8")
            'nna.spec={preset:tflm-int8,weight_bits:4}'
        """
        return f"nna.spec={{{','.join(filter(None, [f'preset:{preset}', self.chip]))}}}"


#: A chip with 4-bit weights and one scale for each tensor, which costs accuracy.
_CHIP = "weight_bits:4,weight_granularity:per_tensor"
NETWORKS = {
    "float": Network("float", is_float=True),
    "int8": Network("8 bits, untrained"),
    "chip": Network("4-bit chip, untrained", chip=_CHIP),
    "chip_trained": Network("4-bit chip, trained for it", ("compression=nna8",), _CHIP),
    "gq4": Network("General Quantizer, 4 bits", ("compression=gq", "bits=4")),
    "gq2": Network("General Quantizer, 2 bits", ("compression=gq", "bits=2")),
    "csp4": Network(
        "80 % zeros (CSP) and 4 bits", ("compression=csp_codebook", "bits=4", "sparsity=0.8")
    ),
}
#: Network whose report compares it with the float weights, and whose firmware is written.
SHOWN = "csp4"


def checkpoint(run_dir: Path) -> Path:
    """Return the path of a finished run's checkpoint."""
    return run_dir / "checkpoints" / "last.ckpt"


def prepare_data(scale: Scale) -> None:
    """Synthesize the speech and compute its features, once for all networks.

    Args:
        scale: Size of the demo.
    """
    instantiate(composed("train", ["experiment=commands_finetune", *scale.data]).data).setup()


class _Layers(nn.Module):
    """The layers of the recognizer, small."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.output = nn.Linear(8, 8)

    def forward(self, labels: Tensor) -> Tensor:
        embedded = self.embedding(labels)
        encodings = self.output(self.lstm(embedded)[0])
        return cast("Tensor", self.output(torch.tanh(encodings.unsqueeze(2) + embedded[:, None])))


def compile_kernels() -> None:
    """Compile the kernels of this processor, once for all networks; they are cached then."""
    labels = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(0))
    for fidelity in ("fast", "exact"):
        layers = _Layers()
        calibrate(layers, [labels])
        with emulate(layers, fidelity=fidelity):
            layers(labels).sum().backward()
        layers.eval()
        with emulate(layers, fidelity=fidelity), torch.no_grad():
            layers(labels)


def train_float(folder: Path, scale: Scale) -> dict[str, Any]:
    """Train the float recognizer as the one that the checkout has was trained.

    Args:
        folder: Run folder.
        scale: Size of the demo.

    Returns:
        Summary of the run, without a test.
    """
    settings = ["experiment=commands", "seed=1", "test=false", *_QUIET, *scale.float_training]
    return train(composed("train", [*settings, f"run_dir={folder}"]))


def work_of(name: str, scale: Scale) -> float:
    """Return the work of :func:`measure`, in training steps that take as long.

    Args:
        name: Key of :data:`NETWORKS`.
        scale: Size of the demo.
    """
    network = NETWORKS[name]
    if network.is_float:
        return _SCORE_WORK
    training = scale.epochs * scale.epoch_batches if network.training else 0
    return training + len(_PRESETS) * _DEPLOYMENT_WORK


def measure(name: str, start: Path, folder: Path, scale: Scale) -> dict[str, Any]:
    """Train a network if it is trained, score it on the test set, and deploy it on two runtimes.

    Args:
        name: Key of :data:`NETWORKS`.
        start: Float weights.
        folder: Folder of its runs.
        scale: Size of the demo.

    Returns:
        ``title``; ``wer`` with ``wer_low``, ``wer_high`` (fractions) and ``words`` of the whole
        test set; ``packed_bytes``, ``bits`` and ``sparsity`` of the weights; ``memory_bytes`` and
        ``inference_ms`` for a second of speech by Vela, None without an estimate; ``runtimes``,
        with ``outputs``, ``equal_outputs``, ``utterances`` and ``wer`` for each; ``seconds``.
    """
    began = time.monotonic()
    network = NETWORKS[name]
    data = [f"++{each}" for each in scale.data]
    if network.is_float:
        settings = [f"ckpt={start}", "threads=1", *data, f"run_dir={folder}"]
        scored = evaluate(composed("evaluate", settings))
        return _row(network, scored, {}, time.monotonic() - began)
    ckpt = start
    if network.training:
        settings = ["experiment=commands_finetune", f"init_from={start}", "test=false", *_QUIET]
        settings += [*network.training, network.spec("tflm-int8"), *scale.data]
        settings += [f"trainer.max_epochs={scale.epochs}", *scale.fine_tuning]
        settings += [f"trainer.limit_train_batches={scale.epoch_batches}"]
        train(composed("train", [*settings, f"run_dir={folder}"]))
        ckpt = checkpoint(folder)
    deployed: dict[str, dict[str, Any]] = {}
    for preset, runtime in _PRESETS.items():
        is_first = not deployed
        # Vela has no wheel for the newest Pythons; the programs are the same without it.
        systems = _SYSTEM if is_first and find_spec("ethosu") else ""
        settings = [f"ckpt={ckpt}", "threads=1", *data, network.spec(preset)]
        settings += [f"compared_batches={scale.compared_batches}", "runtimes=[]"]
        settings += [f"systems=[{systems}]", f"score_float={is_first and name == SHOWN}"]
        settings += [f"target={'tflm' if is_first and name == SHOWN else 'null'}"]
        settings += [f"recalibrate={bool(network.training) and not is_first}"]
        settings += [f"run_dir={folder / ('deployed' if is_first else preset)}"]
        deployed[runtime] = deploy(composed("deploy", settings))
        advance(_DEPLOYMENT_WORK)
    first = next(iter(deployed.values()))
    return _row(network, first, deployed, time.monotonic() - began)


def _row(
    network: Network,
    summary: Mapping[str, Any],
    deployed: Mapping[str, Mapping[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """Return what the table has of a network, from its first summary and those of the runtimes."""
    names = ("wer", "wer_low", "wer_high", "words", "packed_bytes", "bits", "sparsity")
    systems = summary.get("systems") or [{}]
    return {
        "title": network.title,
        **{key: summary[key] for key in names},
        **{key: systems[0].get(key) for key in ("memory_bytes", "inference_ms")},
        "runtimes": {
            runtime: {
                "wer": each["wer"],
                "outputs": each["outputs"],
                "equal_outputs": each["checks"][0]["equal_outputs"],
                "utterances": each["utterances"],
            }
            for runtime, each in deployed.items()
        },
        "seconds": round(seconds, 1),
    }
