"""Which tensor of a program holds which element of the forward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from lightning_nna.deploy.provenance import CONSTANT, KEPT, MOST_ARGUMENTS, RANDOM, Provenance
from lightning_nna.emulation.program import Stored

# Code of an element that no instruction has made.
_UNKNOWN = -2
# Functions that hand Python more than one value.
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
# Frames of them stand between a function and the code that calls it.
_OURS = (
    *(str(Path(__file__).parents[1] / part) for part in ("deploy", "emulation", "weights")),
    str(Path(jaxtyping.__file__).parent),
)
_OPERATORS = str(Path(__file__).parents[1] / "emulation" / "operators")
_CAPTURE = str(Path(__file__).with_name("capture.py"))
_MODULE_CALL = nn.Module.__call__.__code__.co_filename


@contextmanager
def unseen() -> Iterator[None]:
    """Compute for the export itself: no mode sees it."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


class Elements:
    """Addresses of the forward and the codes of what holds them.

    Attributes:
        provenance: Gives the addresses.
        integers: Positions of arguments that are integers.
    """

    def __init__(self) -> None:
        self.provenance = Provenance(self.decides, _asking)
        self.integers: list[int] = []
        self._causes = 0
        # By type, too: one tensor of the forward may have two on the chip.
        self._codes: dict[str, Codes] = {}

    @property
    def reads_kept(self) -> bool:
        """Tell whether the program holds what a module keeps in an attribute."""
        return bool((self._causes | self.provenance.moved_by) & KEPT)

    @property
    def steering(self) -> set[int]:
        """Positions of arguments that have decided something, and so are part of the program."""
        bits = self._causes | self.provenance.moved_by
        return {
            position
            for number, position in enumerate(self.integers)
            if bits >> min(number, MOST_ARGUMENTS - 1) & 1
        }

    def begin(self, x: Tensor) -> Any:
        """Addresses for the elements of an argument."""
        with unseen():
            return self.provenance.begin(x).numpy()

    def addresses(self, stored: Stored) -> Any:
        """Addresses of the values of an operand or a result."""
        assert stored.source is not None
        return self.provenance.addresses(stored.source).numpy()

    def place(self, stored: Stored) -> Any:
        """Addresses of a result; elements that the forward never holds get some."""
        assert stored.source is not None
        return self.provenance.complete(stored.source).numpy()

    def define(self, dtype: str, addresses: Any, codes: Codes) -> None:
        """Say what holds some addresses in a type from now on."""
        self._codes_for(dtype)[addresses.reshape(-1)] = codes

    def _codes_for(self, dtype: str) -> Codes:
        """Codes of all addresses so far."""
        held = self._codes.get(dtype, np.empty(0, np.int64))
        missing = self.provenance.count - len(held)
        if missing > 0 or dtype not in self._codes:
            more = np.full(max(missing, len(held), 1), _UNKNOWN)
            held = self._codes[dtype] = np.concatenate([held, more])
        return held

    def resolve(self, x: Tensor, dtype: str, where: str) -> Codes:
        """Codes of the elements of a tensor that the chip holds in a type."""
        addresses = self.provenance.addresses(x).numpy()
        steering = addresses < CONSTANT
        if steering.any() and dtype == "int32":
            raise CaptureError(
                f"{where} is computed of integer arguments, off the chip: pass what is looked up "
                "as an argument of its own"
            )
        if steering.any():
            self.steered(torch.from_numpy(addresses[steering]), where)
        fixed = addresses < 0
        codes = np.where(fixed, NO_TENSOR, self._codes_for(dtype)[np.maximum(addresses, 0)])
        unknown = codes == _UNKNOWN
        if bool(unknown.any()):
            reason = self.provenance.reason(int(addresses[unknown][0]))
            if reason is not None:
                remedy = _WITHOUT_RANDOM if reason.startswith("random") else _REMEDY
                raise CaptureError(
                    f"{where} would be that of the example for ever: {reason}. {remedy}"
                )
            raise CaptureError(
                f"{where} comes from no operator of the chip: something between two of them works "
                "on values off the chip; coverage(module, example) lists what does"
            )
        return codes

    def steered(self, addresses: Tensor, where: str) -> None:
        """Note that causes decide about something.

        Raises:
            CaptureError: If random numbers are among them.
        """
        causes = self.provenance.causes_of(addresses)
        assert causes is not None
        if causes & RANDOM:
            raise CaptureError(
                f"{where} depends on random numbers, which a program cannot draw. {_WITHOUT_RANDOM}"
            )
        self._causes |= causes

    def check_constant(self, stored: Stored, where: str, remedy: str = "") -> None:
        """Refuse a constant that was computed of the data, as of their mean.

        Raises:
            CaptureError: If it was.
        """
        addresses = self.provenance.addresses(stored.integers)
        if self.provenance.causes_of(addresses) is None:
            raise CaptureError(
                f"{where} is computed of the data, and would be that of the example for ever: "
                f"{remedy or 'it has to be a parameter, a buffer or a number'}"
            )
        self.steered(addresses, where)

    def decides(self, x: Tensor) -> None:
        """Python asks for a value: of lengths and the like it may, they are fixed then.

        Raises:
            CaptureError: If it is a value of the data.
        """
        with unseen():
            caller = _asking()
            causes = self.provenance.causes((x,))
            if causes is not None:
                self.steered(self.provenance.addresses(x), caller or "the forward")
            elif caller is not None:
                raise CaptureError(
                    f"{caller} asks for a value of the data, and the chip cannot decide by it. "
                    f"{_REMEDY}"
                )


class Asked(TorchFunctionMode):
    """Sees Python take whole tensors: what they are turned into is followed no further.

    Args:
        decides: Called with such a tensor.
    """

    def __init__(self, decides: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._decides = decides

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function; before one that leaves PyTorch, say so."""
        if getattr(func, "__name__", "") in _LEAVES and args and isinstance(args[0], Tensor):
            self._decides(args[0])
        return func(*args, **(kwargs or {}))


def _asking() -> str | None:
    """Where a module's code stands; None within the chip's own arithmetic."""
    frame: FrameType | None = sys._getframe(2)
    found = inside = None
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_OPERATORS):
            return None
        if name == _MODULE_CALL or name.startswith(_CAPTURE):
            break
        place = f"{Path(name).name}:{frame.f_lineno} in {frame.f_code.co_qualname}"
        if not name.startswith((_TORCH, *_OURS)):
            found = found or place
        elif name.startswith(_TORCH):
            inside = place
        frame = frame.f_back
    return found or inside
