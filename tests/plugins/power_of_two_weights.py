r"""Weights that are zero or a signed power of two: a method from outside of the package.

A product with such a weight is a shift. With :math:`b` bits there are :math:`2^{b-1} - 1`
magnitudes a tensor, :math:`2^t, 2^{t-1}, \dots`, of which the largest is next to the tensor's
largest weight. Training sees the rounded weights, and the gradient passes the rounding unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nna.callbacks import WeightMethod
from lightning_nna.weights.pipeline import WeightGrid, WeightTransform
from lightning_nna.weights.selection import BitWidths


class PowersOfTwo:
    """The transform of one parameter.

    Args:
        top: Exponent of the largest magnitude.
        bits: Bits of a weight, 2 to 4.

    Example:
        >>> PowersOfTwo(top=0, bits=3).apply(torch.tensor([1.6, -0.8, 0.3, 0.1]), hard=True)
        tensor([ 1.0000, -1.0000,  0.2500,  0.0000])
    """

    method = "power_of_two_weights"
    order = 1

    def __init__(self, top: int, bits: int) -> None:
        self.top, self.bits = top, bits

    @property
    def bottom(self) -> int:
        """Exponent of the smallest magnitude."""
        return self.top - 2 ** (self.bits - 1) + 2

    @property
    def grid(self) -> WeightGrid:
        """The smallest magnitude is the integer 1, the largest of 4 bits is 64."""
        return WeightGrid(torch.tensor([2.0**self.bottom]), 127)

    def apply(self, weight: Tensor, *, hard: bool) -> Tensor:
        """Round each weight to the nearest magnitude or to zero."""
        # m 2^e with 0.5 <= m < 1. Between 2^(e-1) and 2^e the middle is m = 0.75.
        mantissa, exponent = torch.frexp(weight.abs())
        nearest = exponent - (mantissa < 0.75).int()
        magnitude = torch.ldexp(torch.ones_like(weight), nearest.clamp(self.bottom, self.top))
        is_zero = weight.abs() < 2.0 ** (self.bottom - 1)
        return torch.where(is_zero, 0.0, magnitude * weight.sign())

    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Pass the gradient unchanged."""
        return grad


class PowerOfTwoWeights(WeightMethod):
    """Train selected weights as zeros and signed powers of two.

    Args:
        bits: Bits of a weight, 2 to 4.
        targets: Globs or ``re:…`` on the names of parameters, or of modules that hold them.

    Logs ``nna/power_of_two_weights/zeros``, the fraction of zeros.

    Raises:
        ValueError: If ``bits`` is out of range, or a pattern matches nothing.
    """

    method = "power_of_two_weights"

    def __init__(self, bits: int = 4, *, targets: Sequence[str] = ("*",)) -> None:
        if not 2 <= bits <= 4:
            raise ValueError(f"bits must be 2 to 4, got {bits}")
        super().__init__(BitWidths(bits, targets=targets))
        self._transforms: dict[str, PowersOfTwo] = {}
        # Exponents of a state that was loaded, until a run starts.
        self._saved: dict[str, int] = {}

    @override
    def transforms(self) -> dict[str, WeightTransform]:
        return {**self._transforms}

    @override
    def prepare(self) -> None:
        self._transforms = {}
        for name, parameter in self._parameters.items():
            largest = parameter.detach().abs().max()
            _, exponent = torch.frexp(largest / 0.75)
            self._transforms[name] = PowersOfTwo(int(exponent) - 1, self.numbers[name])
        self.rejoin()

    @override
    def rejoin(self) -> None:
        for name, top in self._saved.items():
            if name in self._transforms:
                self._transforms[name].top = top
        self._saved = {}

    @override
    def metrics(self) -> dict[str, float]:
        weights = [self._transforms[n].apply(p, hard=True) for n, p in self._parameters.items()]
        zeros = sum(int((w == 0).sum()) for w in weights)
        return {"zeros": zeros / sum(w.numel() for w in weights)}

    @override
    def settings(self) -> dict[str, Any]:
        return {"bits": dict(self.numbers)}

    @override
    def forget(self) -> None:
        super().forget()
        self._transforms, self._saved = {}, {}

    @override
    def state_dict(self) -> dict[str, Any]:
        tops = {name: transform.top for name, transform in self._transforms.items()}
        return {**super().state_dict(), "tops": self._saved or tops}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = dict(state_dict["tops"])

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle takes its exponents to the module that it meets."""
        return {
            **super().__getstate__(),
            "_transforms": {},
            "_saved": self.state_dict()["tops"],
        }
