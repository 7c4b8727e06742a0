"""Measure how the code reads: ``python -m tests.house [folder …]`` prints figures and offenders."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: First words of a docstring that describe a function instead of saying what it does.
QUESTIONS = frozenset({"What", "Which", "Whether", "Where", "How"})
#: Names of variables that say nothing of what they hold.
VAGUE = frozenset(
    """
    found held kept chosen whole place places at mine theirs given made seen told gone taken
    """.split()
)
#: Where arithmetic is dense enough to need comments with worked examples.
ARITHMETIC = ("lightning_nna/emulation/arithmetic",)
#: Public functions here state shapes.
SHAPED = ("lightning_nna/emulation",)


@dataclass
class Figures:
    """Counts over some files, and the places that count against them."""

    docstrings: int = 0
    questions: list[str] = field(default_factory=list)
    assignments: int = 0
    vague: list[str] = field(default_factory=list)
    tensor_functions: int = 0
    shapeless: list[str] = field(default_factory=list)
    arithmetic_lines: int = 0
    comment_lines: int = 0

    @property
    def question_share(self) -> float:
        """Share of docstrings whose first line begins with a question word."""
        return len(self.questions) / max(self.docstrings, 1)

    @property
    def vague_share(self) -> float:
        """Share of assigned names that say nothing of what they hold."""
        return len(self.vague) / max(self.assignments, 1)

    @property
    def shape_share(self) -> float:
        """Share of public functions on tensors that state a shape."""
        return 1 - len(self.shapeless) / max(self.tensor_functions, 1)

    @property
    def comment_share(self) -> float:
        """Share of lines of arithmetic that are comments."""
        return self.comment_lines / max(self.arithmetic_lines, 1)


def measure(*folders: str) -> Figures:
    """Measure all Python files below folders, by their paths from the checkout's root."""
    figures = Figures()
    for folder in folders or ("lightning_nna", "recipes"):
        target = ROOT / folder
        for path in [target] if target.is_file() else sorted(target.rglob("*.py")):
            measure_text(figures, str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    return figures


def measure_text(figures: Figures, name: str, text: str) -> None:
    """Add the counts of one file to figures.

    Args:
        figures: Counts so far.
        name: Path of the file from the checkout's root.
        text: Its source.
    """
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
            docstring = ast.get_docstring(node)
            line = getattr(node, "lineno", 1)
            if docstring:
                figures.docstrings += 1
                if docstring.split(maxsplit=1)[0].strip("`,.:") in QUESTIONS:
                    figures.questions.append(f"{name}:{line}: {docstring.splitlines()[0]}")
        for target in _assigned(node):
            figures.assignments += 1
            if target.lstrip("_") in VAGUE:
                figures.vague.append(f"{name}:{getattr(node, 'lineno', 1)}: {target}")
    if name.startswith(SHAPED):
        for owner, function in _public_functions(tree):
            _measure_shapes(figures, f"{name}:{function.lineno}: {owner}{function.name}", function)
    if name.startswith(ARITHMETIC):
        figures.arithmetic_lines += sum(bool(line.strip()) for line in text.splitlines())
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        figures.comment_lines += sum(token.type == tokenize.COMMENT for token in tokens)


_LOOPS = (ast.AnnAssign, ast.AugAssign, ast.For, ast.comprehension, ast.NamedExpr)


def _assigned(node: ast.AST) -> Iterator[str]:
    """Names that a statement, a loop or a ``with`` block assigns."""
    targets: list[ast.expr | None] = []
    if isinstance(node, ast.Assign):
        targets = list(node.targets)
    elif isinstance(node, _LOOPS):
        targets = [node.target]
    elif isinstance(node, ast.withitem):
        targets = [node.optional_vars]
    for target in targets:
        if target is not None:
            for each in ast.walk(target):
                if isinstance(each, ast.Name):
                    yield each.id
                elif isinstance(each, ast.Attribute):
                    yield each.attr


def _public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield "", node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    yield f"{node.name}.", method


def _measure_shapes(figures: Figures, where: str, function: ast.FunctionDef) -> None:
    """Count a function that takes or returns tensors; its annotations or docstring state shapes."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    annotations = [ast.unparse(each.annotation) for each in every if each.annotation]
    annotations += [ast.unparse(function.returns)] if function.returns else []
    tensors = [text for text in annotations if "Tensor" in text]
    if not tensors:
        return
    figures.tensor_functions += 1
    stated = any("Tensor," in text for text in tensors)
    docstring = ast.get_docstring(function) or ""
    if not (stated or "shape" in docstring.lower() or "``(" in docstring):
        figures.shapeless.append(where)


def main() -> None:
    """Print the figures of some folders, and what counts against them."""
    figures = measure(*sys.argv[1:])
    for offender in (*figures.questions, *figures.vague, *figures.shapeless):
        print(offender)
    print(f"docstrings that begin with a question word: {figures.question_share:.1%}")
    print(f"vague names among assignments: {figures.vague_share:.2%}")
    print(f"public functions of tensors with shapes: {figures.shape_share:.0%}")
    print(f"comment lines in arithmetic: {figures.comment_share:.1%}")


if __name__ == "__main__":
    main()
