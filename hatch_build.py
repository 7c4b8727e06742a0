"""Write README.md as the description of the package, where relative links lead nowhere.

With the address of the repository (``Repository`` in ``project.urls``) links and images become
absolute. Without one, links are their text, and images are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

#: An image or a link; the target ends at the first parenthesis.
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
_CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


class ReadmeHook(MetadataHookInterface):
    """Set the readme of the project, for Hatchling."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add ``readme`` to the metadata of the project.

        Args:
            metadata: Table ``project`` of ``pyproject.toml``.
        """
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": with_absolute_links(text, repository),
        }


def with_absolute_links(text: str, repository: str | None) -> str:
    """Return Markdown whose links do not depend on where it is read.

    Args:
        text: Markdown with links relative to the root of the repository.
        repository: Address of the repository; None if it has none.

    Example:
        >>> with_absolute_links("[a](docs/a.md#b) [c](https://c.org)", None)
        'a [c](https://c.org)'
        >>> with_absolute_links("![](docs/a.png)", "https://forge.org/x")
        '![](https://forge.org/x/raw/HEAD/docs/a.png)'
    """

    def replaced(link: re.Match[str]) -> str:
        image, label, target = link.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return link.group()
        if repository is None:
            return "" if image else label
        view = "raw" if image else "blob"
        return f"{image}[{label}]({repository.rstrip('/')}/{view}/HEAD/{target})"

    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts += [_LINK.sub(replaced, text[end : code.start()]), code.group()]
        end = code.end()
    return "".join([*parts, _LINK.sub(replaced, text[end:])])
