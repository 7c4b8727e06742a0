"""``TransformMethod``: base of methods whose state is that of one transform of each weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

from torch import nn
from typing_extensions import Unpack, override

from lightning_nna.weights.method import BitsArguments, BitsMethod
from lightning_nna.weights.pipeline import WeightTransform


class StatefulTransform(WeightTransform, Protocol):
    """A transform that a checkpoint has."""

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of its tensors and numbers, by name."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace them by saved ones."""


T = TypeVar("T", bound=StatefulTransform)


class TransformMethod(BitsMethod, Generic[T]):
    """Base of low-bit methods that have one transform of each selected weight, and no other state.

    Args:
        bits: See :class:`.BitsMethod`.
        settings: Other arguments of :class:`.BitsMethod`: ``targets`` and ``overrides``.
    """

    def __init__(self, bits: int, **settings: Unpack[BitsArguments]) -> None:
        super().__init__(bits, **settings)
        self._transforms: dict[str, T] = {}
        # States of a checkpoint that no transform has taken yet.
        self._saved: dict[str, dict[str, Any]] = {}

    @abstractmethod
    def transform_of(self, name: str, parameter: nn.Parameter) -> T:
        """Return the transform of a selected weight at the start of a run.

        Args:
            name: Name of the weight.
            parameter: The weight.
        """

    @override
    def transforms(self) -> dict[str, WeightTransform]:
        return {**self._transforms}

    @override
    def prepare(self) -> None:
        self._transforms = {
            name: self.transform_of(name, parameter) for name, parameter in self._parameters.items()
        }
        self.rejoin()

    @override
    def rejoin(self) -> None:
        for name, state in self._saved.items():
            if name in self._transforms:
                self._transforms[name].load_state_dict(state)
        self._saved = {}

    @override
    def forget(self) -> None:
        super().forget()
        self._transforms, self._saved = {}, {}

    @override
    def state_dict(self) -> dict[str, Any]:
        states = {name: transform.state_dict() for name, transform in self._transforms.items()}
        return {**super().state_dict(), "transforms": self._saved or states}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = dict(state_dict["transforms"])
