"""What happens to a finished task: the update is checked, and then counts or is refused by name."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping

from fedlink import log as logs
from fedlink.blobs import MAX_MANIFEST_SIZE, BlobRef
from fedlink.errors import FedlinkError, Reason
from fedlink.failpoints import reach
from fedlink.run_file import WIRE_DTYPES
from fedlink.work import WorkLimits
from fedserver.aggregation.check import check_update
from fedserver.rounds.model import TaskState
from fedserver.runtime.board import Claim, OpenTask, TaskBoard, Verdict, closed
from fedserver.runtime.engine import Engine
from fedserver.runtime.uploads import TaskBlobAccess
from fedserver.runtime.versions import Versions
from fedserver.runtime.wanted import Unwanted, while_wanted
from fedserver.store.database import Database
from fedserver.store.queries import tasks as q
from fedserver.store.rows import TaskRow

MAX_EXAMPLES = 1 << 53
"""Larger weights are not exact in float64."""
_MAX_METRICS = 64
_CUTS = frozenset(f"{whose} {name}" for whose in ("run", "site") for name in WorkLimits.model_fields)
# What a bit that has turned on the server's disk may look like.
_OF_THE_BYTES = (Reason.BAD_MANIFEST, Reason.BLOB_CORRUPT, Reason.NOT_FINITE)
# Bytes that were not sent are the site's to send, not a verdict on the update.
_NOT_A_VERDICT = (Reason.BLOB_MISSING, Reason.DRAINING, Reason.INTERNAL)


class Completions:
    """Checks results and hands verdicts to the rounds.

    Args:
        database: where tasks that are over are looked up.
        engine: the runs.
        board: the open tasks.
        access: for the model of a task.
        versions: for what was uploaded.
        checks: how many updates are checked at the same time.
    """

    def __init__(
        self,
        database: Database,
        engine: Engine,
        board: TaskBoard,
        access: TaskBlobAccess,
        versions: Versions,
        *,
        checks: int = 2,
    ) -> None:
        self._db = database
        self._engine = engine
        self._board = board
        self._access = access
        self._versions = versions
        self._slots = asyncio.Semaphore(checks)
        self._log = logs.get("completion")

    async def complete(self, client: str, token: bytes, claim: Claim, wait: float) -> Verdict | None:
        """The verdict on a result, or None if it is not known within `wait` seconds.

        Raises:
            FedlinkError: TASK_NOT_FOUND, ROUND_CLOSED, TASK_COMPLETED, BLOB_MISSING, WRONG_RESULT.
        """
        task = self._board.get(token)
        if task is None or task.client != client:
            return _repeated(await self._board.ended_task(client, token), claim)
        _check_claim(task, claim)
        await self._engine.revive(task)
        if task.check is None:
            task.claim, task.handed_in = claim, time.time()
            task.check = asyncio.create_task(self._judge(task, claim))
            task.check.add_done_callback(_seen)
        elif task.claim != claim:
            raise _other_result(task.row)
        check = task.check
        done, _ = await asyncio.wait([check], timeout=wait)
        if not done:
            self._board.extend(task)
            return None
        return check.result()

    async def _judge(self, task: OpenTask, claim: Claim) -> Verdict:
        try:
            return await self._decide(task, claim)
        except BaseException:
            # No verdict: the site may send what is missing, or another result.
            task.check = task.claim = None
            if self._board.get(task.token) is task:
                await self._engine.driver_of(task).task_changed(task, TaskState.RUNNING)
            raise

    async def _decide(self, task: OpenTask, claim: Claim) -> Verdict:
        values: dict[str, object] = {
            "num_examples": claim.num_examples,
            "steps": claim.steps,
            "metrics": dict(claim.metrics),
            "compute_seconds": claim.compute_seconds,
            "examples_seen": claim.examples_seen,
            "cut": claim.cut,
        }
        verdict = Verdict(accepted=True)
        if task.row.kind == "train":
            verdict = await self._check_update(task, claim)
            reach("update.checked")
            values |= {"update_digest": claim.update_digest}
        state = TaskState.ACCEPTED if verdict.accepted else TaskState.REFUSED
        values |= {"reason": verdict.reason, "tensor": verdict.tensor, "message": verdict.message}
        if not await self._engine.driver_of(task).task_ended(task, state, values):
            raise closed(task.row)
        if task.row.kind == "train":
            reach("update.judged")
        log = self._log.info if verdict.accepted else self._log.warning
        log(
            str(state),
            run=task.run.name,
            round=task.row.round,
            version=task.row.version,
            kind=task.row.kind,
            client=task.client,
            num_examples=claim.num_examples,
            **({"reason": verdict.reason, "why": verdict.message} if not verdict.accepted else {}),
        )
        return verdict

    async def _check_update(self, task: OpenTask, claim: Claim) -> Verdict:
        driver = self._engine.driver_of(task)
        uploads = await self._db.run(lambda c: q.task_uploads(c, [task.row.id]))
        model = await self._access.model_manifest((await self._access.task_model(task)).digest)
        limit = await self._access.update_limit(task)
        await driver.task_changed(task, TaskState.CHECKING)
        spec = task.run.parsed

        def check(unwanted: Unwanted) -> None:
            what = f"the update of client {task.client!r}"
            update = self._versions.uploaded(claim.update_digest, uploads, what)
            check_update(
                model,
                update.manifest,
                update.files,
                kind=spec.update_kind,
                update_dtype=WIRE_DTYPES[spec.update_dtype],
                max_bytes=limit,
                unwanted=unwanted,
            )

        async with self._slots:
            try:
                await while_wanted(check)
            except FedlinkError as e:
                if e.reason in _NOT_A_VERDICT:
                    raise
                if self._board.get(task.token) is not task:
                    # Its files may have gone, or hold something else by now.
                    raise closed(task.row) from None
                await self._rule_out_the_disk(task, e)
                tensor = e.metadata.get("tensor", "")
                return Verdict(accepted=False, reason=e.reason.name, tensor=tensor, message=str(e))
        return Verdict(accepted=True)

    async def _rule_out_the_disk(self, task: OpenTask, error: FedlinkError) -> None:
        """Return if the site is to blame for what a check found.

        Raises:
            FedlinkError: BLOB_MISSING; what is stored is not what the site sent.
        """
        if error.reason not in _OF_THE_BYTES:
            return
        as_sent = await self._versions.reverify(task.row)
        if as_sent and error.reason is not Reason.BLOB_CORRUPT:
            return
        self._log.error(
            "a stored update is damaged",
            run=task.run.name,
            round=task.row.round,
            client=task.client,
            because=error.message,
        )
        what = f"the update of client {task.client!r} has changed on the server's disk"
        raise FedlinkError(Reason.BLOB_MISSING, f"{what}; send it again, then repeat the call")


def read_claim(
    update: BlobRef | None,
    num_examples: int,
    steps: int,
    metrics: Mapping[str, float],
    *,
    seconds: float,
    examples_seen: int = 0,
    cut: str = "",
) -> Claim:
    """A claim that somebody sent; a `cut` that is none of ours is dropped.

    Raises:
        FedlinkError: WRONG_RESULT, NO_EXAMPLES.
    """
    if max(num_examples, steps, examples_seen) > MAX_EXAMPLES:
        counts = f"num_examples {num_examples}, steps {steps} or examples_seen {examples_seen}"
        raise FedlinkError(Reason.WRONG_RESULT, f"{counts} is over 2^53")
    if len(metrics) > _MAX_METRICS or any(not 0 < len(k) <= 64 for k in metrics):
        raise FedlinkError(Reason.WRONG_RESULT, "at most 64 metrics with names of 1 to 64 characters")
    if not math.isfinite(seconds) or seconds < 0 or not all(map(math.isfinite, metrics.values())):
        raise FedlinkError(Reason.WRONG_RESULT, "metrics and compute_seconds must be finite numbers")
    if update is not None and update.size > MAX_MANIFEST_SIZE:
        raise FedlinkError(Reason.TOO_LARGE, f"the update's manifest is larger than {MAX_MANIFEST_SIZE} bytes")
    digest = update.digest if update else b""
    told = cut if cut in _CUTS else ""
    return Claim(digest, num_examples, steps, tuple(sorted(metrics.items())), seconds, examples_seen, told)


def _seen(check: asyncio.Task[Verdict]) -> None:
    """Whoever waits is told of an error; if nobody does any more, the site repeats its call."""
    if not check.cancelled():
        check.exception()


def _check_claim(task: OpenTask, claim: Claim) -> None:
    train = task.row.kind == "train"
    if train != bool(claim.update_digest):
        what = "needs an update" if train else "takes no update"
        raise FedlinkError(Reason.WRONG_RESULT, f"a {task.row.kind} task {what}")
    if train and claim.num_examples == 0:
        raise FedlinkError(
            Reason.NO_EXAMPLES,
            f"client {task.client!r} trained on 0 examples, so nothing would weigh what it sends; set ctx.num_examples",
        )


def _repeated(row: TaskRow, claim: Claim) -> Verdict:
    """The answer to a repeat, from the record."""
    if row.state not in (TaskState.ACCEPTED, TaskState.REFUSED):
        raise closed(row)
    recorded = ((row.update_digest or b""), row.num_examples, row.steps)
    if recorded != (claim.update_digest, claim.num_examples, claim.steps):
        raise _other_result(row)
    return Verdict(row.state == TaskState.ACCEPTED, row.reason, row.tensor, row.message)


def _other_result(row: TaskRow) -> FedlinkError:
    return FedlinkError(
        Reason.TASK_COMPLETED, f"client {row.client!r} handed in another result for this task before; that one counts"
    )
