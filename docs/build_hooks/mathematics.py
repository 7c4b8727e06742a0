r"""Set formulas as MathML while the site is built, so that pages need no script from elsewhere.

Markdown writes formulas as ``\(..\)`` and ``$$..$$``; docstrings, which a terminal shows too,
in the reStructuredText manner: ``:math:`..``` and ``.. math::``. Both end up here.
"""

from __future__ import annotations

import html
import re
from inspect import cleandoc
from typing import Any

import griffe
from latex2mathml.converter import convert

SPAN = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
ROLE = re.compile(r":math:`([^`]+)`")
DIRECTIVE = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*|\s*(?=\n\1 +)))*)", re.MULTILINE)
REFERENCE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")


def on_page_content(content: str, **_: Any) -> str:
    """Replace every formula of a page (a hook of MkDocs)."""
    return SPAN.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    formula = html.unescape(match[2]).strip()
    if match[1] == "span":
        return str(convert(formula, display="inline"))
    if "&" in formula and r"\begin" not in formula:
        # Sphinx aligns a directive at its ampersands without an environment.
        formula = rf"\begin{{align*}}{formula}\end{{align*}}"
    # A formula that is wider than a page scrolls in its box, which a keyboard can reach.
    return f'<div class="formula" tabindex="0">{convert(formula, display="block")}</div>'


class DocstringFormulas(griffe.Extension):
    """Rewrites the formulas and references of docstrings in the Markdown manner."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring (a hook of Griffe)."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(docstring: str) -> str:
    r"""Return a docstring with its formulas and references written as Markdown.

    Example:
        >>> to_markdown("The step :math:`s > 0` of :class:`Grid`.")
        'The step \\(s > 0\\) of `Grid`.'
    """
    text = DIRECTIVE.sub(lambda match: f"{match[1]}$$\n{_body(match)}\n{match[1]}$$", docstring)
    text = ROLE.sub(lambda match: rf"\({match[1]}\)", text)
    return REFERENCE.sub(r"`\1`", text)


def _body(match: re.Match[str]) -> str:
    return "\n".join(match[1] + line for line in cleandoc(match[2]).splitlines())
