"""Check the shapes that jaxtyping annotations state, and nothing else, while tests run.

The root ``conftest.py`` has jaxtyping put :func:`check_shapes` around the functions of the packages
whose annotations state a shape. Around the others it would put as much: most of a call's time where
functions are short, and of an import's. General type checkers would do as well, but they also
refuse annotations that mypy accepts, and what is no shape is mypy's to check.

Most annotations have axes that are names and numbers. :func:`matcher` compares those itself, in a
tenth of jaxtyping's time; jaxtyping checks the others, and words the errors of all.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import jaxtyping
from jaxtyping import AbstractArray, AbstractDtype, install_import_hook, jaxtyped

#: Tells if a value fits an annotation, and enters the sizes of its axes in a mapping.
Matcher = Callable[[Any, dict[str, Any]], bool]
_AXIS = re.compile(r"\.\.\.|\d+|\*?[a-zA-Z]\w*")


def check_packages(packages: Sequence[str]) -> None:
    """Have the shapes of packages checked that are imported from here on."""
    # What jaxtyping's import hook writes before every function.
    jaxtyping.jaxtyped = where_stated
    install_import_hook(packages, "tests.check_shapes")


def where_stated(target: Any = None, *, typechecker: Any) -> Any:
    """``jaxtyping.jaxtyped``, and nothing where no annotation mentions a shape."""
    if target is None:
        return functools.partial(where_stated, typechecker=typechecker)
    return checked(target, typechecker) if mentions_shape(target) else target


def checked(target: Any, typechecker: Any) -> Any:
    """Return a function, a method, a property or a dataclass with its arrays checked."""
    if isinstance(target, property):
        parts = (target.fget, target.fset, target.fdel)
        return property(*(part and checked(part, typechecker) for part in parts))
    if isinstance(target, (classmethod, staticmethod)):
        return type(target)(checked(target.__func__, typechecker))
    if not inspect.isclass(target):
        return _checked_function(target, typechecker)
    if is_dataclass(target) and not hasattr(target.__init__, "checks_shapes"):
        target.__init__ = _checked_function(target.__init__, typechecker)  # type: ignore[misc]
    return target


def _checked_function(function: Callable[..., Any], typechecker: Any) -> Callable[..., Any]:
    signature = _resolved(inspect.signature(function), function.__globals__)
    parameters = list(signature.parameters.values())
    hinted = [each for each in parameters if states_shape(each.annotation)]
    if not hinted and not states_shape(signature.return_annotation):
        return function
    matchers = [matcher(each.annotation) for each in hinted]
    result_fits = matcher(signature.return_annotation)
    is_variadic = any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in hinted)
    if is_variadic or result_fits is None or None in matchers:
        return jaxtyped(function, typechecker=typechecker)
    checks = [
        (each.name, _position(each, parameters), fits)
        for each, fits in zip(hinted, matchers, strict=True)
        if fits is not None
    ]

    @functools.wraps(function)
    def checked_call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        axes: dict[str, Any] = {}
        for name, position, fits in checks:
            if position < len(args):
                value = args[position]
            elif name in kwargs:
                value = kwargs[name]
            else:
                continue
            if not fits(value, axes):
                return jaxtyped(function, typechecker=typechecker)(*args, **kwargs)
        result = function(*args, **kwargs)
        if not result_fits(result, axes):
            # What jaxtyping says of a function that returns the same.
            again = functools.update_wrapper(lambda *_, **__: result, function)
            again.__signature__ = signature  # type: ignore[attr-defined]
            return jaxtyped(again, typechecker=typechecker)(*args, **kwargs)
        return result

    checked_call.checks_shapes = True  # type: ignore[attr-defined]
    return checked_call


def _resolved(signature: inspect.Signature, known: dict[str, Any]) -> inspect.Signature:
    """Return a signature whose annotations are objects, ``Any`` where one cannot be read."""
    parameters = [
        each.replace(annotation=_object(each.annotation, known))
        for each in signature.parameters.values()
    ]
    result = _object(signature.return_annotation, known)
    return signature.replace(parameters=parameters, return_annotation=result)


def _object(annotation: Any, known: dict[str, Any]) -> Any:
    def holder() -> None: ...

    holder.__annotations__ = {"value": annotation}
    try:
        return get_type_hints(holder, known, include_extras=True)["value"]
    except Exception:  # As jaxtyping does.
        return Any


def _position(parameter: inspect.Parameter, parameters: Sequence[inspect.Parameter]) -> int:
    """Return where a parameter is among positional arguments."""
    is_positional = parameter.kind is not parameter.KEYWORD_ONLY
    return parameters.index(parameter) if is_positional else sys.maxsize


def matcher(hint: Any) -> Matcher | None:
    """Return what tells if a value fits an annotation as :func:`fits` does, None if only that can.

    The matcher's second argument has the sizes of axes so far, by name, and gets new ones.
    """
    if not states_shape(hint):
        return lambda value, axes: True
    origin, parts = get_origin(hint), get_args(hint)
    if origin is None:
        return _array_matcher(hint)
    of_parts = [matcher(part) for part in parts if part is not ...]
    known = [each for each in of_parts if each is not None]
    if len(known) < len(of_parts):
        return None
    if origin in (Union, UnionType):
        pairs = zip(parts, known, strict=True)
        arrays = [fits_part for part, fits_part in pairs if states_shape(part)]
        return lambda value, axes: (
            not hasattr(value, "shape") or any(fits_one(value, axes) for fits_one in arrays)
        )
    if origin is tuple and parts[-1:] != (...,):
        return lambda value, axes: (
            len(value) == len(known)
            and all(fits_one(each, axes) for fits_one, each in zip(known, value, strict=True))
        )
    if issubclass(origin, Mapping):
        return lambda value, axes: all(known[1](each, axes) for each in value.values())
    if issubclass(origin, Sequence):
        return lambda value, axes: all(known[0](each, axes) for each in value)
    return lambda value, axes: True


def _array_matcher(hint: Any) -> Matcher | None:
    names = hint.dim_str.split()
    if not all(map(_AXIS.fullmatch, names)):
        return None
    variadic = [k for k, name in enumerate(names) if name.startswith(("*", "."))]
    start = variadic[0] if variadic else len(names)
    single = list(enumerate(names[:start]))
    if variadic:
        single += [(k - len(names), names[k]) for k in range(start + 1, len(names))]
    sizes = [(k, int(name)) for k, name in single if name.isdigit()]
    single = [(k, name) for k, name in single if not name.isdigit()]
    end = start + 1 - len(names)
    any_shape = hint.dtype[hint.array_type, "..."]
    of_type: dict[Any, bool] = {}

    def fits_array(value: Any, axes: dict[str, Any]) -> bool:
        kind = type(value), getattr(value, "dtype", None)
        if kind not in of_type:
            of_type[kind] = isinstance(value, any_shape)
        if not of_type[kind]:
            return False
        shape = value.shape
        if len(shape) < len(names) - 1 if variadic else len(shape) != len(names):
            return False
        new_axes: dict[str, Any] = {}
        for axis, size in sizes:
            if shape[axis] != size:
                return False
        for axis, name in single:
            known = axes.get(name, new_axes.get(name))
            if known is None:
                new_axes[name] = shape[axis]
            elif known != shape[axis]:
                return False
        if variadic and names[start] != "...":
            rest, name = tuple(shape[start : len(shape) + end]), names[start]
            if axes.get(name, rest) != rest:
                return False
            new_axes[name] = rest
        axes.update(new_axes)
        return True

    return fits_array


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
