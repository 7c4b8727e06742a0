"""The built site holds: links, pictures, examples, formulas, tables, entries of public names.

What a browser alone can tell is the subject of ``tests/site/walk.mjs``.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PACKAGE = "lightning_nna"
PACKAGES = ("", ".callbacks", ".emulation", ".deploy", ".testing")
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
# What Markdown or reStructuredText would have read as a reference, a role, a directive or code.
MARKUP = re.compile(r"\[[^]\n]+\]\[[^]\n]*\]|:\w+:`|\.\. \w+::|\$\$|`|>>>")


class Page(HTMLParser):
    """A page of the site: its anchors, links and pictures, its text, and what lacks a box."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.pictures: list[tuple[str, str]] = []
        self.loaded: list[str] = []
        self.texts: list[str] = []
        self.quotes = 0
        self.without_box: list[str] = []
        self.ancestors: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.anchors |= {values["id"]} if "id" in values else set()
        self.links += [values["href"]] if tag == "a" and "href" in values else []
        self.pictures += [(values["src"], values.get("alt", ""))] if tag == "img" else []
        self.loaded += [values[name] for name in ("src", "srcset") if name in values]
        if tag == "link" and values.get("rel") in {"stylesheet", "icon", "preconnect", "preload"}:
            self.loaded.append(values["href"])
        if tag == "blockquote" and self.inside("blockquote"):
            self.quotes += 1
        if (tag == "table" and not self.inside(classes="scrolling")) or (
            values.get("display") == "block" and not self.inside(classes="formula")
        ):
            self.without_box.append(self.get_starttag_text() or "")
        if tag not in VOID:
            self.ancestors.append((tag, values.get("class", "")))

    def handle_endtag(self, tag: str) -> None:
        while self.ancestors:
            if self.ancestors.pop()[0] == tag:
                break

    def handle_data(self, data: str) -> None:
        if not any(self.inside(tag) for tag in ("pre", "code", "math", "script", "style")):
            self.texts.append(data)

    def inside(self, tag: str = "", classes: str = "") -> bool:
        return any(
            name == tag or (classes and classes in value.split()) for name, value in self.ancestors
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    paths = sorted(path for path in site.rglob("*.html") if path.name != "404.html")
    return {str(path.relative_to(site)): Page(path.read_text(encoding="utf-8")) for path in paths}


@pytest.fixture(scope="module")
def entries(pages: dict[str, Page]) -> set[str]:
    return {
        anchor
        for page in pages.values()
        for anchor in page.anchors
        if anchor.startswith("lightning_nna.")
    }


def test_marks_of_a_page_are_replaced(site: Path) -> None:
    emulation = (site / "methods/emulation.html").read_text(encoding="utf-8")
    assert "<td><code>log_softmax</code></td>" in emulation
    reference = (site / "reference.html").read_text(encoding="utf-8")
    assert "<!-- names:" not in reference


def test_links_and_their_anchors_lead_somewhere(site: Path, pages: dict[str, Page]) -> None:
    local = [(name, link) for name, page in pages.items() for link in page.links if is_local(link)]
    assert len(local) > 1000
    broken = []
    for name, link in local:
        parts = urlsplit(link)
        target = (site / name).parent / unquote(parts.path) if parts.path else site / name
        relative = os.path.relpath(os.path.normpath(target), site)
        anchor = unquote(parts.fragment)
        lacks_anchor = anchor and relative in pages and anchor not in pages[relative].anchors
        if not target.exists() or lacks_anchor:
            broken.append(f"{name}: {link}")
    assert broken == []


def test_pictures_exist_and_say_what_they_show(site: Path, pages: dict[str, Page]) -> None:
    pictures = [(name, *each) for name, page in pages.items() for each in page.pictures]
    assert len(pictures) >= 12
    assert [(name, path) for name, path, description in pictures if len(description) < 10] == []
    stored = [(name, urlsplit(path).path) for name, path, _ in pictures if is_local(path)]
    assert [each for each in stored if not ((site / each[0]).parent / each[1]).exists()] == []


def test_nothing_is_asked_of_another_host(site: Path, pages: dict[str, Page]) -> None:
    loaded = [(name, path) for name, page in pages.items() for path in page.loaded]
    assert loaded
    assert [each for each in loaded if re.match(r"(https?:)?//", each[1])] == []
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert styles
    assert [each for each in styles if re.search(r"(url\(|@import )['\"]?(https?:)?//", each)] == []


def test_no_markup_is_left_in_the_text(pages: dict[str, Page]) -> None:
    left = [
        (name, match[0])
        for name, page in pages.items()
        for text in page.texts
        for match in MARKUP.finditer(text)
    ]
    assert left == []
    assert [name for name, page in pages.items() if page.quotes] == []


def test_examples_are_blocks_of_code(site: Path) -> None:
    callbacks = (site / "reference/callbacks.html").read_text(encoding="utf-8")
    assert callbacks.count('<details class="example" open>') >= 10
    assert '<span class="gp">&gt;&gt;&gt; </span>' in callbacks


def test_formulas_have_no_leftovers_of_latex(site: Path) -> None:
    pages = {path.name: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert sum("<math " in html for html in pages.values()) > 5
    assert [name for name, html in pages.items() if "<mi>&</mi>" in html] == []
    assert [name for name, html in pages.items() if 'class="arithmatex"' in html] == []


def test_tables_and_formulas_scroll_in_boxes_of_their_own(pages: dict[str, Page]) -> None:
    assert {name: page.without_box for name, page in pages.items() if page.without_box} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_exports_has_an_entry(package: str, entries: set[str]) -> None:
    module = importlib.import_module(f"lightning_nna{package}")
    expected = [getattr(module, name) for name in module.__all__]
    assert expected
    known = objects_of(entries)
    assert [each for each in expected if id(each) not in known] == []


def test_what_a_page_imports_has_an_entry(entries: set[str]) -> None:
    imported = list(imports_of_pages())
    assert len(imported) > 30
    known = objects_of(entries)
    missing = [
        f"{page}: {each}"
        for page, each in imported
        if is_class_or_function(each) and id(each) not in known
    ]
    assert missing == []


def test_private_names_stay_out(entries: set[str]) -> None:
    assert entries
    parts = {entry: entry.split(".") for entry in entries}
    assert [entry for entry, names in parts.items() if any(n.startswith("_") for n in names)] == []


def test_every_entry_is_listed_by_purpose(pages: dict[str, Page], entries: set[str]) -> None:
    listed = {urlsplit(link).fragment for link in pages["reference.html"].links}
    top = {entry for entry in entries if is_class_or_function(located(entry))}
    # What belongs to a class stands with it.
    members = {entry for entry in top if entry.rpartition(".")[0] in top}
    assert top - members - listed == set()


def test_every_page_of_results_is_in_their_index() -> None:
    folder = ROOT / "docs" / "results"
    index = (folder / "index.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\((\w+\.md)\)", index))
    assert links == {path.name for path in folder.glob("*.md")} - {"index.md"}


def test_numbers_of_the_index_of_results_are_those_of_their_pages() -> None:
    folder = ROOT / "docs" / "results"
    text = (folder / "index.md").read_text(encoding="utf-8").partition("## How to read them")[0]
    parts = re.findall(r"^### \[[^]]+\]\((\w+\.md)\)\n(.*?)(?=^##|\Z)", text, re.M | re.S)
    numbers = [
        (page, number)
        for page, part in parts
        for number in re.findall(r"(?<![\w.-])\d(?:[\d,.]*\d)?", re.sub(r"`[^`]*`", "", part))
    ]
    assert len(numbers) > 100
    pages = {page: (folder / page).read_text(encoding="utf-8") for page, _ in parts}
    missing = [
        each
        for each in numbers
        if not re.search(rf"(?<![\d.,]){re.escape(each[1])}(?!\d)", pages[each[0]])
    ]
    assert missing == []


def is_local(link: str) -> bool:
    return not urlsplit(link).scheme and not link.startswith("//")


def is_class_or_function(value: object) -> bool:
    return isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__"))


def objects_of(entries: set[str]) -> set[int]:
    return {id(located(entry)) for entry in entries}


def located(path: str) -> object:
    """Return what has a path; a module comes before a function of its name."""
    names = path.split(".")
    for count in range(len(names), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            value: object = importlib.import_module(".".join(names[:count]))
            for name in names[count:]:
                value = getattr(value, name, None)
            return value
    return None


def imports_of_pages() -> Iterator[tuple[str, object]]:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in re.findall(r"^```python\n(.*?)^```", path.read_text("utf-8"), re.M | re.S):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith(PACKAGE):
                    module = importlib.import_module(str(node.module))
                    for alias in node.names:
                        yield str(path.relative_to(ROOT)), getattr(module, alias.name)
