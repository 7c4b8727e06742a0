"""The project in a few minutes: a speech recognizer in float, emulated, and trained emulated.

    python -m recipes.demo

Trains on the synthetic digits, scores the float model on voices of no training utterance, scores
the same weights emulated, fine-tunes them in the accelerator's arithmetic, exports the programs
that the accelerator runs, and decodes the test set through them on TFLite-Micro, the interpreter
of microcontrollers. Writes everything into ``runs/demo``.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib as mpl
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from omegaconf import DictConfig

from lightning_nna.files import whole_file, write_whole
from recipes.deploy import deploy
from recipes.deploy import table as deployment
from recipes.evaluate import evaluate
from recipes.notices import fewer_notices
from recipes.train import train

CONF = Path(__file__).resolve().parent / "conf"
FOLDER = Path("runs/demo")
TITLES = {
    "float": "float",
    "chip": "emulated, trained in float",
    "chip_aware": "emulated, trained emulated",
    "deployed": "its programs, on TFLite-Micro",
}


def main() -> None:
    """Run the demo, write ``results.json`` and a plot, and print their paths."""
    began = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    with fewer_notices():
        results = demo(FOLDER, sys.argv[1:])
    write_whole(FOLDER / "results.json", json.dumps(results, indent=2) + "\n")
    draw(results, FOLDER / "wer.png")
    print(f"\n{table(results)}\n")
    print(f"metrics     {FOLDER / 'results.json'}")
    print(f"plot        {FOLDER / 'wer.png'}")
    print(f"checkpoint  {checkpoint(FOLDER / 'chip_aware')}")
    print(f"programs    {FOLDER / 'deployed' / 'programs'}")
    print(f"report      {FOLDER / 'deployed' / 'report.html'}")
    print(deployment(results["deployed"]))
    print(f"{time.monotonic() - began:.0f} seconds in all")


def demo(folder: Path, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """Train in float, emulate, train emulated, and deploy.

    Args:
        folder: Folder of the four runs.
        overrides: Overrides of the configuration of both trainings, as on Hydra's command line.

    Returns:
        Summaries of the runs ``float``, ``chip``, ``chip_aware`` and ``deployed``; the last has
        word error rate and loss of the outputs of the programs.
    """
    results: dict[str, dict[str, Any]] = {}
    print("1/4  training in float", flush=True)
    results["float"] = train(_config("train", f"run_dir={folder / 'float'}", *overrides))
    start = checkpoint(folder / "float")
    print("2/4  scoring the same weights emulated", flush=True)
    results["chip"] = evaluate(
        _config("evaluate", f"run_dir={folder / 'chip'}", f"ckpt={start}", "compression=nna8")
    )
    print("3/4  training emulated", flush=True)
    settings = ["experiment=digits_finetune", "compression=nna8", f"init_from={start}"]
    results["chip_aware"] = train(
        _config("train", *settings, f"run_dir={folder / 'chip_aware'}", *overrides)
    )
    print("4/4  exporting the programs, and decoding through them on TFLite-Micro", flush=True)
    ckpt = f"ckpt={checkpoint(folder / 'chip_aware')}"
    # Vela has no wheel for the newest Pythons; the programs are the same without it.
    systems = [] if find_spec("ethosu") else ["systems=[]"]
    results["deployed"] = deploy(
        _config("deploy", f"run_dir={folder / 'deployed'}", ckpt, "score_float=false", *systems)
    )
    return results


def checkpoint(run_dir: Path) -> Path:
    """Return the path of a finished run's checkpoint."""
    return run_dir / "checkpoints" / "last.ckpt"


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the metrics of the models as text.

    Example:
        >>> metrics = {"wer": 0.03, "wer_low": 0.02, "wer_high": 0.04, "loss_per_token": 0.1}
        >>> print(table({"float": metrics}))
        model                              WER   95 % interval  loss per token
        float                            3.0 %     2.0 - 4.0 %           0.100
    """
    lines = [f"{'model':<31}{'WER':>7}{'95 % interval':>16}{'loss per token':>16}"]
    for name, metrics in results.items():
        low, high = 100 * metrics["wer_low"], 100 * metrics["wer_high"]
        lines.append(
            f"{TITLES[name]:<31}{100 * metrics['wer']:>5.1f} %{f'{low:.1f} - {high:.1f} %':>16}"
            f"{metrics['loss_per_token']:>16.3f}"
        )
    return "\n".join(lines)


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Plot the word error rates with their intervals."""
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.subplots()
        names = list(results)
        rates = [100 * results[name]["wer"] for name in names]
        below = [100 * (results[name]["wer"] - results[name]["wer_low"]) for name in names]
        above = [100 * (results[name]["wer_high"] - results[name]["wer"]) for name in names]
        axes.bar(range(len(names)), rates, yerr=[below, above], capsize=6, color="#4878a8")
        axes.set_xticks(range(len(names)), [TITLES[name].replace(", ", ",\n") for name in names])
        axes.set_ylabel("word error rate, %")
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, dpi=150, format="png")


def _config(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=list(overrides))


if __name__ == "__main__":
    main()
