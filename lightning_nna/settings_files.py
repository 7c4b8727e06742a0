"""Settings in YAML and JSON files: what is wrong with one is said with the file, key and line."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: str | Path) -> Any:
    r"""Read a YAML file.

    Args:
        path: A text in UTF-8, with or without a byte-order mark.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML, or has a key twice; names the file, the key and the line.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "spec.yaml"
        ...     _ = path.write_text("bits: 8\nbits: 4\n")
        ...     try:
        ...         read_yaml(path)
        ...     except ValueError as error:
        ...         print(str(error).removeprefix(folder))
        /spec.yaml, line 2: the key 'bits' occurs again, first in line 1
    """
    text = _text(path)
    try:
        _refuse_duplicates(path, text)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Args:
        path: A text in UTF-8, with or without a byte-order mark.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON, or has a key twice; names the file, the key and the line.
    """
    text = _text(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            # JSON is YAML, but for tabs; the parser of YAML knows the lines.
            _refuse_duplicates(path, text.replace("\t", " "))
            raise ValueError(f"a key occurs twice among {[key for key, _ in pairs]}")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error


def _refuse_duplicates(path: str | Path, text: str) -> None:
    """Raise if a mapping has a key twice."""
    waiting = [yaml.compose(text, Loader=yaml.SafeLoader)]
    seen: set[int] = set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # An alias may lead back to the node that holds it.
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        first: dict[Hashable, int] = {}
        for key, value in node.value:
            waiting.append(value)
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            line = key.start_mark.line + 1
            if name in first:
                raise ValueError(
                    f"{path}, line {line}: the key {key.value!r} occurs again, first in line "
                    f"{first[name]}"
                )
            first[name] = line
