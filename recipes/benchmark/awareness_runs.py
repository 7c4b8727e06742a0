"""Runs of the study of accelerator-aware training: two recognizers and a keyword spotter."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_nna import calibrate, emulate
from lightning_nna.callbacks import NNAEmulation
from lightning_nna.deploy import Program, export_tflite
from lightning_nna.emulation.attachment import attached
from lightning_nna.emulation.spec import NNASpec
from lightning_nna.files import whole_file
from recipes.asr.adapter import TransducerAdapter
from recipes.benchmark.exported import export_checkpoint
from recipes.benchmark.grid import Run
from recipes.benchmark.recipe_runs import (
    AVERAGE,
    COMMANDS_CONFORMER,
    SEEDS,
    STARTS,
    Start,
    evaluation,
    pack_errors,
    packed_errors,
    summary_of,
    training,
)
from recipes.benchmark.rows import Row
from recipes.keywords.data import KeywordData
from recipes.keywords.network import KeywordNetwork, folded_weights
from recipes.keywords.spotter import KeywordSpotter
from recipes.preparation import rebuild
from recipes.weights import load_weights

RUNS = Path("runs/awareness")


@dataclass(frozen=True)
class Chip:
    """An accelerator of the study.

    Attributes:
        title: Name in tables.
        settings: Fields of its spec, with the preset that the others come from.
        has_program: Whether a runtime computes its arithmetic, so that programs can be compared.
    """

    title: str
    settings: Mapping[str, Any]
    has_program: bool = True

    @property
    def spec(self) -> NNASpec:
        """Spec of the accelerator."""
        return NNASpec.from_mapping(self.settings)

    @property
    def override(self) -> str:
        """Override of the recipes that selects it.

        Example:
            >>> Chip("4 bits", {"preset": "tflm-int8", "weight_bits": 4}).override
            'nna.spec={preset:tflm-int8,weight_bits:4}'
        """
        settings = ",".join(f"{key}:{value}" for key, value in self.settings.items())
        return f"nna.spec={{{settings}}}"


_TFLM: Mapping[str, Any] = {"preset": "tflm-int8"}
CHIPS: dict[str, Chip] = {
    "int8": Chip("8 bits, `tflm-int8`", _TFLM),
    "per_tensor": Chip("one weight scale a tensor", {**_TFLM, "weight_granularity": "per_tensor"}),
    "weights4": Chip("4-bit weights", {**_TFLM, "weight_bits": 4}),
    "weights4_per_tensor": Chip(
        "4-bit weights, one scale a tensor",
        {**_TFLM, "weight_bits": 4, "weight_granularity": "per_tensor"},
    ),
    "shift": Chip("`shift`", {"preset": "shift"}, has_program=False),
    "accumulator16": Chip(
        "16-bit accumulators",
        {**_TFLM, "accumulator_bits": 16, "accumulator_overflow": "saturate"},
        has_program=False,
    ),
}
#: Titles of the networks.
MODELS = {
    "rnnt": "RNN-T",
    "conformer": "Conformer",
    "conformer_long": "Conformer, trained 3 times as long",
    "keywords": "keyword spotter",
}
#: Folder of the float training of the Conformer that trains three times as long, for its outliers.
_LONG = RUNS / "conformer_long" / "float_start"
_LONG_EPOCHS = 30
#: Float recognizers that all runs start from.
RECOGNIZERS = {
    **STARTS,
    "conformer_long": replace(
        COMMANDS_CONFORMER,
        title="commands, Conformer, trained 3 times as long",
        weights=_LONG / "checkpoints" / "last.ckpt",
    ),
}
#: Titles of the methods, in the order in which they run.
METHODS = {
    "float": "float",
    "untrained": "emulated, untrained",
    "control": "fine-tuned in float, then emulated",
    "trained": "emulated, trained",
    "averaged": "emulated, trained, averaged weights",
}


@dataclass(frozen=True)
class Budget:
    """A training of the keyword spotter.

    Attributes:
        total_steps: Number of optimizer steps.
        learning_rate: Largest learning rate.
    """

    total_steps: int
    learning_rate: float


#: Optimizer steps of a fine-tuning.
STEPS = {"rnnt": 480, "conformer": 240, "conformer_long": 240, "keywords": 93}
#: Batches of a test are large: exact arithmetic does not depend on it.
_LARGE_BATCHES = "data.scoring_batch_seconds=400"
#: Batches of the test set whose outputs are compared with the programs'.
_COMPARED_BATCHES = 1
#: Float training of the keyword spotter, and its fine-tuning.
_FLOAT = Budget(total_steps=1860, learning_rate=1e-2)
#: Selected on the validation words with accumulators of 16 bits: 1e-3 learns less.
_FINE_TUNING = Budget(total_steps=STEPS["keywords"], learning_rate=3e-3)
#: Batches that calibrate the keyword spotter.
_CALIBRATION_STEPS = 16


@dataclass(frozen=True)
class AwarenessRun(Run):
    """One network on one accelerator.

    Attributes:
        model: A key of :data:`MODELS`.
        chip: A key of :data:`CHIPS`, or ``"none"`` in float.
        method: A key of :data:`METHODS`.
        seed: Seed of the fine-tuning; 1 where nothing is trained.
    """

    model: str
    chip: str
    method: str
    seed: int

    @property
    def folder(self) -> Path:
        """Run folder of the scores."""
        return RUNS / self.model / f"{self.chip}_{self.method}" / f"seed{self.seed}"

    @property
    def accelerator(self) -> Chip:
        """Accelerator of the run."""
        return CHIPS[self.chip]

    def rows(self) -> Iterator[Row]:
        """Run, and yield the row."""
        torch.set_num_threads(self.threads or 1)
        begun = time.process_time()
        measured = self.measured()
        seconds = round(time.process_time() - begun, 1)
        yield {**self.keys[0], **measured, "cpu_seconds": seconds, "threads": self.threads}

    @property
    def has_program(self) -> bool:
        """Whether the network is exported, and its programs are compared: that of one seed is."""
        is_first = self.method == "trained" and self.seed == SEEDS[0]
        return is_first and self.accelerator.has_program

    def measured(self) -> Row:
        """Fine-tune if the method does, and return what was measured on the test set."""
        raise NotImplementedError


class RecognizerRun(AwarenessRun):
    """A recognizer of spoken commands."""

    @property
    def start(self) -> Start:
        """Float recognizer that all runs start from."""
        return RECOGNIZERS[self.model]

    def prepare(self) -> None:
        """Train the float weights that are not in the repository."""
        if self.model == "conformer_long":
            settings = ["experiment=commands_conformer", "seed=1", "beam_width=1"]
            settings += [f"trainer.max_epochs={_LONG_EPOCHS}", f"hydra.run.dir={_LONG}"]
            summary_of(_LONG, ["recipes.train", *settings], threads=self.threads)

    @property
    def trained_folder(self) -> Path:
        """Run folder of the fine-tuning; the one in float is shared by all accelerators."""
        if self.method == "control":
            return RUNS / self.model / "float_training" / f"seed{self.seed}"
        return self.folder

    @property
    def training_command(self) -> list[str]:
        """Module and overrides of the fine-tuning; one in float is scored by :attr:`command`."""
        settings = ["compression=nna8", self.accelerator.override, _LARGE_BATCHES]
        if self.method == "control":
            settings = ["test=false"]
        if self.method == "averaged":
            settings.append(AVERAGE)
        steps = STEPS[self.model]
        return training(self.seed, self.trained_folder, *settings, start=self.start, steps=steps)

    @property
    def command(self) -> list[str]:
        """Module and overrides of the run that has the scores."""
        if self.method in ("trained", "averaged"):
            return self.training_command
        checkpoint = self.trained_folder / "checkpoints" / "last.ckpt"
        is_trained = self.method == "control"
        start = replace(self.start, weights=checkpoint) if is_trained else self.start
        emulated = ["compression=nna8", self.accelerator.override] if self.chip != "none" else []
        # Batches that calibrate have utterances of all lengths.
        settings = [*emulated, _LARGE_BATCHES, "+data.curriculum_epochs=0"]
        return evaluation(self.folder, *settings, start=start)

    def measured(self) -> Row:
        """Fine-tune if the method does, and return what was measured on the test set."""
        trained: Mapping[str, Any] = {}
        if self.method == "control":
            command = self.training_command
            trained = summary_of(self.trained_folder, command, threads=self.threads)
        summary = summary_of(self.folder, self.command, threads=self.threads)
        names = ("wer", "wer_low", "wer_high", "loss_per_token", "commit")
        return {
            **{name: summary[name] for name in names},
            "utterance_errors": packed_errors(self.folder),
            "train_seconds": {**trained, **summary}.get("train_seconds"),
            **(self.program() if self.has_program else {}),
            **({"outliers": self.outliers()} if self.chip == "none" else {}),
        }

    def outliers(self) -> Row:
        """Measure the outliers of the float network on the first batch of the test set."""
        adapter = built(self.start)
        batch = next(iter(adapter.speech.test_dataloader()))
        recognizer = adapter.recognizer.eval()
        return outlier_ratios(recognizer, lambda: recognizer.decode(batch))

    def program(self) -> Row:
        """Export the three programs, and compare them on batches of the test set."""
        checkpoint = self.trained_folder / "checkpoints" / "last.ckpt"
        _, models, deployed, _, comparison = export_checkpoint(
            checkpoint, self.folder / "programs", batches=_COMPARED_BATCHES
        )
        return {
            "runtime": deployed.programs["joint"].runtime.title,
            "outputs": comparison.outputs,
            "equal_outputs": comparison.equal_outputs,
            "utterances": len(comparison.references),
            "tflite_bytes": sum(model.size_bytes for model in models.values()),
        }


class KeywordRun(AwarenessRun):
    """The keyword spotter."""

    def measured(self) -> Row:
        """Train what is not trained yet, and return what was measured on the test set."""
        data = KeywordData(seed=self.seed)
        data.setup()
        torch.manual_seed(SEEDS[0])
        network = KeywordNetwork(len(data.labels))
        train_once(network, RUNS / "keywords" / "float.safetensors", _FLOAT, seed=SEEDS[0])
        seconds = None
        if self.method == "control":
            path = RUNS / "keywords" / "control" / f"seed{self.seed}.safetensors"
            seconds = train_once(network, path, _FINE_TUNING, seed=self.seed)
        spotter = _spotter(network, data, _FINE_TUNING)
        callbacks: list[Callback] = []
        if self.chip != "none":
            spec, targets = self.accelerator.spec, ["network"]
            emulation = NNAEmulation(
                spec, targets=targets, calibration_steps=_CALIBRATION_STEPS, fidelity="fast"
            )
            callbacks = [emulation]
            if self.method != "trained":
                batches = itertools.islice(data.train_dataloader(), _CALIBRATION_STEPS)
                calibrate(spotter, [batch[0] for batch in batches], spec=spec, targets=targets)
        if self.method == "trained":
            seconds = _fit(spotter, data, callbacks, _FINE_TUNING, self.seed)
        metrics = _trainer(callbacks).test(spotter, data, verbose=False)[0]
        errors = spotter.errors
        return {
            "wer": sum(errors) / len(errors),
            "loss_per_token": metrics["test/loss"],
            "utterance_errors": pack_errors(errors),
            "train_seconds": seconds,
            **(_program_of(spotter, data, self.folder) if self.has_program else {}),
            **({"channel_ratios": channel_ratios(network)} if self.chip == "none" else {}),
        }


def built(start: Start) -> TransducerAdapter:
    """Build a float recognizer, with the data of its recipe.

    Args:
        start: Recognizer.
    """
    adapter = rebuild(load_weights(start.weights), OmegaConf.create({"data": {}})).adapter
    assert isinstance(adapter, TransducerAdapter)
    return adapter


def outlier_ratios(module: nn.Module, forward: Callable[[], object]) -> dict[str, list[float]]:
    """Divide the largest value by the root mean square, for linear and convolution layers.

    Args:
        module: Module with the layers.
        forward: Function that runs the module.

    Returns:
        Ratios of the layers that ran, in the order of ``named_modules``: of their ``"weights"`` and
        of their ``"inputs"``, of all calls together.

    Example:
        >>> layer = nn.Linear(4, 1)
        >>> layer.weight.data = torch.tensor([[1.0, -1.0, 1.0, 7.0]])
        >>> outlier_ratios(nn.Sequential(layer), lambda: layer(torch.ones(2, 4)))
        {'weights': [1.9], 'inputs': [1.0]}
    """
    layers = [each for each in module.modules() if isinstance(each, (nn.Linear, nn.Conv1d))]
    # Of each call the largest magnitude, the sum of the squares and their number.
    calls: dict[nn.Module, list[tuple[float, float, int]]] = {layer: [] for layer in layers}

    def observe(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].double()
        call = (float(values.abs().max()), float(values.square().sum()), values.numel())
        calls[layer].append(call)

    hooks = [layer.register_forward_pre_hook(observe) for layer in layers]
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    ratios: dict[str, list[float]] = {"weights": [], "inputs": []}
    for layer in layers:
        if not calls[layer]:
            continue
        weights = layer.weight.detach()
        ratios["weights"].append(
            round(float(weights.abs().max() / weights.square().mean() ** 0.5), 1)
        )
        largest, squares, counts = zip(*calls[layer], strict=True)
        ratios["inputs"].append(round(max(largest) / (sum(squares) / sum(counts)) ** 0.5, 1))
    return ratios


def train_once(network: KeywordNetwork, path: Path, budget: Budget, *, seed: int) -> float:
    """Train a spotter in float and store its weights, or read those that are stored.

    Args:
        network: Network to train, with the weights to start from.
        path: File of the trained weights.
        budget: Steps and learning rate.
        seed: Seed of the order and of the positions of the words.

    Returns:
        Seconds of the training.
    """
    if not path.exists():
        data = KeywordData(seed=seed)
        data.setup()
        seconds = _fit(_spotter(network, data, budget), data, [], budget, seed)
        with whole_file(path) as unfinished:
            save_file(network.state_dict(), unfinished, metadata={"train_seconds": str(seconds)})
    network.load_state_dict(load_file(path))
    with safe_open(path, framework="pt") as file:
        return float(file.metadata()["train_seconds"])


def channel_ratios(network: nn.Module) -> list[float]:
    """Divide the largest channel's range by the median one's, for each convolution.

    Args:
        network: Network of convolutions with batch norms, which are folded in.

    Example:
        >>> from recipes.keywords.network import convolution
        >>> layer = convolution(1, 3, 1).eval()
        >>> layer[0].weight.data = torch.tensor([1.0, 2.0, 8.0])[:, None, None, None]
        >>> channel_ratios(layer)
        [4.0]
    """
    ranges = [weights.detach().abs().amax(1) for weights in folded_weights(network)]
    return [round(float(each.max() / each.median()), 1) for each in ranges]


def _spotter(network: nn.Module, data: KeywordData, budget: Budget) -> KeywordSpotter:
    """Return a spotter with a network, and the optimizer of a budget."""
    return KeywordSpotter(
        network=lambda num_labels: network,
        labels=data.labels,
        optimizer=partial(torch.optim.AdamW, lr=budget.learning_rate, weight_decay=0.01),
        schedule=partial(
            torch.optim.lr_scheduler.OneCycleLR, max_lr=budget.learning_rate, pct_start=0.15
        ),
    )


def _fit(
    spotter: KeywordSpotter, data: KeywordData, callbacks: list[Callback], budget: Budget, seed: int
) -> float:
    """Train a spotter for the steps of a budget; return the seconds."""
    pl.seed_everything(seed, verbose=False)
    begun = time.monotonic()
    _trainer(callbacks, max_steps=budget.total_steps).fit(spotter, data)
    return round(time.monotonic() - begun, 1)


def _program_of(spotter: KeywordSpotter, data: KeywordData, folder: Path) -> Row:
    """Export an emulated spotter, and compare its logits of words of the test set."""
    emulator = attached(spotter)
    assert emulator is not None
    words = next(iter(data.test_dataloader()))[0]
    spotter.eval()
    model = export_tflite(spotter, [words[:1]], folder / "keywords.tflite")
    program = Program(model.path)
    outputs = program.run_all([[word[None]] for word in words])
    with torch.no_grad(), emulate(spotter, emulator.spec, targets=emulator.targets):
        expected = spotter(words).numpy()
    logits = np.concatenate([each[0] for each in outputs])
    return {
        "runtime": program.runtime.title,
        "outputs": logits.size,
        "equal_outputs": int((logits == expected).sum()),
        "utterances": len(words),
        "tflite_bytes": model.size_bytes,
    }


def _trainer(callbacks: list[Callback], **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=callbacks,
        gradient_clip_val=5.0,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
