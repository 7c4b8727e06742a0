"""Install a wheel into an empty environment, and run README's first block of code there.

    python -m tests.installed_package dist/lightning_nna-0.1.0-py3-none-any.whl

The environment has what the wheel asks for, in the pinned versions, and none of the extras.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def first_example(readme: str) -> str:
    """Return the first example of the README with the lines that a page hides.

    Args:
        readme: Text of README.md.
    """
    visible = re.search(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    if visible is None:
        raise ValueError("README.md has no block of Python")
    hidden = re.findall(
        r"<!--- invisible-code-block: python\n(.*?)-->", readme[: visible.start()], re.DOTALL
    )
    return "".join([*hidden, visible.group(1)])


def run_in_empty_environment(wheel: Path) -> None:
    """Install a wheel alone and run the example in a folder of its own.

    Args:
        wheel: Path of the wheel.

    Raises:
        subprocess.CalledProcessError: If it cannot be installed, or the example fails.
    """
    example = first_example((ROOT / "README.md").read_text(encoding="utf-8"))
    checks = (
        "import lightning_nna, lightning_nna.callbacks, lightning_nna.testing, sys\n"
        "assert sys.prefix in lightning_nna.__file__, lightning_nna.__file__\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "environment" / "bin" / "python"
        uv = [sys.executable, "-m", "uv"]
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        commands: list[list[str]] = [
            [*uv, "venv", "--quiet", "--python", version, str(python.parents[1])],
            [
                *(*uv, "pip", "install", "--quiet", "--python", str(python)),
                *("-c", str(ROOT / "constraints.txt"), str(wheel.resolve())),
            ],
            [str(python), "-P", "-c", checks + example],
        ]
        for command in commands:
            subprocess.run(command, check=True, cwd=folder)


if __name__ == "__main__":
    run_in_empty_environment(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: installed alone, README's first example runs")
