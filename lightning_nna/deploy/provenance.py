"""Where every element of a tensor came from, whatever moved it since.

A chip knows no views. Between two of its instructions PyTorch transposes, slices, pads, stacks and
copies, in the open and inside of our own operators; an export has to say the same in the chip's own
movements. ``Provenance`` watches the functions below autograd while a forward runs. Each element of
each tensor that the data reaches has an *address*, given where it is computed; functions that only
move values move addresses along, all others give new ones. Views need no watching: addresses belong
to the storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

#: Address of what no input of the network has reached: it belongs to the program.
CONSTANT = -1
#: Address of what was computed of integers that came in (lengths, say): it steers the program.
STEERING = -2

# Functions that copy values, and which of their arguments hold them; the rest steer.
_COPIES: dict[str, tuple[int, ...]] = {
    "aten::_pack_padded_sequence": (0,),
    "aten::_to_copy": (0,),
    "aten::cat": (0,),
    "aten::clone": (0,),
    "aten::constant_pad_nd": (0,),
    "aten::diagonal_copy": (0,),
    "aten::flip": (0,),
    "aten::gather": (0,),
    "aten::index": (0,),
    "aten::index_select": (0,),
    "aten::repeat": (0,),
    "aten::roll": (0,),
    "aten::stack": (0,),
    "aten::take": (0,),
}
# Functions that take the form of a tensor and not its values.
_FRESH = frozenset(
    """
    aten::empty_like aten::full_like aten::new_empty aten::new_empty_strided aten::new_full
    aten::new_ones aten::new_zeros aten::ones_like aten::rand_like aten::randn_like
    aten::zeros_like
    """.split()
)
_ASKS = "aten::_local_scalar_dense"
_FILLS = frozenset({"aten::fill_", "aten::zero_"})
# What changes the type of a copy and not its elements.
_TYPE_KEYWORDS = frozenset({"dtype", "layout", "device", "pin_memory", "non_blocking"})


class Provenance(TorchDispatchMode):
    """Follows elements through a forward.

    Args:
        decides: Called with a tensor that data have reached, where Python asks for its value.

    Example:
        >>> with Provenance() as provenance:
        ...     x = torch.arange(6.0).reshape(2, 3)
        ...     first = provenance.begin(x)
        ...     y = torch.cat([x.T, torch.zeros(1, 2)])
        >>> provenance.addresses(y)
        tensor([[ 0,  3],
                [ 1,  4],
                [ 2,  5],
                [-1, -1]])
    """

    def __init__(self, decides: Callable[[Tensor], None] | None = None) -> None:
        super().__init__()
        self._decides = decides
        self._held: dict[int, Tensor] = {}
        # Kept, because memory that is freed becomes another tensor's.
        self._storages: list[Any] = []
        self._next = 0

    @property
    def count(self) -> int:
        """Addresses given so far."""
        return self._next

    def begin(self, x: Tensor) -> Tensor:
        """Give every element of a tensor an address of its own, and return them."""
        self._write(x, self._fresh(x.shape))
        return self.addresses(x)

    def addresses(self, x: Tensor) -> Tensor:
        """Addresses of the elements of a tensor, of its shape, int64."""
        held = self._held.get(_key(x))
        if held is None:
            return torch.full(x.shape, CONSTANT)
        return held.as_strided(x.shape, x.stride(), x.storage_offset()).clone()

    def reaches(self, values: Any) -> bool:
        """Whether data is in any tensor among values, nested."""
        return bool(self._reached(values))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function and follow what it does."""
        kwargs = kwargs or {}
        if func._schema.name == _ASKS and self._decides is not None and self.reaches(args):
            self._decides(args[0])
        result = func(*args, **kwargs)
        self._follow(func, args, kwargs, result)
        return result

    def _follow(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        name = func._schema.name
        written = list(_written(func, args, kwargs))
        taken = {_key(x) for x in _tensors((args, kwargs))}
        fresh = [x for x in _tensors(result) if _key(x) not in taken]
        if name == "aten::copy_":
            moved = self.addresses(args[1]).expand(args[0].shape)
            self._write(args[0], moved)
        elif name in _FILLS and not _tensors((args[1:], kwargs)):
            self._write(args[0], torch.full(args[0].shape, CONSTANT))
        elif not self._reached(args, kwargs) or name in _FRESH:
            for x in written:
                self._write(x, torch.full(x.shape, CONSTANT))
        elif name in _COPIES and not written and not self._steered(name, args, kwargs):
            self._copy(func, args, kwargs, fresh)
        else:
            steers = not any(x.is_floating_point() for x in self._reached(args, kwargs))
            for x in (*fresh, *written):
                whole = steers and not x.is_floating_point()
                self._write(x, torch.full(x.shape, STEERING) if whole else self._fresh(x.shape))

    def _copy(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Tensor]
    ) -> None:
        """Run the same function on addresses."""
        name = func._schema.name
        places = _COPIES[name]
        moved = [
            tree_map(lambda x: self.addresses(x) if isinstance(x, Tensor) else x, value)
            if position in places
            else value
            for position, value in enumerate(args)
        ]
        kept = {key: value for key, value in kwargs.items() if key not in _TYPE_KEYWORDS}
        if name == "aten::constant_pad_nd":
            moved, kept = [*moved[:2], CONSTANT], {}
        run: Callable[..., Any] = torch.clone if name == "aten::_to_copy" else func
        if name == "aten::_to_copy":
            kept = {}
        found = _tensors(run(*moved, **kept))
        for result, addresses in zip(results, found, strict=False):
            self._write(result, addresses)

    def _reached(self, *values: Any) -> list[Tensor]:
        """Tensors among arguments whose storage has data."""
        return [x for x in _tensors(values) if _key(x) in self._held]

    def _steered(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether data decides what moves where."""
        rest = [value for position, value in enumerate(args) if position not in _COPIES[name]]
        return bool(self._reached(rest, kwargs))

    def _fresh(self, shape: Sequence[int]) -> Tensor:
        count = torch.Size(shape).numel()
        first, self._next = self._next, self._next + count
        return torch.arange(first, self._next).reshape(tuple(shape))

    def _write(self, x: Tensor, addresses: Tensor) -> None:
        """Put addresses into the places that a tensor has in its storage."""
        key = _key(x)
        elements = x.untyped_storage().nbytes() // x.element_size()
        held = self._held.get(key)
        if held is None and bool((addresses == CONSTANT).all()):
            return  # No data there, as before.
        if held is None:
            self._storages.append(x.untyped_storage())
        if held is None or len(held) != elements:
            held = self._held[key] = torch.full((elements,), CONSTANT)
        held.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(addresses)


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Arguments that a function writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)
