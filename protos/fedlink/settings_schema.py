"""What a workload's settings may be: a closed subset of JSON Schema, and the check against it.

The trainer describes its settings, the site narrows them by its limits, the server and the
daemon check every run's settings. The subset (docs/protocol.md, "Settings"):

    {"type": "object", "additionalProperties": false, "required": [NAME, ...],
     "properties": {NAME: {"type": "integer" | "number" | "boolean" | "string" | "array",
                           "description": TEXT, "default": VALUE, "enum": [VALUE, ...],
                           "minimum": N, "maximum": N, "auto": BOOLEAN, "items": {...}}}}

`items` belongs to arrays and describes a scalar; `minimum` and `maximum` belong to numbers. Where `auto` is true, a
number may also be given as the text "auto": the site then measures what it should be.
An integer is a JSON number without fraction or exponent, so 4 is one and 4.0 is not; a number may be either.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator

from fedlink.config import Config, explain
from fedlink.errors import FedlinkError, Reason
from fedlink.run_file import MAX_JSON_BYTES

MAX_SETTINGS = 256
"""Settings one workload may have."""
MAX_ENUM = 256
"""Values one setting may be chosen from."""

AUTO = "auto"
"""What a run gives for a number that is to be measured."""

_INT64 = 1 << 63
_SETTING_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_TYPES: Mapping[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "string": (str,),
    "array": (list, tuple),
}

Scalar = bool | int | float | str
"""One value of a setting."""
Text = Annotated[str, StringConstraints(max_length=1024)]


class _Described(Config):
    description: Text = ""
    default: Any = None
    """Used when a run doesn't name the setting; absent (not null) if there is none."""
    enum: Annotated[tuple[Scalar, ...], Field(min_length=1, max_length=MAX_ENUM)] | None = None
    minimum: int | float | None = None
    maximum: int | float | None = None


class Item(_Described):
    """What each element of an array setting may be."""

    type: Literal["integer", "number", "boolean", "string"]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_description(self)
        return self


class Property(_Described):
    """What one setting may be."""

    type: Literal["integer", "number", "boolean", "string", "array"]
    items: Item | None = None
    auto: bool = False
    """Whether a run may give `AUTO` for the number."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.type == "array") != (self.items is not None):
            raise ValueError("an array, and nothing else, has items")
        if self.auto and self.type not in ("integer", "number"):
            raise ValueError("only numbers can be measured, and are auto")
        _check_description(self)
        return self


class Schema(Config):
    """What a workload's settings may be."""

    type: Literal["object"]
    properties: Mapping[str, Property] = Field(default_factory=dict, max_length=MAX_SETTINGS)
    required: tuple[str, ...] = Field((), max_length=MAX_SETTINGS)
    additionalProperties: Literal[False]  # noqa: N815 - JSON Schema's own name

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in self.properties:
            if not _SETTING_NAME.fullmatch(name):
                raise ValueError(f"{name[:80]!r} is not the name of a setting")
        for name in self.required:
            if name not in self.properties:
                raise ValueError(f"{name[:80]!r} is required and not described")
        return self

    def to_json(self) -> str:
        """The schema as it travels."""
        return json.dumps(self.model_dump(exclude_unset=True), sort_keys=True, separators=(",", ":"))


def parse_schema(text: str | bytes) -> Schema:
    """Read a schema that a site sent.

    Raises:
        FedlinkError: BAD_REGISTRATION, naming what is not of the subset.
    """
    try:
        return Schema.model_validate(_load(text))
    except ValidationError as e:
        raise FedlinkError(Reason.BAD_REGISTRATION, f"settings schema: {explain(e)}") from None
    except ValueError as e:
        raise FedlinkError(Reason.BAD_REGISTRATION, f"settings schema: {e}") from None


def parse_settings(text: str | bytes) -> dict[str, Any]:
    """Read settings that travelled as JSON; no text at all is no settings.

    Raises:
        FedlinkError: BAD_RUN: over 64 KiB, not JSON, or not an object.
    """
    try:
        table = _load(text) if text else {}
    except ValueError as e:
        raise FedlinkError(Reason.BAD_RUN, f"settings: {e}") from None
    if not isinstance(table, dict):
        raise FedlinkError(Reason.BAD_RUN, "settings are not a JSON object")
    return table


def narrow(schema: Schema, limits: Mapping[str, tuple[float | None, float | None]]) -> Schema:
    """The schema with a site's own bounds, which can only make it tighter.

    A setting whose default lies outside the bounds becomes required: a run must choose, nothing is chosen silently.

    Args:
        schema: what the trainer accepts.
        limits: least and greatest value of numeric settings, by name.

    Raises:
        FedlinkError: BAD_CONFIG: a limit on a setting that is not there or is not a number, or that nothing satisfies.
    """
    properties, required = dict(schema.properties), list(schema.required)
    for name, (low, high) in limits.items():
        known = properties.get(name)
        if known is None or known.type not in ("integer", "number"):
            what = "has no such setting" if known is None else "has it, but it is not a number"
            raise FedlinkError(Reason.BAD_CONFIG, f"limits.{name}: the trainer {what}; remove the limit")
        narrowed = properties[name] = _narrow_property(name, known, low, high)
        if "default" in known.model_fields_set - narrowed.model_fields_set and name not in required:
            required.append(name)
    return schema.model_copy(update={"properties": properties, "required": tuple(required)})


def check_settings(schema: Schema, settings: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with a run's settings, one sentence each; empty if they are fine."""
    wrong = [f"{name[:80]}: the workload has no such setting" for name in settings if name not in schema.properties]
    wrong += [f"{name}: missing, and it has no default" for name in schema.required if name not in settings]
    for name, described in schema.properties.items():
        if name in settings:
            wrong += [f"{name}: {text}" for text in _check_value(described, settings[name])]
    return wrong


def open_settings(schema: Schema, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the numbers that a run leaves to measurement, by what it says or by default, in order."""
    return tuple(
        sorted(n for n, known in schema.properties.items() if known.auto and settings.get(n, known.default) == AUTO)
    )


def _check_value(described: Item | Property, value: Any) -> list[str]:
    if isinstance(described, Property) and value == AUTO and described.type in ("integer", "number"):
        cannot = f'"{AUTO}": the site cannot measure it (its workload or release); give a number'
        return [] if described.auto else [cannot]
    if not _is_a(described.type, value):
        return [f"{_short(value)} is not {_an(described.type)}"]
    if isinstance(described, Property) and described.items is not None:
        return [f"element {i}: {text}" for i, v in enumerate(value) for text in _check_value(described.items, v)][
            :8
        ] or _check_choice(described, value)
    return _check_choice(described, value)


def _check_choice(described: Item | Property, value: Any) -> list[str]:
    if described.enum is not None and value not in described.enum:
        return [f"{_short(value)} is not one of {', '.join(_short(v) for v in described.enum)}"]
    if described.minimum is not None and value < described.minimum:
        return [f"{_short(value)} is below the minimum {described.minimum}"]
    if described.maximum is not None and value > described.maximum:
        return [f"{_short(value)} is above the maximum {described.maximum}"]
    return []


def _is_a(kind: str, value: Any) -> bool:
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    if isinstance(value, int):
        return -_INT64 <= value < _INT64
    return not isinstance(value, float) or math.isfinite(value)


def _check_description(d: Item | Property) -> None:
    bounds = [b for b in (d.minimum, d.maximum) if b is not None]
    if bounds and d.type not in ("integer", "number"):
        raise ValueError("only numbers have a minimum and a maximum")
    if not all(_is_a("number", b) for b in bounds) or bounds != sorted(bounds):
        raise ValueError("minimum and maximum are not finite numbers in this order")
    if d.enum is not None and (d.type == "array" or not all(_is_a(d.type, v) for v in d.enum)):
        raise ValueError("enum does not hold values of the type")
    if "default" in d.model_fields_set and (wrong := _check_value(d, d.default)):
        raise ValueError(f"default: {wrong[0]}")


def _narrow_property(name: str, known: Property, low: float | None, high: float | None) -> Property:
    fields = known.model_dump(exclude_unset=True)
    lows = [b for b in (known.minimum, low) if b is not None]
    highs = [b for b in (known.maximum, high) if b is not None]
    if lows:
        fields["minimum"] = _whole(max(lows))
    if highs:
        fields["maximum"] = _whole(min(highs))
    least, greatest = max(lows, default=-math.inf), min(highs, default=math.inf)
    if fields.get("default", AUTO) != AUTO and not least <= fields["default"] <= greatest:
        del fields["default"]
    return Property.checked(fields, f"limits.{name}")


def _whole(bound: float) -> float:
    return int(bound) if bound == int(bound) else bound


def _an(kind: str) -> str:
    return {"integer": "an integer", "array": "a list"}.get(kind, f"a {kind}")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _load(text: str | bytes) -> Any:
    data = text.encode() if isinstance(text, str) else text
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{len(data)} bytes; the limit is {MAX_JSON_BYTES}")
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not valid JSON: {e}") from None


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")
