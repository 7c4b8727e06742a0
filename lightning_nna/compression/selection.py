"""Which parameters a method takes, and a number for each: bits, or a share of zeros."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_nna.emulator.selection import matches, select

V = TypeVar("V")
Granularity = Literal["tensor", "channel"]

_LARGEST_BITS = 8
#: Layers whose operators on the chip have a scale for every row of the weight.
_ROW_BY_ROW = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class ByTensor(ABC, Generic[V]):
    """A number for each of the weights that a method takes.

    Args:
        default: Of a tensor that no override names.
        targets: Globs or ``re:…`` on the names of parameters, or of modules that hold them.
        overrides: Numbers by pattern; of several that match, the last counts. A path names a JSON
            file with such a mapping, or with an entry ``overrides`` as :class:`.BitAllocation`
            saves it.
        exclude: Patterns of weights that are left alone, whatever ``targets`` says.

    Raises:
        ValueError: If a number is out of range, or a file is not such a mapping.
    """

    default: V
    targets: Sequence[str] = ("*",)
    overrides: Mapping[str, V] | str | Path = field(default_factory=dict)
    exclude: Sequence[str] = ()
    #: What the numbers are, in messages.
    quantity: ClassVar[str]

    def __post_init__(self) -> None:
        for patterns in ("targets", "exclude"):
            given = getattr(self, patterns)
            one = [given] if isinstance(given, str) else list(given)
            object.__setattr__(self, patterns, one)
        if isinstance(self.overrides, str | Path):
            object.__setattr__(self, "overrides", _read(Path(self.overrides)))
        object.__setattr__(self, "overrides", dict(self.overrides))  # type: ignore[arg-type]
        self.require(self.quantity, self.default)
        for pattern, number in dict(self.overrides).items():  # type: ignore[arg-type]
            self.require(f"overrides[{pattern!r}]", number)

    @abstractmethod
    def require(self, name: str, number: Any) -> None:
        """Raise unless a number is in range.

        Raises:
            ValueError: Shows the name and the number.
        """

    def of(self, module: nn.Module) -> dict[str, V]:
        """Numbers by the names of the parameters that are selected, in the module's order.

        Raises:
            ValueError: If a pattern matches no parameter.
        """
        names = list(weights_of(module))
        chosen = _select(self.targets, names)
        left_out = set(_select(self.exclude, names))
        chosen = [name for name in chosen if name not in left_out]
        overrides: Mapping[str, V] = self.overrides  # type: ignore[assignment]
        for pattern in overrides:
            _select([pattern], chosen)
        found = {}
        for name in chosen:
            numbers = [number for p, number in overrides.items() if matches_path(p, name)]
            found[name] = numbers[-1] if numbers else self.default
        return found


class BitWidths(ByTensor[int]):
    """Bits of the weights that a method takes, 1 to 8.

    Example:
        >>> widths = BitWidths(5, overrides={"joint.*": 1})
        >>> widths.of(nn.ModuleDict({"joint": nn.Linear(2, 2), "encoder": nn.Linear(2, 2)}))
        {'joint.weight': 1, 'encoder.weight': 5}
    """

    quantity = "bits"

    @override
    def require(self, name: str, number: Any) -> None:
        if (
            isinstance(number, bool)
            or not isinstance(number, int)
            or not 1 <= number <= _LARGEST_BITS
        ):
            raise ValueError(f"{name} must be an int from 1 to {_LARGEST_BITS}, got {number!r}")


class Sparsities(ByTensor[float]):
    """Shares of zeros in the weights that a method takes, at least 0 and below 1.

    Example:
        >>> network = nn.ModuleDict({"joint": nn.Linear(2, 2), "encoder": nn.Linear(2, 2)})
        >>> Sparsities(0.8, exclude=["joint"]).of(network)
        {'encoder.weight': 0.8}
    """

    quantity = "sparsity"

    @override
    def require(self, name: str, number: Any) -> None:
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not 0 <= number < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {number!r}")


def weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that can be compressed: float, of two axes or more, not of a loss or a metric.

    What a parametrisation computes a weight from is none.

    Example:
        >>> list(weights_of(nn.Linear(3, 2)))
        ['weight']
    """
    outside = [name for name, child in module.named_modules() if _is_loss_or_metric(child)]
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.ndim >= 2
        and parameter.is_floating_point()
        and "parametrizations." not in name
        and not name.rsplit(".", 1)[-1].endswith(("weight_g", "weight_v"))
        and not any(name.startswith(f"{path}.") for path in outside if path)
    }


def groups_of(module: nn.Module, name: str, weight: Tensor, granularity: Granularity) -> int:
    """Number of scales of a parameter.

    Args:
        module: That it belongs to.
        name: Of the parameter.
        weight: The parameter.
        granularity: ``"tensor"``: one. ``"channel"``: one a row of a linear layer or convolution,
            one a gate of an LSTM, one elsewhere: what the chip's operators can have.
    """
    if granularity == "tensor":
        return 1
    owner = module.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, _ROW_BY_ROW):
        return weight.shape[0]
    if isinstance(owner, nn.LSTM) and ".weight_hr" not in f".{name}":
        return 4
    return 1


def require_finite(name: str, weight: Tensor) -> None:
    """Raise unless every weight is finite.

    Raises:
        FloatingPointError: Names the tensor.
    """
    if not bool(torch.isfinite(weight).all()):
        raise FloatingPointError(
            f"{name} has weights that are not finite: no centroids can be found for it"
        )


def _select(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """As ``select``, and a pattern that names a module takes all that it holds."""
    chosen: set[str] = set()
    for pattern in patterns:
        below = [name for name in names if matches_path(pattern, name)]
        chosen.update(below or select([pattern], names, what="weight"))
    return [name for name in names if name in chosen]


def matches_path(pattern: str, name: str) -> bool:
    """Whether a pattern fits a name, or that of a module that holds it.

    Example:
        >>> matches_path("joint", "joint.output.weight"), matches_path("*.output", "joint.output.w")
        (True, True)
    """
    parts = name.split(".")
    return any(matches(pattern, ".".join(parts[:end])) for end in range(1, len(parts) + 1))


def _is_loss_or_metric(module: nn.Module) -> bool:
    return isinstance(module, Metric) or type(module).__name__.endswith("Loss")


def _read(path: Path) -> dict[str, Any]:
    """Numbers by pattern from a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    found = content.get("overrides", content) if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no numbers by pattern, but {type(content).__name__}")
    return found
