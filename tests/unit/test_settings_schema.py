"""The closed subset of JSON Schema for settings."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlink.errors import FedlinkError, Reason
from fedlink.settings_schema import check_settings, narrow, parse_schema, parse_settings

FULL = {
    "type": "object",
    "additionalProperties": False,
    "required": ["must"],
    "properties": {
        "rate": {"type": "number", "default": 0.01, "minimum": 0, "maximum": 1.0},
        "steps": {"type": "integer", "default": 4, "minimum": 1},
        "optimizer": {"type": "string", "enum": ["sgd", "adam"], "default": "sgd", "description": "which"},
        "layers": {"type": "array", "items": {"type": "integer", "minimum": 1}, "default": [8, 4]},
        "nesterov": {"type": "boolean", "default": False},
        "must": {"type": "string"},
    },
}


def schema_of(**properties: Any) -> Any:
    return parse_schema(json.dumps({"type": "object", "additionalProperties": False, "properties": properties}))


def test_survives_the_wire() -> None:
    schema = parse_schema(json.dumps(FULL))
    assert json.loads(schema.to_json()) == FULL
    assert parse_schema(schema.to_json()) == schema


def test_four_stays_an_integer() -> None:
    schema = parse_schema(json.dumps(FULL))
    assert type(json.loads(schema.to_json())["properties"]["steps"]["default"]) is int
    assert check_settings(schema, {"must": "", "steps": 4, "rate": 1}) == []
    assert check_settings(schema, {"must": "", "steps": 4.0}) == ["steps: 4.0 is not an integer"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "must: missing"),
        ({"must": "x", "rate": 2}, "rate: 2 is above the maximum 1.0"),
        ({"must": "x", "rate": -1}, "rate: -1 is below the minimum 0"),
        ({"must": "x", "rate": True}, "rate: true is not a number"),
        ({"must": "x", "rate": 10**400}, "is not a number"),
        ({"must": "x", "rate": float("inf")}, "is not a number"),
        ({"must": "x", "steps": 1 << 63}, "is not an integer"),
        ({"must": "x", "optimizer": "lion"}, 'optimizer: "lion" is not one of "sgd", "adam"'),
        ({"must": "x", "layers": 3}, "layers: 3 is not a list"),
        ({"must": "x", "layers": [3, 0]}, "layers: element 1: 0 is below the minimum 1"),
        ({"must": "x", "nesterov": 1}, "nesterov: 1 is not a boolean"),
        ({"must": None}, "must: null is not a string"),
        ({"must": "x", "code": "import os"}, "code: the workload has no such setting"),
    ],
)
def test_what_is_wrong_is_said(settings: dict[str, Any], words: str) -> None:
    wrong = check_settings(parse_schema(json.dumps(FULL)), settings)
    assert len(wrong) == 1
    assert words in wrong[0]
    assert len(wrong[0]) < 300


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"type": "object"}',
        '{"type": "object", "additionalProperties": true}',
        '{"type": "object", "additionalProperties": false, "$ref": "http://x"}',
        '{"type": "object", "additionalProperties": false, "required": ["x"]}',
        "[" * 60_000,
        " " * 70_000,
        '{"type": "object", "additionalProperties": false, "properties": {"x": {"type": "object"}}}',
        '{"type": "object", "additionalProperties": false, "properties": {"../x": {"type": "integer"}}}',
        '{"type": "object", "additionalProperties": false, "properties": {"x": {"type": "integer", "pattern": "a"}}}',
        '{"type": "object", "additionalProperties": false, "properties": {"x": {"type": "integer", "default": NaN}}}',
        '{"type": "object", "additionalProperties": false, "properties": {"x": {"type": "integer", "default": null}}}',
        '{"type": "object", "additionalProperties": false, "properties": {"x": {"type": "integer", "default": 1.5}}}',
        '{"type": "object", "additionalProperties": false, "properties": {"x": {"type": "integer", "enum": []}}}',
        '{"type": "object", "additionalProperties": false, "properties": {"x": {"type": "integer", "enum": ["a"]}}}',
        '{"type": "object", "additionalProperties": false, "properties": {"x": {"type": "string", "minimum": 1}}}',
        '{"type": "object", "additionalProperties": false, "properties": {"x": {"type": "array"}}}',
        '{"type": "object", "additionalProperties": false, "properties": {"x": {"type": "number", "items": {}}}}',
        '{"type":"object","additionalProperties":false,"properties":{"x":{"type":"number","minimum":2,"maximum":1}}}',
    ],
)
def test_what_is_not_of_the_subset_is_refused(text: str) -> None:
    with pytest.raises(FedlinkError) as e:
        parse_schema(text)
    assert e.value.reason is Reason.BAD_REGISTRATION
    assert "\n" not in e.value.message


def test_too_many_settings_are_refused() -> None:
    with pytest.raises(FedlinkError, match="256"):
        schema_of(**{f"x{i}": {"type": "integer"} for i in range(257)})


def test_limits_only_tighten() -> None:
    schema = schema_of(rate={"type": "number", "default": 0.5, "minimum": 0, "maximum": 1})
    narrowed = narrow(schema, {"rate": (-5, 0.75)})
    assert narrowed.properties["rate"].minimum == 0
    assert narrowed.properties["rate"].maximum == 0.75
    assert narrowed.required == ()
    assert narrow(narrowed, {"rate": (None, 2)}).properties["rate"].maximum == 0.75


def test_a_default_outside_the_limits_must_be_chosen_by_the_run() -> None:
    schema = narrow(schema_of(rate={"type": "number", "default": 0.5}), {"rate": (None, 0.1)})
    assert check_settings(schema, {}) == ["rate: missing, and it has no default"]
    assert check_settings(schema, {"rate": 0.1}) == []
    assert parse_schema(schema.to_json()) == schema


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"lr": (0, 1)}, "lr.*no such setting"),
        ({"name": (0, 1)}, "name.*not a number"),
        ({"rate": (3, None)}, "rate"),
    ],
)
def test_limits_that_make_no_sense(limits: Any, words: str) -> None:
    schema = schema_of(rate={"type": "number", "maximum": 2}, name={"type": "string"})
    with pytest.raises(FedlinkError, match=words) as e:
        narrow(schema, limits)
    assert e.value.reason is Reason.BAD_CONFIG


@pytest.mark.parametrize("text", ["[1]", "nonsense", "[" * 60_000, '{"x": NaN}', '{"x": "' + "y" * 70_000 + '"}'])
def test_settings_that_are_none(text: str) -> None:
    with pytest.raises(FedlinkError) as e:
        parse_settings(text)
    assert e.value.reason is Reason.BAD_RUN


def test_settings_may_be_empty() -> None:
    assert parse_settings("") == parse_settings("{}") == {}


words = st.sampled_from(["type", "object", "properties", "items", "x", ""])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from([*FULL["properties"], "other"]), json_values, max_size=7))
def test_any_settings_get_an_answer(settings: dict[str, Any]) -> None:
    wrong = check_settings(parse_schema(json.dumps(FULL)), settings)
    assert all(isinstance(text, str) for text in wrong)


@given(json_values)
def test_any_json_is_a_schema_or_refused(value: Any) -> None:
    with contextlib.suppress(FedlinkError):
        schema = parse_schema(json.dumps(value))
        assert parse_schema(schema.to_json()) == schema


@given(
    st.integers(-100, 100) | st.floats(-100, 100),
    st.none() | st.integers(-100, 100),
    st.none() | st.integers(-100, 100),
)
def test_a_narrowed_schema_accepts_what_both_accept(value: float, low: int | None, high: int | None) -> None:
    schema = schema_of(x={"type": "number", "minimum": -50, "maximum": 50})
    inside = -50 <= value <= 50 and (low is None or low <= value) and (high is None or value <= high)
    try:
        narrowed = narrow(schema, {"x": (low, high)})
    except FedlinkError:
        assert not inside
        return
    assert (check_settings(narrowed, {"x": value}) == []) == inside
