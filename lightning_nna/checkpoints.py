"""From a checkpoint to the module that is deployed: ``load_deployed``.

A checkpoint has all that a run needs to go on: weights, masks, centroids and
ranges that the callbacks know. What the accelerator gets follows from all of them.
"""

from __future__ import annotations

import pickle
import struct
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_nna.emulation.attachment import attach
from lightning_nna.emulation.scope import lightning_classes
from lightning_nna.pruning.masks import MaskTransform
from lightning_nna.quantization.fixed_centroids import FixedCentroids
from lightning_nna.quantization.general_quantizer_transform import GeneralQuantizerTransform
from lightning_nna.weights.codebook import CodebookSettings
from lightning_nna.weights.pipeline import WeightTransform, pipeline_of

# The reader takes any bytes for instructions, and trips over them in many ways.
_OF_OTHER_FILES = (
    *(RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, OverflowError, MemoryError, struct.error),
)


def load_deployed(
    module: nn.Module, checkpoint: str | Path | Mapping[str, Any], *, emulation: bool = True
) -> nn.Module:
    """Load a checkpoint of a run as the run would have been deployed.

    Masks and centroids of the run's weight methods are applied, and the weights keep the
    quantization parameters that the methods chose. The ranges of ``NNAEmulation`` are put back, so
    that the module can be emulated, verified and exported at once. A checkpoint that was written in
    the middle of a run, one that was written after it, and one with averaged weights are loaded
    alike; so is one of a float run.

    Args:
        module: A module as the run has trained it.
        checkpoint: Path of a file of ``ModelCheckpoint`` or ``Trainer.save_checkpoint``, or what
            ``torch.load`` returns of one. A path is read with ``weights_only=True``.
        emulation: Whether ranges are put back; without them the module is a float module of
            compressed weights.

    Returns:
        The same module.

    Raises:
        ValueError: If the file holds no state of callbacks or no weights, or more than tensors and
            plain values, or was written by a version that did not keep what is needed.
        RuntimeError: If the weights are those of another module.

    Example:
        >>> import lightning.pytorch as pl, tempfile
        >>> from lightning_nna.callbacks import MagnitudePruning
        >>> from lightning_nna.testing import SmallRecurrentModule
        >>> trainer = pl.Trainer(max_steps=8, callbacks=[MagnitudePruning(0.5, every_n_steps=2)],
        ...     accelerator="cpu", logger=False, enable_checkpointing=False,
        ...     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(SmallRecurrentModule())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer.save_checkpoint(f"{folder}/run.ckpt")
        ...     loaded = load_deployed(SmallRecurrentModule(), f"{folder}/run.ckpt")
        >>> round(float((loaded.lstm.weight_hh_l0 == 0).float().mean()), 2)
        0.5
    """
    content = checkpoint if isinstance(checkpoint, Mapping) else load_checkpoint(checkpoint)
    if "state_dict" not in content:
        raise ValueError(
            "this is no checkpoint of a Trainer: it has no 'state_dict'; load plain weights with "
            "module.load_state_dict"
        )
    if "callbacks" not in content:
        raise ValueError(
            "the checkpoint holds weights alone (save_weights_only=True), not the state of the "
            "methods of the run: write whole checkpoints, or load it with module.load_state_dict "
            "if no method took part in the run"
        )
    if isinstance(module, lightning_classes()):
        module.on_load_checkpoint(dict(content))  # type: ignore[operator]
    module.load_state_dict(content["state_dict"])
    deploy_weights(module, content["callbacks"])
    if emulation:
        put_ranges_back(module, content["callbacks"])
    return module


@torch.inference_mode(False)  # What is loaded for an evaluation may be trained later.
@torch.no_grad()
def deploy_weights(module: nn.Module, callbacks: Mapping[str, Any]) -> list[str]:
    """Let weights that were loaded from a checkpoint be what its weight methods deploy of them.

    Args:
        module: It holds the weights of the checkpoint.
        callbacks: States of the run's callbacks, by their keys.

    Returns:
        Names of the parameters that a method has taken.

    Raises:
        ValueError: If a method's state does not say how its weights are deployed.
    """
    pipeline = pipeline_of(module)
    pipeline.forget_ended()
    transforms: list[tuple[str, WeightTransform]] = []
    for key, state in callbacks.items():
        if isinstance(state, Mapping) and "latents" in state:
            if "method" not in state:
                raise ValueError(
                    f"the state of {key} was written by an older version, which did not keep what "
                    f"deployment needs: resume the run with its callbacks, and save it again"
                )
            transforms += _transforms_of(module, state)
    for name, transform in transforms:
        pipeline.claim(name, module.get_parameter(name), transform)
    names = list(dict.fromkeys(name for name, _ in transforms))
    for name in names:
        parameter = module.get_parameter(name)
        parameter.copy_(pipeline.hard(parameter))
    for _, transform in transforms:
        pipeline.end(transform)
    return names


def put_ranges_back(module: nn.Module, callbacks: Mapping[str, Any]) -> None:
    """Attach the emulation that a run had, with its ranges.

    Args:
        module: The module.
        callbacks: States of the run's callbacks, by their keys.
    """
    for key, state in callbacks.items():
        if not isinstance(state, Mapping) or "emulator" not in state:
            continue
        if "settings" not in state:
            raise ValueError(
                f"the state of {key} was written by an older version, which did not keep the spec: "
                f"pass emulation=False, and give the state to NNAEmulation"
            )
        saved = state["emulator"]
        if saved is None or not saved["calibrated"]:
            warnings.warn(
                f"the ranges of {key} were not frozen when the checkpoint was written, after "
                f"{state['steps']} optimizer steps: calibrate the module before it is emulated",
                stacklevel=3,
            )
            continue
        settings = state["settings"]
        emulator = attach(
            module,
            settings["spec"],
            targets=settings["targets"],
            observer=settings["observer"],
        )
        emulator.load_state_dict(saved)


def _transforms_of(
    module: nn.Module, state: Mapping[str, Any]
) -> Iterator[tuple[str, WeightTransform]]:
    """The transforms of one callback, by the parameters' names."""
    for name, saved in state.get("masks", {}).items():
        mask = MaskTransform(state["method"], module.get_parameter(name), revives=False)
        mask.load_state_dict(saved)
        yield name, mask
    if state["method"] == "mracos_regularization":
        return  # It pulls weights, and deploys them unchanged.
    for name, saved in state.get("centroids", {}).items():
        parameter, settings = module.get_parameter(name), dict(state["settings"])
        bits = settings["bits"][name]
        transform: GeneralQuantizerTransform | FixedCentroids
        if "scale_log2" not in saved:
            known = {field.name for field in fields(CodebookSettings)}
            codebook = {key: value for key, value in settings.items() if key in known}
            # It serves to fit centroids, which are known.
            codebook["max_entropy_bits"] = None
            transform = FixedCentroids(module, name, parameter, bits, CodebookSettings(**codebook))
        else:
            transform = GeneralQuantizerTransform(
                parameter,
                bits,
                mu=settings["mu"],
                grid_bits=settings["grid_bits"],
                power_of_two_scales=settings["power_of_two_scales"],
                pin_zero=settings["pin_zero"] and bits > 1,
            )
        transform.load_state_dict(saved)
        yield name, transform


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of tensors and plain containers; code in it does not run.

    Args:
        path: A file that Lightning or ``torch.save`` wrote.

    Returns:
        The file's content, tensors on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or holds objects of any other class: reading these can
            run code of whoever wrote the file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"epoch": 3}, f"{folder}/last.ckpt")
        ...     load_checkpoint(f"{folder}/last.ckpt")
        {'epoch': 3}
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not read: it is damaged, or holds objects other than tensors and plain "
            f"containers, which could run code: {str(error).splitlines()[-1]}"
        ) from error
    except _OF_OTHER_FILES as error:
        reason = str(error) if isinstance(error, RuntimeError) else "it is no file of torch.save"
        raise ValueError(f"{path} is damaged or no checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} is no checkpoint of a Trainer: it holds a {type(checkpoint).__name__}"
        )
    return checkpoint
