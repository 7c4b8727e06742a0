"""Prepare a process, and the data and the module that every recipe starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from omegaconf import DictConfig, OmegaConf

from lightning_nna.checkpoints import deploy_weights
from lightning_nna.weights.selection import matches_path
from recipes.adapter import Adapter, adapter_of
from recipes.settings import check_settings
from recipes.weights import TrainedWeights, put_into


class Rebuilt(NamedTuple):
    """A trained module with the data that it is used on."""

    recipe: DictConfig
    """The settings that trained it, with the changes that the command asks for."""
    adapter: Adapter
    """The module with the trained weights as they are deployed, and its data."""


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
    """Build data and module again as ``weights`` were trained.

    Args:
        weights: Trained weights with their settings.
        config: Configuration whose ``data``, ``beam_width`` and ``max_labels_per_step`` change
            these settings; its ``targets`` become theirs.

    Raises:
        ValueError: If ``data`` asks for other features than the weights were trained on.
    """
    recipe = recipe_of(weights, config)
    config.targets = recipe.targets
    return Rebuilt(recipe, build(recipe, weights, with_rest=True))


def recipe_of(weights: TrainedWeights, config: DictConfig) -> DictConfig:
    """Return the settings that trained ``weights``, with the changes that ``config`` asks for."""
    recipe = OmegaConf.create(weights.recipe)
    assert isinstance(recipe, DictConfig)
    changes = {key: value for key, value in config.data.items() if value is not None}
    if "test_part" not in recipe.data and changes.get("test_part") == "test":
        del changes["test_part"]  # Data of one's own may have a test part alone.
    recipe.data = OmegaConf.merge(recipe.data, changes)
    if config.get("beam_width") is not None:
        recipe.beam_width = config.beam_width
    if config.get("max_labels_per_step") is not None:
        recipe.model.max_labels_per_step = config.max_labels_per_step
    return recipe


def build(
    config: DictConfig, weights: TrainedWeights | None = None, *, with_rest: bool = False
) -> Adapter:
    """Build the data of ``config.data``, and the module of ``config.model`` for what it delivers.

    A data module may have ``model_settings()``: arguments of the module that follow from the data,
    such as the number of labels.

    Args:
        config: Settings of the run.
        weights: Weights to start from; the state of their data, such as a vocabulary, becomes the
            data's.
        with_rest: Whether the module is that of the weights, see :func:`.put_into`.

    Raises:
        TypeError: If ``data`` or ``model`` builds something else than a Lightning module of its
            kind.
        ValueError: If ``targets`` names nothing of the module, or the weights are those of another
            network.
    """
    datamodule = instantiate(config.data)
    _require(datamodule, LightningDataModule, "data", config)
    datamodule.prepare_data()
    datamodule.setup("fit")
    if weights is not None:
        datamodule.load_state_dict(weights.data)
    follows: dict[str, Any] = getattr(datamodule, "model_settings", dict)()
    module = instantiate(config.model, **follows)
    _require(module, LightningModule, "model", config)
    _require_targets(module, config.targets)
    adapter = adapter_of(module, datamodule, config.targets)
    adapter.configure(config)
    if weights is not None:
        origin = "the file" if with_rest else f"init_from={config.init_from}"
        put_into(module, weights, config.targets, with_rest=with_rest, origin=origin)
        # A checkpoint may hold latent weights; a run that was compressed is used as deployed.
        deploy_weights(module, weights.callbacks)
    return adapter


def _require_targets(module: LightningModule, targets: Sequence[str]) -> None:
    if isinstance(targets, str):
        raise ValueError(f"targets is a list of names of children, as [{targets}]; got {targets!r}")
    names = [*dict(module.named_modules()), *dict(module.named_parameters())]
    for target in targets:
        if not any(matches_path(target, name) for name in names):
            children = [name for name, _ in module.named_children()]
            raise ValueError(
                f"targets={list(targets)} has {target}, which names no child of "
                f"{type(module).__name__}; there are {', '.join(children) or 'none'}"
            )


def _require(built: object, kind: type, group: str, config: DictConfig) -> None:
    if not isinstance(built, kind):
        raise TypeError(
            f"{group}._target_={config[group].get('_target_')} builds a {type(built).__name__}, "
            f"and must build a {kind.__name__}"
        )
