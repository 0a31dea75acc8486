"""The row of what processes hold in memory, by the size of the model."""

from __future__ import annotations

from tests.bench import weights
from tests.bench.bench_round import bench
from tests.bench.table import Found, Ground

FEDERATIONS = (("resnet18", 2, 20), ("gpt2", 4, 4), ("gpt2-medium", 4, 3), ("gpt2-xl", 1, 2))
"""Model, clients, rounds: a server's memory grows over its first rounds."""
TRAINED = "gpt2"
MB = 1e6


def memory(ground: Ground) -> Found:
    """Peaks of server and daemons with each model, and of a torch trainer over what torch alone takes."""
    found = Found()
    for _ in range(ground.repeat):
        servers, daemons = [], []
        for model, clients, rounds in FEDERATIONS:
            ground.say(f"{model} x {clients}")
            result = bench(model, clients, rounds, ground.directory, say=ground.say)
            servers.append(result["server_peak_rss_bytes"] / MB)
            daemons.append(result["client_peak_rss_bytes"] / MB)
            found.add(**{f"server_{model}": servers[-1]})
            found.note(**{model: result})
        # The bound is for any model: a median over models would hide the one that breaks it.
        found.add(spread=max(servers) / min(servers), daemon=max(daemons))
        peaks = {}
        for model in ("bare", TRAINED):
            ground.say(f"a torch trainer of {model}")
            result = bench(model, 1, 3, ground.directory, trainer="torch", say=ground.say)
            peaks[model] = result["trainer_peak_rss_bytes"]
        found.add(trainer=(peaks[TRAINED] - peaks["bare"]) / weights.size(TRAINED))
        found.note(torch_trainer_peaks=peaks)
    return found
