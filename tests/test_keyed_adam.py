"""Adam of tensors by key: copies and pickles go on where the original was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nna.keyed_adam import KeyedAdam

Pair = tuple[KeyedAdam, dict[str, Tensor]]


def update(adam: KeyedAdam, tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.grad = torch.ones_like(tensor)
    adam.update(tensors)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_a_copy_with_its_tensors_goes_on(copied: Callable[[Any], Pair]) -> None:
    pair: Pair = KeyedAdam(0.1), {"a": torch.zeros(3, requires_grad=True)}
    update(*pair)
    other = copied(pair)
    update(*pair)
    update(*other)
    assert pair[1]["a"].tolist() == pytest.approx([-0.2] * 3, rel=1e-5)
    assert torch.equal(other[1]["a"], pair[1]["a"])
    assert str(other[0].state_dict()) == str(pair[0].state_dict())
