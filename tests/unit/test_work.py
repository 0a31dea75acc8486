"""What a run file and a site.toml may say of the work of a round."""

from __future__ import annotations

from typing import Any

import pytest

from fedclient.settings import WorkloadSettings
from fedlink.errors import FedlinkError
from fedlink.run_file import RunSpec

RUN: dict[str, Any] = {"workload": "w", "rounds": 1}


@pytest.mark.parametrize(
    ("work", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": "equal"}, "balanced"),
        ({"steps": "balanced"}, "mean_steps"),
        ({"steps": 3, "mean_steps": 3}, "mean_steps"),
        ({"mean_steps": 3}, "balanced"),
        ({"max_seconds": 0}, "max_seconds"),
        ({"epochs": 0}, "epochs"),
        ({"examples": -1}, "examples"),
        ({"seconds": 1}, "seconds"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(work: dict[str, Any], word: str) -> None:
    with pytest.raises(FedlinkError, match=word):
        RunSpec.checked({**RUN, "work": work}, "run.toml")


def test_a_gradient_is_of_all_examples() -> None:
    table = {**RUN, "strategy": "fedsgd", "server_optimizer": {"learning_rate": 1.0}}
    spec = RunSpec.checked(table, "run.toml")
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec, "as the server keeps it"
    with pytest.raises(FedlinkError, match="fedavg"):
        RunSpec.checked({**table, "work": {"steps": 3}}, "run.toml")


def test_what_a_site_is_asked_to_do() -> None:
    spec = RunSpec.checked({**RUN, "work": {"steps": "balanced", "mean_steps": 50, "max_seconds": "2m"}}, "run.toml")
    assert spec.work.limits().table == {"steps": 50, "max_seconds": 120.0}
    assert spec.work.limits(7).table == {"steps": 7, "max_seconds": 120.0}
    assert RunSpec.model_validate_json(spec.model_dump_json(exclude_unset=True)).work == spec.work
    assert RunSpec.checked({**RUN, "work": {"epochs": 2, "examples": 9}}, "r").work.limits().table == {
        "epochs": 2,
        "examples": 9,
    }
    assert RunSpec.checked(RUN, "run.toml").work.limits().table == {}


def test_what_a_site_gives() -> None:
    settings = WorkloadSettings.checked({"trainer": "a:B", "share": {"steps": 4, "max_seconds": "5m"}}, "site.toml")
    assert settings.share.table == {"steps": 4, "max_seconds": 300.0}
    with pytest.raises(FedlinkError, match="steps"):
        WorkloadSettings.checked({"trainer": "a:B", "share": {"steps": "balanced"}}, "site.toml")
