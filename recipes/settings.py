"""Validation of settings: a run uses every setting of its command, or does not start.

Hydra composes any setting; without validation nobody would notice that ``bits=2`` goes to a method
without bits. So every recipe validates its configuration first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_nna.emulation.spec import DEFAULT_PRESET
from recipes.nearest import did_you_mean
from recipes.program import CONF

#: Settings that the groups of compression read; each group gives a value to those that it uses.
METHOD_SETTINGS = ("bits", "sparsity", "pattern", "bit_overrides", "parq_steps")

_POSITIVE = frozenset({"threads", "beam_width", "compared_batches"})
_NUMBERS = frozenset(
    {
        *("seed", "model.optimizer.lr", "trainer.max_epochs", "trainer.min_epochs"),
        *("trainer.max_steps", "trainer.min_steps", "trainer.limit_train_batches"),
        *("trainer.limit_val_batches", "trainer.limit_test_batches", "trainer.overfit_batches"),
        *("trainer.accumulate_grad_batches", "trainer.check_val_every_n_epoch"),
        *("trainer.log_every_n_steps", "trainer.num_sanity_val_steps", "trainer.num_nodes"),
        "trainer.gradient_clip_val",
    }
)


def check_settings(config: DictConfig, name: str) -> None:
    """Raise unless every setting of ``config`` has a value and is used.

    Args:
        config: Composed configuration of ``recipes/conf``.
        name: Name of the configuration, such as ``"train"``.

    Raises:
        ValueError: If a mandatory setting has no value, if the recipe does not know a setting, or
            if the selected group of compression does not use one.
    """
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    leaves = list(_leaves(plain))
    if missing := [path for path, value in leaves if value == "???"]:
        raise ValueError(
            f"{', '.join(missing)} must be set: add {missing[0]}=<value> to the command"
        )
    if unknown := sorted({str(key) for key in config} - _known(name)):
        hint = did_you_mean(unknown[0], (path for path, _ in leaves if path not in unknown))
        raise ValueError(f"recipes.{name} has no setting {', '.join(unknown)}{hint}")
    _check_numbers(leaves)
    read = "\n".join(str(value) for _, value in leaves)
    for key in METHOD_SETTINGS:
        if plain.get(key) is not None and f"${{{key}}}" not in read:
            raise ValueError(
                f"{key}={plain[key]} is not used: {_users(key)} read it, and this command has "
                "compression=none or another group, or overrides what reads it; choose such a "
                f"group, or leave {key} out"
            )
    spec = plain.get("nna", {}).get("spec", DEFAULT_PRESET)
    if spec != DEFAULT_PRESET and "${nna.spec}" not in read:
        raise ValueError(
            f"nna={spec} is not used: nothing is emulated; add compression=nna8 or another group "
            "of compression, or leave nna out"
        )


def _check_numbers(leaves: Sequence[tuple[str, Any]]) -> None:
    """Raise if a setting that must be a number is text: what it builds would fail much later."""
    for path, value in leaves:
        if path in _POSITIVE and value is not None:
            is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not is_count and not _is_reference(value):
                raise ValueError(f"{path} must be a positive number, got {value!r}")
        if path in _NUMBERS and isinstance(value, str) and not _is_reference(value):
            raise ValueError(f"{path} must be a number, got {value!r}")


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def instantiate_all(nodes: Mapping[Any, Any] | DictConfig, group: str) -> dict[str, Any]:
    """Build the objects of a keyed group such as ``callbacks``; null entries are left out.

    Args:
        nodes: Configurations by key, each with a ``_target_`` or null.
        group: Name of the group, for messages.

    Raises:
        ValueError: If a node has no ``_target_``: an override of an entry that does not exist.
    """
    configurations = {str(key): node for key, node in nodes.items() if node is not None}
    for key, node in configurations.items():
        if "_target_" not in node:
            raise ValueError(
                f"{group}.{key} has settings ({', '.join(map(str, node))}) and no _target_: no "
                f"selected group defines {group}.{key}"
            )
    return {key: instantiate(node) for key, node in configurations.items()}


def _known(name: str) -> set[str]:
    """Return settings and groups of the top level of a configuration."""
    primary = OmegaConf.load(CONF / f"{name}.yaml")
    assert isinstance(primary, DictConfig)
    groups = {
        str(key) for entry in primary.get("defaults", []) if entry != "_self_" for key in entry
    }
    # `start` puts its key on the top level.
    return {str(key) for key in primary} | groups | {"init_from"}


def _users(key: str) -> str:
    """List the groups of compression that read a setting, by name."""
    folder = sorted((CONF / "compression").glob("*.yaml"))
    return ", ".join(f"compression={path.stem}" for path in folder if _sets(path, key))


def _sets(path: Path, key: str) -> bool:
    """Tell whether a group, or one that it is based on, gives a setting its value."""
    group = OmegaConf.load(path)
    assert isinstance(group, DictConfig)
    bases = [base for base in group.get("defaults", []) if base != "_self_"]
    return key in group or any(_sets(path.with_name(f"{base}.yaml"), key) for base in bases)


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a tree of settings with their dotted keys."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}[{index}]")
    else:
        yield path, node
