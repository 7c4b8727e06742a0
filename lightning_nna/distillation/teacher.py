"""The teacher: a frozen float copy of one module, which sees what the module sees.

The copy lives outside of the module that is trained: it is no part of its ``state_dict``, no
optimizer has its parameters, and neither the emulation nor a weight method finds it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_nna.distillation.distances import Pair, floating_tensors
from lightning_nna.emulation.forward_hooks import remove_copied_hooks


class Teacher:
    """Run a frozen copy of a module on the inputs of the module, and collect both outputs.

    Args:
        name: Name of the module, for messages.
        module: Module to copy. Dropout and batch statistics of the copy are those of evaluation.
        left_out: Objects that are not copied along, such as the Trainer.

    Attributes:
        pairs: Outputs of the calls since :meth:`take`: of the module, and of the copy.
        is_reached: Whether a call of this batch had a gradient.
    """

    def __init__(self, name: str, module: nn.Module, left_out: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.pairs: list[Pair] = []
        self.is_reached = False
        memo: dict[int, Any] = {id(one): None for one in left_out}
        self._copy = copy.deepcopy(module, memo).eval().requires_grad_(False)
        remove_copied_hooks(self._copy)
        # Outputs of the copy, for calls that have begun; a module may call itself.
        self._begun: list[list[Tensor]] = []

    def take(self) -> list[Pair]:
        """Return the pairs of the calls so far, and forget them."""
        pairs, self.pairs = self.pairs, []
        return pairs

    def forget_calls(self) -> None:
        """Forget all calls, as a batch begins or ends."""
        self.pairs, self._begun, self.is_reached = [], [], False

    # --- calls --------------------------------------------------------------------------------

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the copy: before the module, which may write to its inputs.

        Args:
            args: Positional arguments of the module.
            kwargs: Keyword arguments of the module.
        """
        fast = torch.backends.mha.get_fastpath_enabled()
        # Attention has another kernel for evaluation, whose outputs may have other shapes.
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                own_args, own_kwargs = tree_map(_cloned, (args, kwargs))
                self._begun.append(floating_tensors(self._copy(*own_args, **own_kwargs)))
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def after(self, output: object) -> None:
        """Pair the output of the module with that of the copy.

        Args:
            output: Output of the module; later writes to it do not count.

        Raises:
            ValueError: If it has no floating tensor, or other shapes than that of the copy.
        """
        teacher = self._begun.pop()
        with torch._C.DisableTorchFunction():
            student = [tensor.clone() for tensor in floating_tensors(output)]
        if not student:
            raise ValueError(
                f"Distillation: the output of {self.name} is a {type(output).__name__} without "
                f"floating tensors: name a module in targets whose output is a tensor, or tuples, "
                f"lists or dicts of tensors"
            )
        shapes = [[tuple(one.shape) for one in tensors] for tensors in (student, teacher)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"Distillation: {self.name} outputs tensors of the shapes {shapes[0]} in training "
                f"and {shapes[1]} in evaluation, in which its copy runs: name a module in targets "
                f"whose output has the same shapes in both"
            )
        self.pairs += zip(student, teacher, strict=True)
        self.is_reached = self.is_reached or any(one.requires_grad for one in student)

    # --- state --------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers of the copy, by name."""
        return tensors_of(self._copy)

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor], module: nn.Module) -> None:
        """Take saved tensors, with devices and types of the module's.

        Args:
            saved: Parameters and buffers by name, as :meth:`tensors` returns them.
            module: Module that the copy is compared with.

        Raises:
            ValueError: If names differ; names some of them.
        """
        own, like = self.tensors(), tensors_of(module)
        if odd := sorted(saved.keys() ^ own.keys()):
            raise ValueError(
                f"Distillation: the copy of {self.name} in the checkpoint has other tensors than "
                f"the module: {', '.join(odd[:8])}; resume with the module of the checkpoint, or "
                f"begin a new run from its weights (lightning_nna.load_deployed)"
            )
        for name, tensor in own.items():
            tensor.data = saved[name].to(like[name].device, like[name].dtype, copy=True)


class CallHooks:
    """Hooks on a module around its calls; copies and pickles of the module have idle ones.

    Args:
        begins: Function of positional and keyword arguments; None in a copy.
        ends: Function of the output; None in a copy.
    """

    def __init__(
        self,
        begins: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
        ends: Callable[[Any], None] | None = None,
    ) -> None:
        self._begins, self._ends = begins, ends

    def attach(self, module: nn.Module) -> list[Any]:
        """Register the hooks; the first one sees the arguments before any other hook does.

        Returns:
            Handles, which remove the hooks.
        """
        return [
            module.register_forward_pre_hook(self.before, prepend=True, with_kwargs=True),
            module.register_forward_hook(self.after),
        ]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a call begins."""
        if self._begins is not None:
            self._begins(args, kwargs)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note that a call has ended."""
        if self._ends is not None:
            self._ends(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> CallHooks:
        return CallHooks()

    def __reduce__(self) -> tuple[Any, ...]:
        return CallHooks, ()


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers of a module, by name, shared ones under one name.

    Example:
        >>> list(tensors_of(nn.Linear(2, 1)))
        ['weight', 'bias']
    """
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _cloned(leaf: Any) -> Any:
    if isinstance(leaf, torch.nn.utils.rnn.PackedSequence):
        return leaf._replace(data=leaf.data.detach().clone())
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
