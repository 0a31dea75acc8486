"""Settings classes as JSON schemas, and back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclient.trainer.api import Bounds, Workload
from fedclient.trainer.schema import SettingsError, parse_settings, settings_schema
from fedlink.settings_schema import check_settings, parse_schema


@dataclass(frozen=True)
class Good:
    epochs: int
    rate: Annotated[float, Bounds(0, 1)] = 0.5
    layers: Annotated[int, Bounds(minimum=1)] = 2
    warm: bool = False
    note: str = "x"
    optimizer: Literal["sgd", "adam"] = "sgd"
    bits: Literal[4, 8] = 8
    widths: tuple[int, ...] = (3, 4)
    betas: list[Annotated[float, Bounds(0, 1)]] = field(default_factory=lambda: [0.9, 0.999])


def test_schema_is_of_the_closed_subset():
    schema = settings_schema(Good)
    assert schema == {
        "type": "object",
        "additionalProperties": False,
        "required": ["epochs"],
        "properties": {
            "epochs": {"type": "integer"},
            "rate": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.5},
            "layers": {"type": "integer", "minimum": 1, "default": 2},
            "warm": {"type": "boolean", "default": False},
            "note": {"type": "string", "default": "x"},
            "optimizer": {"type": "string", "enum": ["sgd", "adam"], "default": "sgd"},
            "bits": {"type": "integer", "enum": [4, 8], "default": 8},
            "widths": {"type": "array", "items": {"type": "integer"}, "default": [3, 4]},
            "betas": {
                "type": "array",
                "items": {"type": "number", "minimum": 0, "maximum": 1},
                "default": [0.9, 0.999],
            },
        },
    }
    parse_schema(json.dumps(schema))


def test_no_settings_at_all():
    assert settings_schema(Workload.Settings)["properties"] == {}
    parse_settings(Workload.Settings, {})


def test_values_keep_their_types():
    found = parse_settings(Good, {"epochs": 4, "rate": 1, "widths": [1], "betas": [1, 0.5]})
    assert type(found.epochs) is int
    assert (found.rate, type(found.rate)) == (1.0, float)
    assert found.widths == (1,)
    assert found.betas == [1.0, 0.5]
    assert found.layers == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 4.0},
        {"epochs": True},
        {"epochs": "4"},
        {"rate": 1.5},
        {"rate": float("nan")},
        {"rate": True},
        {"layers": 0},
        {"warm": 1},
        {"note": 3},
        {"optimizer": "lbfgs"},
        {"bits": 8.0},
        {"bits": True},
        {"widths": 3},
        {"widths": [1.5]},
        {"betas": [2]},
        {"unknown": 1},
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(wrong):
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        parse_settings(Good, {"epochs": 1} | wrong)
    if wrong.get("rate") == wrong.get("rate"):
        assert check_settings(parse_schema(json.dumps(settings_schema(Good))), {"epochs": 1} | wrong)


def test_missing():
    with pytest.raises(SettingsError, match="epochs: missing"):
        parse_settings(Good, {})


@given(
    st.dictionaries(
        st.sampled_from(["epochs", "rate", "layers", "warm", "note", "optimizer", "widths", "other"]),
        st.one_of(
            st.integers(-3, 3),
            st.floats(-2, 2),
            st.booleans(),
            st.sampled_from(["sgd", "", "x"]),
            st.lists(st.integers(0, 3), max_size=3),
        ),
    )
)
def test_agrees_with_the_check_on_the_wire(settings):
    schema = parse_schema(json.dumps(settings_schema(Good)))
    try:
        parse_settings(Good, settings)
        fits = True
    except SettingsError:
        fits = False
    assert fits == (check_settings(schema, settings) == [])


def settings_with(hint: Any, default: Any = None) -> type:
    return dataclass(type("Settings", (), {"__annotations__": {"field": hint}, "field": default}))


@pytest.mark.parametrize(
    ("hint", "default"),
    [
        (dict, None),
        (list, ()),
        (list[list[int]], ()),
        (int | None, None),
        (Literal["a", 1], "a"),
        (Annotated[str, Bounds(1, 2)], "a"),
        (tuple[int, int], (1, 2)),
        (int, 1.5),
        (float, float("inf")),
        (Annotated[int, Bounds(0, 1)], 2),
        (Literal["a"], "b"),
    ],
    ids=str,
)
def test_classes_that_cannot_be_described(hint, default):
    with pytest.raises(SettingsError, match="field"):
        settings_schema(settings_with(hint, default))


def test_not_a_dataclass():
    with pytest.raises(SettingsError, match="dataclass"):
        settings_schema(int)
