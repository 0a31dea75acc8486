"""What the demo shows at its end: the comparison, samples, bytes, a plot, and the result line."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.llm.sites import MODEL, PROMPT, SITES


@dataclass(frozen=True)
class Comparison:
    """What was measured."""

    versions: Sequence[Mapping[str, Any]]
    """What the sites measured of each version, the starting model first."""
    rounds: Sequence[Mapping[str, Any]]
    """What the server says of each round."""
    alone: Mapping[str, float]
    """Perplexity of what was trained at each site alone, and of `pooled`, on all sites' held-out passages."""
    measured: Mapping[str, float]
    """Settings that the sites have measured."""
    samples: Sequence[str]
    """What each version made of the prompt."""
    steps: int
    """Of each site in each round."""
    step_seconds: float
    seconds: float

    @property
    def federated(self) -> list[float]:
        """Perplexity of every version, on all sites' held-out passages."""
        return [float(version["metrics"]["perplexity"]) for version in self.versions]

    @property
    def local(self) -> dict[str, float]:
        """Perplexity of what was trained at each site alone."""
        return {name: self.alone[name] for name in SITES}

    @property
    def bytes_per_round(self) -> int:
        """Bytes that all sites fetched and sent in the last round."""
        return int(self.rounds[-1]["bytes_down"]) + int(self.rounds[-1]["bytes_up"])


def report(root: Path, found: Comparison) -> None:
    """Print the comparison, draw the plot, and end with the result line."""
    console = Console(highlight=False)
    show(console, found)
    # Each site would fetch the model and send one as large.
    full = 2 * len(SITES) * (root / MODEL / "model.safetensors").stat().st_size
    console.print(
        f"\nbytes per round  {found.bytes_per_round / 1e6:.1f} MB for three sites' adapters, down and up; "
        f"the whole model would be {full / 1e6:,.0f} MB",
        soft_wrap=True,
    )
    plot, adapter = root / "perplexity.png", root / "model"
    draw(plot, found)
    print(f"adapter  {adapter}\nplot     {plot}\n\nLoad it with transformers and peft:\n")
    print("    from transformers import AutoModelForCausalLM\n    from peft import PeftModel\n")
    print(f'    base = AutoModelForCausalLM.from_pretrained("{root / MODEL}")')
    print(f'    model = PeftModel.from_pretrained(base, "{adapter}")\n')
    result = {
        "run": "shakespeare",
        "rounds": len(found.versions) - 1,
        "steps_per_round": found.steps,
        "measured": found.measured,
        "step_seconds": round(found.step_seconds, 2),
        "perplexity_before": round(found.federated[0], 3),
        "perplexity_federated": round(found.federated[-1], 3),
        "perplexity_per_site": {
            name: round(site["metrics"]["perplexity"], 3) for name, site in found.versions[-1]["clients"].items()
        },
        "perplexity_local": round(statistics.mean(found.local.values()), 3),
        "perplexity_local_per_site": {name: round(value, 3) for name, value in found.local.items()},
        "perplexity_pooled": round(found.alone["pooled"], 3),
        "bytes_per_round": found.bytes_per_round,
        "bytes_per_round_full_model": full,
        "seconds": round(found.seconds, 1),
        "adapter_path": str(adapter),
        "plot_path": str(plot),
    }
    print(f"result {json.dumps(result)}", flush=True)


def show(console: Console, found: Comparison) -> None:
    """Print perplexities and samples."""
    table = Table(box=None)
    table.add_column("trained on")
    table.add_column("perplexity", justify="right")
    table.add_row("nothing yet", f"{found.federated[0]:.2f}")
    table.add_row("[bold]three sites, federated[/bold]", f"[bold]{found.federated[-1]:.2f}[/bold]")
    for name, value in found.local.items():
        table.add_row(f"{name} alone", f"{value:.2f}")
    table.add_row("mean of the three alone", f"{statistics.mean(found.local.values()):.2f}")
    table.add_row("pooled passages (what nobody may do)", f"{found.alone['pooled']:.2f}")
    console.print("\nPerplexity on all sites' held-out passages, after equal steps")
    console.print(table, "")
    if found.samples:
        for when, text in (("before", found.samples[0]), ("after", found.samples[-1])):
            console.print(f"[bold]{when}[/bold]", f"[dim]{escape(PROMPT)}[/dim]{escape(text)}\n", sep="\n")


def draw(path: Path, found: Comparison) -> None:
    """Plot perplexity by round, beside what was trained alone and pooled."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after the backend is chosen

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    last = len(found.federated) - 1
    for name in SITES:
        curve = [version["clients"].get(name, {}).get("metrics", {}).get("perplexity") for version in found.versions]
        (line,) = axes.plot(curve, linewidth=1, alpha=0.6, label=f"federated, on {name}")
        axes.plot([last], [found.alone[name]], "o", color=line.get_color(), label=f"{name} alone, on all")
    axes.plot([last], [found.alone["pooled"]], "k*", markersize=10, label="pooled passages, on all")
    axes.plot(found.federated, color="tab:red", linewidth=2.5, label="federated, on all")
    axes.set(
        xlabel=f"round ({found.steps} steps at each site)",
        ylabel="perplexity, held-out passages",
        title="SmolLM2-135M by LoRA on Shakespeare, three sites",
        xticks=range(last + 1),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)
