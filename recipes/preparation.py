"""Prepare a process, and the data and the recognizer that every recipe starts from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf

from lightning_nna.checkpoints import deploy_weights
from recipes.asr.data import SpeechDataModule
from recipes.asr.recognizer import TransducerRecognizer
from recipes.run_folder import settings_of
from recipes.settings import check_settings
from recipes.weights import TrainedWeights, put_into


class Rebuilt(NamedTuple):
    """A trained recognizer with the data that it is used on."""

    recipe: DictConfig
    """The settings that trained it, with the changes that the command asks for."""
    datamodule: SpeechDataModule
    """Its data, read from disk."""
    recognizer: TransducerRecognizer
    """The recognizer with the trained weights as they are deployed."""


def prepare_process(config: DictConfig, name: str) -> None:
    """Validate the settings of a recipe, then set threads and seed of this process.

    Args:
        config: Composed configuration of ``recipes/conf``; ``seed`` is optional.
        name: Name of the configuration, such as ``"train"``.

    Raises:
        ValueError: See :func:`.check_settings`.
    """
    check_settings(config, name)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if "seed" in config:
        seed_everything(config.seed, verbose=False)


def rebuild(weights: TrainedWeights, config: DictConfig) -> Rebuilt:
    """Build data and recognizer again as ``weights`` were trained.

    Args:
        weights: Trained weights with their settings.
        config: Configuration whose ``data`` and ``beam_width`` change these settings.

    Raises:
        ValueError: If ``data`` asks for other features than the weights were trained on.
    """
    recipe = recipe_of(weights, config)
    datamodule = instantiate(recipe.data)
    return Rebuilt(recipe, datamodule, build_recognizer(recipe, datamodule, weights))


def recipe_of(weights: TrainedWeights, config: DictConfig) -> DictConfig:
    """Return the settings that trained ``weights``, with the changes that ``config`` asks for."""
    recipe = OmegaConf.create(weights.recipe)
    assert isinstance(recipe, DictConfig)
    changes = {key: value for key, value in config.data.items() if value is not None}
    recipe.data = OmegaConf.merge(recipe.data, changes)
    if config.get("beam_width") is not None:
        recipe.beam_width = config.beam_width
    return recipe


def build_recognizer(
    config: DictConfig, datamodule: SpeechDataModule, weights: TrainedWeights | None = None
) -> TransducerRecognizer:
    """Build the recognizer of ``config.model`` for what ``datamodule`` delivers.

    Args:
        config: Settings of the run; the recognizer stores them in its checkpoints.
        datamodule: Data module, read from disk here.
        weights: Weights to start from; their vocabulary and normalization become the data's.

    Raises:
        ValueError: If the weights are those of another network.
    """
    datamodule.prepare_data()
    datamodule.setup("fit")
    if weights is not None:
        datamodule.load_state_dict(weights.data)
    recognizer: TransducerRecognizer = instantiate(
        config.model,
        vocabulary=datamodule.vocabulary,
        num_mels=datamodule.num_mels,
        beam_width=config.beam_width,
    )
    recognizer.recipe = settings_of(config)
    if weights is not None:
        put_into(recognizer.model, weights)
        # A checkpoint may hold latent weights; a run that was compressed is used as deployed.
        deploy_weights(recognizer, weights.callbacks)
    return recognizer
