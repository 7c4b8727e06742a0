"""Draw the pictures of the pages on methods, from small seeded runs of the package.

``python docs/figures/draw.py`` writes them beside this file, each for light and for dark pages.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib as mpl
import numpy as np
import torch
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nna import emulate
from lightning_nna.callbacks import CompressedSensingPruning, GeneralQuantizer
from lightning_nna.drift.detector import DriftDetector, DriftReading
from lightning_nna.emulation.arithmetic.fixed_point import (
    multiply_by_quantized_multiplier,
    quantize_multiplier,
)
from lightning_nna.emulation.program import Instruction

HERE = Path(__file__).resolve().parent
BLUE, ORANGE = "#4c8bd6", "#e0813a"


@dataclass(frozen=True)
class Ink:
    """Colors of a picture for one kind of page: of lines and text, of what is behind, of boxes."""

    text: str
    faint: str
    box: str


INKS = {"light": Ink("#222222", "#9a9a9a", "#eef2f7"), "dark": Ink("#e6e6e6", "#8a8f9c", "#2b303b")}


class Regression(pl.LightningModule):
    """A linear layer that learns the outputs of another one, with noise."""

    def __init__(self, inputs: int = 24, outputs: int = 16, *, steps: int, batch: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layer = nn.Linear(inputs, outputs, bias=False)
        teacher = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        # Neighbors are alike, as features of a sound are: then one input can stand for another.
        x = torch.randn(steps * batch, inputs, generator=generator).cumsum(1) / 4
        noise = 0.05 * torch.randn(steps * batch, outputs, generator=generator)
        self.data, self.batch = TensorDataset(x, x @ teacher.T + noise), batch
        with torch.no_grad():
            start = teacher + 0.05 * torch.randn(outputs, inputs, generator=generator)
            self.layer.weight.copy_(start)

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        """Return the mean squared error of a batch."""
        x, y = batch
        return nn.functional.mse_loss(self.layer(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)

    def train_dataloader(self) -> DataLoader:
        """Return the batches in their order."""
        return DataLoader(self.data, batch_size=self.batch)


class AfterEachStep(pl.Callback):
    """Collects what a function returns after each optimizer step."""

    def __init__(self, observe: Callable[[pl.LightningModule], Any]) -> None:
        self.observe, self.rows = observe, []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Observe (a hook of Lightning)."""
        self.rows.append(self.observe(pl_module))


def fit(module: pl.LightningModule, method: pl.Callback, observer: AfterEachStep) -> None:
    """Train a module for an epoch on a processor, without files and messages."""
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[method, observer],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)


# --- an emulated operator ---------------------------------------------------------------------

FACTORS = (0.6, 1.4)


@dataclass(frozen=True)
class EmulatedLayer:
    """Integers of a linear layer with four inputs and one output, for inputs of two sizes."""

    x: Tensor
    q_x: Tensor
    sums: Tensor
    rescaled: Tensor
    q_y: Tensor
    y: Tensor
    gradients: Tensor
    curve: tuple[Tensor, Tensor, Tensor]


@cache
def emulated_layer() -> EmulatedLayer:
    """Run a linear layer emulated and record its integers."""
    layer = nn.Linear(4, 1)
    direction = torch.tensor([[0.5, -0.3, 0.2, 0.4]])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.62, -0.35, 0.18, 0.44]]))
        layer.bias.fill_(0.05)
    recorded: list[Instruction] = []
    with emulate(layer, "tflm-int8") as emulator:
        with emulator.observing(), torch.no_grad():
            # Inputs reach further than the sum: they cancel out in it.
            layer(direction * torch.linspace(-1, 1, 41)[:, None])
            layer(torch.tensor([[1.0, 0.8, -1.0, -0.5], [-1.0, -0.8, 1.0, 0.5]]))
        x = (direction * torch.tensor(FACTORS)[:, None]).requires_grad_()
        with emulator.running(recorder=recorded.append):
            y = layer(x)
            y.sum().backward()
        along = torch.linspace(-1.8, 1.8, 241)
        swept = (direction * along[:, None]).requires_grad_()
        with emulator.running():
            outputs = layer(swept)
            outputs.sum().backward()
    [instruction] = [each for each in recorded if each.operator == "FULLY_CONNECTED"]
    stored_x, stored_w, stored_b = instruction.inputs
    [stored_y] = instruction.outputs
    assert stored_x is not None
    assert stored_w is not None
    assert stored_b is not None
    sums = (stored_x.integers - stored_x.zero_point) @ stored_w.integers.T + stored_b.integers
    factor = float(stored_x.scale) * float(stored_w.scale) / float(stored_y.scale)
    rescaled = multiply_by_quantized_multiplier(sums, *quantize_multiplier(factor))
    with torch.no_grad():
        slopes = (swept.grad * direction).sum(1) if swept.grad is not None else along
        exact = layer(swept)
    assert x.grad is not None
    return EmulatedLayer(
        x.detach(),
        stored_x.integers,
        sums,
        rescaled + stored_y.zero_point,
        stored_y.integers,
        y.detach(),
        x.grad,
        (exact[:, 0], outputs.detach()[:, 0], slopes),
    )


def emulated_operator(figure: Figure, ink: Ink) -> None:
    """Draw the way of two inputs through an operator, its output, and its gradient."""
    run = emulated_layer()
    flow, output, gradient = figure.subplot_mosaic(
        [["flow", "flow"], ["output", "gradient"]], height_ratios=[1.6, 1]
    ).values()
    inside, outside = (numbers(each, "{:.2f}") for each in run.gradients)
    rows = [
        ("float input", [numbers(each, "{:.2f}") for each in run.x]),
        ("quantize, 8 bits", [numbers(each, "{:d}") for each in run.q_x]),
        ("integer sum, 32 bits", [f"{int(each):,}" for each in run.sums]),
        ("requantize", [f"{int(each)}" for each in run.rescaled]),
        ("clip to -128 … 127", [f"{int(each)}" for each in run.q_y]),
        ("real value", [f"{float(each):.4f}" for each in run.y]),
    ]
    flow.set(xlim=(0, 3.3), ylim=(-len(rows) + 0.1, 1.0))
    flow.axis("off")
    flow.text(0, 0.75, "gradient of the input", va="center", color=ORANGE)
    for row, (title, cells) in enumerate(rows):
        flow.text(0, -row, title, va="center", color=ink.text)
        for middle, cell, slope in zip((1.6, 2.7), cells, (inside, outside), strict=True):
            flow.text(
                middle, -row, cell, ha="center", va="center", color=ink.text, size=8,
                bbox={"boxstyle": "round,pad=0.35", "facecolor": ink.box, "edgecolor": BLUE},
            )  # fmt: skip
            if row == 0:
                flow.text(middle, 0.75, slope, ha="center", va="center", color=ORANGE, size=8)
            else:
                arrow(flow, (middle - 0.1, -row + 0.82), (middle - 0.1, -row + 0.18), BLUE)
            arrow(flow, (middle + 0.1, -row + 0.18), (middle + 0.1, -row + 0.64), ORANGE)
    exact, emulated, slopes = (each.numpy() for each in run.curve)
    output.plot(exact, exact, color=ink.faint, linestyle="--", label="float")
    output.plot(exact, emulated, color=BLUE, label="emulated")
    output.set(xlabel="sum in float", ylabel="output")
    output.legend(frameon=False, labelcolor=ink.text)
    gradient.plot(exact, slopes, color=ORANGE)
    gradient.set(xlabel="sum in float", ylabel="gradient along the input", ylim=(-0.05, None))


def numbers(values: Tensor, form: str) -> str:
    """Write a few numbers in one line."""
    return "  ".join(form.format(each).replace("-0.00", "0.00") for each in values.tolist())


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    """Draw an arrow in the coordinates of the data."""
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.0}
    axes.annotate("", end, start, arrowprops=style)


# --- a codebook over a training ---------------------------------------------------------------

STEPS = 400


@cache
def codebook_run() -> tuple[Tensor, Tensor, float]:
    """Train 2-bit weights; return centroids and weights after each step, and when they are hard."""
    method = GeneralQuantizer(2, centroid_lr=4e-3)

    def observe(module: pl.LightningModule) -> tuple[Tensor, Tensor]:
        [transform] = method.transforms().values()
        codebook, latent = transform.codebook, module.layer.weight.detach()
        weights = transform.apply(latent, hard=False)
        return codebook.centroids.flatten() * codebook.scales.flatten()[0], weights.flatten()

    observer = AfterEachStep(observe)
    fit(Regression(steps=STEPS), method, observer)
    centroids, weights = zip(*observer.rows, strict=True)
    return torch.stack(centroids), torch.stack(weights), method.hard_step


def codebook_over_training(figure: Figure, ink: Ink) -> None:
    """Draw the paths of weights and of their centroids."""
    centroids, weights, hard = codebook_run()
    axes = figure.subplots()
    axes.plot(weights[:, ::12].numpy(), color=ink.faint, linewidth=0.4, alpha=0.6)
    axes.plot(centroids.numpy(), color=BLUE, linewidth=2)
    axes.axvline(hard, color=ORANGE, linestyle="--")
    top = axes.get_ylim()[1]
    axes.text(hard - 4, top, "soft", ha="right", va="bottom", color=ORANGE)
    axes.text(hard + 4, top, "hard", ha="left", va="bottom", color=ORANGE)
    axes.plot([], color=ink.faint, label="weights in training")
    axes.plot([], color=BLUE, linewidth=2, label="centroids")
    axes.set(xlabel="optimizer step", ylabel="value", xlim=(0, STEPS))
    figure.legend(frameon=False, labelcolor=ink.text, loc="outside upper left", ncols=2)


# --- a mask over a training -------------------------------------------------------------------


@cache
def mask_run() -> Tensor:
    """Prune four fifths of a layer's weights; return the mask after each step."""
    method = CompressedSensingPruning(0.8, every_n_steps=20)

    def observe(module: pl.LightningModule) -> Tensor:
        [mask] = method.masks.values()
        return mask.apply(torch.ones(module.layer.weight.shape), hard=True).flatten() != 0

    observer = AfterEachStep(observe)
    fit(Regression(steps=STEPS), method, observer)
    return torch.stack(observer.rows)


def mask_over_training(figure: Figure, ink: Ink) -> None:
    """Draw which weights are zero after each step, and the fraction of them."""
    masks = mask_run().numpy()
    image, fraction = figure.subplots(2, sharex=True, height_ratios=[2.4, 1])
    order = (-masks.sum(0)).argsort(kind="stable")
    image.imshow(
        masks[:, order].T,
        aspect="auto",
        cmap=ListedColormap([ink.box, BLUE]),
        interpolation="nearest",
        extent=(0, len(masks), masks.shape[1], 0),
    )
    image.set(ylabel="weights")
    zeros = 1 - masks.mean(1)
    [returns] = (masks[1:] & ~masks[:-1]).any(1).nonzero()
    fraction.plot(zeros, color=BLUE)
    fraction.plot(returns + 1, zeros[returns + 1], ".", color=ORANGE, label="weights return")
    fraction.set(xlabel="optimizer step", ylabel="zeros", ylim=(0, 1), xlim=(0, len(masks)))
    fraction.legend(frameon=False, labelcolor=ink.text, loc="lower right")


# --- the newest value of a noisy metric -------------------------------------------------------


@cache
def drift_run() -> list[DriftReading]:
    """Watch a metric that falls, stays, and gets worse at epoch 70, with noise."""
    generator = np.random.default_rng(3)
    epochs = np.arange(100)
    level = 0.2 + 0.3 * np.exp(-epochs / 12) + 0.1 * (epochs >= 70)
    detector = DriftDetector()
    return [detector.update(float(y)) for y in level + 0.02 * generator.standard_normal(100)]


def newest_value(figure: Figure, ink: Ink) -> None:
    """Draw the raw metric, its estimate with the radius, and the drift."""
    readings = drift_run()
    x = np.arange(len(readings))
    value = np.array([each.value for each in readings])
    radius = np.array([each.radius for each in readings])
    raw = np.array([each.raw for each in readings])
    drift = np.array([each.drift for each in readings])
    axes = figure.subplots()
    shown = np.isfinite(radius)
    band = (value - radius)[shown], (value + radius)[shown]
    axes.fill_between(x[shown], *band, color=BLUE, alpha=0.25, linewidth=0, label="radius")
    axes.plot(x, raw, ".", color=ink.faint, label="raw")
    axes.plot(x, value, color=BLUE, label="wavelet estimate")
    axes.plot(x[drift], raw[drift], "o", color=ORANGE, markersize=4, label="drift")
    axes.set(xlabel="epoch", ylabel="metric", ylim=(raw.min() - 0.05, raw.max() + 0.05))
    axes.legend(frameon=False, labelcolor=ink.text, ncols=2)


#: Pictures by name: what draws them, and their size in inches.
PICTURES: dict[str, tuple[Callable[[Figure, Ink], None], tuple[float, float]]] = {
    "emulated_operator": (emulated_operator, (5.2, 5.4)),
    "codebook_over_training": (codebook_over_training, (5.2, 3.2)),
    "mask_over_training": (mask_over_training, (5.2, 3.6)),
    "newest_value": (newest_value, (5.2, 3.2)),
}


def style(ink: Ink) -> dict[str, Any]:
    """Return Matplotlib's settings for one kind of page, without what differs from run to run."""
    colors = dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), ink.text
    )
    return {
        **colors,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "none",
        "font.size": 9.0,
        "savefig.transparent": True,
        "svg.fonttype": "path",
        "svg.hashsalt": "lightning-nna",
    }


def draw(folder: Path) -> list[Path]:
    """Write all pictures into a folder.

    Args:
        folder: Folder, which is created.

    Returns:
        Paths of the files, two for each picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (drawn, size) in PICTURES.items():
        for kind, ink in INKS.items():
            path = folder / f"{name}_{kind}.svg"
            with mpl.rc_context(style(ink)):
                figure = Figure(figsize=size, layout="constrained")
                drawn(figure, ink)
                figure.savefig(path, metadata={"Date": None, "Creator": None})
            paths.append(path)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the pictures of the pages on methods.")
    parser.add_argument("folder", type=Path, nargs="?", default=HERE, help="where to write them")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", PossibleUserWarning)
    for written in draw(parser.parse_args().folder):
        print(written)
