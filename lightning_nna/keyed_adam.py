"""Adam by key, for tensors that methods learn besides the weights; the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_nna.distributed import is_distributed


class KeyedAdam:
    """Adam for learned scales or centroids, whatever optimizers the module's parameters have.

    A scale may be added when its weight is first used, so the state goes by key, not by position.

    Args:
        learning_rate: Change of a number in one update, positive; for a scale's logarithm to base
            2, 0.01 is 0.7 %.

    Raises:
        ValueError: If ``learning_rate`` is not positive.

    Example:
        >>> from lightning_nna.emulation.attachment import calibrate, emulate
        >>> net, x = torch.nn.Linear(4, 2), torch.randn(8, 4)
        >>> _ = calibrate(net, [x])
        >>> with emulate(net, learned_scales="all") as chip:
        ...     net(x).square().mean().backward()
        >>> before = chip.scales.state_dict()
        >>> KeyedAdam(0.01).update(chip.scales.tensors())
        >>> abs(chip.scales.weights["weight:1"] - before["weights"]["weight:1"]).round(decimals=3)
        tensor([0.0100, 0.0100], grad_fn=<RoundBackward1>)
    """

    def __init__(self, learning_rate: float) -> None:
        if learning_rate <= 0:
            raise ValueError(f"a learning rate must be positive, got {learning_rate}")
        self.learning_rate = learning_rate
        self._state: dict[str, dict[str, Tensor]] = {}
        self._tensors: dict[str, Tensor] = {}
        self._adam: torch.optim.Adam | None = None

    def update(self, tensors: dict[str, Tensor], *, divisor: float = 1.0) -> None:
        """Move everything that a gradient has reached since the last update, and drop gradients.

        Args:
            tensors: All learned tensors by key; the same keys on every rank.
            divisor: Factor of the loss, as of a gradient scaler.
        """
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if is_distributed():
                _average(tensors)
            self._hold(tensors)
            grads = [x.grad for x in self._tensors.values() if x.grad is not None]
            for grad in grads:
                grad.div_(divisor)
            # After a scaler has skipped an overflowed step its gradient is still there.
            if self._adam is not None and grads and _is_finite(grads):
                self._adam.param_groups[0]["lr"] = self.learning_rate
                self._adam.step()
            self.zero_grad(tensors)

    @staticmethod
    def zero_grad(tensors: dict[str, Tensor]) -> None:
        """Drop the gradients of all."""
        for tensor in tensors.values():
            tensor.grad = None

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Adam's state by key."""
        state = {key: dict(values) for key, values in self._state.items()}
        if self._adam is not None:
            for key, step in self._tensors.items():
                if step in self._adam.state:
                    values = self._adam.state[step]
                    state[key] = {name: value.clone() for name, value in values.items()}
        return dict(sorted(state.items()))

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on where the state was taken."""
        self._state = {key: dict(values) for key, values in state.items()}
        self._tensors, self._adam = {}, None

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle has the state by key, not the tensors themselves."""
        return {**self.__dict__, "_state": self.state_dict(), "_tensors": {}, "_adam": None}

    def _hold(self, tensors: dict[str, Tensor]) -> None:
        """Take in tensors that are new, or have been loaded or moved since."""
        same = tensors.keys() == self._tensors.keys()
        if same and all(tensors[key] is known for key, known in self._tensors.items()):
            return
        self._state, self._tensors = self.state_dict(), tensors
        self._adam = torch.optim.Adam(tensors.values(), lr=self.learning_rate, foreach=True)
        for key, step in tensors.items():
            if key in self._state:
                # The count of updates stays on the CPU, as Adam keeps it.
                self._adam.state[step] = {
                    name: value.clone() if name == "step" else value.to(step.device, copy=True)
                    for name, value in self._state[key].items()
                }


def _average(tensors: dict[str, Tensor]) -> None:
    """Mean gradients of all ranks; a rank that has none counts as zeros."""
    if not tensors:
        return
    flat = [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors.values()]
    first = flat[0]
    reached = first.new_tensor([float(x.grad is not None) for x in tensors.values()])
    total = torch.cat([*(grad.flatten().to(first.device) for grad in flat), reached])
    torch.distributed.all_reduce(total)
    sums = total.split([*(grad.numel() for grad in flat), len(reached)])
    ranks = torch.distributed.get_world_size()
    for step, summed, count in zip(tensors.values(), sums, sums[-1].tolist(), strict=False):
        step.grad = (summed / ranks).view_as(step).to(step.device) if count else None


def _is_finite(grads: list[Tensor]) -> bool:
    return all(bool(torch.isfinite(grad).all()) for grad in grads)
