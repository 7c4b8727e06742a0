"""What a chip can do and how it rounds: ``NNASpec`` and its presets.

A spec is a frozen dataclass, a preset's name, or a YAML file with the same keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

#: The operators that the emulator has, by the name that coverage and call sites use.
OPERATORS = (
    "add",
    "concatenation",
    "embedding",
    "fully_connected",
    "lstm",
    "mul",
    "relu",
    "sigmoid",
    "sub",
    "tanh",
)

Granularity = Literal["per_channel", "per_tensor"]


@dataclass(frozen=True)
class NNASpec:
    """The arithmetic of one accelerator.

    Args:
        name: What reports call it.
        activation_bits: Width of activations between operators; 8.
        weight_bits: Width of weights, 2 to 8; values are symmetric, in ±(2^(b-1) - 1).
        weight_granularity: One scale per output channel of a fully connected layer, or one per
            tensor. LSTM gates and embeddings always have one per tensor, as their kernels do.
        operators: Which of :data:`OPERATORS` run on the chip; the others run in float and are
            reported as CPU fallbacks.

    Raises:
        ValueError: If a field is out of range; the message names it and what is allowed.

    Example:
        >>> NNASpec(weight_bits=4).weight_max
        7

    Reference:
        The TensorFlow Lite 8-bit quantization specification.
    """

    name: str = "litert-int8"
    activation_bits: int = 8
    weight_bits: int = 8
    weight_granularity: Granularity = "per_channel"
    operators: tuple[str, ...] = OPERATORS

    def __post_init__(self) -> None:
        _require_integer("activation_bits", self.activation_bits, 8, 8)
        _require_integer("weight_bits", self.weight_bits, 2, 8)
        if self.weight_granularity not in ("per_channel", "per_tensor"):
            raise ValueError(
                f"weight_granularity must be 'per_channel' or 'per_tensor', "
                f"got {self.weight_granularity!r}"
            )
        unknown = sorted(set(self.operators) - set(OPERATORS))
        if unknown:
            raise ValueError(f"operators has unknown names {unknown}; known: {list(OPERATORS)}")
        object.__setattr__(self, "operators", tuple(self.operators))

    @property
    def weight_max(self) -> int:
        """Largest integer a weight can take; the smallest is its negative."""
        return int(2 ** (self.weight_bits - 1) - 1)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> NNASpec:
        """Build a spec from plain keys, as a YAML file has them.

        Args:
            settings: Field names and values; missing fields keep their defaults.

        Raises:
            ValueError: If a key is unknown, or a value is not allowed.

        Example:
            >>> NNASpec.from_mapping({"name": "tiny", "weight_bits": 4}).weight_bits
            4
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(f"an NNASpec has no key {unknown}; allowed: {sorted(known)}")
        values = dict(settings)
        if "operators" in values:
            values["operators"] = tuple(values["operators"])
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> NNASpec:
        """Read a spec from a YAML file.

        Args:
            path: A file whose top level is a mapping of field names to values.

        Raises:
            ValueError: If the file is not a mapping, or a key or value is not allowed; the
                message names the file.
        """
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, Mapping):
            raise ValueError(f"{path}: a spec file holds a mapping of keys, got {content!r}")
        try:
            return cls.from_mapping(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def resolve_spec(spec: str | NNASpec | Mapping[str, Any]) -> NNASpec:
    """Turn what a user may write for ``spec`` into an :class:`NNASpec`.

    Args:
        spec: A spec, the name of a preset, a mapping of keys, or the path of a YAML file.

    Raises:
        ValueError: If a name is neither a preset nor an existing file.

    Example:
        >>> resolve_spec("litert-int8").activation_bits
        8
    """
    if isinstance(spec, NNASpec):
        return spec
    if isinstance(spec, Mapping):
        return NNASpec.from_mapping(spec)
    if spec in PRESETS:
        return PRESETS[spec]
    if Path(spec).is_file():
        return NNASpec.from_yaml(spec)
    raise ValueError(
        f"spec {spec!r} is neither a preset ({', '.join(sorted(PRESETS))}) nor a YAML file"
    )


def _require_integer(name: str, value: object, low: int, high: int) -> None:
    """Raise unless ``value`` is a whole number in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        allowed = str(low) if low == high else f"{low} to {high}"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


PRESETS: dict[str, NNASpec] = {"litert-int8": NNASpec()}
