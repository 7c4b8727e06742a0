"""A trained recognizer on its way to the chip: programs, what the chip recognizes, what it costs.

    python -m recipes.deploy ckpt=runs/an4_rnnt_finetune/seed1/checkpoints/last.ckpt
    python -m recipes.deploy ckpt=recipes/pretrained/an4_rnnt.safetensors

Exports encoder, predictor and joint network, decodes the test set through them on LiteRT's
reference kernels, compares every output with the emulation, and asks Vela for memory and time. A
checkpoint that was trained on the chip brings its ranges and the methods that chose its weights; a
float one is calibrated on training batches first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from lightning_nna import emulate
from lightning_nna.callbacks import NNAEmulation
from lightning_nna.deploy import TFLiteModel, VelaReport, vela_report, write_report
from lightning_nna.emulation.attachment import attached
from lightning_nna.weights.method import WeightMethod
from recipes.asr.batches import Batch
from recipes.asr.beam import beam_decode
from recipes.asr.data import SpeechDataModule
from recipes.asr.decoding import Decodable, greedy_decode
from recipes.asr.deployed import DeployedTransducer, export_transducer
from recipes.asr.recognizer import TransducerRecognizer, transducer_loss
from recipes.asr.scoring import word_errors
from recipes.asr.vocabulary import BLANK
from recipes.evaluate import put_on_chip, recipe_of
from recipes.run_folder import provenance, size_of, weight_figures, write_summary
from recipes.settings import METHOD_SETTINGS, check_settings
from recipes.train import build_recognizer, score_test
from recipes.weights import TrainedWeights, load_weights

_log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../conf", config_name="deploy")
def main(config: DictConfig) -> None:
    """Run :func:`deploy` and print what it found."""
    _log.info("\n%s", table(deploy(config)))


@dataclass
class Comparison:
    """The deployed recognizer beside the emulated one, on the same utterances.

    Args:
        outputs: Activations that left a program.
        equal_outputs: How many of them the emulation has, in every bit.
        loss: Negative log-likelihood of all references through the programs, nats.
        labels: Labels of the references.
        hypotheses: What was recognized, by utterance.
        references: What was said.
    """

    outputs: int
    equal_outputs: int
    loss: float
    labels: int
    hypotheses: dict[str, str]
    references: dict[str, str]


def deploy(config: DictConfig) -> dict[str, Any]:
    """Export ``config.ckpt`` and measure it as ``config`` says.

    Args:
        config: The composed configuration ``deploy`` of ``conf/``.

    Returns:
        What ``summary.json`` in the run folder holds. The programs are in ``programs`` beside it,
        and ``report.html`` and ``report.csv`` have every weight.

    Raises:
        FileNotFoundError: If ``ckpt`` does not exist.
        ValueError: If ``ckpt`` was not written by ``recipes.train``, or the network has no program.
        VelaError: If Vela is missing or refuses a program.
    """
    check_settings(config, "deploy")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    weights = load_weights(config.ckpt)
    check_asked(weights, config)
    recipe = recipe_of(weights, config)
    datamodule = instantiate(recipe.data)
    recognizer = build_recognizer(recipe, datamodule, weights)
    in_float = _scored(recognizer, datamodule, []) if config.score_float else None
    callbacks = chip_callbacks(weights, config)
    emulation = next(c for c in callbacks if isinstance(c, NNAEmulation))
    batches = config.calibration_batches
    put_on_chip(recognizer, datamodule, emulation, weights, batches=batches)
    emulated = _scored(recognizer, datamodule, callbacks)
    transcripts = dict(recognizer.hypotheses)
    figures = weight_figures(recognizer)
    recognizer.eval()
    run_dir = Path(config.run_dir)
    models = export_transducer(recognizer, run_dir / "programs", chunk_steps=config.chunk_steps)
    deployed = DeployedTransducer(run_dir / "programs")
    found = compare(recognizer, deployed, datamodule.test_dataloader())
    speech = speed(recognizer, run_dir / "programs", datamodule)
    compiled = [compile_for(models, *system) for system in config.systems]
    reports = [cost(parts, speech["calls_per_second"]) for parts in compiled]
    write_report(recognizer, run_dir, list(compiled[0].values()) if compiled else [])
    summary = {
        "ckpt": str(config.ckpt),
        "experiment": recipe.name,
        "method": _method(weights),
        **provenance(recipe.seed),
        **size_of(recognizer.model),
        "threads": torch.get_num_threads(),
        **_deployed_figures(found, transcripts),
        "float": in_float,
        "emulated": emulated,
        **figures,
        "tflite_bytes": sum(model.size_bytes for model in models.values()),
        "programs": {part: model.size_bytes for part, model in models.items()},
        **speech,
        "systems": reports,
    }
    write_summary(run_dir, summary)
    return summary


def check_asked(weights: TrainedWeights, config: DictConfig) -> None:
    """Raise if ``config`` asks for another method than a checkpoint was trained with.

    Raises:
        ValueError: If the checkpoint was trained emulated, so that it brings its own methods, and
            ``compression``, ``nna`` or a setting of theirs differs from them.
    """
    trained = (weights.recipe.get("callbacks") or {}).get("nna")
    if not trained:
        return
    method, spec = str(weights.recipe.get("method")), trained.get("spec")
    asked = {"compression": config.method, "nna": config.nna.spec}
    held = {"compression": method, "nna": spec}
    # What a command has without asking for it.
    unasked: dict[str, Any] = {"compression": "nna8", "nna": "litert-int8"}
    for key in METHOD_SETTINGS:
        asked[key], held[key] = config.get(key), weights.recipe.get(key)
        unasked[key] = None
    for key, value in asked.items():
        if value not in (unasked[key], held[key]):
            raise ValueError(
                f"{key}={value} is not used: {config.ckpt} was trained with {key}={held[key]}, and "
                "is deployed so; leave it out, or deploy a float checkpoint"
            )


def chip_callbacks(weights: TrainedWeights, config: DictConfig) -> list[Callback]:
    """The chip and the weight methods that a checkpoint was trained with, with their state.

    A checkpoint that was not trained on the chip takes those of ``config.callbacks``.
    """
    trained = weights.recipe.get("callbacks") or {}
    nodes = (
        trained if trained.get("nna") else OmegaConf.to_container(config.callbacks, resolve=True)
    )
    assert isinstance(nodes, Mapping)
    callbacks = []
    for node in nodes.values():
        if not node or not str(node.get("_target_", "")).startswith("lightning_nna.callbacks."):
            continue
        callback = instantiate(_found(dict(node), Path(config.ckpt)))
        if not isinstance(callback, (NNAEmulation, WeightMethod)):
            continue
        if callback.state_key in weights.callbacks and isinstance(callback, WeightMethod):
            callback.load_state_dict(weights.callbacks[callback.state_key])
        callbacks.append(callback)
    return callbacks


def _found(node: dict[str, Any], ckpt: Path) -> dict[str, Any]:
    """A node whose file of bits is looked for where the checkpoint was trained, too."""
    path = node.get("overrides")
    if isinstance(path, str) and not Path(path).exists():
        places = [parent / path for parent in ckpt.resolve().parents]
        node["overrides"] = str(next((p for p in places if p.exists()), path))
    return node


def compare(
    recognizer: TransducerRecognizer, deployed: DeployedTransducer, batches: Any
) -> Comparison:
    """Score and decode batches through the programs, and compare every output.

    Args:
        recognizer: On the chip.
        deployed: Its programs.
        batches: Of the test set.
    """
    found = Comparison(0, 0, 0.0, 0, {}, {})
    for batch in tqdm(batches, desc="through the programs", delay=2):
        theirs = _outputs(recognizer, recognizer.model, batch)
        ours = _outputs(None, deployed, batch)
        steps = ours[3]
        for kind, (mine, other) in enumerate(zip(ours[:3], theirs[:3], strict=True)):
            valid = _valid(batch, steps, kind, mine.shape)
            found.outputs += int(valid.sum())
            found.equal_outputs += int(((mine == other[:, : mine.shape[1]]) & valid).sum())
        loss = transducer_loss(ours[2], batch.targets, steps, batch.target_lengths)
        found.loss += float(loss)
        found.labels += int(batch.target_lengths.sum())
        features, width = batch.features, recognizer.beam_width
        if width == 1:
            labels = greedy_decode(deployed, features, batch.feature_lengths)
        else:
            labels = beam_decode(deployed, features, batch.feature_lengths, beam_width=width)
        texts = [recognizer.vocabulary.decode(sequence) for sequence in labels]
        found.hypotheses.update(zip(batch.ids, texts, strict=True))
        found.references.update(zip(batch.ids, batch.texts, strict=True))
    return found


@torch.no_grad()
def _outputs(
    recognizer: TransducerRecognizer | None, model: Decodable, batch: Batch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encodings, predictions, logits of every pair, and the steps of each utterance."""
    if recognizer is not None:
        emulator = attached(recognizer)
        assert emulator is not None
        with emulate(recognizer, emulator.spec, targets=emulator.targets):
            return _outputs(None, model, batch)
    encodings, steps = model.transcribe(batch.features, batch.feature_lengths)
    start = torch.full_like(batch.targets[:, :1], BLANK)
    labels = torch.cat([start, batch.targets], dim=1)
    predictions, _, _ = model.predict(labels, batch.target_lengths + 1, None)
    logits, _, _ = model.join(encodings, steps, predictions, batch.target_lengths + 1)
    return encodings, predictions, logits, steps


def _valid(batch: Batch, steps: Tensor, kind: int, shape: Sequence[int]) -> Tensor:
    """Which elements of encodings, predictions or logits belong to the sound and its labels."""
    sounds = torch.arange(int(steps.max())) < steps[:, None]
    labels = torch.arange(batch.targets.shape[1] + 1) <= batch.target_lengths[:, None]
    if kind == 0:
        return sounds[:, :, None].expand(*shape)
    if kind == 1:
        return labels[:, :, None].expand(*shape)
    return (sounds[:, :, None] & labels[:, None, :])[..., None].expand(*shape)


def speed(
    recognizer: TransducerRecognizer, folder: Path, datamodule: SpeechDataModule
) -> dict[str, Any]:
    """How long LiteRT's fast kernels take for a second of speech, greedily, and what they run."""
    fast = DeployedTransducer(folder, optimized=True)
    seconds = spent = 0.0
    for batch in datamodule.test_dataloader():
        began = time.perf_counter()
        greedy_decode(fast, batch.features, batch.feature_lengths)
        spent += time.perf_counter() - began
        seconds += float(batch.feature_lengths.sum()) * datamodule.log_mel.hop_ms / 1000
    return {
        "speech_seconds": seconds,
        "real_time_factor": spent / seconds,
        "calls_per_second": {part: count / seconds for part, count in fast.calls.items()},
    }


def compile_for(
    models: Mapping[str, TFLiteModel], accelerator: str, system: str, memory_mode: str
) -> dict[str, VelaReport]:
    """What Vela says of each program; see :func:`.vela_report`."""
    return {
        part: vela_report(
            model.path, accelerator=accelerator, system=system, memory_mode=memory_mode
        )
        for part, model in models.items()
    }


def cost(parts: Mapping[str, VelaReport], calls_per_second: Mapping[str, float]) -> dict[str, Any]:
    """What Vela says of the programs, all together, for a second of speech.

    Args:
        parts: Of each program, for one system.
        calls_per_second: How often each runs in a second of speech.
    """
    reports = parts.values()
    first = next(iter(reports))
    return {
        "accelerator": first.accelerator,
        "system": first.system,
        "memory_mode": first.memory_mode,
        "encoded_bytes": sum(report.encoded_bytes for report in reports),
        "memory_bytes": sum(report.memory_bytes for report in reports),
        "sram_bytes": max(report.sram_bytes for report in reports),
        "inference_ms": sum(parts[p].inference_ms * calls_per_second.get(p, 0.0) for p in parts),
        "part_ms": {part: report.inference_ms for part, report in parts.items()},
        "bound": {
            part: "bandwidth" if report.is_bandwidth_bound else "computation"
            for part, report in parts.items()
        },
        "cpu_operators": sorted(name for report in reports for name in report.cpu_operators),
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary as text."""
    lines = [f"{'':20}{'WER':>8}{'nats per label':>16}"]
    rows = [("float", summary["float"]), ("on the chip, emulated", summary["emulated"])]
    for name, figures in [*rows, ("deployed, LiteRT", summary)]:
        if figures is not None:
            rate, loss = 100 * figures["wer"], figures["loss_per_token"]
            lines.append(f"{name:22}{rate:5.2f} %{loss:16.4f}")
    lines.append(
        f"outputs equal {summary['equal_outputs']:.6%} of {summary['outputs']}, transcripts "
        f"{summary['equal_transcripts']:.2%} of {summary['utterances']}"
    )
    sizes = ", ".join(f"{part} {size}" for part, size in summary["programs"].items())
    lines.append(f"programs {summary['tflite_bytes']} bytes ({sizes})")
    lines.append(f"real-time factor on this CPU {summary['real_time_factor']:.4f}")
    for report in summary["systems"]:
        lines.append(
            f"{report['accelerator']}, {report['system']}: weights {report['encoded_bytes']} bytes,"
            f" memory {report['memory_bytes']} bytes, {report['inference_ms']:.1f} ms per second of"
            f" speech; on the CPU: {', '.join(report['cpu_operators']) or 'nothing'}"
        )
    return "\n".join(lines)


def _scored(
    recognizer: TransducerRecognizer, datamodule: SpeechDataModule, callbacks: list[Callback]
) -> dict[str, Any]:
    """Figures of the test set."""
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, callbacks=callbacks)
    return score_test(trainer, recognizer, datamodule)


def _deployed_figures(found: Comparison, emulated: Mapping[str, str]) -> dict[str, Any]:
    ids = sorted(found.hypotheses)
    score = asdict(
        word_errors([found.hypotheses[k] for k in ids], [found.references[k] for k in ids])
    )
    same = sum(found.hypotheses[k] == emulated[k] for k in ids)
    return {
        "wer": score["rate"],
        "wer_low": score["low"],
        "wer_high": score["high"],
        "errors": score["errors"],
        "words": score["words"],
        "loss_per_token": found.loss / found.labels,
        "outputs": found.outputs,
        "equal_outputs": found.equal_outputs / found.outputs,
        "utterances": len(ids),
        "equal_transcripts": same / len(ids),
    }


def _method(weights: TrainedWeights) -> str:
    trained = str(weights.recipe.get("method", "float"))
    return "chip" if trained == "float" else trained


if __name__ == "__main__":
    main()
