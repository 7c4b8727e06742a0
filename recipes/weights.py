"""Weights of a recognizer with everything that their use needs, in one file.

Two kinds of file are read: a Lightning checkpoint of ``recipes.train``, and a ``.safetensors`` file
with the network's weights in half precision and, in its header, the settings and the vocabulary.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_nna.checkpoints import load_checkpoint
from recipes.asr.data import SpeechDataModule
from recipes.asr.rnnt import Transducer

# Settings in the header of a small file: those that build the data and the recognizer again.
# The others name folders of the training machine, and the speed of the run.
_HEADER_SETTINGS = ("name", "method", "seed", "beam_width", "data", "model")
_NETWORK = "model."
_DATA = SpeechDataModule.__qualname__  # Lightning's key for the state of the data module.


@dataclass(frozen=True)
class TrainedWeights:
    """Content of a weights file.

    Attributes:
        network: Weights of the transducer, float32, by parameter name.
        recipe: All settings of the run that trained them.
        data: State of the data module: vocabulary and normalization as plain dictionaries.
        callbacks: State of the run's callbacks by key; empty for a ``.safetensors`` file.
    """

    network: dict[str, Tensor]
    recipe: dict[str, Any]
    data: dict[str, Any]
    callbacks: dict[str, Any] = field(default_factory=dict)


def load_weights(path: str | Path) -> TrainedWeights:
    """Read a checkpoint or a ``.safetensors`` file.

    Args:
        path: Path of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file was not written by this recipe, is damaged, or contains objects
            that could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}; train one with recipes.train")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    checkpoint = load_checkpoint(path)
    if not {"state_dict", "recipe", _DATA} <= checkpoint.keys():
        raise ValueError(f"{path} was not written by recipes.train: it names no recipe")
    network = {
        name.removeprefix(_NETWORK): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(_NETWORK)
    }
    return TrainedWeights(
        network, checkpoint["recipe"], checkpoint[_DATA], checkpoint.get("callbacks", {})
    )


def save_weights(path: str | Path, weights: TrainedWeights, *, command: str) -> None:
    """Write the network in half precision, with the settings of data and model in the header.

    Args:
        path: Path of a ``.safetensors`` file; its folder is created.
        weights: Weights to write; the state of callbacks is left out.
        command: Command that trained them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in weights.network.items()}
    header = {
        "recipe": json.dumps({key: weights.recipe[key] for key in _HEADER_SETTINGS}),
        "data": json.dumps(weights.data),
        "command": command,
    }
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, unfinished, metadata=header)
    unfinished.replace(path)


def put_into(model: Transducer, weights: TrainedWeights) -> None:
    """Copy ``weights`` into ``model``.

    Raises:
        ValueError: If a weight's name or shape is another in ``model``.
    """
    try:
        model.load_state_dict(weights.network)
    except RuntimeError as error:
        raise ValueError(
            f"these weights are of another network, set model.network as in their recipe: {error}"
        ) from error


def _load_safetensors(path: Path) -> TrainedWeights:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            network = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if not {"recipe", "data"} <= header.keys():
        raise ValueError(f"{path} was not written by this recipe: its header names none")
    return TrainedWeights(network, json.loads(header["recipe"]), json.loads(header["data"]))
