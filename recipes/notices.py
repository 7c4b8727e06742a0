"""Leave out what Lightning says of every run of the recipes, and nobody can act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.rank_zero import rank_zero_module

_WARNINGS = (
    # A run that resumes is meant to find its checkpoints.
    (r"Checkpoint directory .* exists and is not empty", UserWarning),
    # Lightning 2.6 uses a name that PyTorch 2.11 has deprecated.
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
    # data.num_workers=0 is on purpose: features are read from a cache.
    (r"The '\w+' does not have many workers", UserWarning),
)
_LINES = (
    "Tip: For seamless cloud",  # Of other products.
    "Ignoring `Trainer(max_time=",  # callbacks.timer has it, and counts all parts of a run.
)


@contextmanager
def fewer_notices() -> Iterator[None]:
    """Hide these warnings and lines of the log in the block, and nothing else.

    Example:
        >>> with fewer_notices():
        ...     warnings.warn("Checkpoint directory runs exists and is not empty.", stacklevel=1)
    """
    # Another name if pytorch_lightning, the package of the older name, was imported, too.
    logger = rank_zero_module.log
    logger.addFilter(_is_wanted)
    try:
        with warnings.catch_warnings():
            for message, category in _WARNINGS:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        logger.removeFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not any(line in record.getMessage() for line in _LINES)
