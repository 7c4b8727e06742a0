"""Deploy a trained module: export its programs, test them, and estimate their cost.

    python -m recipes.deploy ckpt=runs/an4_rnnt_finetune/seed1/checkpoints/last.ckpt
    python -m recipes.deploy ckpt=recipes/pretrained/an4_rnnt.safetensors

Exports the networks (of a recognizer: encoder, predictor and joint network), runs the test set
through their programs on the runtime that the spec names, compares every output with the emulation,
and compiles them with Vela for memory and time. ``target=tflm`` and ``target=ethos-u55-128`` write
what the firmware of a microcontroller needs, too: the one with the default spec, the other with
``nna=ethos-u``. A checkpoint that was trained emulated brings its ranges and its weight methods; a
float one is calibrated on training batches first. ``recalibrate=true nna=tosa-int8`` deploys one
that was trained emulated on another device than it was trained for: its weights stay, and its
ranges are observed again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_nna.callbacks import NNAEmulation
from lightning_nna.deploy import (
    DeviceTotals,
    ExportedProgram,
    Metric,
    Origin,
    Program,
    RuntimeCheck,
    TFLiteModel,
    VelaReport,
    export_micro,
    export_tflite,
    measure_deployment,
    runtime_of,
    vela_report,
    write_report,
)
from lightning_nna.deploy.vela import require_accelerator
from lightning_nna.emulation.spec import DEFAULT_PRESET, resolve_spec
from lightning_nna.weights.method import WeightMethod
from recipes.adapter import DeployedResults, Part
from recipes.evaluate import restore_or_calibrate
from recipes.parent import command_line
from recipes.preparation import prepare_process, rebuild
from recipes.program import as_program
from recipes.run_folder import provenance, size_of, weight_metrics, write_summary
from recipes.settings import METHOD_SETTINGS
from recipes.weights import TrainedWeights, load_weights

_log = logging.getLogger(__name__)


@as_program("deploy")
def main(config: DictConfig) -> None:
    """Run :func:`deploy` and print its table."""
    _log.info("\n%s", table(deploy(config)))


def deploy(config: DictConfig) -> dict[str, Any]:
    """Export ``config.ckpt``, score its programs, and estimate their cost.

    Args:
        config: Composed configuration ``deploy`` of ``recipes/conf``.

    Returns:
        Content of ``summary.json`` in the run folder. The folder also has the programs in
        ``programs``, the report in ``report.html``, and its weights and activations in
        ``report.csv`` and ``activations.csv``.

    Raises:
        FileNotFoundError: If ``ckpt`` does not exist.
        ValueError: If ``ckpt`` was not written by ``recipes.train``, the network has no program, or
            a setting names no runtime, target or system.
        VelaError: If Vela is missing or does not compile a program.
    """
    prepare_process(config, "deploy")
    weights = load_weights(config.ckpt)
    if config.recalibrate:
        weights = for_spec(weights, config.nna.spec)
    check_method(weights, config)
    check_target(weights, config)
    check_systems(config.systems)
    for name in config.runtimes:
        runtime_of(name)
    recipe, adapter = rebuild(weights, config)
    module, targets = adapter.module, list(recipe.targets)
    float_results = adapter.test(accelerator="cpu") if config.score_float else None
    callbacks = trained_callbacks(weights, config)
    emulation = next(c for c in callbacks if isinstance(c, NNAEmulation))
    restore_or_calibrate(adapter, emulation, weights, batches=config.calibration_batches)
    emulated = adapter.test(callbacks, accelerator="cpu")
    metrics = weight_metrics(module, targets)
    module.eval()
    run_dir = Path(config.run_dir)
    parts = adapter.programs(config)
    programs = run_dir / "programs"
    models = {
        name: export_tflite(module, example, programs / f"{name}.tflite", forward=forward)
        for name, (example, forward) in parts.items()
    }
    firmware = write_firmware(module, parts, run_dir / "firmware", config.target)
    deployed = adapter.test_deployed(programs, callbacks, batches=config.compared_batches)
    speed = adapter.speed(programs, batches=config.compared_batches)
    # Of a part of the test set the programs have no results that others can be compared with.
    results = deployed.results if config.compared_batches is None else emulated
    titles = adapter.titles_of(emulated)
    deployment = measure_deployment(
        module,
        [
            ExportedProgram(name, models[name], *part, speed.calls.get(name, 0.0))
            for name, part in parts.items()
        ],
        metrics=metrics_of(titles, results, float_results),
        runtimes=list(config.runtimes),
        systems=[(str(a), str(system), str(mode)) for a, system, mode in config.systems],
        unit=adapter.unit,
        run=partial(adapter.run, next(adapter.test_batches())),
        checks=[comparison_of(models, deployed)],
        configuration=configuration_of(config, weights),
        origin=Origin.of_process(Path(__file__).parent, command=command_line()),
    )
    write_report(module, run_dir, deployment=replace(deployment, firmware=firmware))
    summary = {
        "ckpt": str(config.ckpt),
        "experiment": recipe.name,
        "method": _method(weights),
        **provenance(recipe.seed),
        **size_of(module, targets),
        "threads": torch.get_num_threads(),
        "titles": titles,
        **deployed.results,
        **results,
        "outputs": deployed.outputs,
        "equal_outputs": deployed.equal_outputs / deployed.outputs,
        "examples": deployed.examples,
        "compared_batches": config.compared_batches,
        "float": float_results,
        "emulated": emulated,
        **metrics,
        "tflite_bytes": sum(model.size_bytes for model in models.values()),
        "programs": {name: model.size_bytes for name, model in models.items()},
        "target": config.target,
        "runtime": Program(next(iter(models.values())).path).runtime.title,
        "firmware": firmware,
        **speed.figures,
        "speed": speed.text,
        "calls_per_unit": speed.calls,
        "unit": adapter.unit,
        "systems": [asdict(totals) for totals in deployment.totals],
        "timing": asdict(deployment.timing) if deployment.timing else None,
        "checks": [asdict(check) for check in deployment.checks],
    }
    write_summary(run_dir, summary)
    return summary


def metrics_of(
    titles: Mapping[str, str],
    deployed: Mapping[str, Any],
    float_results: Mapping[str, Any] | None,
) -> list[Metric]:
    """Return the metrics of a report, with their intervals where the results have some.

    Args:
        titles: Titles of the results that count, by their names.
        deployed: Results of the programs; ``wer_low`` and ``wer_high`` are the interval of ``wer``.
        float_results: Results of the float module; None if it was not scored.

    Example:
        >>> results = {"wer": 0.1, "wer_low": 0.05, "wer_high": 0.2}
        >>> (metric,) = metrics_of({"wer": "WER, %"}, results, None)
        >>> metric.name, metric.interval, metric.is_fraction
        ('WER', (0.05, 0.2), True)
    """
    return [
        Metric(
            title.removesuffix(", %"),
            deployed[key],
            _interval(deployed, key),
            None if float_results is None else float_results.get(key),
            None if float_results is None else _interval(float_results, key),
            is_fraction=title.endswith("%"),
        )
        for key, title in titles.items()
    ]


def _interval(results: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    ends = results.get(f"{key}_low"), results.get(f"{key}_high")
    return None if ends[0] is None or ends[1] is None else (ends[0], ends[1])


def comparison_of(models: Mapping[str, TFLiteModel], deployed: DeployedResults) -> RuntimeCheck:
    """Return the comparison of the test set, as a report has it.

    Args:
        models: Programs by name.
        deployed: Results of the programs.
    """
    runtime = Program(next(iter(models.values())).path).runtime
    return RuntimeCheck(
        runtime.title,
        runtime.version(),
        tuple(models),
        f"{deployed.examples:,} examples of the test set",
        deployed.outputs,
        deployed.equal_outputs,
        is_promised=True,
    )


def configuration_of(config: DictConfig, weights: TrainedWeights) -> str:
    """Return the settings of the deployment and those of the training, as YAML.

    Args:
        config: Composed configuration ``deploy``.
        weights: Checkpoint that is deployed.
    """
    trained = OmegaConf.to_yaml(OmegaConf.create(dict(weights.recipe)))
    return f"# deployment\n{OmegaConf.to_yaml(config, resolve=True)}\n# training\n{trained}"


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
    if target != "tflm":
        try:
            require_accelerator(str(target))
        except ValueError as error:
            raise ValueError(
                f"target={target} is no device: it is tflm, null for the programs alone, or an "
                f"Ethos-U; {error}"
            ) from error
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


def check_systems(systems: Sequence[Any]) -> None:
    """Raise unless Vela may know every system.

    Args:
        systems: Names of the accelerator, of the system and of the memory mode of each.

    Raises:
        ValueError: If one is no list of three names, or of an accelerator that Vela has not.
    """
    for system in systems:
        if isinstance(system, str) or len(system) != 3:
            raise ValueError(
                f"systems has {system}: each is a list of an accelerator, a system and a memory "
                "mode, as [[ethos-u55-128,Ethos_U55_High_End_Embedded,Shared_Sram]]"
            )
        require_accelerator(system[0])


def write_firmware(
    module: nn.Module, parts: Mapping[str, Part], folder: Path, target: str | None
) -> dict[str, dict[str, Any]]:
    """Write the programs for a microcontroller, and return their figures; none without a device.

    Args:
        module: Emulated module.
        parts: Arguments and function of each program, by its name.
        folder: Folder of one folder a program.
        target: Device of the configuration: null, ``tflm``, whose processor decodes compressed
            constants, or an Ethos-U, for which Vela compiles.
    """
    if target is None:
        return {}
    is_processor = target == "tflm"
    figures = {}
    for name, (example, forward) in parts.items():
        export = export_micro(
            module,
            example,
            folder / name,
            name=name,
            forward=forward,
            compress=is_processor,
            accelerator=None if is_processor else target,
        )
        figures[name] = {
            "flash_bytes": export.flash_bytes,
            "plain_flash_bytes": export.plain_flash_bytes,
            "arena_bytes": export.arena_bytes,
            "plain_arena_bytes": export.plain_arena_bytes,
            "sram_bytes": None if export.vela is None else export.vela.report.sram_bytes,
            "equal_outputs": None if export.agreement is None else float(export.agreement),
        }
    return figures


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


def cost(parts: Mapping[str, VelaReport], calls: Mapping[str, float]) -> dict[str, Any]:
    """Add up Vela's estimates of all programs for a unit of work, such as a second of speech.

    Args:
        parts: Vela's report of each program by its name, all for one system.
        calls: Calls of each program for a unit, by its name.
    """
    return asdict(DeviceTotals.of(parts, calls))


def table(summary: Mapping[str, Any]) -> str:
    """Format the summary as text."""
    titles = summary["titles"]
    lines = [f"{'':20}" + "".join(f"{title:>16}" for title in titles.values())]
    rows = [("float", summary["float"]), ("emulated", summary["emulated"])]
    if summary["compared_batches"] is None:
        rows.append(("deployed", summary))
    for name, results in rows:
        if results is not None:
            lines.append(
                f"{name:20}" + "".join(_number(results[key], titles[key]) for key in titles)
            )
    lines.append(
        f"{summary['runtime']}: outputs equal {summary['equal_outputs']:.6%} of "
        f"{summary['outputs']}, from {summary['examples']} examples"
    )
    sizes = ", ".join(f"{part} {size}" for part, size in summary["programs"].items())
    lines.append(f"programs {summary['tflite_bytes']} bytes ({sizes})")
    lines.append(summary["speed"])
    for part, each in summary["firmware"].items():
        lines.append(
            f"firmware of the {part} for {summary['target']}: flash {each['flash_bytes']} bytes "
            f"({each['plain_flash_bytes']} before compression), {_working_memory(each)}"
        )
    for report in summary["systems"]:
        lines.append(
            f"{report['accelerator']}, {report['system']}: weights {report['encoded_bytes']} bytes,"
            f" memory {report['memory_bytes']} bytes, {report['inference_ms']:.2f} ms per "
            f"{summary['unit']}; on the CPU: {', '.join(report['cpu_operators']) or 'nothing'}"
        )
    return "\n".join(lines)


def _working_memory(figures: Mapping[str, Any]) -> str:
    """Describe the working memory of a program for a microcontroller."""
    if (tensors := figures["sram_bytes"]) is not None:
        return f"tensors {tensors} bytes by Vela's estimate"
    if (arena := figures["arena_bytes"]) is not None:
        return f"arena {arena} bytes"
    return "arena not measured"


def _number(value: float, title: str) -> str:
    return f"{100 * value:16.2f}" if title.endswith("%") else f"{value:16.4f}"


def _method(weights: TrainedWeights) -> str:
    trained = str(weights.recipe.get("method", "float"))
    return "chip" if trained == "float" else trained


if __name__ == "__main__":
    main()
