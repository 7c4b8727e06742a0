"""Which tensor of a program holds which element of the forward."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lightning_nna.deploy.graph import CaptureError
from lightning_nna.deploy.movement import NO_TENSOR, Codes
from lightning_nna.deploy.provenance import CONSTANT, STEERING, Provenance
from lightning_nna.emulator.program import Stored

# Code of an element that no instruction has made.
_UNKNOWN = -2
_INSTALLED = str(Path(torch.__file__).parents[1])
_PACKAGE = str(Path(__file__).parents[1])
_OPERATORS = str(Path(__file__).parents[1] / "emulator" / "operators")
_MODULE_CALL = nn.Module.__call__.__code__.co_filename


class Elements:
    """Addresses of the forward and the codes of what holds them.

    Attributes:
        provenance: Gives the addresses.
        integers: Positions of arguments that are integers.
        steering: Those of them that have decided something, and so are part of the program.
    """

    def __init__(self) -> None:
        self.provenance = Provenance(self._decides)
        self.integers: list[int] = []
        self.steering: set[int] = set()
        # By type, too: one tensor of the forward may have two on the chip.
        self._codes: dict[str, Codes] = {}

    def begin(self, x: Tensor) -> Any:
        """Addresses for the elements of an argument."""
        with _disable_current_modes():
            return self.provenance.begin(x).numpy()

    def addresses(self, stored: Stored) -> Any:
        """Addresses of the values of an operand or a result."""
        assert stored.source is not None
        return self.provenance.addresses(stored.source).numpy()

    def place(self, stored: Stored) -> Any:
        """Addresses of a result; one that the forward never holds gets some."""
        assert stored.source is not None
        addresses = self.addresses(stored)
        is_held = bool((addresses != CONSTANT).any())
        return addresses if is_held else self.provenance.begin(stored.source).numpy()

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
        steering = addresses == STEERING
        if steering.any() and dtype != "bool":
            raise CaptureError(f"{where} is computed of integer arguments, off the chip")
        if steering.any():
            self.steering.update(self.integers)
        fixed = (addresses == CONSTANT) | steering
        codes = np.where(fixed, NO_TENSOR, self._codes_for(dtype)[np.maximum(addresses, 0)])
        if bool((codes == _UNKNOWN).any()):
            raise CaptureError(
                f"{where} comes from no operator of the chip: something between two of them works "
                "on values off the chip; coverage(module, example) lists what does"
            )
        return codes

    def _decides(self, x: Tensor) -> None:
        """Python asks for a value: of lengths and the like it may, they are fixed then."""
        caller = _asking()
        if caller is None:
            return
        with _disable_current_modes():
            addresses = self.provenance.addresses(x).numpy()
            known = self._codes_for("int32")[np.maximum(addresses, 0)] != _UNKNOWN
            if not bool((known | (addresses < 0)).all()):
                raise CaptureError(
                    f"{caller} asks for a value of the data, and the chip cannot decide by it: "
                    "keep the decision out of the export with forward="
                )
            self.steering.update(self.integers)


def _asking() -> str | None:
    """Where a module's code stands; None within the chip's own arithmetic."""
    frame: FrameType | None = sys._getframe(2)
    found = None
    while frame is not None and frame.f_code.co_filename != _MODULE_CALL:
        name = frame.f_code.co_filename
        if name.startswith(_OPERATORS):
            return None
        if found is None and not name.startswith((_INSTALLED, _PACKAGE)):
            found = f"{Path(name).name}:{frame.f_lineno} in {frame.f_code.co_qualname}"
        frame = frame.f_back
    return found
