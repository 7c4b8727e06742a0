"""Show the notebooks under ``docs`` as pages, with the outputs that are stored in them.

A notebook ``a/b.ipynb`` becomes the page ``a/b.md``; the file itself can be downloaded there.
"""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add a page for every notebook (a hook of MkDocs)."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        path = PurePosixPath(file.src_uri)
        content = page_of(json.loads(file.content_string), path.name)
        files.append(File.generated(config, str(path.with_suffix(".md")), content=content))
    return files


def page_of(notebook: dict[str, Any], name: str) -> str:
    """Return a notebook as Markdown: its texts, its code, and what the code printed or drew.

    Example:
        >>> cell = {"cell_type": "code", "source": ["1 + 1"], "outputs": []}
        >>> print(page_of({"cells": [cell]}, "sum.ipynb"))
        ```python
        1 + 1
        ```
        <BLANKLINE>
        [Download this notebook](sum.ipynb)
    """
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source:
            parts.append(f"```python\n{source}\n```")
            parts += [part for each in cell["outputs"] if (part := _output(each))]
    return "\n\n".join([*parts, f"[Download this notebook]({name})"])


def _output(output: dict[str, Any]) -> str:
    """Return one stored output as Markdown: a picture if there is one, else its text."""
    data = output.get("data", {})
    if "image/png" in data:
        encoded = "".join(data["image/png"]).replace("\n", "")
        return f"![Output of the cell above](data:image/png;base64,{encoded})"
    written = output.get("text") or data.get("text/plain") or output.get("traceback") or []
    text = ESCAPES.sub("", "".join(written)).rstrip()
    return f"```text\n{text}\n```" if text else ""
