"""Test a checkpoint, in float or emulated.

    python -m recipes.evaluate ckpt=runs/an4_rnnt/seed1/checkpoints/last.ckpt
    python -m recipes.evaluate ckpt=recipes/pretrained/an4_rnnt.safetensors compression=nna8

With ``compression=nna8`` the network is emulated: it runs in the accelerator's arithmetic.
A checkpoint that was trained emulated brings its ranges; a float one is calibrated on training
batches first.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from lightning_nna import calibrate
from lightning_nna.callbacks import NNAEmulation
from lightning_nna.weights.method import WeightMethod
from recipes.adapter import Adapter
from recipes.preparation import prepare_process, rebuild
from recipes.program import as_program
from recipes.run_folder import (
    log_summary,
    provenance,
    size_of,
    weight_metrics,
    write_summary,
)
from recipes.train import build_callbacks
from recipes.weights import TrainedWeights, load_weights


@as_program("evaluate")
def main(config: DictConfig) -> None:
    """Run :func:`evaluate` and print its summary."""
    log_summary(evaluate(config))


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Test ``config.ckpt`` on the test set.

    Args:
        config: Composed configuration ``evaluate`` of ``recipes/conf``.

    Returns:
        Content of ``summary.json`` in the run folder.

    Raises:
        FileNotFoundError: If ``ckpt`` does not exist.
        ValueError: If ``ckpt`` was not written by ``recipes.train``, or if ``data`` asks for other
            features than it was trained on; see :func:`.check_settings` too.
    """
    prepare_process(config, "evaluate")
    weights = load_weights(config.ckpt)
    recipe, adapter = rebuild(weights, config)
    callbacks = build_callbacks(config)
    for callback in callbacks.values():
        if isinstance(callback, WeightMethod) and callback.state_key in weights.callbacks:
            callback.load_state_dict(weights.callbacks[callback.state_key])
    emulation = callbacks.get("nna")
    if isinstance(emulation, NNAEmulation):
        restore_or_calibrate(adapter, emulation, weights, batches=config.calibration_batches)
    summary = {
        "ckpt": str(config.ckpt),
        "experiment": recipe.name,
        "method": _method(config, weights),
        **provenance(recipe.seed),
        **size_of(adapter.module, recipe.targets),
        **adapter.test(list(callbacks.values())),
        **weight_metrics(adapter.module, recipe.targets),
    }
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    adapter.write_results(run_dir)
    write_summary(run_dir, summary)
    return summary


def restore_or_calibrate(
    adapter: Adapter, emulation: NNAEmulation, weights: TrainedWeights, *, batches: int
) -> None:
    """Restore the ranges of ``emulation`` from a checkpoint, or calibrate on training batches.

    Args:
        adapter: Module of the coming test run, and its data.
        emulation: Callback of the coming test run.
        weights: Checkpoint, with or without ranges.
        batches: Number of training batches to observe if the checkpoint has no ranges, positive.
    """
    if emulation.state_key in weights.callbacks:
        emulation.load_state_dict(weights.callbacks[emulation.state_key])
        return
    examples = itertools.islice(adapter.training_batches(), batches)
    calibrate(
        adapter.module,
        tqdm(examples, total=batches, desc="observing ranges", delay=2),
        forward=lambda _, batch: adapter.run(batch),
        spec=emulation.spec,
        targets=emulation.targets,
    )


def _method(config: DictConfig, weights: TrainedWeights) -> str:
    """Name the method of a score: ``chip`` is an emulated model that was trained in float."""
    is_emulated = config.callbacks.get("nna") is not None
    is_compressed = any("latents" in state for state in weights.callbacks.values())
    if not is_emulated and not is_compressed:
        return "float"
    trained = str(weights.recipe.get("method", "float"))
    return "chip" if trained == "float" else trained


if __name__ == "__main__":
    main()
