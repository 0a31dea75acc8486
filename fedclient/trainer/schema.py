"""A `Settings` dataclass as a JSON schema, and JSON settings back as an instance."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fedclient.trainer.api import AUTO, Bounds

_TYPES: Mapping[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}


class SettingsError(ValueError):
    """A `Settings` class that cannot be described, or settings that don't fit it; the message names the field."""


def settings_schema(settings: type) -> dict[str, Any]:
    """The JSON schema of a `Settings` class, in the subset of docs/protocol.md.

    Raises:
        SettingsError: not a dataclass, or a field has a type that settings cannot have.
    """
    if not (isinstance(settings, type) and dataclasses.is_dataclass(settings)):
        raise SettingsError("Settings is not a dataclass: write @dataclass(frozen=True) above it")
    hints = typing.get_type_hints(settings, include_extras=True)
    properties, required = {}, []
    for field in dataclasses.fields(settings):
        described = properties[field.name] = _describe(field.name, hints[field.name])
        default = _default(field)
        if default is dataclasses.MISSING:
            required.append(field.name)
        else:
            described["default"] = _to_json(_parse(field.name, hints[field.name], _to_json(default)))
    schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": required} if required else schema


def parse_settings(settings: type, table: Mapping[str, Any]) -> Any:
    """An instance of a `Settings` class from JSON values; an int is accepted for a float, never the reverse.

    Raises:
        SettingsError: a field that is unknown, missing, of another type or out of bounds; or the class refused it.
    """
    hints = typing.get_type_hints(settings, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(settings)}
    if unknown := sorted(table.keys() - fields.keys()):
        raise SettingsError(f"{unknown[0]}: there is no such setting; there are: {', '.join(fields) or 'none'}")
    for name, field in fields.items():
        if name not in table and _default(field) is dataclasses.MISSING:
            raise SettingsError(f"{name}: missing, and it has no default")
    return settings(**{name: _parse(name, hints[name], value) for name, value in table.items()})


def left_open(schema: Mapping[str, Any], table: Mapping[str, Any] | None) -> list[str]:
    """Names of the settings that are "auto", by what a run says or by default; of those that may be, for None."""
    properties: Mapping[str, Mapping[str, Any]] = schema["properties"]
    may = [name for name, known in properties.items() if known.get("auto")]
    return may if table is None else [n for n in may if table.get(n, properties[n].get("default")) == AUTO]


def check_found(
    schema: Mapping[str, Any], names: Sequence[str], given: Mapping[str, float], limits: Mapping[str, Bounds]
) -> dict[str, float]:
    """What `Workload.calibrate` gave for these settings, as numbers of their types.

    Raises:
        SettingsError: one is missing, of another type or beyond its limits.
    """
    found: dict[str, float] = {}
    for name in names:
        if name not in given:
            raise SettingsError(f"{name}: calibrate gave nothing for it")
        kind = int if schema["properties"][name]["type"] == "integer" else float
        found[name] = _bounded(name, limits.get(name, Bounds()), _scalar(name, kind, given[name]))
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _describe(name: str, hint: Any) -> dict[str, Any]:
    if (number := _measured(hint)) is not None:
        return _describe(name, number) | {"auto": True}
    kind, bounds = _split(hint)
    if kind in _TYPES:
        described: dict[str, Any] = {"type": _TYPES[kind]}
        for bound in ("minimum", "maximum"):
            if (value := getattr(bounds, bound)) is not None:
                if kind not in (int, float):
                    raise SettingsError(f"{name}: Bounds are for int and float")
                described[bound] = value
        return described
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        found = {type(choice) for choice in choices}
        if len(found) == 1 and found <= _TYPES.keys():
            return {"type": _TYPES[found.pop()], "enum": list(choices)}
    if (item := _item(kind)) is not None:
        described = _describe(f"{name}[]", item)
        if described["type"] != "array":
            return {"type": "array", "items": described}
    raise SettingsError(
        f"{name}: a setting cannot be {hint}; use int, float, bool, str, Literal[...], a list or tuple of these, "
        f'or a number | Literal["{AUTO}"]'
    )


def _parse(name: str, hint: Any, value: Any) -> Any:
    if (number := _measured(hint)) is not None:
        return AUTO if value == AUTO else _parse(name, number, value)
    kind, bounds = _split(hint)
    if kind in _TYPES:
        return _bounded(name, bounds, _scalar(name, kind, value))
    if typing.get_origin(kind) is Literal:
        for choice in typing.get_args(kind):
            if type(choice) is type(value) and choice == value:
                return choice
        raise SettingsError(f"{name}: {value!r} is not one of {', '.join(map(repr, typing.get_args(kind)))}")
    if not isinstance(value, list):
        raise SettingsError(f"{name}: {value!r} is not a list")
    items = [_parse(f"{name}[{i}]", _item(kind), v) for i, v in enumerate(value)]
    return tuple(items) if typing.get_origin(kind) is tuple else items


def _scalar(name: str, kind: type, value: Any) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise SettingsError(f"{name}: {value!r} is not {'an integer' if kind is int else f'a {_TYPES[kind]}'}")
    return value


def _bounded(name: str, bounds: Bounds, value: Any) -> Any:
    if bounds.minimum is not None and value < bounds.minimum:
        raise SettingsError(f"{name}: {value} is below the minimum {bounds.minimum}")
    if bounds.maximum is not None and value > bounds.maximum:
        raise SettingsError(f"{name}: {value} is above the maximum {bounds.maximum}")
    return value


def _split(hint: Any) -> tuple[Any, Bounds]:
    if typing.get_origin(hint) is not Annotated:
        return hint, Bounds()
    kind, *extras = typing.get_args(hint)
    return kind, next((e for e in extras if isinstance(e, Bounds)), Bounds())


def _measured(hint: Any) -> Any:
    """The number's type of `float | Literal["auto"]`, with its bounds; None for every other hint."""
    kind, bounds = _split(hint)
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return None
    numbers = [part for part in typing.get_args(kind) if part != Literal["auto"]]
    if len(numbers) != 1 or len(typing.get_args(kind)) != 2 or _split(numbers[0])[0] not in (int, float):
        return None
    return numbers[0] if bounds == Bounds() else Annotated[numbers[0], bounds]


def _item(kind: Any) -> Any:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is list and len(arguments) == 1:
        return arguments[0]
    if typing.get_origin(kind) is tuple and len(arguments) == 2 and arguments[1] is ...:
        return arguments[0]
    return None


def _to_json(value: Any) -> Any:
    return [_to_json(v) for v in value] if isinstance(value, list | tuple) else value
