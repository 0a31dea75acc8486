"""A federation of hospitals on this machine: their data, and their files."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from examples import federation
from examples.heart import data

HERE = Path(__file__).resolve().parent
HOSPITALS = [data.slug(name) for name in data.HOSPITALS]
SITE = """\
name = "{name}"
server = "{server}"

[workload.heart]
trainer = "heart:HeartDisease"

[workload.heart.data]
train = {train}
test = {test}
statistics = "../../data/statistics.json"
normalise = "{normalise}"
"""


class Hospitals(federation.Federation):
    """Four hospitals, in a directory with prepared data."""

    def prepare(self) -> None:
        """Empty the directory, but for the data, which are fetched if they are not there."""
        data.prepare(self.root / "data")
        self.clear()

    def start(self, processes: contextlib.ExitStack, normalise: str = "shared") -> None:
        """Start the server and every hospital's daemon."""
        server = self.start_server(processes)
        for name in HOSPITALS:
            self.start_site(processes, self.site(name, [name], [name], server=server, normalise=normalise))

    def site(
        self,
        name: str,
        train: Sequence[str],
        test: Sequence[str],
        *,
        server: str = federation.NOWHERE,
        normalise: str = "shared",
    ) -> Path:
        """Write a site.toml, and the workload's class beside it; returns the site.toml."""
        path = self.root / "sites" / name / "site.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "heart.py", path.parent)
        files = {
            kind: json.dumps([f"../../data/{n}-{kind}.csv" for n in names])
            for kind, names in (("train", train), ("test", test))
        }
        path.write_text(SITE.format(name=name, server=server, normalise=normalise, **files), encoding="utf-8")
        return path

    def init_model(self, path: Path, seed: int, *, quiet: bool = False) -> None:
        """Write the weights that the class begins with after `torch.manual_seed(seed)`, and give them to the server."""
        site = str(self.root / "sites" / HOSPITALS[0] / "site.toml")
        command = ["fedclient", "init-model", "heart", "--config", site, "--seed", str(seed), "-o", str(path)]
        federation.call(command, quiet=quiet)
        self.operate(["model", "import", str(path)], quiet=quiet)

    def train_alone(self, site: Path, run_file: Path, init: Path) -> list[float]:
        """Accuracy of every version of a model trained at one site, without a server."""
        return [version["evaluation"]["accuracy"] for version in federation.train_alone(site, run_file, init)]
