"""Updates that were accepted, and whose bytes have changed on the disk since, or are gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable

from fedlink import log as logs
from fedlink.errors import FedlinkError, Reason
from fedserver.rounds.model import Round, TaskState
from fedserver.runtime.parts import Parts
from fedserver.store.queries.tasks import round_tasks
from fedserver.store.rows import RunRow, TaskRow

ASK_AGAIN = 3
"""Times a site is asked again for one update."""


class LostUpdates:
    """Has the sites of one run asked for such updates once more; they keep what they sent for that.

    Args:
        run: whose updates these are.
        parts: the rest of the server.
        counts: whether a client's update is one of those that an attempt at a round adds up; it may change meanwhile.
        ask_again: takes an update back in its round and has its site send it; False if it counts there no more.
    """

    def __init__(
        self,
        run: RunRow,
        parts: Parts,
        *,
        counts: Callable[[str, Round], bool],
        ask_again: Callable[[TaskRow, Round], Awaitable[bool]],
    ) -> None:
        self._run_id = run.id
        self._parts = parts
        self._counts = counts
        self._ask_again = ask_again
        self._asked: Counter[int] = Counter()
        self._log = logs.get("rounds").bind(run=run.name)

    async def asked_again(self, current: Round, error: FedlinkError) -> bool:
        """If an error says that an update has changed or is gone: ask its site for it.

        Returns:
            False if it is something else, or the site was asked too often already.
        """
        client = error.metadata.get("client", "")
        if error.reason is Reason.BLOB_CORRUPT and not client and "digest" in error.metadata:
            await self._parts.integrity.note(bytes.fromhex(error.metadata["digest"]), error)
        if error.reason not in (Reason.BLOB_CORRUPT, Reason.BLOB_MISSING) or not client:
            return False
        number, attempt = current.number, current.attempt
        tasks = await self._parts.database.run(lambda c: round_tasks(c, self._run_id, number, attempt))
        lost = next((t for t in tasks if t.client == client and t.state == TaskState.ACCEPTED), None)
        if not self._counts(client, current) or lost is None or self._asked[lost.id] >= ASK_AGAIN:
            return not self._counts(client, current)
        self._log.error("asks for an update again", round=current.number, client=client, because=error.message)
        # Without the driver's lock: a large update takes minutes, and the clock of every run would stop meanwhile.
        await self._parts.versions.reverify(lost)
        if await self._ask_again(lost, current):
            self._asked[lost.id] += 1
        return True
