"""Write files completely or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, so that a reader of ``path`` gets the old file or the new one.

    The new file is on the disk before it takes the name, so that a power cut leaves one of the two.

    Args:
        path: Path of the file; its folder is created if it is missing. If the block fails the file
            is unchanged.

    Raises:
        OSError: If the folder cannot be created, or the file not be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_file(Path(folder) / "a") as unfinished:
        ...         _ = unfinished.write_text("done")
        ...     [file.name for file in Path(folder).iterdir()]
        ['a']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        flush(unfinished)
        unfinished.replace(path)
        _flush_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to write files to, so that ``path`` has all of them or is unchanged.

    Args:
        path: Path of the folder; if there is one it is replaced, and if the block fails it stays.

    Raises:
        OSError: If the folder cannot be created, or a file not be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with whole_folder(Path(parent) / "a") as unfinished:
        ...         _ = (unfinished / "b").write_text("done")
        ...     [file.name for file in (Path(parent) / "a").iterdir()]
        ['b']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    unfinished.mkdir()
    try:
        yield unfinished
        for file in unfinished.rglob("*"):
            if file.is_file():
                flush(file)
        _flush_folder(unfinished)
        if path.exists():
            path.rename(replaced)
        unfinished.rename(path)
        _flush_folder(path.parent)
    finally:
        for leftover in (unfinished, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder.

    Args:
        path: Path of the file or the folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    with suppress(OSError):  # Not every file system can flush a folder, and the files are there.
        flush(path)


def write_whole(path: Path, text: str) -> None:
    """Write a text in UTF-8, completely or not at all.

    Args:
        path: Path of the file.
        text: Contents.
    """
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
