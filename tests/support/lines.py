"""Two sites of a shared server, each behind a line of its own, and their run, whose weights a test can foretell."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np

from fedlink.v1 import admin_service_pb2 as admin_pb
from fedlink.v1 import types_pb2
from tests.support import hasty
from tests.support.classes.drift import expected
from tests.support.federation import Federation, Site, arrays_equal, until
from tests.support.line import Line

SIZE = 2_600_000
UPDATE = 4 * SIZE
"""Bytes of an update, and of a model."""
START = {"w": np.random.default_rng(3).normal(size=SIZE).astype(np.float32), "b": np.zeros(3, np.float32)}
EXAMPLES = {"a": (1, 30), "b": (2, 11)}
"""Number and examples of each site."""


class Pair:
    """Sites `a` and `b` of one run; a context manager, at whose end their daemons are gone.

    Args:
        federation: with a server that has the model "start".
        name: of the run and of its workload; also begins the sites' names.
        patient: whether the daemons have the patience of real ones.
        extra: further keys of site.toml.
    """

    def __init__(self, federation: Federation, name: str, *, patient: bool = True, **extra: Any) -> None:
        self.federation = federation
        self.name = name
        self._stack = contextlib.ExitStack()
        self.lines = {key: Line(federation.address) for key in EXAMPLES}
        self.line = self.lines["a"]
        for key, (number, examples) in EXAMPLES.items():
            data = {"size": SIZE, "number": number, "examples": examples}
            site = federation.site(
                f"{name}-{key}",
                "drift:Drift",
                workload=name,
                data=data,
                server=self.lines[key].address,
                extra=extra,
                start=False,
            )
            if not patient:
                site.command = [hasty.__file__, str(site.config)]
            setattr(self, key, site)

    a: Site
    b: Site

    def __enter__(self) -> Self:
        for line in self.lines.values():
            self._stack.enter_context(line)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        for site in (self.a, self.b):
            if site.daemon:
                site.daemon.clean()
        self._stack.__exit__(exc_type, exc, tb)

    def begin(self, rounds: int, **tables: Any) -> None:
        """Create the run."""
        table = {"name": self.name, "workload": self.name, "model": "start", "rounds": rounds}
        table |= {"evaluation": {"enabled": False}, "cohort": {"min_clients": 2}, **tables}
        request = admin_pb.CreateRunRequest(spec_json=json.dumps(table), request_id=os.urandom(16))
        with self.federation.admin() as stub:
            stub.CreateRun(request, timeout=60)
        self._rounds = rounds

    def state(self, number: int, site: Site) -> int:
        """The state of a site's training task."""
        found = self.federation.round(self.name, number)
        tasks = found.tasks if found else ()
        return next((t.state for t in tasks if t.client == site.name and t.kind == "train"), 0)

    def accepted(self, number: int, site: Site) -> bool:
        """Whether a site's update to a round is in."""
        return self.state(number, site) == types_pb2.TASK_STATE_ACCEPTED

    def until_accepted(self, number: int, site: Site) -> None:
        """Wait for it."""
        until(lambda: self.accepted(number, site), f"update {number} of {site.name}")

    def finished(self) -> None:
        """The run completes, its weights are exact, and no update that was there was computed again."""
        self.federation.until_version(self.name, self._rounds)
        got = self.federation.export(f"{self.name}@{self._rounds}")
        arrays_equal(got, expected(START, EXAMPLES.values(), self._rounds))
        for site in (self.a, self.b):
            assert [r for r, _ in site.trained] == list(range(1, self._rounds + 1))
            assert site.daemon
            assert site.daemon.running, site.daemon.text()


@contextlib.contextmanager
def server_with_start(federation: Federation) -> Iterator[Federation]:
    """A federation whose server has the model."""
    with federation:
        federation.start_server("--log-level", "debug", max_poll_wait=1.0)
        federation.import_model("start", START)
        yield federation
