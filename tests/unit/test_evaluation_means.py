"""What a metric comes to over several sites."""

from __future__ import annotations

import math

import pytest

from fedserver.rounds.evaluation import weighted_means


def test_the_mean_perplexity_is_that_over_all_tokens() -> None:
    results = [(300, {"loss": 2.0, "perplexity": math.exp(2.0)}), (100, {"loss": 4.0, "perplexity": math.exp(4.0)})]
    means = weighted_means(results)
    assert means["loss"] == 2.5
    assert means["perplexity"] == pytest.approx(math.exp(2.5))


def test_a_site_without_examples_or_without_the_metric_does_not_count() -> None:
    results = [(10, {"accuracy": 0.5}), (0, {"accuracy": 1.0}), (90, {"perplexity": 7.0})]
    assert weighted_means(results) == {"accuracy": 0.5, "perplexity": pytest.approx(7.0)}
