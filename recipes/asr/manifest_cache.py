"""Files of the cache that make a large corpus start in seconds.

Headers of audio files are kept by path with the size and the time of change of each file; a file
that has changed is read again. Both that and the utterances of a manifest are JSON with a checksum,
written whole: a reader, also one in another process, gets the old file or the new one.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_nna.files import whole_file
from recipes.asr.audio import CorpusError, Header

# Increased with every change of what the files hold, so that an old one is not read.
_FORMAT = 1


def digest(*parts: object) -> str:
    """Hash settings and stamps to the name of a file.

    Args:
        parts: What the file depends on, as JSON takes it; other objects by their texts.
    """
    text = json.dumps([_FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def write_checked(path: Path, content: Any) -> None:
    """Write JSON below its checksum, completely or not at all.

    Args:
        path: Path of the file; its folder is created if it is missing.
        content: Anything that JSON takes.
    """
    data = json.dumps(content, separators=(",", ":")).encode()
    with whole_file(path) as unfinished:
        unfinished.write_bytes(f"{zlib.crc32(data):08x}\n".encode() + data)


def read_checked(path: Path) -> Any:
    """Read what `write_checked` has written.

    Raises:
        CorpusError: If the file has changed since; the message names it and the remedy.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.json"
        >>> write_checked(path, {"a": [1]})
        >>> read_checked(path)
        {'a': [1]}
    """
    checksum, _, data = path.read_bytes().partition(b"\n")
    if checksum != f"{zlib.crc32(data):08x}".encode():
        raise CorpusError(
            f"{path} has changed since it was written: remove it, then it is created again"
        )
    return json.loads(data)


@contextmanager
def lasting_objects() -> Iterator[None]:
    """Pause the search for cyclic garbage while a block makes many objects that stay.

    Of 100,000 utterances it would take half of the time: the more objects stay, the more are
    searched.

    Example:
        >>> import gc
        >>> with lasting_objects():
        ...     gc.isenabled()
        False
        >>> gc.isenabled()
        True
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def known_headers(cache_dir: Path, *source: object) -> Iterator[dict[str, Header]]:
    """Yield the headers that were read before, by path; keep those that the block leaves there.

    They are kept also if the block fails: an hour of reading may end with one wrong file too many.

    Args:
        cache_dir: Folder of the cache.
        source: Names of the corpus and its part, and its folder.

    Raises:
        CorpusError: If the file of the cache is damaged.
    """
    key = digest(*(os.path.abspath(one) if isinstance(one, Path) else one for one in source))
    path = cache_dir / "headers" / f"{key}.json"
    with lasting_objects():
        before = read_checked(path) if path.is_file() else {}
        headers = {name: Header(*fields) for name, fields in before.items()}
    known = dict(headers)
    try:
        yield headers
    finally:
        if headers != known:
            write_checked(path, headers)
