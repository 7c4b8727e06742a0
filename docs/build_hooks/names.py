"""List the public names of the reference by purpose, and link names in the text to their entries.

A line ``<!-- names: PATH PATH -->`` of a page becomes a table: a row for each class and function,
with the first line of its docstring. A path of a module stands for its public classes and
functions. In the text of any page, inline code that is a name of the reference becomes a link to
its entry.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import griffe

HERE = Path(__file__).resolve().parent
PAGES = HERE.parent / "reference"
MARK = re.compile(r"^<!-- names: ([\w. ]+) -->$", re.MULTILINE)
ENTRY = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
# Headings, links and blocks of code stay; the last alternative is inline code.
CODE = re.compile(
    r"(<(h[1-6]|a|pre|autoref)\b.*?</\2>)|<code>([\w.]+)(\([^<]*\))?</code>", re.DOTALL
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page by tables (a hook of MkDocs)."""
    return MARK.sub(lambda match: table(match[1].split()), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Link inline code that is a public name to its entry (a hook of MkDocs)."""
    return CODE.sub(_linked, content)


def table(paths: list[str]) -> str:
    """Return a table in Markdown of the classes and functions under some paths.

    Example:
        >>> print(table(["lightning_nna.callbacks.Schedule"]).splitlines()[2].split(" | ")[0])
        | [`Schedule`][lightning_nna.callbacks.Schedule]
    """
    rows = ["| name | purpose |", "|---|---|"]
    for path in paths:
        for identifier, entry in members(path):
            docstring = entry.docstring.value if entry.docstring else ""
            summary = " ".join(docstring.split("\n\n")[0].split())
            rows.append(f"| [`{entry.name}`][{identifier}] | {summary} |")
    return "\n".join(rows)


def members(path: str) -> list[tuple[str, griffe.Object]]:
    """Return what has an entry under a path: the path itself, or what a module has of its own.

    Example:
        >>> [identifier for identifier, _ in members("lightning_nna.drift.detector")]
        ['lightning_nna.drift.detector.DriftReading', 'lightning_nna.drift.detector.DriftDetector']
    """
    root = package()
    entry = root[path.removeprefix(f"{root.path}.")] if path != root.path else root
    if not entry.is_module:
        return [(path, _resolved(entry))]
    of_module = [
        (f"{path}.{name}", _resolved(member))
        for name, member in entry.members.items()
        if (name in entry.exports if entry.exports else not member.is_alias)
    ]
    return [
        (identifier, member)
        for identifier, member in of_module
        if (member.is_class or member.is_function)
        and member.docstring
        and not member.name.startswith("_")
    ]


def identifiers() -> dict[str, str]:
    """Return the entry of every name: full paths, classes, and functions whose name says enough.

    A short name that two entries have is left out, and so is a function with a name of one word,
    like ``run``, unless a package exports it.
    """
    entries: dict[str, set[str]] = {}
    for page in sorted(PAGES.glob("*.md")):
        for path in ENTRY.findall(page.read_text(encoding="utf-8")):
            entries.setdefault(path, set()).add(path)
            for identifier, member in members(path):
                entries.setdefault(identifier, set()).add(identifier)
                entries.setdefault(member.path, set()).add(identifier)
                if member.is_class or "_" in member.name or _is_exported(member.name):
                    entries.setdefault(member.name, set()).add(identifier)
    return {name: min(paths) for name, paths in entries.items() if len(paths) == 1}


@lru_cache
def package() -> griffe.Module:
    """Return the package as Griffe reads it, with the formulas of docstrings as Markdown."""
    extensions = griffe.load_extensions(f"{HERE / 'mathematics.py'}:DocstringFormulas")
    loaded = griffe.load(
        "lightning_nna",
        search_paths=[str(HERE.parents[1])],
        extensions=extensions,
        resolve_aliases=True,
    )
    assert isinstance(loaded, griffe.Module)
    return loaded


@lru_cache
def _entries() -> dict[str, str]:
    return identifiers()


def _is_exported(name: str) -> bool:
    root = package()
    return any(
        name in (module.exports or ()) for module in (root, root["emulation"], root["deploy"])
    )


def _resolved(entry: Any) -> griffe.Object:
    target: griffe.Object = entry.final_target if entry.is_alias else entry
    return target


def _linked(match: re.Match[str]) -> str:
    name, arguments = match[3], match[4] or ""
    if match[1] or name not in _entries():
        return match[0]
    code = f"<code>{name}{arguments}</code>"
    return f'<autoref identifier="{_entries()[name]}" optional>{code}</autoref>'
