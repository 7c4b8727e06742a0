"""Map provenance ids of a forward to the tensors of the program that hold their values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import jaxtyping
import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from lightning_nna.deploy.graph import CaptureError
from lightning_nna.deploy.layout import NO_TENSOR, Codes
from lightning_nna.deploy.provenance import ATTRIBUTE, CONSTANT, MOST_ARGUMENTS, RANDOM, Provenance
from lightning_nna.emulation.program import Stored

# Code of an element that no instruction has computed.
_UNKNOWN = -2
# Functions that return more than one value to Python.
_LEAVES = frozenset({"numpy", "tolist", "__array__", "__dlpack__"})
_REMEDY = (
    "Lengths and other integer arguments may decide; for all else write it without a decision, as "
    "a product with an activation, or keep it out of the export with forward="
)
_WITHOUT_RANDOM = (
    "Leave dropout and noise out of an evaluation (F.dropout needs training=self.training), or "
    "keep what is drawn once in a buffer"
)
_TORCH = str(Path(torch.__file__).parent)
# Frames of these folders stand between a function and the code that calls it.
_OURS = (
    *(str(Path(__file__).parents[1] / part) for part in ("deploy", "emulation", "weights")),
    str(Path(jaxtyping.__file__).parent),
)
_OPERATORS = str(Path(__file__).parents[1] / "emulation" / "operators")
_CAPTURE = str(Path(__file__).with_name("capture.py"))
_MODULE_CALL = nn.Module.__call__.__code__.co_filename


@contextmanager
def untracked() -> Iterator[None]:
    """Compute for the export itself, seen by no mode."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


class ProvenanceMap:
    """Provenance ids of the forward and the codes of the program's tensors that hold them.

    Attributes:
        provenance: Mode that assigns the ids.
        integers: Positions of arguments that are integers.
    """

    def __init__(self) -> None:
        self.provenance = Provenance(self.on_decision, _caller)
        self.integers: list[int] = []
        self._causes = 0
        # By type, too: one tensor of the forward may have two in the program.
        self._codes: dict[str, Codes] = {}

    @property
    def reads_attributes(self) -> bool:
        """Tell if the program has values of tensors in attributes of a module."""
        return bool((self._causes | self.provenance.layout_causes) & ATTRIBUTE)

    @property
    def steering(self) -> set[int]:
        """Return the positions of arguments that have decided something: part of the program."""
        bits = self._causes | self.provenance.layout_causes
        return {
            position
            for number, position in enumerate(self.integers)
            if bits >> min(number, MOST_ARGUMENTS - 1) & 1
        }

    def assign(self, x: Tensor) -> Any:
        """Assign ids to the elements of an argument, and return them.

        Args:
            x: Argument, any shape.
        """
        with untracked():
            return self.provenance.assign(x).numpy()

    def ids(self, stored: Stored) -> Any:
        """Return the ids of the values of an operand or a result, in its shape."""
        assert stored.source is not None
        return self.provenance.ids(stored.source).numpy()

    def result_ids(self, stored: Stored) -> Any:
        """Return the ids of a result; elements that the forward never has are assigned some."""
        assert stored.source is not None
        return self.provenance.complete(stored.source).numpy()

    def define(self, dtype: str, ids: Any, codes: Codes | int) -> None:
        """Set the codes of some ids in a type.

        Args:
            dtype: Type of the program's tensor.
            ids: Provenance ids, int64, any shape.
            codes: Codes, shape ``(ids.size,)``, or one for all.
        """
        self._codes_for(dtype)[ids.reshape(-1)] = codes

    def _codes_for(self, dtype: str) -> Codes:
        """Return the codes of all ids so far."""
        codes = self._codes.get(dtype, np.empty(0, np.int64))
        missing = self.provenance.count - len(codes)
        if missing > 0 or dtype not in self._codes:
            more = np.full(max(missing, len(codes), 1), _UNKNOWN)
            codes = self._codes[dtype] = np.concatenate([codes, more])
        return codes

    def resolve(self, x: Tensor, dtype: str, where: str, *, fixes_integers: bool = True) -> Codes:
        """Return the codes of the elements of a tensor.

        Args:
            x: Tensor of the forward, any shape.
            dtype: Type in which the program has it.
            where: Operand, for messages.
            fixes_integers: Whether integers that are computed of integer arguments are part of the
                program.

        Raises:
            CaptureError: If a value comes from no instruction, or data decided about it.
        """
        ids = self.provenance.ids(x).numpy()
        steering = ids < CONSTANT
        if steering.any() and not fixes_integers:
            raise CaptureError(
                f"{where} is computed from integer arguments in no emulated operator: pass the "
                "indices to look up as an argument of their own"
            )
        if steering.any():
            self.note_causes(torch.from_numpy(ids[steering]), where)
        fixed = ids < 0
        codes = np.where(fixed, NO_TENSOR, self._codes_for(dtype)[np.maximum(ids, 0)])
        unknown = codes == _UNKNOWN
        if bool(unknown.any()):
            reason = self.provenance.reason(int(ids[unknown][0]))
            if reason is not None:
                remedy = _WITHOUT_RANDOM if reason.startswith("random") else _REMEDY
                raise CaptureError(
                    f"{where} would be that of the example for ever: {reason}. {remedy}"
                )
            raise CaptureError(
                f"{where} comes from no emulated operator: a function between two of them computes "
                "values that are not emulated, and coverage(module, example) lists it: emulate it, "
                "too, or export the emulated part alone, as export_tflite(module.network, ...) "
                "after NNAEmulation(targets=['network'])"
            )
        return codes

    def has_codes(self, x: Tensor, dtype: str) -> bool:
        """Tell if the program has every element of a tensor.

        Args:
            x: Tensor of the forward, any shape.
            dtype: Type in which the program has it.
        """
        ids = self.provenance.ids(x).numpy()
        return bool((ids >= 0).all()) and self.has_data(x, dtype)

    def has_data(self, x: Tensor, dtype: str) -> bool:
        """Tell if the program has every element of a tensor that is no constant.

        Args:
            x: Tensor of the forward, any shape.
            dtype: Type in which the program has it.
        """
        ids = self.provenance.ids(x).numpy()
        return bool((self._codes_for(dtype)[ids[ids >= 0]] != _UNKNOWN).all())

    def note_causes(self, ids: Tensor, where: str) -> None:
        """Note that causes decide about something.

        Args:
            ids: Ids without data, int64, any shape.
            where: Operand, for messages.

        Raises:
            CaptureError: If random numbers are among them.
        """
        causes = self.provenance.causes_of(ids)
        assert causes is not None
        if causes & RANDOM:
            raise CaptureError(
                f"{where} depends on random numbers, which a program cannot draw. {_WITHOUT_RANDOM}"
            )
        self._causes |= causes

    def validate_constant(self, stored: Stored, where: str, remedy: str = "") -> None:
        """Validate that a constant was not computed from the data, as from their mean.

        Args:
            stored: Constant operand.
            where: Operand, for messages.
            remedy: Remedy, for the message; empty for the general one.

        Raises:
            CaptureError: If it was computed from the data.
        """
        ids = self.provenance.ids(stored.integers)
        if self.provenance.causes_of(ids) is None:
            raise CaptureError(
                f"{where} is computed from the data, and would be that of the example for ever: "
                f"{remedy or 'it has to be a parameter, a buffer or a number'}"
            )
        self.note_causes(ids, where)

    def on_decision(self, x: Tensor) -> None:
        """Note that Python reads a value; lengths and the like are fixed by this.

        Args:
            x: Tensor whose value Python reads.

        Raises:
            CaptureError: If it is a value of the data.
        """
        with untracked():
            caller = _caller()
            if caller is None and x.is_floating_point():
                return  # The emulation takes a shorter way of computing the same integers.
            causes = self.provenance.causes((x,))
            if causes is not None:
                self.note_causes(self.provenance.ids(x), caller or "the forward")
            elif caller is not None:
                raise CaptureError(
                    f"{caller} reads a value of the data, and a program cannot decide by it. "
                    f"{_REMEDY}"
                )


class PythonReads(TorchFunctionMode):
    """Watch Python read whole tensors, whose values are followed no further.

    Args:
        on_decision: Callback for such a tensor.
    """

    def __init__(self, on_decision: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._on_decision = on_decision

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function; report a tensor that leaves PyTorch before."""
        if getattr(func, "__name__", "") in _LEAVES and args and isinstance(args[0], Tensor):
            self._on_decision(args[0])
        return func(*args, **(kwargs or {}))


def _caller() -> str | None:
    """Return the line of the module's code that calls now; None within an emulated operator."""
    frame: FrameType | None = sys._getframe(2)
    outside: FrameType | None = None
    inside: FrameType | None = None
    while frame is not None:
        place = _place(frame.f_code.co_filename)
        if place == "operators":
            return None
        if place == "module call":
            break
        if place == "outside" and outside is None:
            outside = frame
        elif place == "torch":
            inside = frame
        frame = frame.f_back
    line = outside or inside
    if line is None:
        return None
    return f"{Path(line.f_code.co_filename).name}:{line.f_lineno} in {line.f_code.co_qualname}"


@cache
def _place(file: str) -> str:
    """Return what the code of a file is to a call."""
    if file.startswith(_OPERATORS):
        return "operators"
    if file == _MODULE_CALL or file.startswith(_CAPTURE):
        return "module call"
    if file.startswith(_TORCH):
        return "torch"
    return "ours" if file.startswith(_OURS) else "outside"
