r"""Allocation of bits to tensors: greedy, from the measured loss.

Every tensor alone is rounded to its Lloyd-Max codebook of each width, and the loss of a calibration
batch is measured. All tensors start at the widest; then the change with the least increase of the
loss for a byte saved is made,

.. math:: \arg\min_{t,\, b < b_t} \frac{\max(0, L_t(b) - L_t(b_t))}{B_t(b_t) - B_t(b)},

to any lower width and not only to the next one, until the target is met; sizes are exact, to the
byte. What is left of the target goes to the tensors that gain most. With a :class:`.Price` the
:math:`B_t(b)` are prices, and a width that saves nothing there is not lowered.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_nna.files import write_whole
from lightning_nna.non_finite import require_finite_weights
from lightning_nna.settings_files import read_json
from lightning_nna.weights.codebook import Codebook, CodebookSettings, channels_of
from lightning_nna.weights.price import Price
from lightning_nna.weights.selection import (
    BitWidths,
    Granularity,
    candidates_of,
    groups_of,
)


@dataclass(frozen=True)
class BitAllocation:
    """Bits by tensor, and the measurements behind them.

    Args:
        bits: Bits of the index of a weight, by the name of the parameter.
        losses: Loss with this tensor alone rounded, by name and bits.
        sizes: Sizes of this tensor in bytes (indices, centroids and scales), by name and bits.
        weights: Number of weights, by name.
        float_loss: Loss with nothing rounded.
        prices: Prices of this tensor, by name and bits; empty if none were asked for.
        unit: Unit of the prices.
    """

    bits: dict[str, int]
    losses: dict[str, dict[int, float]]
    sizes: dict[str, dict[int, int]]
    weights: dict[str, int]
    float_loss: float
    prices: dict[str, dict[int, float]] = field(default_factory=dict)
    unit: str = ""

    @property
    def overrides(self) -> dict[str, int]:
        """Bits by tensor, as every weight method takes them in ``overrides``."""
        return dict(self.bits)

    @property
    def packed_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(self.sizes[name][bits] for name, bits in self.bits.items())

    @property
    def price(self) -> float:
        """Price of all tensors in :attr:`unit`; 0 if no prices were asked for."""
        return sum(row[self.bits[name]] for name, row in self.prices.items())

    @property
    def mean_bits(self) -> float:
        """Mean width of a weight's index in bits."""
        total = sum(self.weights[name] * bits for name, bits in self.bits.items())
        return total / sum(self.weights.values())

    def save(self, path: str | Path) -> None:
        """Write a JSON file, which ``overrides`` of every weight method takes by its path."""
        content = {
            "overrides": self.bits,
            "packed_bytes": self.packed_bytes,
            "mean_bits": self.mean_bits,
            "price": self.price,
            "measured": asdict(self),
        }
        write_whole(Path(path), json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> BitAllocation:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or another one; names it.
        """
        content = read_json(path)
        if not isinstance(content, dict) or "measured" not in content:
            raise ValueError(f"{path} was not written by BitAllocation.save: it has no 'measured'")
        measured = content["measured"]
        for key in ("losses", "sizes", "prices"):
            measured[key] = {
                n: {int(b): x for b, x in row.items()} for n, row in measured.get(key, {}).items()
            }
        return cls(**measured)

    def __str__(self) -> str:
        """A table: tensor, weights, bits, increase of the loss, bytes, and prices if there are."""
        width = max(len(name) for name in self.bits)
        lines = [f"{'tensor':{width}}  {'weights':>9}  bits  {'loss':>9}  {'bytes':>9}"]
        prices = [self.unit] if self.prices else []
        for name, bits in self.bits.items():
            increase = self.losses[name][bits] - self.float_loss
            size = self.sizes[name][bits]
            lines.append(
                f"{name:{width}}  {self.weights[name]:9}  {bits:4}  {increase:+9.4f}  {size:9}"
            )
            prices += [f"{self.prices[name][bits]:.0f}"] if self.prices else []
        total = sum(self.weights.values())
        mean = f"{self.mean_bits:.2f}"
        lines.append(f"{'all':{width}}  {total:9}  {mean:>4}  {'':9}  {self.packed_bytes:9}")
        if self.prices:
            prices.append(f"{self.price:.0f}")
            lines = [f"{line}  {price:>12}" for line, price in zip(lines, prices, strict=True)]
        return "\n".join(lines)


def allocate_bits(
    module: nn.Module,
    loss: Callable[[nn.Module], float | Tensor],
    *,
    target_bytes: int | None = None,
    target_mean_bits: float | None = None,
    price: Price | None = None,
    target_price: float | None = None,
    target_price_ratio: float | None = None,
    targets: Sequence[str] = ("*",),
    candidates: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8),
    granularity: Granularity = "per_tensor",
    grid_bits: int | None = 8,
    codebook: Granularity = "per_tensor",
) -> BitAllocation:
    """Allocate bits to every tensor so that all of them have a given size, or a given price.

    Args:
        module: Trained module; in evaluation for the time of the measurement.
        loss: Function of the module that returns its loss on a calibration batch; called once for
            every tensor and width.
        target_bytes: Greatest size of all selected tensors in bytes.
        target_mean_bits: Greatest mean width of a weight in bits, instead.
        price: What the device pays for a tensor, for example its cycles: see
            :class:`lightning_nna.deploy.VelaPrice`. Asked once for every tensor and width.
        target_price: Greatest price of all selected tensors, in the unit of ``price``, instead.
        target_price_ratio: The same over the price with all tensors at the greatest candidate.
        targets: Patterns of the selected weights: globs or ``re:…`` on the names of parameters, or
            of modules that have them.
        candidates: Widths that a tensor may get, 1 to 8.
        granularity: Granularity of the weight method that is to follow.
        grid_bits: Width of integer centroids of the weight method that is to follow.
        codebook: Codebook of the weight method that is to follow, see :class:`.CodebookMethod`.

    Raises:
        ValueError: If not exactly one target is given, it is too small, a price has no target or
            the other way around, a width is not 1 to 8, a pattern matches nothing, or a channel
            cannot have centroids of a width.
        FloatingPointError: If a weight, the loss of the unchanged module or a price is not finite.

    Example:
        >>> net, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), torch.randn(16, 8)
        >>> y = net(x).detach()
        >>> found = allocate_bits(
        ...     net, lambda n: (n(x) - y).square().mean(), target_mean_bits=4, candidates=(2, 4, 8)
        ... )
        >>> found.mean_bits <= 4
        True
    """
    targets_of_sizes = {
        "target_bytes": target_bytes,
        "target_mean_bits": target_mean_bits,
        "target_price": target_price,
        "target_price_ratio": target_price_ratio,
    }
    given = [name for name, target in targets_of_sizes.items() if target is not None]
    if len(given) != 1:
        raise ValueError(
            f"give one of {', '.join(targets_of_sizes)}; got {', '.join(given) or 'none'}"
        )
    if (price is None) != (given[0] in ("target_bytes", "target_mean_bits")):
        raise ValueError(
            f"{given[0]} goes {'with' if price is None else 'without'} a price: a price needs "
            f"target_price or target_price_ratio, and these need a price"
        )
    if not candidates:
        raise ValueError("candidates is empty: name the widths that a tensor may get")
    for bits in candidates:
        BitWidths(bits)
    names = list(BitWidths(max(candidates), targets).of(module))
    settings = CodebookSettings(granularity, grid_bits, codebook=codebook)
    measured = _measure(module, loss, names, sorted(set(candidates)), settings, price)
    costs: Mapping[str, Mapping[int, float]] = measured.sizes
    if target_mean_bits is not None:
        # Centroids and scales are few compared with indices, and do not count here.
        costs = {n: {b: b * measured.weights[n] for b in measured.sizes[n]} for n in names}
        budget: float = math.floor(target_mean_bits * sum(measured.weights.values()))
        unit = "bits"
    elif target_bytes is not None:
        budget, unit = target_bytes, "bytes"
    else:
        costs, unit = measured.prices, measured.unit
        # Sums of floats in another order differ in their last digits.
        rounding = 1e-9 * sum(abs(cost) for row in costs.values() for cost in row.values())
        widest = measured.price
        budget = target_price if target_price is not None else (target_price_ratio or 0.0) * widest
        budget += rounding
    least = sum(min(row.values()) for row in costs.values())
    if least > budget:
        raise ValueError(
            f"the target is {budget:.0f} {unit}, and the least that these tensors can have is "
            f"{least:.0f} {unit}: raise it, or add lower widths to candidates"
        )
    lowered = _lower(measured.bits, measured.losses, costs, budget)
    bits_by_name = _raise(lowered, measured.losses, costs, budget)
    return replace(measured, bits=bits_by_name)


def _measure(
    module: nn.Module,
    loss: Callable[[nn.Module], float | Tensor],
    names: Sequence[str],
    candidates: Sequence[int],
    settings: CodebookSettings,
    price: Price | None,
) -> BitAllocation:
    """Measure losses, sizes and prices of every tensor at every width; all have the widest."""
    candidates_by_name = candidates_of(module)
    losses: dict[str, dict[int, float]] = {}
    sizes: dict[str, dict[int, int]] = {}
    prices: dict[str, dict[int, float]] = {}
    with torch.no_grad(), _evaluating(module):
        float_loss = float(loss(module))
        if not math.isfinite(float_loss):
            raise FloatingPointError(f"the loss of the unchanged module is {float_loss}")
        for name in names:
            parameter = candidates_by_name[name]
            require_finite_weights({name: parameter})
            groups = groups_of(module, name, parameter, settings.granularity)
            original = parameter.detach().clone()
            losses[name], sizes[name] = {}, {}
            try:
                for bits in candidates:
                    channels = channels_of(module, name, parameter, bits, settings.codebook)
                    book = Codebook.fit(
                        *(original, bits),
                        groups=groups,
                        grid_bits=settings.grid_bits,
                        channels=channels,
                    )
                    projected = book.project(original)
                    if price is not None:
                        cost = float(price(name, projected, book.grid))
                        if not math.isfinite(cost):
                            raise FloatingPointError(f"{name} with {bits} bits costs {cost}")
                        prices.setdefault(name, {})[bits] = cost
                    parameter.copy_(projected)
                    measured = float(loss(module))
                    # So few bits break the network: they are never allocated.
                    losses[name][bits] = measured if math.isfinite(measured) else math.inf
                    sizes[name][bits] = book.packed_bytes(original, bits)
            finally:
                parameter.copy_(original)
    widest = dict.fromkeys(names, candidates[-1])
    return BitAllocation(
        widest,
        losses,
        sizes,
        {name: candidates_by_name[name].numel() for name in names},
        float_loss,
        prices,
        "" if price is None else price.unit,
    )


def _lower(
    bits: Mapping[str, int],
    losses: Mapping[str, Mapping[int, float]],
    costs: Mapping[str, Mapping[int, float]],
    budget: float,
) -> dict[str, int]:
    """Make the cheapest change again and again until the budget is met."""
    bits = dict(bits)
    while sum(costs[name][b] for name, b in bits.items()) > budget:
        # A price may be lower at more bits; costs fall in every change, so that this ends.
        changes = [
            (_increase(losses[name], b, now) / saved, -saved, name, b)
            for name, now in bits.items()
            for b in costs[name]
            if (saved := costs[name][now] - costs[name][b]) > 0
        ]
        _, _, name, lower = min(changes)
        bits[name] = lower
    return bits


def _raise(
    bits: Mapping[str, int],
    losses: Mapping[str, Mapping[int, float]],
    costs: Mapping[str, Mapping[int, float]],
    budget: float,
) -> dict[str, int]:
    """Spend what is left on the widths that lower the loss most for what they cost."""
    bits = _widest_for(bits, costs)
    while True:
        left = budget - sum(costs[name][b] for name, b in bits.items())
        changes = [
            (-_increase(losses[name], now, b) / cost, cost, name, b)
            for name, now in bits.items()
            for b in costs[name]
            if b > now and 0 < (cost := costs[name][b] - costs[name][now]) <= left
        ]
        if not changes or min(changes)[0] >= 0:
            return _widest_for(bits, costs)
        _, _, name, higher = min(changes)
        bits[name] = higher


def _widest_for(
    bits: Mapping[str, int], costs: Mapping[str, Mapping[int, float]]
) -> dict[str, int]:
    """Give each tensor the most bits that cost no more than those it has."""
    return {
        name: max(b for b in costs[name] if b >= now and costs[name][b] <= costs[name][now])
        for name, now in bits.items()
    }


def _increase(losses: Mapping[int, float], to: int, now: int) -> float:
    """Increase of the loss with ``to`` bits instead of ``now``; a decrease by noise counts as 0."""
    if math.isinf(losses[to]):
        return math.inf
    return max(0.0, losses[to] - losses[now])


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation, and restore the mode of every part afterwards."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
