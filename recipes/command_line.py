"""The command ``lightning-nna``: the recipes of an installed package.

    lightning-nna train experiment=commands compression=nna8
    lightning-nna train --config-dir my_conf experiment=mine
    lightning-nna evaluate --help

A checkout runs the same programs by their modules, as ``python -m recipes.train``.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.nearest import did_you_mean

#: Modules by command, and what each does.
COMMANDS = {
    "train": ("recipes.train", "train a module and test it"),
    "evaluate": ("recipes.evaluate", "test a checkpoint, in float or emulated"),
    "deploy": ("recipes.deploy", "export a checkpoint, test its programs, estimate their cost"),
    "allocate": ("recipes.allocate", "choose the bits of every weight"),
    "drift-replay": ("recipes.drift_replay", "score a stored sequence with the drift detector"),
    "sweep-table": ("recipes.sweep_table", "compare the runs of a sweep"),
    "demo": ("recipes.demo", "train, emulate and deploy on synthetic speech"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe that the first argument names, with the arguments after it.

    Args:
        arguments: Arguments of the command; None for those of the process.

    Raises:
        SystemExit: With status 2 if there is no such command.
    """
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if name in ("", "-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        raise SystemExit(_refusal(f"there is no command {name!r}{hint}"))
    module, _ = COMMANDS[name]
    sys.argv = [module, *rest[:-1]]
    # As ``python -m`` does: modules of the user's are found in the present folder, and so is the
    # module of the command, by Hydra and by the processes that Lightning starts.
    sys.path.insert(0, str(Path.cwd()))
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def usage() -> str:
    """Describe the command and what it takes."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: lightning-nna COMMAND [key=value ...] [--config-dir FOLDER] [--help]",
            "",
            *(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()),
            "",
            "lightning-nna COMMAND --help lists the settings of a command.",
        ]
    )


def _refusal(message: str) -> int:
    print(f"lightning-nna: {message}\n\n{usage()}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
