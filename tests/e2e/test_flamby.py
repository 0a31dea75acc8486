"""Fed-Heart-Disease in FLamby's setting gives FLamby's accuracies, through a real server and four real daemons."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import heart
from tests.support.federation import Federation

PUBLISHED = {42: 0.7520, 43: 0.7638, 44: 0.7638, 45: 0.7008, 46: 0.7598}
"""Accuracy on all 254 test rows, by seed."""
TRAIN, TEST = 0, 1


@pytest.mark.timeout(600)
def test_the_five_published_accuracies(federation: Federation, heart_data: Path) -> None:
    sites = heart.hospitals(federation, heart_data, normalise="own")
    settings = {"learning_rate": 1e-3, "batch_size": 4, "steps": 100}
    accuracies = {}
    for seed in PUBLISHED:
        name = f"seed-{seed}"
        model = heart.import_initial(federation, sites[0], seed)
        heart.create_run(federation, name=name, model=model, rounds=15, seed=seed, settings=settings)
        last = [e["data"] for e in federation.finish(name) if e["kind"] == "version_evaluated"][-1]
        assert last["version"] == 15
        accuracies[seed] = round(last["metrics"]["accuracy"], 4)
        counted = {c: v["num_examples"] for c, v in last["clients"].items()}
        assert counted == {n: r[TEST] for n, r in heart.ROWS.items()}
    assert accuracies == PUBLISHED

    shown = federation.json("round", "show", "seed-46", "15")
    [round_] = shown if isinstance(shown, list) else [shown]
    weights = {t["client"]: t["num_examples"] for t in round_["tasks"] if t["kind"] == "train"}
    assert weights == {n: r[TRAIN] for n, r in heart.ROWS.items()}
