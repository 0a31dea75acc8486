"""Throughput of several trainer processes against one: `make bench-processes`.

A LLaMA of so many weights learns from generated texts, on CPUs, as a site's trainer does it; what
is counted is the tokens of the whole site a second, without the first step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from pathlib import Path

from fedclient.settings import load_site
from tests.support.tiny_models import reviews, save_llama, write_jsonl
from tests.support.trainers import init, make_trainer, train

SITE = """
name = "site-1"
[workload.w]
trainer = "causal_lm"
model = "llama"
data = { train = "train.jsonl", max_length = 64 }
metrics = ["*"]
precision = { autocast = "float32" }
distributed = { processes = PROCESSES, strategy = "STRATEGY" }
"""


async def measure(directory: Path, processes: int, strategy: str, threads: int, steps: int) -> float:
    """Tokens a second."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    name = f"{processes}-{strategy}-{threads}"
    text = SITE.replace("PROCESSES", str(processes)).replace("STRATEGY", strategy)
    (directory / "site.toml").write_text(text, encoding="utf-8")
    trainer = make_trainer(load_site(directory / "site.toml"))
    try:
        model = await init(trainer, directory / f"model-{name}")
        settings = {"steps": 2, "batch_size": 16}
        await train(trainer, model, directory / f"warm-{name}", settings=settings)
        found = await train(trainer, model, directory / f"out-{name}", settings=settings | {"steps": steps})
        return found.metrics["tokens_per_second"]
    finally:
        await trainer.close()


def main() -> None:
    """Measure, and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description="throughput of several trainer processes against one")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    options = parser.parse_args()
    threads = max(1, len(os.sched_getaffinity(0)) // options.processes)
    rows = [(1, "ddp", threads), (1, "ddp", threads * options.processes)]
    rows += [(options.processes, strategy, threads) for strategy in ("ddp", "fsdp")]
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as home:
        directory = Path(home)
        sizes = {"hidden_size": options.width, "intermediate_size": 4 * options.width, "num_hidden_layers": 6}
        save_llama(directory / "llama", **sizes, num_attention_heads=6)
        write_jsonl(directory / "train.jsonl", reviews(400))
        for processes, strategy, each in rows:
            what = f"{processes} x {each} threads" + (f", {strategy}" if processes > 1 else "")
            found[what] = asyncio.run(measure(directory, processes, strategy, each, options.steps))
            print(
                f"{what:24} {found[what]:9.0f} tokens/s  {found[what] / next(iter(found.values())):5.2f} x", flush=True
            )
    print("result " + json.dumps({name: round(value, 1) for name, value in found.items()}))


if __name__ == "__main__":
    main()
