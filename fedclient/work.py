"""One task from its order to the server's verdict.

    FETCHED ── fetch the model, train ──▶ TRAINED ── upload, complete ──▶ COMPLETED or gone

Every arrow ends with a journal entry, so that a restart begins at the last one. A result is
made safe from a power loss if it is not over soon: until then, all that could be lost is one
training. A device is held only for the first arrow. What ends a task early, and what becomes
of it:

    the site's terms forbid it, the trainer fails     reported, forgotten
    the server says it is over or cancels it          forgotten
    the daemon drains or dies                         kept, gone on with after the next start
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from functools import partial
from typing import TypeVar

from pydantic import ValidationError

from fedclient.ahead import Ahead
from fedclient.computing import Computation, GetTrainer, since
from fedclient.launch import FailReason, Result, TrainerFailed
from fedclient.policy import Refused, Terms
from fedclient.session import BACKOFF, TaskFailure
from fedclient.spool import Held, Order, Outcome, Stage
from fedclient.status import Status
from fedclient.tools import Tools
from fedclient.transfer import drop_model_files
from fedclient.update import Encoded, LocalBlob, encode
from fedlink import log
from fedlink.config import explain
from fedlink.errors import FedlinkError, Reason
from fedlink.failpoints import reach
from fedlink.files import boot_id

TASK_OVER = frozenset({Reason.TASK_NOT_FOUND, Reason.ROUND_CLOSED, Reason.TASK_COMPLETED})
"""The server needs nothing more of a task."""
SESSION_OVER = frozenset(
    {
        Reason.SESSION_REPLACED,
        Reason.BAD_CREDENTIALS,
        Reason.CLIENT_REVOKED,
        Reason.CLIENT_TOO_OLD,
        Reason.CLIENT_TOO_NEW,
        Reason.BAD_REGISTRATION,
        Reason.TLS_REFUSED,
        Reason.PROXY_REFUSED,
    }
)
"""The server refuses this daemon, or can only be reached again by its next start: it stops."""
SECURE_AFTER = 20.0
"""Seconds after which a result is synced that is not over. Before that it would only be in the way of the upload."""
STILL = 2.0
"""Seconds without a byte sent after which a result that the server has not accepted is synced at once."""
LEAST_BEAT = 1.0
"""Seconds between two heartbeats at least, unless the lease is shorter."""

_T = TypeVar("_T")

_GONE = frozenset({errno.ENOENT})
"""What is said of a file that will not come back by waiting."""
_NOT_KEPT = _GONE | {errno.EIO}
"""The same of a file being synced: what a sync lost once, the next one does not tell of."""


class Work:
    """A held task being worked on.

    Attributes:
        held: its journal entry.
        status: how far it is.
        gone: nothing is kept of it any more.
    """

    def __init__(self, tools: Tools, held: Held, terms: Terms | None, say_dropped: Callable[[str, str], None]) -> None:
        self.held = held
        self.status = Status()
        self.gone = False
        self._tools = tools
        self._terms = terms
        self._say_dropped = say_dropped
        self._computation: Computation | None = None
        self._ahead: Ahead | None = None
        self._encoded: Encoded | None = None
        self._securing: asyncio.Task[None] | None = None
        self._log = log.get("task").bind(
            client=tools.client, run=held.order.run, round=held.order.round, task=self.short_name
        )

    @property
    def short_name(self) -> str:
        """What logs call the task."""
        return self.held.token.hex()[:8]

    @property
    def order(self) -> Order:
        """What the server asked for."""
        return self.held.order

    async def compute(self, trainer: GetTrainer) -> TaskFailure | None:
        """Bring a FETCHED task to TRAINED; answers what the server must be told if that cannot be.

        Raises:
            FedlinkError: the task or the session is over.
        """
        try:
            await self._compute(trainer)
        except Refused as e:
            return TaskFailure("not_allowed", str(e))
        except TrainerFailed as e:
            if e.reason is FailReason.CANCELLED:
                raise FedlinkError(Reason.ROUND_CLOSED, "the trainer was stopped") from None
            self._log.error("the trainer failed", reason=e.reason.value, error=e.message, output=e.output)
            assert self._terms is not None
            return self._terms.report(e)
        except ValidationError as e:
            return TaskFailure("exception", f"the trainer gave an impossible result: {explain(e)}")
        except (FedlinkError, OSError) as e:
            return _unavailable(e)
        return None

    async def deliver(self) -> TaskFailure | None:
        """Bring a TRAINED task to the server's verdict, or hand in a COMPLETED one again; answers as `compute`.

        Raises:
            FedlinkError: the task or the session is over.
        """
        if self.held.boot and self._securing is None:
            self._securing = asyncio.create_task(self._secure())
        try:
            accepted = await self._deliver()
        except (FedlinkError, OSError) as e:
            return _unavailable(e)
        if accepted and self.order.update:
            if not self.held.completed:
                self.held = self.held.accepted()
                await self._until_it_works(lambda: self._tools.on_disk(self._tools.spool.put, self.held))
        else:
            await self.forget()
        return None

    async def fail(self, failure: TaskFailure) -> None:
        """Tell the server that the task cannot be done, and forget it.

        Raises:
            FedlinkError: the task or the session is over.
        """
        self._log.error("gave the task up", reason=failure.reason, error=failure.message)
        tools = self._tools
        # Before the server knows: if its answer is lost, or comes too late for us, the task is over like any other.
        self.held = self.held.model_copy(update={"retryable": failure.retryable})
        if failure.retryable and self.held.stage is Stage.FETCHED:
            with contextlib.suppress(OSError):
                await tools.on_disk(tools.spool.put, self.held)
        await tools.session.fail(self.held.token, failure)
        await self.forget()

    async def forget(self) -> None:
        """Delete everything kept of the task, but the checkpoint that another attempt may go on from."""
        tools, token = self._tools, self.held.token
        if self._securing:
            self._securing.cancel()
        try:
            await tools.on_disk(partial(tools.spool.drop, token, keep_checkpoint=self.held.retryable))
        except OSError as e:
            # What stays is deleted after the next start, when the server is asked about it.
            self._log.error("the site's disk refuses to delete what is over", error=e.strerror)
        finally:
            await tools.transfer.let_go(token)
        self.gone = True

    def reopen(self) -> None:
        """Treat an accepted result as not handed in: the server has lost it and asks again."""
        self.held = self.held.model_copy(update={"completed": False})

    async def stop_trainer(self) -> None:
        """Stop the job under way, if there is one, without losing the warm process."""
        if self._computation:
            await self._computation.stop()

    async def leave(self) -> None:
        """End what goes on of the task beside `compute` and `deliver`, for neither will go on."""
        if self._computation and self._computation.ahead:
            await self._computation.ahead.stop()

    async def keep_lease(self) -> str:
        """Send heartbeats and metrics until the server says that the task is over; returns its words.

        Raises:
            FedlinkError: the session is over.
        """
        session, failures = self._tools.session, 0
        await asyncio.sleep(min(LEAST_BEAT, session.lease_term / 3))
        while True:
            self.status.changed.clear()
            try:
                if await self._beat():
                    return "the server cancelled it"
                failures = 0
            except FedlinkError as e:
                if e.reason is Reason.TASK_COMPLETED:
                    # The verdict is on its way to `deliver`. A server that loses the update opens the task again.
                    await asyncio.sleep(session.lease_term / 3)
                    continue
                if e.reason in TASK_OVER:
                    return e.message
                if not e.reason.retryable:
                    raise
                failures += 1
                await asyncio.sleep(min(BACKOFF.wait(e, failures, self._tools.rng), session.lease_term / 3))
                continue
            third = session.lease_term / 3
            least = min(LEAST_BEAT, third)
            await asyncio.sleep(least)
            # Not `wait_for`: in Python 3.11 it may swallow a cancellation, and nothing else ends this loop.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(third - least):
                    await self.status.changed.wait()

    async def _beat(self) -> bool:
        status, session = self.status, self._tools.session
        cancelled = await session.extend(self.held.token, status.activity, status.done, status.total)
        if status.points and not cancelled:
            points, status.points = status.points, {}
            await session.report(self.held.token, points)
        return cancelled

    async def _compute(self, get_trainer: GetTrainer) -> None:
        tools = self._tools
        if self._terms is None:
            raise Refused(f"this site has no workload {self.order.workload}")
        self._computation = Computation(tools, self.order, self._terms, self.status, self._log)
        result = await self._computation.run(get_trainer)
        self._ahead = self._computation.ahead
        reach("update.computed")
        trained = self.held.trained(self._outcome(result), boot_id() if self.order.update else "")
        await self._until_it_works(lambda: tools.on_disk(self._keep_result, trained), hopeless=_NOT_KEPT)
        self.held = trained
        await tools.transfer.let_go(self.held.token)

    async def _secure(self) -> None:
        """Have a result that is not over soon survive a power loss."""
        clock = asyncio.get_running_loop().time
        due, still = clock() + SECURE_AFTER, False
        while clock() < due and not still:
            await asyncio.sleep(STILL / 4)
            still = not self.held.completed and clock() - self.status.moved > STILL
        spool, token = self._tools.spool, self.held.token
        try:
            await self._until_it_works(lambda: asyncio.to_thread(spool.keep_files, token), hopeless=_NOT_KEPT)
            self.held = self.held.secured()
            await self._until_it_works(lambda: self._tools.on_disk(spool.put, self.held))
            self._log.info("synced the result")
        except OSError as e:
            self._log.error("a result could not be synced; it is safe while the machine runs", error=e.strerror)

    async def _until_it_works(self, act: Callable[[], Awaitable[_T]], hopeless: frozenset[int] = _GONE) -> _T:
        """Do something with a finished result, again and again whatever the site's system says but what is hopeless.

        The disk may be full, read-only or away, files or memory short: all of it may pass, and hours of training are
        not given up for it.
        """
        attempts, seldom = 0, log.Seldom()
        while True:
            try:
                return await act()
            except OSError as e:
                if e.errno in hopeless:
                    raise
                await asyncio.to_thread(self._tools.spool.recycler.clear)
                if seldom.due():
                    self._log.error("the site's system refuses; the finished result waits", error=e.strerror)
                attempts += 1
                await asyncio.sleep(BACKOFF.delay(attempts, self._tools.rng))

    def _keep_result(self, trained: Held) -> None:
        spool, token = self._tools.spool, self.held.token
        if self.order.update:
            drop_model_files(spool.model_dir(token))
            if not trained.boot:
                spool.keep_files(token)
        spool.put(trained)

    def _outcome(self, result: Result) -> Outcome:
        assert self._terms is not None
        if wanted := self.order.calibrate:
            found = {name: float(value) for name, value in result.found.items() if name in wanted}
            return Outcome(num_examples=0, steps=result.steps, metrics=found, compute_seconds=result.compute_seconds)
        for name in result.metrics:
            if not self._terms.allows_metric(name):
                self._say_dropped(self.order.workload, name)
        return Outcome(
            num_examples=result.num_examples,
            steps=result.steps,
            metrics=self._terms.let_out(result.metrics),
            compute_seconds=result.compute_seconds,
            examples_seen=result.examples_seen,
            cut=result.cut,
            files=tuple(f.name for f in result.files),
        )

    async def _deliver(self) -> bool:
        tools, token, outcome = self._tools, self.held.token, self.held.outcome
        assert outcome is not None
        self.status.enter("uploading")
        began = time.monotonic()
        if self.order.update and self._encoded is None:
            self._encoded = await self._encode(outcome)
            reach("update.encoded")
        if self._encoded and self.held.stage is Stage.TRAINED:
            with _already_completed():
                await self._send(self._encoded, but=self._ahead.sent if self._ahead else ())
            self._ahead = None
            reach("update.sent")
        update = self._encoded.manifest.ref if self._encoded else None
        attempts = 0
        while True:
            try:
                verdict = await tools.session.complete(token, outcome, update)
                reach("update.answered")
            except FedlinkError as e:
                if e.reason is not Reason.BLOB_MISSING or self._encoded is None:
                    raise
                self._log.warning("the server asks for the update again", error=e.message)
                await self._send(self._encoded)
                verdict = None
            self.status.advance(self.status.done, self.status.total)
            if verdict and verdict.accepted is not None:
                break
            attempts += 1
            await asyncio.sleep(BACKOFF.delay(attempts, tools.rng))
        if verdict.accepted:
            self._log.info("accepted", activity=self.order.activity, seconds=since(began))
        else:
            self._log.error("refused", reason=verdict.reason, tensor=verdict.tensor, error=verdict.message)
        return verdict.accepted

    async def _encode(self, outcome: Outcome) -> Encoded:
        spool, token, named = self._tools.spool, self.held.token, dict[str, LocalBlob]()
        if self._ahead:
            await self._ahead.finish()
            named = self._ahead.named
        act = partial(encode, self.order, spool.model_dir(token), spool.update_dir(token), outcome.files, named)
        return await self._until_it_works(lambda: asyncio.to_thread(act))

    async def _send(self, update: Encoded, but: Collection[LocalBlob] = ()) -> None:
        send = self._tools.transfer.send
        await self._until_it_works(lambda: send(self.held.token, update, self.status.advance, but))


@contextlib.contextmanager
def _already_completed() -> Iterator[None]:
    """Pass over the answer that the result was handed in, by an earlier life: CompleteTask knows the verdict."""
    try:
        yield
    except FedlinkError as e:
        if e.reason is not Reason.TASK_COMPLETED:
            raise


def _unavailable(error: FedlinkError | OSError) -> TaskFailure:
    if isinstance(error, OSError):
        return TaskFailure("unavailable", f"the site's disk: {error.strerror}", retryable=True)
    if error.reason in TASK_OVER | SESSION_OVER:
        raise error
    passing = error.reason.retryable or error.reason in (Reason.BLOB_CORRUPT, Reason.BLOB_NOT_FOUND)
    return TaskFailure("unavailable", error.message, retryable=passing)
