"""The fixed set of cases, and cases drawn at random.

Every failpoint stands in the fixed set at least once. Server and sites are struck in one
case where that costs the proof nothing: what each of them lost is looked up by itself.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from tests.fault.case import Case, Fault, Kill, Sever, parse_fault
from tests.fault.start import SITES

MiB = 1 << 20

LEAN = {"retention": {"keep_versions": 1, "keep_updates": False}}
"""Nothing is kept that need not be: updates and old versions go."""
EAGER = {"cohort": {"min_clients": 3, "target": 2, "quorum": 2}}
"""A round closes with the first two; the third comes too late."""

_FIXED = {
    # The server, at every failpoint; beside it a site, at every one of its own.
    "nothing-happens": "",
    "recovered": "server:version.stored@1,server:server.recovered@1,a:client.registered@1",
    "run-created": "server:run.created@1,b:journal.fetched@1",
    "calibration": "server:calibration.issued@1,server:calibration.closed@1",
    "round-opened": "server:round.opened@2,c:task.kept@2",
    "round-issued": "server:round.issued@1,a:download.listed@3",
    "round-closed": "server:round.closed@2,b:download.written@20",
    "task-given": "server:task.given@5,c:download.renamed@6",
    "blob-read": "server:blob.read@40,a:model.fetched@2",
    "upload-slot": "server:upload.slot@6,b:update.computed@1",
    "upload-started": "server:upload.started@15,c:journal.trained@2",
    "upload-written": "server:upload.written@30,a:update.encoded@1",
    "upload-marked": "server:upload.marked@50,b:upload.sending@9",
    "update-checked": "server:update.checked@5,c:update.sent@1",
    "update-judged": "server:update.judged@2,a:update.answered@1",
    "fold-shard": "server:fold.shard@5,b:journal.completed@1",
    "blob-listed": "server:blob.listed@2,c:task.dropped@2",
    "blob-placed": "server:blob.placed@7,b:trainer.wrote@2",
    "version-stored": "server:version.stored@2",
    "version-committed": "server:version.committed@1,a:update.ahead@2",
    "updates-forgotten": "server:updates.forgotten@1,server:upload.removed@4",
    "versions-retired": "server:versions.retired@2",
    "blob-unlinked": "server:blob.unlinked@2",
    "evaluation-and-end": "server:evaluation.closed@2,server:run.ending@1",
    # Trainers; their failure ends a task, and its retry is the server's to record.
    "trainer-step": "a:trainer.step@6,server:task.failed@1",
    "trainer-update": "b:trainer.update@2,server:round.reissued@1",
    "checkpoint-written": "c:checkpoint.written@2",
    "checkpoint-renamed": "a:checkpoint.renamed@3",
    "round-failed": "a:trainer.step@2,a:trainer.step@2,server:round.failed@1",
    # The same again and again, and all at once.
    "server-thrice": "server:version.stored@1,server:version.stored@1,server:version.stored@1",
    "server-in-each-round": "server:update.judged@2,server:fold.shard@2,server:round.closed@1,server:blob.placed@1",
    "site-in-each-stage": "b:download.written@9,b:update.computed@1,b:upload.sending@3,b:update.answered@1",
    "all-sites": "a:update.sent@1,b:update.sent@1,c:update.sent@1",
    "everybody": "server:upload.marked@20,a:upload.sending@5,b:download.written@30,c:update.computed@1",
    "in-the-same-instant": "server:update.judged@1,a:update.answered@1,b:update.answered@1,c:update.answered@1",
    # The line between them.
    "cut-uploads": f"a:cut-server@{9 * MiB + 1},b:cut-server@{33 * MiB},c:cut-server@{61 * MiB}",
    "cut-downloads": f"a:cut-client@700,b:cut-client@{20 * MiB + 17},c:cut-client@{59 * MiB}",
    "stalls": f"a:stall-server@{5 * MiB},b:stall-client@{8 * MiB},c:cut-server@200",
    "cut-and-killed": f"server:upload.written@40,a:cut-server@{30 * MiB},b:upload.sending@7,c:cut-client@{40 * MiB}",
    # Cohorts that differ from case to case.
    "late-site": "c:upload.sending@8,server:round.closed@1",
    "late-site-and-server": "b:update.sent@1,server:update.judged@2",
}
_SETTINGS: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "calibration": {"settings": {"strength": "auto"}},
    "updates-forgotten": LEAN,
    "versions-retired": LEAN,
    "blob-unlinked": LEAN,
    "server-in-each-round": LEAN,
    "round-failed": {"cohort": {"min_clients": 3, "task_retries": 1}},
    "late-site": EAGER,
    "late-site-and-server": EAGER,
}
_TORCH = {
    "checkpoint-renamed": "a",
    # Sites that live on: a trainer of torch's takes seconds to start.
    "update-judged": "b",
    "round-closed": "a",
    "blob-read": "b",
    "version-stored": "c",
}
_CHECKPOINTS = frozenset(("checkpoint-written", "checkpoint-renamed", "trainer-step"))
_EVALUATED = frozenset(
    ("nothing-happens", "evaluation-and-end", "versions-retired", "server-thrice", "all-sites", "stalls")
)
_OFTEN = 0.001


def fixed() -> list[Case]:
    """The fixed set."""
    return [
        Case(
            name,
            tuple(parse_fault(part) for part in text.split(",") if part),
            _SETTINGS.get(name, {}),
            _TORCH.get(name, ""),
            _OFTEN if name in _CHECKPOINTS else 0.0,
            name in _EVALUATED,
        )
        for name, text in _FIXED.items()
    ]


# --- At random

_SERVER = {
    "round.opened": 1,
    "round.issued": 1,
    "round.closed": 1,
    "task.given": 3,
    "blob.read": 30,
    "upload.slot": 9,
    "upload.started": 9,
    "upload.written": 40,
    "upload.marked": 40,
    "update.checked": 3,
    "update.judged": 3,
    "fold.shard": 3,
    "blob.listed": 3,
    "blob.placed": 3,
    "version.stored": 1,
    "version.committed": 1,
}
"""Passages of which any round, wherever it is entered, has at least so many."""
_SITE = {
    "journal.fetched": 1,
    "task.kept": 1,
    "download.listed": 3,
    "download.written": 14,
    "download.renamed": 3,
    "model.fetched": 1,
    "update.ahead": 2,
    "update.computed": 1,
    "journal.trained": 1,
    "update.encoded": 1,
    "upload.sending": 15,
    "update.sent": 1,
    "update.answered": 1,
    "journal.completed": 1,
}
_TRAINER = {"trainer.step": 4, "trainer.wrote": 3, "trainer.update": 1}
_CHECKPOINTED = {"checkpoint.written": 3, "checkpoint.renamed": 3}
_AFTER_A_FAILURE = ("task.failed", "round.reissued")
_LEAN_ONLY = {"updates.forgotten": 1, "upload.removed": 8}
_LIVES = 2
"""Kills of one process at most: each takes a round at most, and there are three."""


def drawn(seed: int, number: int) -> Case:
    """Case `number` of a campaign; the same for the same seed."""
    rng = random.Random(f"{seed}/{number}")
    lean = rng.random() < 0.3
    faults: list[Fault] = []
    points = _SERVER | (_LEAN_ONLY if lean else {})
    for _ in range(rng.choice((0, 1, 1, 2))):
        faults.append(_kill(rng, "server", points))
        if rng.random() < 0.2:
            faults.append(Kill("server", "server.recovered"))
    checkpoints = _OFTEN if rng.random() < 0.3 else 0.0
    trainer = _TRAINER | (_CHECKPOINTED if checkpoints else {})
    for site in rng.sample(sorted(SITES), rng.randint(1, len(SITES))):
        faults += _on_site(rng, site, trainer)
    if {f.point for f in faults if isinstance(f, Kill)} & {*trainer} and not any(f.who == "server" for f in faults):
        faults.append(Kill("server", rng.choice(_AFTER_A_FAILURE)))
    torch = rng.choice(sorted(SITES)) if rng.random() < 0.1 else ""
    evaluated = rng.random() < 0.5
    return Case(f"drawn-{seed}-{number}", tuple(faults), LEAN if lean else {}, torch, checkpoints, evaluated)


def _on_site(rng: random.Random, site: str, trainer: Mapping[str, int]) -> Sequence[Fault]:
    what = rng.random()
    if what < 0.45:
        return [_kill(rng, site, _SITE) for _ in range(rng.randint(1, _LIVES))]
    if what < 0.6:
        return [_kill(rng, site, trainer)]
    return [
        Sever(site, rng.choice(("cut", "cut", "stall")), rng.choice(("server", "client")), rng.randrange(1, 50 * MiB))
        for _ in range(rng.randint(1, 2))
    ]


def _kill(rng: random.Random, who: str, points: Mapping[str, int]) -> Kill:
    point = rng.choice(sorted(points))
    return Kill(who, point, rng.randint(1, points[point]))
