"""Named strategies as pipelines."""

from __future__ import annotations

from fedlink.run_file import RunSpec
from fedserver.aggregation.optimizers.sgd import Sgd
from fedserver.aggregation.pipeline import Pipeline
from fedserver.aggregation.reducers.mean import WeightedMean


def pipeline_for(spec: RunSpec) -> Pipeline:
    """The pipeline that a run file's `strategy` and `[server_optimizer]` stand for.

    fedavg: x + rate * mean delta (rate 1 by default, which is FedAvg exactly).
    fedsgd: x - rate * mean gradient.
    Both means are weighted by examples.
    """
    return Pipeline(spec.update_kind, WeightedMean(), Sgd(spec.server_optimizer.learning_rate))
