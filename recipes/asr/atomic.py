"""Folders that are complete or absent, and that are verified when they are read.

Data that are slow to compute are cached on disk. A process that is killed in the middle must not
leave an incomplete folder under the final name, and two processes must not write into one folder. A
training must not read what a full disk, a truncated copy or a flipped bit has damaged.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from lightning_nna.files import flush
from recipes.asr.audio import CorpusError

CONTENTS = "contents.json"
"""File in every folder: size and CRC-32 of each of its other files."""

# A sync of one file takes milliseconds; above this number of files, one sync of the disk is faster.
_MOST_SYNCS = 64


@contextlib.contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """Fill a temporary folder next to ``target``, then rename it to ``target``.

    All files are on the disk before the rename. If the block raises, the temporary folder is
    removed. If another process finished ``target`` first, that folder stays: both have the same
    settings.

    Args:
        target: Folder to create, with its parents.

    Yields:
        Temporary folder to write into.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "made"
        >>> with complete_folder(target) as folder:
        ...     _ = (folder / "a.txt").write_text("complete")
        >>> check_folder(target, "a.txt")
        >>> (target / "a.txt").read_text()
        'complete'
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        _seal(temporary)
        # mkdtemp creates folders that only their owner may read.
        temporary.chmod(0o755)
        with contextlib.suppress(OSError):
            os.replace(temporary, target)
        if not target.is_dir():
            raise OSError(f"{temporary} could not be renamed to {target}")
        flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder(folder: Path, *read: str) -> None:
    """Raise unless a folder is unchanged since `complete_folder` has written it.

    Args:
        folder: Folder that `complete_folder` has written.
        read: Names of files whose sizes and checksums are compared; of others only the sizes.

    Raises:
        CorpusError: If a file is missing or has changed; the message names it and the remedy.
    """
    remedy = f"remove {folder}, then it is created again"
    try:
        contents = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        entries = {str(name): (int(size), int(crc)) for name, (size, crc) in contents.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CorpusError(f"{folder / CONTENTS} is missing or damaged: {remedy}") from error
    for name, (size, checksum) in entries.items():
        # A corpus has tens of thousands of files: paths as objects would take most of the time.
        path = f"{folder}/{name}"
        try:
            actual = os.stat(path).st_size
        except OSError:
            raise CorpusError(f"{path} is missing: {remedy}") from None
        if actual != size:
            raise CorpusError(f"{path} has {actual} bytes and was written with {size}: {remedy}")
        if name in read and _checksum(folder / name) != checksum:
            raise CorpusError(f"{path} has changed since it was written: {remedy}")
    if unknown := sorted(set(read) - entries.keys()):
        raise CorpusError(f"{folder} has no {', '.join(unknown)}: {remedy}")


def _seal(folder: Path) -> None:
    """Write the list of a folder's files into it, and flush all of them to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _checksum(path)]
        for path in files
    }
    (folder / CONTENTS).write_text(json.dumps(contents), encoding="utf-8")
    folders = [path for path in folder.rglob("*") if path.is_dir()]
    if len(files) > _MOST_SYNCS:
        os.sync()
        return
    for path in [*files, folder / CONTENTS, *folders, folder]:
        flush(path)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum
