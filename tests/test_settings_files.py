"""Settings in files: what is wrong with one is said with the file, the key and the line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_nna import NNASpec
from lightning_nna.emulation.spec import resolve_spec
from lightning_nna.settings_files import read_json, read_yaml
from lightning_nna.weights.allocation import BitAllocation
from lightning_nna.weights.selection import BitWidths

Read = Callable[[Path], Any]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_file_reads_as_its_format_says(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "a"
    text = '{"a": [1.5, {"b": null}], "c": {"a": "x\\ty", "b": true}}'
    path.write_text(mark + text, encoding="utf-8")
    assert read_json(path) == json.loads(text)
    assert read_yaml(path) == yaml.safe_load(text)


@pytest.mark.parametrize("read", [read_json, read_yaml])
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"joint": 4,\n "x": 1,\n "joint": 8}', 3),
        ('{"x": [{"y": 1}, {"joint": 4,\n "joint": 8}],\n "y": 1}', 2),
        ('{"joint": {"joint": 1}, "x": {"joint": 1,\n\n "joint": 2}}', 3),
    ],
)
def test_a_key_that_occurs_twice_is_named_with_its_line(
    tmp_path: Path, read: Read, text: str, line: int
) -> None:
    path = tmp_path / "twice"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"twice, line {line}: the key 'joint' occurs again"):
        read(path)


def test_tabs_do_not_hide_a_key(tmp_path: Path) -> None:
    path = tmp_path / "twice"
    path.write_text('{\n\t"joint": 4,\n\t"joint": 8\n}')
    with pytest.raises(ValueError, match="twice, line 3: the key 'joint' occurs again, first in l"):
        read_json(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"weight_bits: [8\n", r"spec\.yaml is not a YAML file: .*"),
        (b"a:\n\t- b\n", r"spec\.yaml is not a YAML file"),
        (b"name: \xff\n", r"spec\.yaml is not a text in UTF-8"),
        (b"weight_bits: 8\nweight_bits: 4\n", r"spec\.yaml, line 2: the key 'weight_bits' occurs"),
        (b"operators: 3\n", r"spec\.yaml: .*int"),
        (b"1: 2\nname: x\n", r"spec\.yaml: "),
    ],
)
def test_a_spec_that_is_wrong_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s){complaint}"):
        NNASpec.from_yaml(path)
    with pytest.raises(ValueError, match=rf"(?s){complaint}"):
        resolve_spec(str(path))


def test_an_alias_that_leads_back_ends(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text("a: &loop\n  b: *loop\n")
    assert read_yaml(path)["a"]["b"]["b"].keys() == {"b"}


def test_bits_by_pattern_name_a_key_that_occurs_twice(tmp_path: Path) -> None:
    path = tmp_path / "bits.json"
    path.write_text('{"overrides": {"*joint*": 4,\n "*joint*": 8}}')
    with pytest.raises(ValueError, match=r"bits\.json, line 2: the key '\*joint\*' occurs again"):
        BitWidths(8, overrides=path)


@pytest.mark.parametrize("text", ["{", "[1]", "{}"])
def test_an_allocation_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bits.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bits\.json (is not a JSON|was not written by)"):
        BitAllocation.load(path)
