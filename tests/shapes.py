"""Check the shapes that jaxtyping annotations state, and nothing else, while tests run.

The root ``conftest.py`` has jaxtyping put :func:`check_shapes` around the functions of the packages
whose annotations state a shape. Around the others it would put as much: most of a call's time where
functions are short, and of an import's. General type checkers would do as well, but they also
refuse annotations that mypy accepts, and what is no shape is mypy's to check.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

import jaxtyping
from jaxtyping import AbstractArray, AbstractDtype, install_import_hook, jaxtyped


def check_packages(packages: Sequence[str]) -> None:
    """Have the shapes of packages checked that are imported from here on."""
    # What jaxtyping's import hook writes before every function.
    jaxtyping.jaxtyped = where_stated
    install_import_hook(packages, "tests.check_shapes")


def where_stated(target: Any = None, *, typechecker: Any) -> Any:
    """``jaxtyping.jaxtyped``, and nothing where no annotation mentions a shape."""
    if target is None:
        return functools.partial(where_stated, typechecker=typechecker)
    return jaxtyped(target, typechecker=typechecker) if mentions_shape(target) else target


def mentions_shape(target: Any) -> bool:
    """Say whether an annotation of a function, or of a class's attributes, mentions a shape."""
    if isinstance(target, property):
        return any(mentions_shape(part) for part in (target.fget, target.fset, target.fdel) if part)
    if inspect.isclass(target):
        known = vars(sys.modules[target.__module__])
        annotations = [each for owner in target.__mro__ for each in _own_annotations(owner)]
    else:
        function = inspect.unwrap(getattr(target, "__func__", target))
        known, annotations = function.__globals__, list(function.__annotations__.values())
    return any(_mentions(annotation, known) for annotation in annotations)


def _own_annotations(owner: type) -> list[Any]:
    return list(vars(owner).get("__annotations__", {}).values())


def _mentions(annotation: Any, known: Mapping[str, Any]) -> bool:
    if not isinstance(annotation, str):
        return states_shape(annotation)
    return any(_is_shape(known.get(word)) for word in re.findall(r"\w+", annotation))


def _is_shape(value: Any) -> bool:
    """Whether a name's value is one of jaxtyping's types, or an alias of some."""
    is_type = inspect.isclass(value) and issubclass(value, AbstractDtype)
    return is_type or states_shape(value)


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with its annotated arrays checked at every call.

    jaxtyping hands over the annotations as objects and keeps the axes' names between checks.
    """
    signature = inspect.signature(function)
    hints = {name: each.annotation for name, each in signature.parameters.items()}
    hints = {name: hint for name, hint in hints.items() if states_shape(hint)}
    result_hint = signature.return_annotation
    if not hints and not states_shape(result_hint):
        return function

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, hint in hints.items():
            if name in bound.arguments:
                _require(bound.arguments[name], hint, name)
        result = function(*args, **kwargs)
        _require(result, result_hint, "the result")
        return result

    return checked


def states_shape(hint: Any) -> bool:
    """Say whether an annotation contains one of jaxtyping's arrays."""
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(states_shape(part) for part in get_args(hint))


def fits(value: Any, hint: Any) -> bool:
    """Say whether the arrays in ``value`` have the shapes and dtypes that ``hint`` states."""
    if not states_shape(hint):
        return True
    origin, parts = get_origin(hint), get_args(hint)
    if origin is None:
        return isinstance(value, hint)
    if origin in (Union, UnionType):
        # An array fits a union by one of its arrays; what is no array is mypy's business.
        return not hasattr(value, "shape") or any(
            fits(value, part) for part in parts if states_shape(part)
        )
    if origin is tuple and parts[-1:] != (...,):
        return len(value) == len(parts) and all(map(fits, value, parts))
    if issubclass(origin, Mapping):
        return all(fits(each, parts[1]) for each in value.values())
    if issubclass(origin, Sequence):
        return all(fits(each, parts[0]) for each in value)
    return True


def _require(value: Any, hint: Any, name: str) -> None:
    if not fits(value, hint):
        raise TypeError(f"{name} does not fit {hint}")
