"""The trainer's end of the pipe to the daemon."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import threading
from collections.abc import Mapping
from typing import Any

from fedclient.trainer.wire import MAX_LINE


class Pipe:
    """Messages in and out; a thread of its own reads, so that a busy trainer still hears the daemon go.

    At end-of-file, or when the daemon sends what is no message, the process and its children end at once.
    """

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._socket = socket.socket(fileno=fd)
        self._messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self._shards: queue.Queue[str] = queue.Queue()
        self._cancelled = threading.Event()
        self._writing = threading.Lock()
        threading.Thread(target=self._read, name="fedclient-pipe", daemon=True).start()

    def receive(self) -> dict[str, Any]:
        """Wait for the next job, or the start; its coming takes back an earlier "cancel"."""
        return self._messages.get()

    def shard(self, wait: float) -> str | None:
        """The name of the next shard of the job under way; None after so many seconds, or at once if cancelled."""
        with contextlib.suppress(queue.Empty):
            return self._shards.get(timeout=wait) or None
        return None

    def cancelled(self) -> bool:
        """Whether the daemon has cancelled the job under way."""
        return self._cancelled.is_set()

    def send(self, kind: str, table: Mapping[str, Any]) -> None:
        """Send one message."""
        line = json.dumps({"type": kind, **table}, allow_nan=False).encode() + b"\n"
        with self._writing:
            self._socket.sendall(line)

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                while (line := lines.readline(MAX_LINE)).endswith(b"\n"):
                    message = json.loads(line)
                    if message["type"] == "cancel":
                        self._cancelled.set()
                        self._shards.put("")
                    elif message["type"] == "shard":
                        self._shards.put(message["name"])
                    else:
                        self._cancelled.clear()
                        # What is left there was told for a job that is over.
                        self._shards = queue.Queue()
                        self._messages.put(message)
        finally:
            end_group()


def end_group() -> None:
    """End this process, and those it started."""
    # The children first (data loaders hold the accelerator too); whoever started this process made it lead a group.
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)
