"""The documents hold: their commands and links exist.

Their Python blocks are executed by the root ``conftest.py``.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from lightning_nna.emulation.operators.catalog import operators
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [ROOT / "Makefile", *PAGES], ids=page_id)
def test_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^(?:\$ )?make ([a-z]+)", text, re.MULTILINE)) <= targets
    modules = set(re.findall(r"python -m (recipes[.\w]*)", text))
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


def test_paths_of_the_makefile_exist() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    paths = re.findall(r"(?<![\w./-])(?:tests|recipes|docs|conf)/[\w./-]+", text)
    assert "tests/emulation" in paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_configurations_exist(page: Path) -> None:
    commands = re.findall(r"^.*-m recipes[.]\w+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    choices = re.findall(r"(?<![\w.])([a-z_]+)=([\w-]+)(?=\s|`|$)", " ".join(commands))
    groups = {path.name for path in (ROOT / "recipes" / "conf").iterdir() if path.is_dir()}
    files = [ROOT / "recipes" / "conf" / group / f"{option}.yaml" for group, option in choices]
    assert [path for path in files if path.parent.name in groups and not path.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_page_on_emulation_has_every_operator_and_its_widths() -> None:
    page = ROOT / "docs/methods/emulation.md"
    written = _hook("operators").on_page_markdown(page.read_text(encoding="utf-8"))
    rows = re.findall(r"^\| `(\w+)` \| ([\d, ]+) \| (\S.*) \| (\S.*) \|$", written, re.MULTILINE)
    expected = {name: ", ".join(map(str, entry.widths)) for name, entry in operators().items()}
    assert {name: widths for name, widths, _, _ in rows} == expected


def test_the_readme_lists_the_functions_of_the_records() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == _hook("operators").with_functions(readme), (
        "run python docs/build_hooks/operators.py"
    )


def test_the_messages_of_the_page_on_troubleshooting_are_those_of_the_code() -> None:
    """Quoted lines and the first cells of tables that are code; an ellipsis stands for a value."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    cells = [row.split(" | ")[0] for table in tables for row in table.splitlines()]
    quotes = re.findall(r"^> (.*)$", page, re.MULTILINE)
    messages = [code for line in cells + quotes for code in re.findall(r"`([^`]+)`", line)]
    parts = {part.strip(" :") for message in messages for part in message.split("…")}
    sources = [path.read_text("utf-8") for path in (ROOT / "lightning_nna").rglob("*.py")]
    constants = "\n".join(
        node.value
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    assert len(messages) > 25
    assert sorted(part for part in parts if part not in constants) == []


def _hook(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/build_hooks/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
