"""Run a recipe as a program: what its user gets wrong ends in one short message and status 1.

A check of ours, a setting that does not exist, or a choice that no group has is the user's to
correct, and says how. A fault of the program keeps its traceback. ``HYDRA_FULL_ERROR=1`` prints the
traceback of everything.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from hydra.utils import get_object
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError

import recipes.debug
import recipes.run_name  # noqa: F401  # Both register the resolvers of folders.
from recipes.nearest import did_you_mean
from recipes.notices import fewer_notices
from recipes.parent import COMMAND, command_line, end_with
from recipes.sigterm import STATUS, report_stop

CONF = Path(__file__).resolve().parent / "conf"

_PACKAGES = ("recipes", "lightning_nna", "__main__")
_CHECKS = (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError)
_FULL_ERROR = "HYDRA_FULL_ERROR"
_STARTED_BY = "LIGHTNING_NNA_PROGRAM"
"""Variable with the process that reports errors; processes that a sweep starts inherit it."""

Result = TypeVar("Result")


class RefusedError(Exception):
    """A run that cannot be done as asked; its text is for the user, and says what to change."""


def as_program(name: str) -> Callable[[Callable[[DictConfig], Result]], Callable[[], None]]:
    """Make a function of a composed configuration a program, as ``hydra.main`` does.

    Args:
        name: Name of the recipe and of its configuration in ``recipes/conf``.

    Returns:
        A decorator. The program ends with status 1 and one message where its user was wrong; see
        :func:`explanation`.
    """

    def decorate(task: Callable[[DictConfig], Result]) -> Callable[[], None]:
        @functools.wraps(task)
        def job(config: DictConfig) -> Result:
            _end_with_starter()  # A process of a sweep.
            with _without_full_errors(), fewer_notices():
                try:
                    with _folder_of_its_own(config, name):
                        return task(config)
                except SIGTERMException as stop:
                    # Lightning's own ends the process with status 0, as if the run were finished.
                    report_stop(name)
                    raise SystemExit(STATUS) from stop
                except Exception as error:
                    if _is_full():
                        raise
                    if (text := explanation(error, name)) is not None:
                        raise RefusedError(_of_run(config, text)) from error
                    if os.environ.get(_STARTED_BY, str(os.getpid())) != str(os.getpid()):
                        # What another process raises arrives without its traceback.
                        error.add_note("".join(traceback.format_exception(error)))
                    raise

        program = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)

        @functools.wraps(task)
        def main() -> None:
            _end_with_starter()  # A further process of one run.
            if _is_full():
                program()
                return
            with _full_errors(), short_errors(name):
                program()

        return main

    return decorate


@contextmanager
def short_errors(name: str) -> Iterator[None]:
    """End the process with status 1 and one message where the block raises what its user can fix.

    Args:
        name: Name of the recipe, such as ``"train"``.

    Raises:
        SystemExit: In place of an error that :func:`explanation` explains. Others are raised as
            they are, and so is everything with ``HYDRA_FULL_ERROR=1``.
    """
    try:
        yield
    except Exception as error:
        text = None if _is_full() else explanation(error, name)
        if text is None:
            raise
        print(f"recipes.{name}: {text}", file=sys.stderr)
        print(f"{_FULL_ERROR}=1 in the environment shows where this was raised.", file=sys.stderr)
        raise SystemExit(1) from error


def explanation(error: BaseException, name: str) -> str | None:
    """Return what to tell a user who was wrong; None if the program was.

    A user was wrong where the configuration cannot be composed, and where a ``raise`` of this
    project ended the run. An error of a library below is a fault of the program.

    Args:
        error: Error that ended a recipe.
        name: Name of the recipe.
    """
    if isinstance(error, RefusedError):
        return str(error)
    if isinstance(error, MissingConfigException):
        return _missing_choice(error)
    if isinstance(error, InstantiationException):
        return _not_built(error)
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override}: {error.message}{_quotes(error.override)}"
    if isinstance(error, ConfigCompositionException):
        return _not_composed(error, name)
    user_errors = (HydraException, GrammarParseError, InterpolationResolutionError)
    if isinstance(error, user_errors) or _is_check(error) or _is_of_trainer(error):
        return str(error).strip()
    return _unwritable(error)


def known_keys(name: str, overrides: Sequence[str] = ()) -> list[str]:
    """List the settings and groups that a command may set.

    Args:
        name: Name of a configuration.
        overrides: Choices of the command; left out if they do not compose.
    """
    return _keys(_composable(name, overrides))


def _composable(name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose a configuration, without the choices of a command if they do not compose."""
    try:
        return _composed(name, overrides)
    except HydraException:
        return _composed(name, [])


def _keys(config: DictConfig) -> list[str]:
    plain = OmegaConf.to_container(config, resolve=False)
    groups = (path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
    return sorted({*_paths(plain), *groups})


def composed(name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration of another recipe, within a program or without one.

    Args:
        name: Name of the configuration, such as ``"deploy"``.
        overrides: Overrides, as on the command line.
    """
    if GlobalHydra.instance().is_initialized():  # With the folders of the program's user.
        config = compose(name, overrides=list(overrides))
    else:
        config = _composed(name, overrides)
    OmegaConf.set_struct(config, False)
    return config


def _composed(name: str, overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def _paths(node: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted keys of a tree of settings, those of groups, too."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            inner = f"{path}.{key}" if path else str(key)
            yield inner
            yield from _paths(value, inner)


def _not_composed(error: ConfigCompositionException, name: str) -> str:
    """Explain an override of a setting that does not exist."""
    fixed, swept = _overrides(sys.argv[1:])
    if "multirun" in str(error) and swept:
        # Hydra looks for the mode that sweep=... sets, and does not tell what keeps it from that.
        try:
            _composed(name, fixed)
        except ConfigCompositionException as cause:
            return explanation(cause, name) or str(cause)
    missing = re.match(r"Could not (override|delete)[^']*'([^']+)'", str(error))
    if missing is None:
        return str(error)
    key = missing[2].split("@")[0]
    groups = [one for one in fixed if re.match(r"[a-z]+=\w+$", one) and key not in one]
    hint = f"; recipes.{name} --help lists them"
    with suppress(Exception):
        config = _composable(name, groups)
        hint = _taken(key, config) or did_you_mean(key, _keys(config)) or hint
    if swept and "." in key:
        hint += f" (a setting of a group that is swept: ++{key}=...)"
    return f"there is no setting {key}{hint}"


def _taken(key: str, config: DictConfig) -> str:
    """Say how to add a setting that its class takes and no file gives; empty if it takes none."""
    node, _, argument = key.rpartition(".")
    target = OmegaConf.select(config, f"{node}._target_") if node else None
    if target is None:
        return ""
    maker = get_object(target)
    # A class may hand settings on to those that it inherits from.
    calls = [maker]
    if isinstance(maker, type):
        calls = [vars(each)["__init__"] for each in maker.__mro__ if "__init__" in vars(each)]
    takes = any(argument in inspect.signature(call).parameters for call in calls)
    owner = str(target).rpartition(".")[2]
    return f"; {owner} takes it, and it is added with a plus: +{key}=..." if takes else ""


def _quotes(override: str) -> str:
    """Suggest quotes for a path with ``=`` or ``,``, as folders of sweeps have them."""
    key, _, value = override.partition("=")
    if not re.search(r"[=,]", value) or re.search(r"['\"\[{(]", value):
        return ""
    return f"; a value with = or , needs quotes: \"{key}='{value}'\""


def _overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide the overrides of a command into those of all of its runs, and those that are swept."""
    parser = OverridesParser.create()
    fixed: list[str] = []
    swept: list[str] = []
    for argument in arguments:
        with suppress(HydraException):
            (override,) = parser.parse_overrides([argument])
            if not argument.startswith("-"):
                (swept if override.is_sweep_override() else fixed).append(argument)
    return fixed, swept


def _missing_choice(error: MissingConfigException) -> str:
    """Explain a choice that a group does not have."""
    if not error.missing_cfg_file or not error.options:
        return str(error)
    group, _, choice = error.missing_cfg_file.rpartition("/")
    hint = did_you_mean(choice, error.options)
    return f"there is no {group}={choice}{hint or ';'} {group} has {', '.join(error.options)}"


def _not_built(error: InstantiationException) -> str | None:
    """Explain settings that what they build does not take; None if building them is at fault."""
    cause = error.__cause__
    if cause is None:
        return str(error)
    match = re.search(r"^full_key: (\S+)", str(error), re.MULTILINE)
    key = "" if match is None else match[1]
    # What a Trainer and a logger are given is all in the settings.
    is_of_library = key.split(".")[0] in ("trainer", "logger") and isinstance(cause, _CHECKS)
    is_of_settings = is_of_library or "unexpected keyword argument" in str(cause)
    if _is_check(cause) or _is_of_trainer(cause) or is_of_settings:
        return f"{key}: {cause}" if key else str(cause)
    return None


def _unwritable(error: BaseException) -> str | None:
    """Explain that a folder or a file cannot be written; None if the error is another one."""
    cause: BaseException | None = error
    if str(error).startswith("Unable to configure handler"):
        cause = error.__cause__  # Of the log file of a run.
    if not (isinstance(cause, OSError) and cause.filename):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = {_module_of(frame) for frame in frames}
    has_begun = any(frame.f_code.co_name == "job" for frame in frames)
    if "hydra.core.utils" in modules and not has_begun:
        return (
            f"cannot write into the folder of the run: {cause.filename}: {cause.strerror}; choose "
            "another one, hydra.run.dir=<folder>"
        )
    if "lightning_nna.files" in modules:
        return f"cannot write {cause.filename}: {cause.strerror}"
    return None


def _is_check(error: BaseException) -> bool:
    """Tell whether a ``raise`` of this project raised an error."""
    is_own = type(error).__module__.split(".")[0] in _PACKAGES
    return (is_own or isinstance(error, _CHECKS)) and _raised_in(error).split(".")[0] in _PACKAGES


def _raised_in(error: BaseException) -> str:
    """Return the module with the statement that raised an error; none if no statement did."""
    if error.__traceback__ is None:
        return ""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    is_raised = linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
    return _module_of(frame) if is_raised else ""


def _module_of(frame: FrameType) -> str:
    """Return the name of the module that a frame runs; also of the one that ``-m`` started."""
    spec = frame.f_globals.get("__spec__")
    return str(getattr(spec, "name", None) or frame.f_globals.get("__name__", ""))


def _is_of_trainer(error: BaseException) -> bool:
    """Tell whether Lightning complains about the arguments of its trainer or of a callback."""
    if type(error).__name__ == "MisconfigurationException":
        return True
    of_loops = _raised_in(error).startswith("lightning.pytorch.loops.")
    return of_loops and isinstance(error, (ValueError, TypeError))


def _of_run(config: DictConfig, text: str) -> str:
    """Name the run of a sweep that a message is about."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return f"{Path(config.run_dir).name}: {text}"
    return text


def _is_full() -> bool:
    """Tell whether the user wants tracebacks."""
    return os.environ.get(_FULL_ERROR) == "1" and _STARTED_BY not in os.environ


@contextmanager
def _folder_of_its_own(config: DictConfig, name: str) -> Iterator[None]:
    """Refuse a second recipe in a folder; training does so itself, after looking for results."""
    if name == "train":
        yield
        return
    from recipes.run_folder import sole_run

    if name in ("evaluate", "deploy") and (Path(config.run_dir) / "config.yaml").exists():
        raise ValueError(
            f"{config.run_dir} is the folder of a run of training, whose summary.json would be "
            "replaced: choose another hydra.run.dir"
        )
    with sole_run(Path(config.run_dir)):
        yield


@functools.cache
def _end_with_starter() -> None:
    """End with the program that has started this process on this machine, if one has."""
    if os.environ.get(_STARTED_BY) == str(os.getppid()):
        end_with(os.getppid())


@contextmanager
def _full_errors() -> Iterator[None]:
    """Let Hydra raise errors in place of printing them, so that this module prints them."""
    values = {_FULL_ERROR: "1", _STARTED_BY: str(os.getpid()), COMMAND: command_line()}
    os.environ.update(values)
    try:
        yield
    finally:
        for variable in values:
            os.environ.pop(variable, None)


@contextmanager
def _without_full_errors() -> Iterator[None]:
    """Hide from a run, and from the processes that it starts, what :func:`_full_errors` sets."""
    started_by = os.environ.get(_STARTED_BY)
    if started_by is not None:
        os.environ.pop(_FULL_ERROR, None)
    try:
        yield
    finally:
        if started_by is not None:
            os.environ[_FULL_ERROR] = "1"
