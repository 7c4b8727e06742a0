"""The runtimes by name."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_nna.deploy.runtimes.interface import Runtime
from lightning_nna.deploy.runtimes.litert import LiteRT
from lightning_nna.deploy.runtimes.tflite_micro import TFLiteMicro
from lightning_nna.deploy.runtimes.tosa import TOSA

#: Runtimes by name: LiteRT's reference kernels, its faster ones, TFLite-Micro, and TOSA.
RUNTIMES: Mapping[str, Runtime] = {
    each.name: each
    for each in (LiteRT(), LiteRT("optimized"), LiteRT("XNNPACK"), TFLiteMicro(), TOSA())
}


def runtime_of(name: str) -> Runtime:
    """Return a runtime by its name; it need not be installed.

    Args:
        name: ``"litert"`` for LiteRT's reference kernels, ``"litert-optimized"`` for faster ones,
            ``"litert-xnnpack"`` for the fastest, ``"tflm"`` for TFLite-Micro, or ``"tosa"`` for
            TOSA's reference model.

    Raises:
        ValueError: If there is no runtime of this name.

    Example:
        >>> runtime_of("tflm").title
        'TFLite-Micro'
    """
    if name not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}; got {name!r}")
    return RUNTIMES[name]
