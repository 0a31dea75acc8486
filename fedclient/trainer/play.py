"""One run of a script, from its start to its end: the script on the main thread, the job on the worker's.

The two take turns. The worker lets the script run up to `load`, loads the weights into its
model, lets it train up to `save`, writes the update, and lets it run to its end. So each thread
finds the model as the other has left it, and the script never notices that it is interrupted.
"""

from __future__ import annotations

import contextlib
import enum
import os
import queue
import runpy
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedclient.trainer.api import CancelledJob, Context

GLOBAL = "__fedclient__"
"""The name in a script's globals by which what it calls finds its `Play`; also from threads of its own."""
Evaluate = Callable[[Any], Mapping[str, float]]
"""Measures a model: metrics, and the count `num_examples`."""
_ALIVE_EVERY = 0.25


class ScriptError(Exception):
    """The script did not do what it is to do; the message says what to change in it."""


class _LeftError(BaseException):
    """Ends a script whose job is over; not an Exception, so that ordinary handlers let it through."""


class Place(enum.Enum):
    """Where a script hands over."""

    LOADED = "load"
    MEASURED = "what load was given as evaluate"
    SAVED = "save"
    OVER = "its end"


class Play:
    """One run of a script.

    Args:
        script: the file.
        args: its `sys.argv` after its own name.
        context: of the job; `settings` may be None.

    Attributes:
        context: of the job.
        model: what the script gave to `load`.
        evaluate: how it measures it, or None.
    """

    def __init__(self, script: Path, args: Sequence[str], context: Context) -> None:
        self.context = context
        self.model: Any = None
        self.evaluate: Evaluate | None = None
        self._script = script
        self._args = args
        self._came: queue.SimpleQueue[Place] = queue.SimpleQueue()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._place: Place | None = None
        self._over = False
        self._error: BaseException | None = None
        self._cancelled = False
        self._context_lock = threading.Lock()
        self._steps_itself = False

    # --- On the main thread

    def perform(self) -> None:
        """Run the script."""
        try:
            with _surroundings(self._script, self._args):
                runpy.run_path(str(self._script), init_globals={GLOBAL: self}, run_name="__main__")
        except _LeftError:
            pass
        except SystemExit as e:
            if e.code not in (None, 0):
                self._error = e
        except BaseException as e:  # noqa: BLE001 - whatever it is, the other thread raises it again
            self._error = e
        self._came.put(Place.OVER)

    def load(self, model: Any, evaluate: Evaluate | None) -> None:
        """Hand the model over, and come back when the round's weights are in it."""
        if self.model is not None:
            raise ScriptError(f"{self._script.name}: load was called before; call it once, before the training")
        self.model, self.evaluate = model, evaluate
        self._hand_over(Place.LOADED)

    def save(self, model: Any, num_examples: int, metrics: Mapping[str, Any]) -> None:
        """Hand the trained model over, and come back when the update is written."""
        if self.model is None:
            raise ScriptError(f"{self._script.name}: save was called before load")
        if self._place is Place.SAVED:
            raise ScriptError(f"{self._script.name}: save was called before; call it once, after the training")
        if _inner(model) is not _inner(self.model):
            raise ScriptError(f"{self._script.name}: save was given another model than load")
        self.rest()
        with self._context_lock:
            self.context.num_examples = num_examples
            self.context.log(**metrics)
        self._hand_over(Place.SAVED)

    def step(self, total: int = 0) -> bool:
        """Count a step; whether another may follow.

        Raises:
            CancelledJob: the job is over.
        """
        self._begin_steps()
        return self.context.count_step(total)

    def batches(self, data: Iterable[Any]) -> Iterator[Any]:
        """The batches of an epoch, each of them a step."""
        self._begin_steps()
        yield from self.context.batches(data)
        self.rest()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Keep the last value of each metric."""
        with self._context_lock:
            self.context.log(**metrics)

    def alive(self) -> None:
        """Say that the script gets on.

        Raises:
            CancelledJob: the job is over.
        """
        with self._context_lock:
            self.context.alive()

    def rest(self) -> None:
        """No steps follow for now: until the next one, that the script runs is sign of life enough."""
        self._steps_itself = False

    def _begin_steps(self) -> None:
        if not self._steps_itself:
            with self._context_lock:
                self._steps_itself = True

    def _hand_over(self, place: Place) -> None:
        self._place = place
        self._came.put(place)
        while (call := self._calls.get()) is not None:
            call()

    # --- On the worker's thread

    @property
    def saved(self) -> bool:
        """Whether the script has handed over its trained model."""
        return self._place is Place.SAVED

    def until(self, place: Place) -> None:
        """Wait until the script has come to a place.

        Raises:
            ScriptError: it ended before.
            CancelledJob: it ended because the job was cancelled.
            BaseException: what the script raised.
        """
        came = self._next()
        if self._cancelled:
            raise CancelledJob
        if came is place and self._error is None:
            return
        error, self._error = self._error, None
        if isinstance(error, SystemExit):
            raise ScriptError(f"{self._script.name} called sys.exit({error.code!r})") from error
        if error is not None:
            raise error
        hint = " (is that behind a condition, or a function that nobody calls?)" if place is Place.LOADED else ""
        raise ScriptError(f"{self._script.name} ended without calling {place.value}{hint}")

    def go_on(self) -> None:
        """Let the script come back from where it has handed over."""
        self._calls.put(None)

    def measure(self) -> Mapping[str, float]:
        """Call the script's `evaluate` where the script runs.

        Raises:
            ScriptError: it has none.
            BaseException: what it raised.
        """
        evaluate, found = self.evaluate, list[Mapping[str, float]]()
        if evaluate is None:
            raise ScriptError(f"{self._script.name}: load was called without evaluate this time")

        def call() -> None:
            with _no_gradients():
                found.append(evaluate(self.model))
            self._came.put(Place.MEASURED)

        self._calls.put(call)
        self.until(Place.MEASURED)
        return found[0]

    def leave(self) -> None:
        """End the script where it has handed over, if it has not ended; what it does then is no matter."""
        if self._place is None or self._over:
            return
        self._calls.put(_leave)
        # One that catches everything comes to another place first.
        while self._next() is not Place.OVER:
            self._calls.put(_leave)

    def _next(self) -> Place:
        while True:
            with contextlib.suppress(queue.Empty):
                came = self._came.get(timeout=_ALIVE_EVERY)
                self._over = came is Place.OVER
                return came
            self._show_life()

    def _show_life(self) -> None:
        # A script that counts its own steps says so itself, and is watched for hangs between two of them.
        with self._context_lock:
            if self._steps_itself or self._cancelled:
                return
            try:
                self.context.alive()
            except CancelledJob:
                # Its next step ends it; the daemon does not wait for that for ever.
                self._cancelled = True


def _leave() -> None:
    raise _LeftError


def _inner(model: Any) -> Any:
    """A model without what wraps it: DistributedDataParallel, DataParallel, torch.compile."""
    while (inner := next((i for n, i in _children(model) if n in ("_orig_mod", "module")), None)) is not None:
        model = inner
    return model


def _children(model: Any) -> Iterable[tuple[str, Any]]:
    named = getattr(model, "named_children", None)
    return named() if callable(named) else ()


@contextlib.contextmanager
def _no_gradients() -> Iterator[None]:
    # Whether gradients are tracked is known by thread.
    torch = sys.modules.get("torch")
    with contextlib.nullcontext() if torch is None else torch.no_grad():
        yield


@contextlib.contextmanager
def _surroundings(script: Path, args: Sequence[str]) -> Iterator[None]:
    """What a script finds when it is run by hand; afterwards the next run finds it, too."""
    argv, path, environ, directory = sys.argv, list(sys.path), dict(os.environ), Path.cwd()
    before = set(sys.modules)
    sys.argv = [str(script), *args]
    sys.path.insert(0, str(script.parent))
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_grad_enabled(True)
    try:
        yield
    finally:
        sys.argv = argv
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environ)
        os.chdir(directory)
        for name in set(sys.modules) - before:
            if _is_beside(sys.modules[name], script.parent):
                del sys.modules[name]


def _is_beside(module: Any, directory: Path) -> bool:
    """Whether a module is one of the script's own, which a fresh run is to import afresh."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or not file.endswith(".py"):
        return False
    path = Path(file)
    return path.is_relative_to(directory) and not {"site-packages", "dist-packages"} & set(path.parts)
