"""One child process with a control pipe: spawned, spoken to, killed with everything it started."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from fedclient.trainer.descent import kill_descendants
from fedclient.trainer.wire import MAX_LINE
from fedlink.errors import FedlinkError, Reason

LOG_LIMIT = 4 << 20
"""Bytes in a log file before it is renamed to NAME.1 and begun anew."""
TAIL = 4000
"""Bytes of output kept at hand."""
_DRAIN = 1.0


class OutputLog:
    """Copies a process's output into a bounded file, on a thread that ends with the output.

    Args:
        path: the file; appended to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tail = b""
        reading, self.writing_fd = os.pipe()
        self._thread = threading.Thread(target=self._copy, args=(reading,), name="fedclient-output", daemon=True)
        self._thread.start()

    def close_writing(self) -> None:
        """Close this process's copy of the end that the child writes to."""
        os.close(self.writing_fd)

    async def tail(self, *, wait: float) -> str:
        """The last of the output, after waiting at most so many seconds for its end."""
        await asyncio.to_thread(self._thread.join, wait)
        return self._tail.decode(errors="replace")

    def _copy(self, fd: int) -> None:
        with open(fd, "rb", buffering=0) as source:
            while data := source.read(1 << 16):
                self._tail = (self._tail + data)[-TAIL:]
                # A full disk must not stop the trainer, which would block on its output.
                with contextlib.suppress(OSError):
                    self._append(data)

    def _append(self, data: bytes) -> None:
        if self._path.exists() and self._path.stat().st_size + len(data) > LOG_LIMIT:
            self._path.replace(self._path.with_name(self._path.name + ".1"))
        with open(self._path, "ab", opener=_private) as f:
            f.write(data)


class Child:
    """A running child process; made by `spawn`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        output: OutputLog,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._output = output
        self._reaped = asyncio.create_task(self._reap())

    @classmethod
    async def spawn(cls, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path) -> Self:
        """Start `command` with the number of its pipe's descriptor appended, in a session of its own.

        Raises:
            FedlinkError: BAD_CONFIG: it cannot be executed.
        """
        ours, theirs = socket.socketpair()
        output = OutputLog(log)
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output.writing_fd,
                stderr=output.writing_fd,
                pass_fds=(theirs.fileno(),),
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
            )
        except OSError as e:
            ours.close()
            raise FedlinkError(Reason.BAD_CONFIG, f"{command[0]} cannot be run: {e.strerror}") from None
        except asyncio.CancelledError:
            ours.close()
            raise
        finally:
            theirs.close()
            output.close_writing()
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=MAX_LINE)
        return cls(process, reader, writer, output)

    @property
    def alive(self) -> bool:
        """Whether it still runs and listens, as far as is known."""
        return self._process.returncode is None and not self._reader.at_eof()

    async def send(self, kind: str, table: Mapping[str, Any]) -> None:
        """Send one message; a child that is gone is noticed by `receive`."""
        self._writer.write(json.dumps({"type": kind, **table}).encode() + b"\n")
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None when the child is gone, or sends what is no message."""
        try:
            line = await self._reader.readline()
            message = json.loads(line)
        except (ConnectionError, ValueError):
            return None
        return message if isinstance(message, dict) and isinstance(message.get("type"), str) else None

    async def tail(self) -> str:
        """The last of what it printed."""
        return await self._output.tail(wait=0.05 if self.alive else _DRAIN)

    async def end(self) -> int:
        """Make sure that it and all it started are gone; the exit code, negative for a signal.

        A child that closed its pipe by itself gets a moment to exit with a code of its own.
        """
        if self._reader.at_eof():
            await asyncio.wait([self._reaped], timeout=_DRAIN)
        if self._process.returncode is None:
            # Those that lead groups of their own, as each of several processes does, end in no other way.
            kill_descendants(self._process.pid, also=[self._process.pid])
        return await asyncio.shield(self._reaped)

    async def _reap(self) -> int:
        code = await self._process.wait()
        # At once, while the number cannot have been given to anybody else: what it started may outlive it.
        _kill_group(self._process.pid)
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        return code


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
