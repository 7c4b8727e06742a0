"""Read settings in YAML and JSON files; errors have the file, the key and the line."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: str | Path) -> Any:
    r"""Read a YAML file.

    Args:
        path: Path of a text in UTF-8, with or without a byte-order mark.

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
        _validate_keys(path, text)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Args:
        path: Path of a text in UTF-8, with or without a byte-order mark.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON, or has a key twice; names the file, the key and the line.
    """
    text = _text(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            # JSON is YAML, except for tabs; the parser of YAML knows the lines.
            _validate_keys(path, text.replace("\t", " "))
            raise ValueError(f"a key occurs twice among {[key for key, _ in pairs]}")
        return mapping

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error


def _validate_keys(path: str | Path, text: str) -> None:
    """Validate that no mapping has a key twice."""
    nodes = [yaml.compose(text, Loader=yaml.SafeLoader)]
    visited: set[int] = set()
    while nodes:
        node = nodes.pop()
        if id(node) in visited:  # An alias may lead back to the node that holds it.
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        first: dict[Hashable, int] = {}
        for key, value in node.value:
            nodes.append(value)
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            line = key.start_mark.line + 1
            if name in first:
                raise ValueError(
                    f"{path}, line {line}: the key {key.value!r} occurs again, first in line "
                    f"{first[name]}"
                )
            first[name] = line
