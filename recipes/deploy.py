"""Deploy a trained recognizer: export its programs, score them, and estimate their cost.

    python -m recipes.deploy ckpt=runs/an4_rnnt_finetune/seed1/checkpoints/last.ckpt
    python -m recipes.deploy ckpt=recipes/pretrained/an4_rnnt.safetensors

Exports encoder, predictor and joint network, decodes the test set through them on the runtime that
the spec names, compares every output with the emulation, and compiles them with Vela for memory and
time. ``target=tflm`` and ``target=ethos-u55-128`` write what the firmware of a microcontroller
needs, too: the one with the default spec, the other with ``nna=ethos-u``. A checkpoint that was
trained emulated brings its ranges and its weight methods; a float one is calibrated on training
batches first. ``recalibrate=true nna=tosa-int8`` deploys one that was trained emulated on another
device than it was trained for: its weights stay, and its ranges are observed again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

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
from lightning_nna.emulation.spec import DEFAULT_PRESET, resolve_spec
from lightning_nna.weights.method import WeightMethod
from recipes.asr.batches import Batch
from recipes.asr.beam import beam_decode
from recipes.asr.data import SpeechDataModule
from recipes.asr.decoding import Decodable, greedy_decode
from recipes.asr.deployed import DeployedTransducer, export_firmware, export_transducer
from recipes.asr.recognizer import (
    TransducerRecognizer,
    score_references,
    transducer_losses,
)
from recipes.asr.rnnt import Encoder
from recipes.asr.scoring import word_errors
from recipes.evaluate import restore_or_calibrate
from recipes.preparation import prepare_process, rebuild
from recipes.program import as_program
from recipes.run_folder import provenance, size_of, weight_metrics, write_summary
from recipes.settings import METHOD_SETTINGS
from recipes.train import score_test
from recipes.weights import TrainedWeights, load_weights

_log = logging.getLogger(__name__)


@as_program("deploy")
def main(config: DictConfig) -> None:
    """Run :func:`deploy` and print its table."""
    _log.info("\n%s", table(deploy(config)))


@dataclass
class Comparison:
    """A deployed recognizer compared with the emulated one, on the same utterances.

    Args:
        outputs: Number of activations that the programs returned.
        equal_outputs: Number of them that equal the emulation in every bit.
        loss: Negative log-likelihood of all references through the programs, in nats.
        labels: Number of labels of the references.
        hypotheses: Recognized texts, by utterance id.
        references: Reference texts, by utterance id.
    """

    outputs: int
    equal_outputs: int
    loss: float
    labels: int
    hypotheses: dict[str, str]
    references: dict[str, str]


def deploy(config: DictConfig) -> dict[str, Any]:
    """Export ``config.ckpt``, score its programs, and estimate their cost.

    Args:
        config: Composed configuration ``deploy`` of ``recipes/conf``.

    Returns:
        Content of ``summary.json`` in the run folder. The folder also has the programs in
        ``programs``, and every weight in ``report.html`` and ``report.csv``.

    Raises:
        FileNotFoundError: If ``ckpt`` does not exist.
        ValueError: If ``ckpt`` was not written by ``recipes.train``, or the network has no program.
        VelaError: If Vela is missing or does not compile a program.
    """
    prepare_process(config, "deploy")
    weights = load_weights(config.ckpt)
    if config.recalibrate:
        weights = for_spec(weights, config.nna.spec)
    check_method(weights, config)
    check_target(weights, config)
    recipe, datamodule, recognizer = rebuild(weights, config)
    float_score = _score(recognizer, datamodule, []) if config.score_float else None
    callbacks = trained_callbacks(weights, config)
    emulation = next(c for c in callbacks if isinstance(c, NNAEmulation))
    batches = config.calibration_batches
    restore_or_calibrate(recognizer, datamodule, emulation, weights, batches=batches)
    frames = utterance_frames(recognizer, datamodule, config.utterance_frames)
    emulated_score = _score(recognizer, datamodule, callbacks)
    transcripts = {id_: each.hypothesis for id_, each in recognizer.tested.items()}
    metrics = weight_metrics(recognizer)
    recognizer.eval()
    run_dir = Path(config.run_dir)
    models = export_transducer(
        recognizer,
        run_dir / "programs",
        chunk_steps=config.chunk_steps,
        utterance_frames=frames,
    )
    deployed = DeployedTransducer(run_dir / "programs")
    firmware = write_firmware(recognizer, run_dir / "firmware", config, frames)
    comparison = compare(recognizer, deployed, datamodule.test_dataloader())
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
        **_deployed_metrics(comparison, transcripts),
        "float": float_score,
        "emulated": emulated_score,
        **metrics,
        "tflite_bytes": sum(model.size_bytes for model in models.values()),
        "programs": {part: model.size_bytes for part, model in models.items()},
        "target": config.target,
        "runtime": deployed.programs["joint"].runtime.title,
        "firmware": firmware,
        **speech,
        "systems": reports,
    }
    write_summary(run_dir, summary)
    return summary


def for_spec(weights: TrainedWeights, spec: str | Mapping[str, Any]) -> TrainedWeights:
    """Return a checkpoint without its ranges, for an accelerator that it was not trained for.

    Args:
        weights: Checkpoint to deploy.
        spec: Name of the accelerator, or a preset and what differs from it.
    """
    if isinstance(spec, DictConfig):
        spec = cast("dict[str, Any]", OmegaConf.to_container(spec, resolve=True))
    nodes = dict(weights.recipe.get("callbacks") or {})
    if nodes.get("nna"):
        nodes["nna"] = {**nodes["nna"], "spec": spec}
    callbacks = {
        key: state
        for key, state in weights.callbacks.items()
        if not key.startswith(NNAEmulation.__qualname__)
    }
    recipe = {**weights.recipe, "callbacks": nodes}
    return replace(weights, recipe=recipe, callbacks=callbacks)


def check_method(weights: TrainedWeights, config: DictConfig) -> None:
    """Raise if ``config`` names another method than a checkpoint was trained with.

    Args:
        weights: Checkpoint to deploy.
        config: Composed configuration ``deploy``.

    Raises:
        ValueError: If the checkpoint was trained emulated, so that it brings its own methods, and
            ``compression``, ``nna`` or a setting of theirs differs from them.
    """
    trained = (weights.recipe.get("callbacks") or {}).get("nna")
    if not trained:
        return
    method, spec = str(weights.recipe.get("method")), trained.get("spec")
    settings = {"compression": config.method, "nna": config.nna.spec}
    trained_settings = {"compression": method, "nna": spec}
    defaults: dict[str, Any] = {"compression": "nna8", "nna": DEFAULT_PRESET}
    for key in METHOD_SETTINGS:
        settings[key], trained_settings[key] = config.get(key), weights.recipe.get(key)
        defaults[key] = None
    for key, value in settings.items():
        if value not in (defaults[key], trained_settings[key]):
            raise ValueError(
                f"{key}={value} is not used: {config.ckpt} was trained with "
                f"{key}={trained_settings[key]}, and "
                "is deployed so; leave it out, or deploy a float checkpoint"
            )


def check_target(weights: TrainedWeights, config: DictConfig) -> None:
    """Raise if the spec of a checkpoint has other integers than the device.

    Args:
        weights: Checkpoint to deploy.
        config: Composed configuration ``deploy``.

    Raises:
        ValueError: If ``target`` is unknown, or a device of TFLite-Micro and the spec is not, or an
            Ethos-U and the spec has the kernel of the LSTM.
    """
    target = config.target
    if target is None:
        return
    if target != "tflm" and not str(target).startswith("ethos-u"):
        raise ValueError(
            f"target must be tflm, an Ethos-U as ethos-u55-128, or null for the programs alone; "
            f"got {target!r}"
        )
    trained = (weights.recipe.get("callbacks") or {}).get("nna")
    spec = (trained or config.nna)["spec"]
    preset = "tflm-int8" if target == "tflm" else "ethos-u"
    remedy = f"add recalibrate=true nna={preset}" if trained else f"add nna={preset}"
    resolved = resolve_spec(spec)
    if resolved.runtime != "tflm":
        raise ValueError(
            f"target={target} computes the integers of TFLite-Micro, and {spec} has others: "
            f"{remedy}, or leave target out"
        )
    if target != "tflm" and resolved.lstm_form() == "sequence":
        raise ValueError(
            f"target={target} has no place for the cell state of the LSTM's kernel, which {spec} "
            f"has: {remedy}, with LSTMs of elementary operators, or leave target out"
        )


def utterance_frames(
    recognizer: TransducerRecognizer, datamodule: SpeechDataModule, frames: int | None
) -> int | None:
    """Return the frames of the longest utterance that is encoded; None for a recurrent encoder.

    Args:
        recognizer: Recognizer that is exported.
        datamodule: Data module with the test set.
        frames: Number of frames that the configuration names; None for the longest utterance of
            the test set.
    """
    if isinstance(recognizer.model.encoder, Encoder) or frames is not None:
        return frames
    return max(int(batch.feature_lengths.max()) for batch in datamodule.test_dataloader())


def write_firmware(
    recognizer: TransducerRecognizer, folder: Path, config: DictConfig, frames: int | None
) -> dict[str, dict[str, Any]]:
    """Write the programs for a microcontroller, and return their figures; none without a device.

    Args:
        recognizer: Emulated recognizer.
        folder: Folder of one folder a program.
        config: Composed configuration ``deploy``.
        frames: Number of frames of a Conformer's program, see :func:`utterance_frames`.
    """
    target = config.target
    if target is None:
        return {}
    exports = export_firmware(
        recognizer,
        folder,
        chunk_steps=config.chunk_steps,
        utterance_frames=frames,
        accelerator=None if target == "tflm" else target,
    )
    return {
        part: {
            "flash_bytes": export.flash_bytes,
            "plain_flash_bytes": export.plain_flash_bytes,
            "arena_bytes": export.arena_bytes,
            "plain_arena_bytes": export.plain_arena_bytes,
            "equal_outputs": None if export.agreement is None else float(export.agreement),
        }
        for part, export in exports.items()
    }


def trained_callbacks(weights: TrainedWeights, config: DictConfig) -> list[Callback]:
    """Build the emulation and the weight methods of a checkpoint, with their state.

    Args:
        weights: Checkpoint to deploy.
        config: Composed configuration ``deploy``; its ``callbacks`` are those of a checkpoint that
            was not trained emulated.
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
        callback = instantiate(_with_bits_path(dict(node), Path(config.ckpt)))
        if not isinstance(callback, (NNAEmulation, WeightMethod)):
            continue
        if callback.state_key in weights.callbacks and isinstance(callback, WeightMethod):
            callback.load_state_dict(weights.callbacks[callback.state_key])
        callbacks.append(callback)
    return callbacks


def _with_bits_path(node: dict[str, Any], ckpt: Path) -> dict[str, Any]:
    """Resolve a node's file of bits, also relative to the folders above the checkpoint."""
    path = node.get("overrides")
    if isinstance(path, str) and not Path(path).exists():
        candidates = [parent / path for parent in ckpt.resolve().parents]
        node["overrides"] = str(next((p for p in candidates if p.exists()), path))
    return node


def compare(
    recognizer: TransducerRecognizer, deployed: DeployedTransducer, batches: Any
) -> Comparison:
    """Score and decode batches through the programs, and compare every output.

    Args:
        recognizer: Emulated recognizer.
        deployed: Programs of the recognizer.
        batches: Batches of the test set.
    """
    comparison = Comparison(0, 0, 0.0, 0, {}, {})
    for batch in tqdm(batches, desc="through the programs", delay=2):
        emulated = _emulated_scores(recognizer, batch)
        encodings, predictions, logits, steps = _reference_scores(deployed, batch)
        valid = _valid(batch, steps)
        for actual, expected, mask in zip(
            (encodings, predictions, logits), emulated[:3], valid, strict=True
        ):
            comparison.outputs += int(mask.expand(actual.shape).sum())
            equal = (actual == expected[:, : actual.shape[1]]) & mask
            comparison.equal_outputs += int(equal.sum())
        losses = transducer_losses(logits, batch.targets, steps, batch.target_lengths)
        comparison.loss += float(losses.sum())
        comparison.labels += int(batch.target_lengths.sum())
        features, width = batch.features, recognizer.beam_width
        if width == 1:
            labels = greedy_decode(deployed, features, batch.feature_lengths)
        else:
            labels = beam_decode(deployed, features, batch.feature_lengths, beam_width=width)
        texts = [recognizer.vocabulary.decode(sequence) for sequence in labels]
        comparison.hypotheses.update(zip(batch.ids, texts, strict=True))
        comparison.references.update(zip(batch.ids, batch.texts, strict=True))
    return comparison


def _emulated_scores(
    recognizer: TransducerRecognizer, batch: Batch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score the references of a batch with the emulated network."""
    emulator = attached(recognizer)
    assert emulator is not None
    with emulate(recognizer, emulator.spec, targets=emulator.targets):
        return _reference_scores(recognizer.model, batch)


@torch.no_grad()
def _reference_scores(model: Decodable, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score the references of a batch without gradients; see :func:`.score_references`."""
    return score_references(model, batch)


def _valid(batch: Batch, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mask the padding of encodings, predictions and logits; True where an entry is valid."""
    sounds = torch.arange(int(steps.max())) < steps[:, None]
    labels = torch.arange(batch.targets.shape[1] + 1) <= batch.target_lengths[:, None]
    pairs = sounds[:, :, None] & labels[:, None, :]
    return sounds[..., None], labels[..., None], pairs[..., None]


def speed(
    recognizer: TransducerRecognizer, folder: Path, datamodule: SpeechDataModule
) -> dict[str, Any]:
    """Measure the time of LiteRT's fast kernels per second of speech, in greedy decoding.

    Args:
        recognizer: Recognizer that was exported.
        folder: Folder of its programs.
        datamodule: Data module with the test set.

    Returns:
        ``speech_seconds``, ``real_time_factor`` (seconds of computation per second of speech) and
        ``calls_per_second`` (calls of each program per second of speech).
    """
    fast = DeployedTransducer(folder, runtime="litert-xnnpack")
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
    """Compile each program with Vela; see :func:`.vela_report`."""
    return {
        part: vela_report(
            model.path, accelerator=accelerator, system=system, memory_mode=memory_mode
        )
        for part, model in models.items()
    }


def cost(parts: Mapping[str, VelaReport], calls_per_second: Mapping[str, float]) -> dict[str, Any]:
    """Add up Vela's estimates of all programs for a second of speech.

    Args:
        parts: Vela's report of each program by its name, all for one system.
        calls_per_second: Calls of each program per second of speech, by its name.
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
        "cycles": sum(parts[p].cycles * calls_per_second.get(p, 0.0) for p in parts),
        "inference_ms": sum(parts[p].inference_ms * calls_per_second.get(p, 0.0) for p in parts),
        "part_ms": {part: report.inference_ms for part, report in parts.items()},
        "bound": {
            part: "bandwidth" if report.is_bandwidth_bound else "computation"
            for part, report in parts.items()
        },
        "cpu_operators": sorted(name for report in reports for name in report.cpu_operators),
    }


def table(summary: Mapping[str, Any]) -> str:
    """Format the summary as text."""
    lines = [f"{'':20}{'WER':>8}{'loss per token':>16}"]
    rows = [("float", summary["float"]), ("emulated", summary["emulated"])]
    for name, metrics in [*rows, ("deployed", summary)]:
        if metrics is not None:
            rate, loss = 100 * metrics["wer"], metrics["loss_per_token"]
            lines.append(f"{name:22}{rate:5.2f} %{loss:16.4f}")
    lines.append(
        f"{summary['runtime']}: outputs equal {summary['equal_outputs']:.6%} of "
        f"{summary['outputs']}, transcripts {summary['equal_transcripts']:.2%} of "
        f"{summary['utterances']}"
    )
    sizes = ", ".join(f"{part} {size}" for part, size in summary["programs"].items())
    lines.append(f"programs {summary['tflite_bytes']} bytes ({sizes})")
    lines.append(f"real-time factor on this CPU {summary['real_time_factor']:.4f}")
    for part, each in summary["firmware"].items():
        lines.append(
            f"firmware of the {part} for {summary['target']}: flash {each['flash_bytes']} bytes "
            f"({each['plain_flash_bytes']} before compression), arena {each['arena_bytes']} bytes"
        )
    for report in summary["systems"]:
        lines.append(
            f"{report['accelerator']}, {report['system']}: weights {report['encoded_bytes']} bytes,"
            f" memory {report['memory_bytes']} bytes, {report['inference_ms']:.1f} ms per second of"
            f" speech; on the CPU: {', '.join(report['cpu_operators']) or 'nothing'}"
        )
    return "\n".join(lines)


def _score(
    recognizer: TransducerRecognizer, datamodule: SpeechDataModule, callbacks: list[Callback]
) -> dict[str, Any]:
    """Score a recognizer on the test set."""
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, callbacks=callbacks)
    return score_test(trainer, recognizer, datamodule)


def _deployed_metrics(comparison: Comparison, emulated: Mapping[str, str]) -> dict[str, Any]:
    hypotheses, references = comparison.hypotheses, comparison.references
    ids = sorted(hypotheses)
    score = asdict(word_errors([hypotheses[k] for k in ids], [references[k] for k in ids]))
    equal = sum(hypotheses[k] == emulated[k] for k in ids)
    return {
        "wer": score["rate"],
        "wer_low": score["low"],
        "wer_high": score["high"],
        "errors": score["errors"],
        "words": score["words"],
        "loss_per_token": comparison.loss / comparison.labels,
        "outputs": comparison.outputs,
        "equal_outputs": comparison.equal_outputs / comparison.outputs,
        "utterances": len(ids),
        "equal_transcripts": equal / len(ids),
    }


def _method(weights: TrainedWeights) -> str:
    trained = str(weights.recipe.get("method", "float"))
    return "chip" if trained == "float" else trained


if __name__ == "__main__":
    main()
