"""Where every element of a tensor came from, whatever moved it since.

A chip knows no views. Between two of its instructions PyTorch transposes, slices, pads, stacks and
copies, in the open and inside of our own operators; an export has to say the same in the chip's own
movements. ``Provenance`` watches the functions below autograd while a forward runs. Each element of
each tensor that the data reaches has an *address*, given where it is computed; functions that only
move values move addresses along, all others give new ones. Views need no watching: addresses belong
to the storage.

An address below 0 is no data. It holds *causes*, one bit each: nothing (:data:`CONSTANT`), integer
arguments that the value was computed from and that therefore are part of the program, or a random
number (:data:`RANDOM`), which no program can repeat.

    address -1: no cause; -2: integer argument 0; -3: integer argument 1; -4: both
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
#: Address of what was computed of the first integers that came in (lengths, say).
STEERING = -2
#: Cause: a random number.
RANDOM = 1 << 60
#: Cause: what a module keeps in an attribute, perhaps from an earlier call.
KEPT = 1 << 61
#: Integer arguments beyond so many share the last bit.
MOST_ARGUMENTS = 48

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
    aten::new_ones aten::new_zeros aten::ones_like aten::rand_like aten::randint_like
    aten::randn_like aten::zeros_like
    """.split()
)
# Functions that hand Python a value, or a shape that depends on values.
_ASKS = frozenset({"aten::_local_scalar_dense", "aten::equal"})
_SHAPES = frozenset(
    """
    aten::_unique2 aten::bincount aten::masked_select aten::nonzero aten::nonzero_numpy
    aten::repeat_interleave aten::unique_consecutive aten::unique_dim
    """.split()
)
# Functions that put a number where a mask says; a 0 is on every grid and may be filled in.
_MASKED_FILLS = frozenset({"aten::masked_fill", "aten::masked_fill_"})
# Which have a seed though they compute of their operands, unless they drop some.
_NOT_RANDOM = ("attention", "gru", "lstm", "rnn")
_FILLS = frozenset({"aten::fill_", "aten::zero_"})
# What changes the type of a copy and not its elements.
_TYPE_KEYWORDS = frozenset({"dtype", "layout", "device", "pin_memory", "non_blocking"})


class Provenance(TorchDispatchMode):
    """Follows elements through a forward.

    Args:
        decides: Called with a tensor that data have reached, where Python asks for its value.
        origin: Says where in the module's code a function is called.

    Attributes:
        moved_by: Causes, as bits, that have decided where values went.

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

    def __init__(
        self,
        decides: Callable[[Tensor], None] = lambda x: None,
        origin: Callable[[], str | None] = lambda: None,
    ) -> None:
        super().__init__()
        self._decides, self._origin = decides, origin
        self._held: dict[int, Tensor] = {}
        # Kept, because memory that is freed becomes another tensor's.
        self._storages: list[Any] = []
        self._next = 0
        # Addresses of integer arguments: first, end, bit.
        self._integers: list[tuple[int, int, int]] = []
        # Why addresses are no movement of others: first, end, text.
        self._reasons: list[tuple[int, int, str]] = []
        self.moved_by = 0
        self._drawn = False

    @property
    def count(self) -> int:
        """Addresses given so far."""
        return self._next

    def begin(self, x: Tensor) -> Tensor:
        """Give every element of a tensor an address of its own, and return them.

        Integers are a cause from now on: what is computed of them alone belongs to the program.
        """
        first = self._next
        self._write(x, self._fresh(x.shape))
        if not x.is_floating_point() and not x.is_complex():
            bit = 1 << min(len(self._integers), MOST_ARGUMENTS - 1)
            self._integers.append((first, self._next, bit))
        return self.addresses(x)

    def keep(self, x: Tensor) -> None:
        """Follow what is computed of a tensor that a module keeps."""
        self._write(x, torch.full(x.shape, CONSTANT - KEPT))

    def complete(self, x: Tensor) -> Tensor:
        """Give the elements of a tensor that are no data addresses, too, and return all."""
        held = self.addresses(x)
        self._write(x, torch.where(held < 0, self._fresh(x.shape), held))
        return self.addresses(x)

    def addresses(self, x: Tensor) -> Tensor:
        """Addresses of the elements of a tensor, of its shape, int64."""
        held = self._held.get(_key(x))
        if held is None:
            return torch.full(x.shape, CONSTANT)
        return held.as_strided(x.shape, x.stride(), x.storage_offset()).clone()

    def reaches(self, values: Any) -> bool:
        """Tell whether data or a cause is in any tensor among values, nested."""
        return bool(self._reached(values))

    def causes(self, values: Any) -> int | None:
        """Causes of all tensors among values, nested, as bits; None if data are among them."""
        found = 0
        for x in self._reached(values):
            bits = self.causes_of(self.addresses(x))
            if bits is None:
                return None
            found |= bits
        return found

    def causes_of(self, addresses: Tensor) -> int | None:
        """Causes that addresses hold, as bits; None if any is of data."""
        flat = addresses.reshape(-1)
        data, found = flat[flat >= 0], 0
        for first, end, bit in self._integers if len(data) else ():
            inside = (data >= first) & (data < end)
            if bool(inside.any()):
                found, data = found | bit, data[~inside]
        if len(data):
            return None
        for address in flat[flat < CONSTANT].unique().tolist():
            found |= CONSTANT - address
        return found

    def reason(self, address: int) -> str | None:
        """Why a value is no movement of others, if that is known."""
        for first, end, text in self._reasons:
            if first <= address < end:
                return text
        return None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function and follow what it does."""
        kwargs = kwargs or {}
        for x in self._deciding(func, args, kwargs):
            self._decides(x)
        result = func(*args, **kwargs)
        self._follow(func, args, kwargs, result)
        return result

    def _deciding(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Sequence[Tensor]:
        """Arguments that data have reached and whose values decide what Python sees next."""
        name = func._schema.name
        if name in _ASKS or name in _SHAPES:
            return self._reached(args, kwargs)
        if name == "aten::index":  # By a mask, which gives as many values as are true.
            return [x for x in self._reached(args[1]) if x.dtype in (torch.bool, torch.uint8)]
        return ()

    def _follow(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        name = func._schema.name
        written = list(_written(func, args, kwargs))
        taken = {_key(x) for x in _tensors((args, kwargs))}
        fresh = [x for x in _tensors(result) if _key(x) not in taken]
        reached = name not in _FRESH and self._reached(args, kwargs)
        if name == "aten::copy_":
            moved = self.addresses(args[1]).expand(args[0].shape)
            self._write(args[0], moved)
        elif name in _FILLS and not _tensors((args[1:], kwargs)):
            self._write(args[0], torch.full(args[0].shape, CONSTANT))
        elif _is_random(func) and (written or not reached):
            self._drawn = True
            for x in (*fresh, *written):
                self._write(x, torch.full(x.shape, CONSTANT - RANDOM))
        elif not reached:
            for x in written:
                self._write(x, torch.full(x.shape, CONSTANT))
        elif name in _COPIES and not written and self._may_steer(name, args, kwargs):
            self._copy(func, args, kwargs, fresh)
        elif name in _MASKED_FILLS and args[2] == 0 and self._may_steer(name, args, kwargs):
            filled = self.addresses(args[0]).masked_fill(args[1], CONSTANT)
            self._write(written[0] if written else result, filled)
        else:
            self._computed(func, (args, kwargs), (*fresh, *written))

    def _computed(self, func: Any, operands: Any, results: Sequence[Tensor]) -> None:
        """Give results of a computation new addresses, or the causes of all operands."""
        causes = self.causes(operands)
        for x in results:
            if causes is not None:
                self._write(x, torch.full(x.shape, CONSTANT - causes))
                continue
            first, text = self._next, self._why(func, operands, x)
            self._write(x, self._fresh(x.shape))
            if text is not None:
                self._reasons.append((first, self._next, text))

    def _why(self, func: Any, operands: Any, result: Tensor) -> str | None:
        """Why a result of data can be no part of a program, if that is to be seen here."""
        name = func._schema.name
        if self._drawn and self._mixes_random(operands):
            return f"random numbers are mixed in by {name}"
        for x in self._reached(operands):  # A mask passes its reason on, whatever is made of it.
            if torch.bool in (x.dtype, result.dtype) and x.numel():
                known = self.reason(int(self.addresses(x).max()))
                if known is not None:
                    return known
        chooses = name in _COPIES
        if result.is_floating_point() and not chooses:
            return None
        origin = self._origin()
        if origin is None:  # The chip's own arithmetic.
            return None
        what = "decide what is moved where" if chooses else "decide"
        return f"values of the data {what}, by {name} at {origin}"

    def _mixes_random(self, operands: Any) -> bool:
        held = [self.addresses(x).reshape(-1) for x in self._reached(operands)]
        return any(bool(((x < CONSTANT) & ((CONSTANT - x) & RANDOM > 0)).any()) for x in held)

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
        for result, addresses in zip(results[:1], found, strict=False):
            self._write(result, addresses)
        for result in results[1:]:  # The sizes of the steps of packed sequences.
            self._write(result, torch.full(result.shape, CONSTANT - (self.causes(args[1:]) or 0)))

    def _reached(self, *values: Any) -> list[Tensor]:
        """Tensors among arguments whose storage has data."""
        return [x for x in _tensors(values) if _key(x) in self._held]

    def _may_steer(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell whether no data decide what moves where; what does decide is part of the program."""
        places = _COPIES.get(name, (0,))
        rest = [value for position, value in enumerate(args) if position not in places]
        causes = self.causes((rest, kwargs))
        if causes is None or causes & RANDOM:
            return False
        self.moved_by |= causes
        return True

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


def _is_random(func: Any) -> bool:
    """Tell whether a function draws random numbers."""
    seeded = torch.Tag.nondeterministic_seeded in func.tags
    return seeded and not any(word in func._schema.name for word in _NOT_RANDOM)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Arguments that a function writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)
