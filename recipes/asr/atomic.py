"""Folders that exist whole or not at all, and that say so when they are read.

What takes long to make is kept on disk. A process that is killed in the middle must not leave
half of it behind under the final name, and two processes must not write into each other's. A disk
that was full, a copy that was cut off, or a bit that flipped must not go into a training.
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
from recipes.asr.corpora import CorpusError

CONTENTS = "contents.json"
"""In every folder: size and CRC-32 of each of its files."""

# Waiting for one file takes milliseconds; for thousands of them the disk is written out at once.
_MOST_SYNCS = 64


@contextlib.contextmanager
def folder_made_whole(target: Path) -> Iterator[Path]:
    """Fill a temporary folder beside ``target``, then rename it to ``target``.

    All of it is on the disk before it has its name. If the block raises, the temporary folder is
    removed. If another process finished ``target`` first, that one stays: both were made from the
    same settings.

    Args:
        target: The folder to make; its parents are made too.

    Yields:
        The temporary folder to write into.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "made"
        >>> with folder_made_whole(target) as folder:
        ...     _ = (folder / "a.txt").write_text("whole")
        >>> check_folder(target, "a.txt")
        >>> (target / "a.txt").read_text()
        'whole'
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        _seal(temporary)
        # mkdtemp makes folders that only their owner may read.
        temporary.chmod(0o755)
        with contextlib.suppress(OSError):
            os.replace(temporary, target)
        if not target.is_dir():
            raise OSError(f"{temporary} could not be renamed to {target}")
        flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder(folder: Path, *read: str) -> None:
    """Raise unless a folder is as `folder_made_whole` has left it.

    Args:
        folder: The folder.
        read: Files whose checksums are compared, too; of the others it is the size alone.

    Raises:
        CorpusError: If a file is missing or has changed; names it, and says what to do.
    """
    remedy = f"remove {folder}, then it is made again"
    try:
        contents = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        entries = {str(name): (int(size), int(crc)) for name, (size, crc) in contents.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CorpusError(f"{folder / CONTENTS} is missing or damaged: {remedy}") from error
    for name, (size, checksum) in entries.items():
        path = folder / name
        held = path.stat().st_size if path.is_file() else None
        if held != size:
            what = "is missing" if held is None else f"has {held} bytes and was written with {size}"
            raise CorpusError(f"{path} {what}: {remedy}")
        if name in read and _checksum(path) != checksum:
            raise CorpusError(f"{path} has changed since it was written: {remedy}")
    if unknown := sorted(set(read) - entries.keys()):
        raise CorpusError(f"{folder} has no {', '.join(unknown)}: {remedy}")


def _seal(folder: Path) -> None:
    """List the files of a folder in it, and see that all of them are on the disk."""
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
