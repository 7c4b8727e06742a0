"""Folders that exist whole or not at all.

What takes long to make is kept on disk. A process that is killed in the middle must not leave
half of it behind under the final name, and two processes must not write into each other's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def folder_made_whole(target: Path) -> Iterator[Path]:
    """Fill a temporary folder beside ``target``, then rename it to ``target``.

    If the block raises, the temporary folder is removed. If another process finished ``target``
    first, that one stays: both were made from the same settings.

    Args:
        target: The folder to make; its parents are made too.

    Yields:
        The temporary folder to write into.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "made"
        >>> with folder_made_whole(target) as folder:
        ...     _ = (folder / "a.txt").write_text("whole")
        >>> (target / "a.txt").read_text()
        'whole'
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        # mkdtemp makes folders that only their owner may read.
        temporary.chmod(0o755)
        with contextlib.suppress(OSError):
            os.replace(temporary, target)
        if not target.is_dir():
            raise OSError(f"{temporary} could not be renamed to {target}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
