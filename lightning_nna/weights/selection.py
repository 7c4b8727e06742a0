"""Selection of a method's parameters, and a number for each: bits, or a fraction of zeros.

By default a method takes the *weights of operators* that are trained. What an operator multiplies
with shows in the layer that owns a parameter, and where a module of one's own does, in its shape:

- layers of ``torch.nn`` that multiply or look up (linear, bilinear, convolutions, embeddings,
  recurrent layers and cells, attention): their weights, not their biases;
- layers of normalization (a class whose name ends in ``Norm``, ``Norm2d``, …): nothing;
- any other module: a parameter with two axes or more that are longer than 1, the first among them.
  So ``(1, 1, channels)``, ``(1, positions, channels)`` and ``(channels, 1, 1)`` are none. Nor is
  one with ``bias``, ``pos`` or ``position``, ``token`` or ``state`` as a word of its own name
  (``pos_bias_u``, ``relative_position_bias_table``), which shapes do not tell apart.

Frozen parameters (``requires_grad`` is False while others are trained) are left alone, too. A
pattern that fits nothing else takes what it names: ``targets=["backbone"]``, ``["pos_embedding"]``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_nna.settings_files import read_json

V = TypeVar("V")
Granularity = Literal["per_tensor", "per_channel"]

_LARGEST_BITS = 8
#: Layers of PyTorch that multiply with their weights, or look rows of them up.
_MULTIPLIERS = (
    *(nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag),
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),
)
_NORM = re.compile(r"Norm(\dd)?$")
#: Words of names that say of a parameter that nothing is multiplied with it.
_NO_WEIGHT = re.compile(
    r"(?:^|[_.])(?:bias(?:es)?|pos|pe|pos(?:ition|enc|emb)\w*|tokens?|states?|h0|c0)(?=$|[_.\d])"
)
#: Layers whose operators have a scale for every row of the weight.
_ROW_BY_ROW = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_loss_or_metric(module: nn.Module) -> bool:
    """Tell metrics by their class, and losses by the name ``…Loss`` that all libraries use.

    Example:
        >>> is_loss_or_metric(nn.MSELoss()), is_loss_or_metric(nn.Linear(1, 1))
        (True, False)
    """
    return isinstance(module, Metric) or type(module).__name__.endswith("Loss")


def matches(pattern: str, name: str) -> bool:
    """Say whether a name fits a pattern.

    Args:
        pattern: A glob in which ``*`` also crosses dots, or ``re:`` and a regular expression
            that must match the whole name.
        name: A dotted module or parameter name.

    Raises:
        ValueError: If a regular expression does not compile.

    Example:
        >>> matches("encoder.*", "encoder.lstm.weight_ih_l0"), matches("re:.*bias", "a.weight")
        (True, False)
    """
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error


def select(patterns: Sequence[str], names: Iterable[str], *, what: str) -> list[str]:
    """Return the names that at least one pattern selects, in their own order.

    Args:
        patterns: Globs or ``re:`` expressions, see :func:`matches`.
        names: Candidates.
        what: What the names are, for the error ("module", "parameter").

    Raises:
        ValueError: If a pattern selects nothing; the message lists some candidates.
        TypeError: If ``patterns`` is one string, whose letters would be taken as patterns.

    Example:
        >>> select(["*.lstm"], ["encoder.lstm", "joint.output"], what="module")
        ['encoder.lstm']
    """
    if isinstance(patterns, str):
        raise TypeError(f"patterns must be a sequence of strings, got {patterns!r}: use [..]")
    candidates = list(names)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in candidates):
            shown = ", ".join(candidates[:8]) + (", …" if len(candidates) > 8 else "")
            raise ValueError(
                f"pattern {pattern!r} matches no {what}; there are: {shown or '(none)'}"
            )
    return [name for name in candidates if any(matches(p, name) for p in patterns)]


@dataclass(frozen=True)
class ByTensor(ABC, Generic[V]):
    """A number for each of the weights that a method takes.

    Args:
        default: Number of a tensor that no override names.
        targets: Globs or ``re:…`` on the names of parameters, or of modules that have them. Each
            takes the weights of operators that it fits and that are trained, see the module; if
            there are none, the frozen ones, and if there are none, other parameters.
        overrides: Numbers by pattern; of several that match, the last counts. A path names a JSON
            file with such a mapping, or with an entry ``overrides`` as :class:`.BitAllocation`
            saves it.
        exclude: Patterns of weights that are never selected, whatever ``targets`` says.

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
            patterns_or_one = getattr(self, patterns)
            one = [patterns_or_one] if isinstance(patterns_or_one, str) else list(patterns_or_one)
            object.__setattr__(self, patterns, one)
        if isinstance(self.overrides, str | Path):
            object.__setattr__(self, "overrides", read_numbers(self.overrides))
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

    def of(self, module: nn.Module, frozen: Collection[str] | None = None) -> dict[str, V]:
        """Numbers by the names of the parameters that are selected, in the module's order.

        Args:
            module: Module with the parameters.
            frozen: Names of the parameters that count as frozen; None for :func:`frozen_in`.

        Raises:
            ValueError: If a pattern matches no parameter.
        """
        names = self._selected(module, frozen)
        overrides: Mapping[str, V] = self.overrides  # type: ignore[assignment]
        for pattern in overrides:
            _select([pattern], [names])
        numbers_by_name = {}
        for name in names:
            numbers = [number for p, number in overrides.items() if matches_path(p, name)]
            numbers_by_name[name] = numbers[-1] if numbers else self.default
        return numbers_by_name

    def left_alone(
        self, module: nn.Module, frozen: Collection[str] | None = None
    ) -> dict[str, list[str]]:
        """Names that ``targets`` fit and that are not taken, nor excluded, by the reason.

        Args:
            module: Module with the parameters.
            frozen: See :meth:`of`.

        Raises:
            ValueError: If a pattern matches no parameter.

        Example:
            >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            >>> _ = net[0].requires_grad_(False)
            >>> Sparsities(0.5).left_alone(net)
            {'frozen': ['0.weight']}
        """
        selected, of_operators = set(self._selected(module, frozen)), set(operator_weights(module))
        names_by_reason: dict[str, list[str]] = {}
        for name in candidates_of(module):
            fits = any(matches_path(pattern, name) for pattern in self.targets)
            excluded = any(matches_path(pattern, name) for pattern in self.exclude)
            if fits and not excluded and name not in selected:
                reason = "frozen" if name in of_operators else "no weights of operators"
                names_by_reason.setdefault(reason, []).append(name)
        return names_by_reason

    def _selected(self, module: nn.Module, frozen: Collection[str] | None) -> list[str]:
        names, of_operators = list(candidates_of(module)), list(operator_weights(module))
        still = set(frozen_in(module) if frozen is None else frozen)
        trained = [name for name in of_operators if name not in still]
        selected = _select(self.targets, [trained, of_operators, names])
        left_out = set(_select(self.exclude, [names]))
        return [name for name in selected if name not in left_out]


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
    """Fractions of zeros in the weights that a method takes, at least 0 and below 1.

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


def candidates_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a method can take if they are named.

    They are float, of two axes or more, and not of a loss or a metric. The originals of a
    parametrization are none.

    Args:
        module: Module with the parameters.

    Example:
        >>> list(candidates_of(nn.LayerNorm((3, 2))))
        ['weight', 'bias']
    """
    outside = [name for name, child in module.named_modules() if is_loss_or_metric(child)]
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.ndim >= 2
        and parameter.is_floating_point()
        and "parametrizations." not in name
        and not name.rsplit(".", 1)[-1].endswith(("weight_g", "weight_v"))
        and not any(name.startswith(f"{path}.") for path in outside if path)
    }


def operator_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the candidates that operators multiply with, or look up in; see the module.

    Args:
        module: Module with the parameters.

    Example:
        >>> net = nn.Module()
        >>> net.head, net.norm = nn.Linear(4, 1), nn.LayerNorm((4, 4))
        >>> net.cls_token, net.matrix = (nn.Parameter(torch.ones(*s)) for s in [(1, 1, 4), (4, 4)])
        >>> list(operator_weights(net))
        ['matrix', 'head.weight']
    """
    return {
        name: parameter
        for name, parameter in candidates_of(module).items()
        if _is_operator_weight(module.get_submodule(name.rpartition(".")[0]), name, parameter)
    }


def frozen_in(module: nn.Module) -> list[str]:
    """Return the names of the frozen parameters; none where no parameter at all is trained.

    Args:
        module: Module with the parameters.

    Example:
        >>> frozen_in(nn.Linear(2, 2).requires_grad_(False))
        []
    """
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    return frozen if any(p.requires_grad for p in module.parameters()) else []


def groups_of(module: nn.Module, name: str, weight: Tensor, granularity: Granularity) -> int:
    """Count the scales of a parameter.

    Args:
        module: Module that it belongs to.
        name: Name of the parameter.
        weight: Parameter, shape ``(rows, …)``.
        granularity: ``"per_tensor"``: one. ``"per_channel"``: one for each row of a linear layer or
            convolution, one for each gate of an LSTM, one elsewhere: as the operators of the
            accelerator have them.
    """
    if granularity == "per_tensor":
        return 1
    owner = module.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, _ROW_BY_ROW):
        return weight.shape[0]
    if isinstance(owner, nn.LSTM) and ".weight_hr" not in f".{name}":
        return 4
    return 1


def _select(patterns: Sequence[str], tiers: Sequence[Sequence[str]]) -> list[str]:
    """As ``select``, and a pattern that names a module takes all that it holds.

    Args:
        patterns: Patterns; each selects what it fits in the first tier where it fits anything.
        tiers: Names in tiers, each a subset of the next. A pattern of stars alone names nothing,
            and so fits in the first tier only.
    """
    names, selected = tiers[-1], set()
    for pattern in patterns:
        reachable = tiers if pattern.strip("*") else tiers[:1]
        fits = ([n for n in level if matches_path(pattern, n)] for level in reachable)
        below = next((level for level in fits if level), [])
        if not below and names and reachable != tiers:
            raise ValueError(
                f"pattern {pattern!r} matches no weight of an operator that is trained: name what "
                f"is to be taken; there are: {', '.join(names[:8])}{', …' if names[8:] else ''}"
            )
        selected.update(below or select([pattern], names, what="weight"))
    return [name for name in names if name in selected]


def matches_path(pattern: str, name: str) -> bool:
    """Say whether a pattern fits a name, or the name of a module that has it.

    Example:
        >>> matches_path("joint", "joint.output.weight"), matches_path("*.output", "joint.output.w")
        (True, True)
    """
    parts = name.split(".")
    return any(matches(pattern, ".".join(parts[:end])) for end in range(1, len(parts) + 1))


def _is_operator_weight(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    # What a list of parameters holds has the name of the list.
    in_list = isinstance(owner, (nn.ParameterList, nn.ParameterDict))
    own = ".".join(name.rsplit(".", 2)[-2:]) if in_list else name.rpartition(".")[2]
    if _NORM.search(type(owner).__name__) or _NO_WEIGHT.search(own):
        return False
    longer = [length > 1 for length in parameter.shape]
    return isinstance(owner, _MULTIPLIERS) or (longer[0] and sum(longer) > 1)


def read_numbers(path: str | Path) -> dict[str, Any]:
    """Read numbers by pattern from a JSON file.

    Args:
        path: File with such a mapping, or with one as its entry ``overrides``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has none.
    """
    content = read_json(path)
    numbers = content.get("overrides", content) if isinstance(content, dict) else None
    if not isinstance(numbers, dict):
        raise ValueError(f"{path} holds no numbers by pattern, but {type(content).__name__}")
    return numbers
