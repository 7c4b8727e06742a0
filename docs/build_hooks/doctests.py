r"""Turn the doctests of docstrings into code blocks while the site is built.

In Markdown ``>>>`` begins three nested quotes, so that an example would lose its lines.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

PROMPT = re.compile(r"^( *)>>> ")
FENCE = re.compile(r"^ *(```|~~~)")


class DocstringExamples(griffe.Extension):
    """Encloses the doctests of docstrings in fences."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring (a hook of Griffe)."""
        if obj.docstring is not None:
            obj.docstring.value = with_fences(obj.docstring.value)


def with_fences(docstring: str) -> str:
    r"""Return a docstring with every doctest in a fence of its own.

    A doctest begins with a prompt and ends before a blank line or a smaller indent. Doctests with
    nothing but blank lines between them share a fence; what a fence encloses already stays.

    Example:
        >>> with_fences("Add.\n\n>>> 1 + 1\n2").splitlines()
        ['Add.', '', '```pycon', '>>> 1 + 1', '2', '```']
    """
    lines, written, index, fenced = docstring.splitlines(), [], 0, False
    while index < len(lines):
        prompt = PROMPT.match(lines[index])
        if FENCE.match(lines[index]):
            fenced = not fenced
        if prompt is None or fenced:
            written.append(lines[index])
            index += 1
            continue
        end = _end_of_doctests(lines, index, prompt[1])
        # After a title, which has a smaller indent, a blank line would end the section.
        if written and written[-1].startswith(prompt[1]) and written[-1].strip():
            written.append("")
        written += [f"{prompt[1]}```pycon", *lines[index:end], f"{prompt[1]}```"]
        if end < len(lines) and lines[end].strip():
            written.append("")
        index = end
    return "\n".join(written)


def _end_of_doctests(lines: list[str], start: int, indent: str) -> int:
    """Return the index after the last line of the doctests that begin at ``start``."""
    end = start
    for index, line in enumerate(lines[start:], start):
        if not line.strip():
            continue
        after_blank_lines = index > end
        is_prompt = line.startswith(f"{indent}>>> ")
        if not line.startswith(indent) or (after_blank_lines and not is_prompt):
            break
        end = index + 1
    return end
