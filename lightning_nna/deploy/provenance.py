"""Follow the origin of every element of a tensor through whatever moves it.

An accelerator has no views. Between two of its instructions PyTorch transposes, slices, pads,
stacks and copies, in the module and inside of our own operators; an export has to do the same with
the accelerator's layout operators. ``Provenance`` follows the functions below autograd while a
forward runs. Each element of each tensor that the data reaches has a *provenance id*, assigned
where it is computed; functions that only move values move the ids along, all others assign new
ones. Views need no attention: ids belong to the storage.

An id below 0 is no data. It is a set of *causes*, one bit each: nothing (:data:`CONSTANT`), integer
arguments that the value was computed from and that therefore are part of the program, or a random
number (:data:`RANDOM`), which no program can repeat.

    id -1: no cause; -2: integer argument 0; -3: integer argument 1; -4: both
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

#: Id of a value that no input of the network has reached: it belongs to the program.
CONSTANT = -1
#: Id of a value computed from the first integer argument (lengths, say).
STEERING = -2
#: Cause: a random number.
RANDOM = 1 << 60
#: Cause: a tensor in an attribute of a module, perhaps from an earlier call.
ATTRIBUTE = 1 << 61
#: Integer arguments beyond so many share the last bit.
MOST_ARGUMENTS = 48

# Functions that copy values, and the arguments that hold these; the rest decide about the layout.
_COPIES: dict[str, tuple[int, ...]] = {
    "aten::_pack_padded_sequence": (0,),
    "aten::_to_copy": (0,),
    "aten::as_strided_scatter": (0, 1),
    "aten::block_diag": (0,),
    "aten::cat": (0,),
    "aten::channel_shuffle": (0,),
    "aten::clone": (0,),
    "aten::constant_pad_nd": (0,),
    "aten::diag_embed": (0,),
    "aten::diagonal_copy": (0,),
    "aten::diagonal_scatter": (0, 1),
    "aten::flip": (0,),
    "aten::gather": (0,),
    "aten::index": (0,),
    "aten::index_copy": (0, 3),
    "aten::index_fill": (0, 3),
    "aten::index_put": (0, 2),
    "aten::index_put_": (0, 2),
    "aten::index_select": (0,),
    "aten::masked_scatter": (0, 2),
    "aten::masked_select": (0,),
    "aten::narrow_copy": (0,),
    "aten::native_channel_shuffle": (0,),
    "aten::pixel_shuffle": (0,),
    "aten::pixel_unshuffle": (0,),
    "aten::reflection_pad1d": (0,),
    "aten::reflection_pad2d": (0,),
    "aten::reflection_pad3d": (0,),
    "aten::repeat": (0,),
    "aten::replication_pad1d": (0,),
    "aten::replication_pad2d": (0,),
    "aten::replication_pad3d": (0,),
    "aten::roll": (0,),
    "aten::rot90": (0,),
    "aten::scatter": (0, 3),
    "aten::select_scatter": (0, 1),
    "aten::slice_scatter": (0, 1),
    "aten::stack": (0,),
    "aten::take": (0,),
    "aten::tril": (0,),
    "aten::triu": (0,),
}
# Those of them whose result has the elements of the operand, in its shape.
_SAME_ELEMENTS = frozenset({"aten::_to_copy", "aten::clone"})
# Those of them that have no kernel for integers.
_FLOATS_ONLY = ("aten::reflection_pad", "aten::replication_pad")
# Functions that read the shape of a tensor and not its values.
_FRESH = frozenset(
    """
    aten::empty_like aten::full_like aten::new_empty aten::new_empty_strided aten::new_full
    aten::new_ones aten::new_zeros aten::ones_like aten::rand_like aten::randint_like
    aten::randn_like aten::zeros_like
    """.split()
)
# Functions that return a value to Python, or a shape that depends on values.
_ASKS = frozenset({"aten::_local_scalar_dense", "aten::equal"})
_BY_MASKS = frozenset({"aten::index", "aten::masked_select"})
_SHAPES = frozenset(
    """
    aten::_unique2 aten::bincount aten::nonzero aten::nonzero_numpy
    aten::repeat_interleave aten::unique_consecutive aten::unique_dim
    """.split()
)
# Functions that fill in a number by a mask; a 0 is exact with all quantization parameters.
_MASKED_FILLS = frozenset({"aten::masked_fill", "aten::masked_fill_"})
# Functions that have a seed though they compute from their operands, unless they drop some.
_NOT_RANDOM = ("attention", "gru", "lstm", "rnn")
_FILLS = frozenset({"aten::fill_", "aten::zero_"})
# Functions that write a shape and no values.
_VIEWS_IN_PLACE = frozenset(
    """
    aten::as_strided_ aten::detach_ aten::squeeze_ aten::swapaxes_ aten::swapdims_ aten::t_
    aten::transpose_ aten::unsqueeze_
    """.split()
)
# Number of storages among which none is looked for that is freed.
_LEAST_STORAGES = 256
# Arguments that change the type of a copy and not its elements.
_TYPE_KEYWORDS = frozenset({"dtype", "layout", "device", "pin_memory", "non_blocking"})


@dataclass(slots=True)
class _Run:
    """Describe ids that follow one another.

    Attributes:
        elements: Number of ids.
        first: First of them; None until one is asked for. Most results are read by one computation,
            which asks for none.
    """

    elements: int
    first: int | None = None


@dataclass(slots=True)
class _Storage:
    """Describe the ids of the elements of one storage.

    Attributes:
        handle: Weak reference: the values are freed with their last tensor, and yet no other
            storage gets the same key as long as the reference lives.
        run: Ids of its elements, as long as ``ids`` is None; copies of a storage share it.
        ids: Ids, int64, shape ``(elements,)``, or None.
        all_data: Whether it is known that each id is of data and of no integer argument.
    """

    handle: StorageWeakRef
    run: _Run
    ids: Tensor | None = None
    all_data: bool = False

    @property
    def elements(self) -> int:
        """Return the number of elements."""
        return self.run.elements


class Provenance(TorchDispatchMode):
    """Follow elements through a forward.

    Args:
        on_decision: Callback for a tensor that data have reached, when Python reads its value.
        origin: Function that returns the line of the module's code that calls now, or None.

    Attributes:
        layout_causes: Causes, as bits, that have decided about the layout of values.

    Example:
        >>> with Provenance() as provenance:
        ...     x = torch.arange(6.0).reshape(2, 3)
        ...     first = provenance.assign(x)
        ...     y = torch.cat([x.T, torch.zeros(1, 2)])
        >>> provenance.ids(y)
        tensor([[ 0,  3],
                [ 1,  4],
                [ 2,  5],
                [-1, -1]])
    """

    def __init__(
        self,
        on_decision: Callable[[Tensor], None] = lambda x: None,
        origin: Callable[[], str | None] = lambda: None,
    ) -> None:
        super().__init__()
        self._on_decision, self._origin = on_decision, origin
        self._storages: dict[int, _Storage] = {}
        self._most_storages = _LEAST_STORAGES
        self._next = 0
        # Ids of integer arguments: first, end, bit.
        self._integers: list[tuple[int, int, int]] = []
        # Reasons why ids are no layout of others: first, end, text.
        self._reasons: list[tuple[int, int, str]] = []
        self.layout_causes = 0
        self._has_random = False

    @property
    def count(self) -> int:
        """Return the number of ids so far."""
        return self._next

    def assign(self, x: Tensor) -> Tensor:
        """Assign an id of its own to every element of a tensor, and return the ids.

        Integers are a cause from now on: what is computed from them alone belongs to the program.

        Args:
            x: Argument of the forward, any shape and type.

        Returns:
            Ids, int64, in the shape of ``x``.
        """
        is_integer = not x.is_floating_point() and not x.is_complex()
        first = self._next
        self._write_fresh(x, all_data=not is_integer)
        ids = self.ids(x)
        if is_integer:
            bit = 1 << min(len(self._integers), MOST_ARGUMENTS - 1)
            self._integers.append((first, self._next, bit))
        return ids

    def follow_attribute(self, x: Tensor) -> None:
        """Follow the values computed from a tensor in an attribute of a module.

        Args:
            x: Value of the attribute, any shape.
        """
        self._write(x, torch.full(x.shape, CONSTANT - ATTRIBUTE))

    def complete(self, x: Tensor) -> Tensor:
        """Assign ids to the elements of a tensor that are no data, too, and return all ids.

        Args:
            x: Result of an instruction, any shape.

        Returns:
            Ids, int64, in the shape of ``x``.
        """
        ids = self.ids(x)
        is_without = ids < 0
        count = int(is_without.sum())
        if not count:
            return ids
        self._write(x, ids.masked_scatter(is_without, self._fresh((count,))))
        return self.ids(x)

    def ids(self, x: Tensor) -> Tensor:
        """Return the ids of the elements of a tensor.

        Args:
            x: Tensor of the forward, any shape.

        Returns:
            Ids, int64, in the shape of ``x``.
        """
        storage = self._storages.get(_key(x))
        if storage is None:
            return torch.full(x.shape, CONSTANT)
        if storage.ids is None and _is_whole(x, storage.elements):
            return self._numbers(storage.run).view(x.shape)
        return self._each(storage).as_strided(x.shape, x.stride(), x.storage_offset()).clone()

    def reaches(self, values: Any) -> bool:
        """Tell if data or a cause is in any tensor among values, nested."""
        return bool(self._reached(values))

    def causes(self, values: Any) -> int | None:
        """Collect the causes of all tensors among values, nested; None if data are among them.

        Args:
            values: Tensors, in any nesting of lists, tuples and mappings.

        Returns:
            Causes as bits.
        """
        return self._causes_among(self._reached(values))

    def _causes_among(self, reached: Sequence[Tensor]) -> int | None:
        """Collect the causes of tensors whose storage has data or causes."""
        if any(self._storages[_key(x)].all_data and x.numel() for x in reached):
            return None
        causes = 0
        for x in reached:
            bits = self.causes_of(self.ids(x))
            if bits is None:
                return None
            causes |= bits
        return causes

    def causes_of(self, ids: Tensor) -> int | None:
        """Collect the causes in ids; None if any is of data.

        Args:
            ids: Ids, int64, any shape.

        Returns:
            Causes as bits.
        """
        flat = ids.reshape(-1)
        data, causes = flat[flat >= 0], 0
        for first, end, bit in self._integers if len(data) else ():
            inside = (data >= first) & (data < end)
            if bool(inside.any()):
                causes, data = causes | bit, data[~inside]
        if len(data):
            return None
        for negative in flat[flat < CONSTANT].unique().tolist():
            causes |= CONSTANT - negative
        return causes

    def reason(self, provenance_id: int) -> str | None:
        """Return the reason why a value is no layout of others, if it is known.

        Args:
            provenance_id: Id of the value.
        """
        for first, end, text in self._reasons:
            if first <= provenance_id < end:
                return text
        return None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function and follow its effect on ids."""
        kwargs = kwargs or {}
        function = _function(func)
        if function.decides:
            for x in self._deciding(function.name, args, kwargs):
                self._on_decision(x)
        result = func(*args, **kwargs)
        self._follow(function, args, kwargs, result)
        return result

    def _deciding(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Sequence[Tensor]:
        """Return arguments that data have reached and whose values Python sees or branches on."""
        if name in _BY_MASKS:  # The number of their true values is a shape.
            return [x for x in self._reached(args[1]) if x.dtype in (torch.bool, torch.uint8)]
        return self._reached(args, kwargs)

    def _follow(
        self, function: _Function, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        name, written = function.name, function.written(args, kwargs)
        operands = _tensors(args, kwargs)
        keys = [_key(x) for x in operands]
        fresh = [x for x in _tensors(result) if _key(x) not in keys]
        if not (fresh or written):  # A view, or a value for Python.
            return
        reached = [x for x, key in zip(operands, keys, strict=True) if key in self._storages]
        if name in _FRESH:
            reached = []
        if name == "aten::copy_":
            moved = self.ids(args[1]).expand(args[0].shape)
            self._write(args[0], moved)
        elif name in _VIEWS_IN_PLACE:
            pass
        elif name in _FILLS and not self._reached(args[1:], kwargs):
            self._fill(args[0], CONSTANT)
        elif function.is_random and (written or not reached):
            self._has_random = True
            for x in (*fresh, *written):
                self._fill(x, CONSTANT - RANDOM)
        elif not reached:
            for x in written:
                self._fill(x, CONSTANT)
        elif name in _COPIES and self._layout_is_fixed(name, args, kwargs):
            self._copy(function, args, kwargs, written or fresh)
        elif name in _MASKED_FILLS and args[2] == 0 and self._layout_is_fixed(name, args, kwargs):
            filled = self.ids(args[0]).masked_fill(args[1], CONSTANT)
            self._write(written[0] if written else result, filled)
        else:
            self._computed(name, reached, (*fresh, *written))

    def _computed(self, name: str, reached: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Assign new ids to the results of a computation, or the causes of all operands."""
        causes = self._causes_among(reached)
        for x in results:
            if causes is not None:
                self._fill(x, CONSTANT - causes)
                continue
            text = self._why(name, reached, x)
            self._write_fresh(x)
            if text is not None and x.numel():
                ids = self.ids(x)
                self._reasons.append((int(ids.min()), int(ids.max()) + 1, text))

    def _why(self, name: str, reached: Sequence[Tensor], result: Tensor) -> str | None:
        """Return why a result of data can be no part of a program, if it can be told here."""
        if self._has_random and self._mixes_random(reached):
            return f"random numbers are mixed in by {name}"
        for x in reached if self._reasons else ():
            # A mask or an index passes its reason on to its users.
            decides = not (x.is_floating_point() and result.is_floating_point())
            if decides and x.numel():
                known = self.reason(int(self.ids(x).max()))
                if known is not None:
                    return known
        is_copy = name in _COPIES
        of_conditions = any(x.dtype == torch.bool for x in reached)
        if result.is_floating_point() and not is_copy and not of_conditions:
            return None
        origin = self._origin()
        if origin is None:  # Arithmetic of the emulation.
            return None
        effect = "decide about the layout" if is_copy else "decide"
        return f"values of the data {effect}, by {name} at {origin}"

    def _mixes_random(self, reached: Sequence[Tensor]) -> bool:
        flat = [self.ids(x).reshape(-1) for x in reached]
        return any(bool(((x < CONSTANT) & ((CONSTANT - x) & RANDOM > 0)).any()) for x in flat)

    def _copy(
        self,
        function: _Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        results: Sequence[Tensor],
    ) -> None:
        """Run the same function on ids, which it fills up with zeros or with a number."""
        name = function.name
        if name in _SAME_ELEMENTS:
            self._share(args[0], results[0])
            return
        # Ids are shifted so that 0, which tril and diag_embed fill in, stands for CONSTANT.
        copied, dtype = _COPIES[name], torch.int64
        if name.startswith(_FLOATS_ONLY):
            dtype = torch.float64

        def ids_of(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return [ids_of(each) for each in x]
            return (self.ids(x) - CONSTANT).to(dtype) if isinstance(x, Tensor) else x

        moved = [
            ids_of(value) if position in copied else value for position, value in enumerate(args)
        ]
        options = {key: value for key, value in kwargs.items() if key not in _TYPE_KEYWORDS}
        if name == "aten::constant_pad_nd":
            moved, options = moved[:2], {}
        elif name in ("aten::index_fill", "aten::scatter") and not isinstance(moved[3], Tensor):
            moved[3] = 0
        outputs = _tensors(function.run(*moved, **options))
        for result, ids in zip(results[:1], outputs, strict=False):
            self._write(result, ids.long() + CONSTANT)
        for result in results[1:]:  # The batch sizes of packed sequences.
            self._fill(result, CONSTANT - (self.causes(args[1:]) or 0))

    def _reached(self, *values: Any) -> list[Tensor]:
        """Return the tensors among arguments whose storage has data."""
        return [x for x in _tensors(*values) if _key(x) in self._storages]

    def _layout_is_fixed(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell if no data decide about the layout; what does decide is part of the program."""
        copied = _COPIES.get(name, (0,))
        rest = [value for position, value in enumerate(args) if position not in copied]
        causes = self.causes((rest, kwargs))
        if causes is None or causes & RANDOM:
            return False
        self.layout_causes |= causes
        return True

    def _numbers(self, run: _Run) -> Tensor:
        """Return the ids of a run, which are assigned now if they were not before."""
        if run.first is None:
            run.first, self._next = self._next, self._next + run.elements
        return torch.arange(run.first, run.first + run.elements)

    def _each(self, storage: _Storage) -> Tensor:
        """Return the ids of all elements of a storage, which may be written to."""
        if storage.ids is None:
            storage.ids = self._numbers(storage.run)
        return storage.ids

    def _fresh(self, shape: Sequence[int]) -> Tensor:
        count = torch.Size(shape).numel()
        first, self._next = self._next, self._next + count
        return torch.arange(first, self._next).reshape(tuple(shape))

    def _write(self, x: Tensor, ids: Tensor) -> None:
        """Write ids to the elements of a tensor in its storage."""
        storage = self._storage(x)
        if storage is None:
            if bool((ids == CONSTANT).all()):
                return  # No data there, as before.
            storage = self._new_storage(x)
        storage.all_data = False
        self._each(storage).as_strided(x.shape, x.stride(), x.storage_offset()).copy_(ids)

    def _share(self, x: Tensor, result: Tensor) -> None:
        """Write the ids of a tensor to another of its shape."""
        source = self._storages[_key(x)]
        both_whole = _is_whole(x, source.elements) and _is_whole(result, _elements(result))
        if both_whole and source.ids is None and self._storage(result) is None:
            self._add(result, replace(source, handle=_handle(result)))
        else:
            self._write(result, self.ids(x))

    def _fill(self, x: Tensor, provenance_id: int) -> None:
        """Write one id without data to all elements of a tensor."""
        if provenance_id != CONSTANT or _key(x) in self._storages:
            self._write(x, torch.full(x.shape, provenance_id))

    def _write_fresh(self, x: Tensor, *, all_data: bool = True) -> None:
        """Write an id of its own to each element of a tensor.

        Args:
            x: Tensor, any shape.
            all_data: Whether they are of data and of no integer argument.
        """
        if _is_whole(x, _elements(x)):
            if x.numel():
                self._add(x, _Storage(_handle(x), _Run(x.numel()), all_data=all_data))
            return
        storage = self._storage(x)
        were_data = storage is not None and storage.all_data
        self._write(x, self._fresh(x.shape))
        if were_data and all_data:
            self._storages[_key(x)].all_data = True

    def _storage(self, x: Tensor) -> _Storage | None:
        """Return the ids of a tensor's storage; none if no data have reached it."""
        storage = self._storages.get(_key(x))
        if storage is None or storage.elements == _elements(x):
            return storage
        return self._new_storage(x)  # It is read in another type.

    def _new_storage(self, x: Tensor) -> _Storage:
        elements = _elements(x)
        ids = torch.full((elements,), CONSTANT)
        storage = _Storage(_handle(x), _Run(elements), ids)
        self._add(x, storage)
        return storage

    def _add(self, x: Tensor, storage: _Storage) -> None:
        """Add the storage of a tensor; the ids of those that are freed go once they are many."""
        self._storages[_key(x)] = storage
        if len(self._storages) > self._most_storages:
            live = {key: each for key, each in self._storages.items() if not each.handle.expired()}
            self._storages, self._most_storages = live, 2 * len(live) + _LEAST_STORAGES


@dataclass(frozen=True)
class _Function:
    """Describe a function that is dispatched.

    Args:
        run: Function.
        name: Name of its schema.
        writes: Positions and names of the arguments that it writes to.
        is_random: Whether it draws random numbers.
        decides: Whether Python may see values by it, or branch on them.
    """

    run: Callable[..., Any]
    name: str
    writes: tuple[tuple[int, str], ...]
    is_random: bool
    decides: bool

    def written(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the arguments that a call writes to."""
        if not self.writes:
            return []
        return _tensors(
            [
                args[position] if position < len(args) else kwargs.get(name)
                for position, name in self.writes
            ]
        )


@cache
def _function(func: Any) -> _Function:
    name = func._schema.name
    writes = tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    seeded = torch.Tag.nondeterministic_seeded in func.tags
    is_random = seeded and not any(word in name for word in _NOT_RANDOM)
    decides = name in _ASKS or name in _SHAPES or name in _BY_MASKS
    return _Function(func, name, writes, is_random, decides)


def _handle(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _elements(x: Tensor) -> int:
    """Return how many elements of a tensor's type its storage has."""
    return x.untyped_storage().nbytes() // x.element_size()


def _is_whole(x: Tensor, elements: int) -> bool:
    """Tell if a tensor is all elements of a storage, in their order."""
    return x.numel() == elements and x.is_contiguous()


def _tensors(*values: Any) -> list[Tensor]:
    """Collect the tensors in any nesting of lists, tuples and mappings."""
    found: list[Tensor] = []
    _collect(values, found)
    return found


def _collect(values: Iterable[Any], found: list[Tensor]) -> None:
    for each in values:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, (list, tuple)):
            _collect(each, found)
        elif isinstance(each, dict):
            _collect(each.values(), found)
