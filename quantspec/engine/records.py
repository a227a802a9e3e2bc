"""Frozen dataclasses to and from JSON values, checked field by field against their annotations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

from quantspec.errors import ModelError


class Record:
    """A dataclass of numbers, strings, tuples, mappings of strings and other records.

    Values are checked as they are read, so that a file from elsewhere ends in one line; a record's own
    ``__post_init__`` raises ``ValueError`` for values that do not go together.
    """

    __slots__ = ()

    def as_dict(self) -> dict[str, Any]:
        """What ``from_dict`` reads; tuples become lists in JSON."""
        assert is_dataclass(self), "a record is a dataclass"
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Any) -> Self:
        """Raises ``ModelError``: a field is missing, unknown, or of another type; the line names it."""
        found = _read(cls, value, cls.__name__)
        assert isinstance(found, cls)
        return found


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        if value is None and NoneType in arguments:
            return None
        choices = [each for each in arguments if each is not NoneType]
        return _read(_fitting(choices, value), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ModelError(f"{where} must be a list")
        if _all_plain(arguments[0], value):  # traces have many thousands of numbers
            return tuple(value)
        return tuple([_read(arguments[0], each, f"{where}[{i}]") for i, each in enumerate(value)])
    if origin is Mapping:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ModelError(f"{where} must be an object")
        return {key: _read(arguments[1], each, f"{where}.{key}") for key, each in value.items()}
    if is_dataclass(kind):
        return _read_record(kind, value, where)
    return _read_plain(kind, value, where)


def _all_plain(kind: Any, values: list[Any] | tuple[Any, ...]) -> bool:
    """Whether all values are of that plain type as they stand."""
    if kind not in (int, float, str, bool) or set(map(type, values)) != {kind}:
        return False
    return kind is not float or all(map(math.isfinite, values))


def _fitting(choices: list[Any], value: Any) -> Any:
    """The type of a union that a plain value is of."""
    return next((each for each in choices if isinstance(each, type) and type(value) is each), choices[0])


def _read_record(kind: Any, value: Any, where: str) -> Any:
    names = [field.name for field in fields(kind)]
    if not isinstance(value, Mapping):
        raise ModelError(f"{where} must be an object")
    wrong = next((f"no {name}" for name in names if name not in value), None)
    wrong = wrong or next((f"an unknown {name!r}" for name in value if name not in names), None)
    if wrong:
        raise ModelError(f"{where} has {wrong}")
    hints = _hints(kind)
    try:
        return kind(**{name: _read(hints[name], value[name], f"{where}.{name}") for name in names})
    except ValueError as error:
        raise ModelError(f"{where}: {error}") from error


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _read_plain(kind: Any, value: Any, where: str) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        words = {float: "a finite number", int: "a whole number", str: "a string", bool: "true or false"}
        raise ModelError(f"{where} must be {words[kind]}, not {value!r:.40}")
    return value
