"""What the site takes, and what it lets out."""

from __future__ import annotations

import math

import pytest

from fedclient.launch import Description, FailReason, TrainerFailed
from fedclient.policy import MAX_MESSAGE, Refused, Terms
from fedclient.settings import WorkloadSettings
from fedlink.tensors import Kind
from tests.support.orders import order

SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"rate": {"type": "number", "default": 0.1}},
}


def terms(abilities: tuple[str, ...] = ("train", "evaluate"), **settings: object) -> Terms:
    table = {"trainer": "m:C", **settings}
    return Terms.of("heart", WorkloadSettings.checked(table, "here"), Description(SCHEMA, abilities, ()))


def test_takes_what_it_offers() -> None:
    assert terms().accept(order()) == {"rate": 1}
    assert terms().accept(order(update=None, update_dtype="")) == {"rate": 1}
    assert terms(("gradient",)).accept(order(update=Kind.GRADIENT)) == {"rate": 1}


@pytest.mark.parametrize(
    ("refusing", "fields", "words"),
    [
        (terms(("evaluate",)), {}, "train"),
        (terms(), {"update": Kind.GRADIENT}, "gradient"),
        (terms(("train",)), {"update": None, "update_dtype": ""}, "evaluate"),
        (terms(runs=["prod-*"]), {}, "run r1"),
        (terms(), {"update_dtype": "I8"}, "I8"),
        (terms(limits={"rate": {"max": 0.5}}), {}, "above the maximum 0.5"),
        (terms(), {"settings_json": "{"}, "JSON"),
    ],
)
def test_refuses_the_rest_in_words(refusing: Terms, fields: dict[str, object], words: str) -> None:
    with pytest.raises(Refused, match=words):
        refusing.accept(order(**fields))


def test_lets_out_only_listed_finite_metrics() -> None:
    site = terms(metrics=["loss", "acc*"])
    metrics = {"loss": 1, "accuracy": 0.5, "patients": 3.0, "acc_nan": math.nan, "acc_inf": math.inf, "a" * 65: 1.0}
    assert site.let_out(metrics) == {"loss": 1.0, "accuracy": 0.5}
    assert len(terms(metrics=["*"]).let_out({f"m{i}": 1.0 for i in range(100)})) == 64


def test_a_failure_quotes_nothing_unless_the_site_shares_it() -> None:
    failure = TrainerFailed(
        FailReason.EXCEPTION, "it failed", exception_class="E" * 100, step=3, output="patient 17 " + "x" * 5000
    )
    told = terms().report(failure)
    assert (told.reason, told.message, told.step) == ("exception", "it failed", 3)
    assert len(told.exception_class) == 64
    shared = terms(share_errors=True).report(failure)
    assert shared.message.startswith("it failed: patient 17")
    assert len(shared.message) == MAX_MESSAGE
