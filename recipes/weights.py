"""Weights of a module with everything that their use needs, in one file.

Two kinds of file are read: a Lightning checkpoint of ``recipes.train``, and a ``.safetensors`` file
with the networks' weights in half precision and, in its header, the settings and the state of the
data, such as a vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

from lightning_nna.checkpoints import load_checkpoint
from lightning_nna.files import whole_file
from lightning_nna.name_lists import listed
from recipes.adapter import names_within
from recipes.whole_checkpoints import is_plain

#: Folder of the package; relative paths of weights that it brings are also looked for there.
_PACKAGE = Path(__file__).resolve().parent
# Settings in the header of a small file: those that build the data and the module again.
# The others name folders of the training machine, and the speed of the run.
_HEADER_SETTINGS = ("name", "method", "seed", "beam_width", "targets", "data", "model")
# Small files of older versions name no targets, and their weights have no names of networks.
_FORMER_TARGETS = ["model"]
_RECIPE, _DATA = "recipe", "recipe_data"


@dataclass(frozen=True)
class TrainedWeights:
    """Content of a weights file.

    Attributes:
        network: Weights and buffers of the networks, by their names in the module.
        recipe: All settings of the run that trained them.
        data: State of the data module, such as vocabulary and normalization, as plain values.
        callbacks: State of the run's callbacks by key; empty for a ``.safetensors`` file.
        rest: Weights and buffers of the module outside of its networks, by name; empty for a
            ``.safetensors`` file.
    """

    network: dict[str, Tensor]
    recipe: dict[str, Any]
    data: dict[str, Any]
    callbacks: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)


class RecipeInCheckpoint(Callback):
    """Put the settings of a run and the state of its data into every checkpoint.

    Args:
        recipe: All settings of the run, plain values.
    """

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.recipe = recipe

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        datamodule: LightningDataModule = trainer.datamodule  # type: ignore[attr-defined]
        for name, value in datamodule.state_dict().items():
            if not is_plain(value):
                raise TypeError(
                    f"state_dict of {type(datamodule).__name__} has {name}, a "
                    f"{type(value).__name__}: a checkpoint keeps tensors, numbers, text, lists and "
                    "dicts alone, so that reading it runs no code"
                )

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        datamodule: LightningDataModule = trainer.datamodule  # type: ignore[attr-defined]
        checkpoint |= {_RECIPE: self.recipe, _DATA: datamodule.state_dict()}


def load_weights(path: str | Path) -> TrainedWeights:
    """Read a checkpoint or a ``.safetensors`` file.

    Args:
        path: Path of the file; a relative one that begins with ``recipes/`` may be that of a file
            in the package.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file was not written by the recipes, is damaged, or contains objects
            that could run code.
    """
    path = _found(Path(path))
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    checkpoint = load_checkpoint(path)
    if not {"state_dict", _RECIPE, _DATA} <= checkpoint.keys():
        raise ValueError(f"{path} was not written by recipes.train: it names no recipe")
    recipe = checkpoint[_RECIPE]
    state, callbacks = checkpoint["state_dict"], checkpoint.get("callbacks", {})
    network = {name: state[name] for name in names_within(state, recipe["targets"])}
    rest = {name: tensor for name, tensor in state.items() if name not in network}
    return TrainedWeights(network, recipe, checkpoint[_DATA], callbacks, rest)


def save_weights(path: str | Path, weights: TrainedWeights, *, command: str) -> None:
    """Write the networks in half precision, with the settings of data and model in the header.

    Args:
        path: Path of a ``.safetensors`` file; its folder is created.
        weights: Weights to write; the state of callbacks is left out.
        command: Command that trained them.
    """
    path = Path(path)
    tensors = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in weights.network.items()
    }
    recipe = {key: weights.recipe[key] for key in _HEADER_SETTINGS if key in weights.recipe}
    header = {
        "recipe": json.dumps(recipe),
        "data": json.dumps(weights.data),
        "command": command,
    }
    with whole_file(path) as unfinished:
        save_file(tensors, unfinished, metadata=header)


def put_into(
    module: LightningModule,
    weights: TrainedWeights,
    targets: Sequence[str],
    *,
    with_rest: bool = False,
    origin: str = "the file",
) -> None:
    """Copy ``weights`` into the networks of a module.

    Args:
        module: Module of the networks.
        weights: Weights of all of its networks.
        targets: Patterns of its networks.
        with_rest: Whether what is outside of the networks is copied, too, such as a layer that runs
            on the processor; otherwise the module keeps its own, as a loss with parameters when
            another run starts from these weights.
        origin: Name of the weights in the message of an error, as ``init_from=last.ckpt``.

    Raises:
        ValueError: If a weight's name or shape is another in ``module``; names both networks.
    """
    own = module.state_dict()
    other_names = own.keys() - set(names_within(own, targets))
    rest = {name: own[name] for name in other_names} | (weights.rest if with_rest else {})
    try:
        module.load_state_dict({**rest, **weights.network})
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        lines = [line if len(line) < 160 else f"{line[:160]} …" for line in lines]
        model = weights.recipe.get("model", {}).get("_target_", "another module")
        raise ValueError(
            f"{origin} has weights of another network, targets={weights.recipe.get('targets')} of "
            f"{model}, than targets={list(targets)} of this run's {type(module).__name__}: "
            f"{listed(lines, 3)}; take weights of the same network, or set model and targets as "
            "in the run that trained them"
        ) from error


def _found(path: Path) -> Path:
    """Return the path of a file, or of the file of that name in the package."""
    if path.is_file():
        return path
    own = _PACKAGE.parent / path
    if not path.is_absolute() and path.parts[:1] == (_PACKAGE.name,) and own.is_file():
        return own
    raise FileNotFoundError(f"there is no weights file {path}; train one with recipes.train")


def _load_safetensors(path: Path) -> TrainedWeights:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            network = {name: _whole(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if not {"recipe", "data"} <= header.keys():
        raise ValueError(f"{path} was not written by the recipes: its header names none")
    recipe = json.loads(header["recipe"])
    if "targets" not in recipe:
        recipe["targets"] = _FORMER_TARGETS
        network = {f"{_FORMER_TARGETS[0]}.{name}": tensor for name, tensor in network.items()}
    return TrainedWeights(network, recipe, json.loads(header["data"]))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
