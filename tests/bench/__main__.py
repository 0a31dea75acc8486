"""Measure the table of targets: `make bench`.

    python -m tests.bench [--rows a,b] [--repeat N] [--dir DIR] [--idle-clients N]
    python -m tests.bench --list | --markdown | --plot

Progress goes to stderr, the table to stdout; DIR/results.json and DIR/results.png hold the latest of every row.
docs/performance.md says what each row measures.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tests.bench import report
from tests.bench.bench_round import fresh_processes, interruptible
from tests.bench.place import IN_MEMORY, REPOSITORY, BenchError, file_system
from tests.bench.table import Found, Ground, Row, SkippedRow, summary
from tests.bench.targets import ROWS


def measure(rows: Sequence[Row], given: argparse.Namespace, results: dict[str, Any], path: Path) -> None:
    """Run rows one after the other; each one's results are written before the next one begins."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for number, row in enumerate(rows, 1):
            title = f"{row.name} ({number} of {len(rows)})"
            load, commit = os.getloadavg()[0], _commit()
            console.print(f"[bold]{title}[/]: {row.what}; load average {load:.2f}")
            task = progress.add_task(title, total=None)
            row_began = time.monotonic()

            def say(line: str, since: float = row_began) -> None:
                console.print(f"{time.monotonic() - since:7.1f} s  {line}", markup=False)

            ground = Ground(given.dir, given.repeat or row.repeat, given.idle_clients, say)
            outcome = _outcome(row, ground)
            progress.remove_task(task)
            seconds = time.monotonic() - row_began
            now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
            results["rows"][row.name] = {
                "when": now,
                "commit": commit,
                "load_average": round(load, 2),
                "seconds": round(seconds, 1),
                "repeat": ground.repeat,
                **outcome,
            }
            path.write_text(json.dumps(results, indent=1), encoding="utf-8")
            console.print(f"{row.name} took {seconds:.0f} s; {time.monotonic() - began:.0f} s in all")


def _outcome(row: Row, ground: Ground) -> dict[str, Any]:
    """What a row gives, or why it gives nothing; one that fails does not stop the others."""
    found = Found()
    try:
        found = row.run(ground)
    except SkippedRow as e:
        ground.say(f"skipped: {e}")
        return {"values": {}, "details": {}, "skipped": str(e)}
    except Exception as e:  # noqa: BLE001 - whatever it is, the other rows are wanted
        if not isinstance(e, BenchError):
            traceback.print_exc()
        ground.say(f"failed: {e}")
        return {"values": {}, "details": {}, "error": (str(e).splitlines() or [type(e).__name__])[0]}
    return {"values": summary(found.values), "details": found.details}


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _machine() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9,
        "system": f"{platform.system()} {platform.release()}",
        "python": f"Python {platform.python_version()}",
    }


def _chosen(names: str) -> list[Row]:
    """Rows by their names, with commas between; all if there is none.

    Raises:
        argparse.ArgumentTypeError: there is no such row.
    """
    known = {row.name: row for row in ROWS}
    wanted = [name for name in names.split(",") if name]
    if unknown := [name for name in wanted if name not in known]:
        raise argparse.ArgumentTypeError(f"there is no row {unknown[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in wanted] or list(ROWS)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="bench", description="Measure the table of targets.")
    parser.add_argument("--rows", type=_chosen, default=list(ROWS), metavar="a,b", help="only these rows")
    parser.add_argument("--repeat", type=int, default=0, help="how often each; by default what the row says")
    parser.add_argument("--dir", type=Path, default=REPOSITORY / ".bench", help="on a disk")
    parser.add_argument("--idle-clients", type=int, default=1000, help="of the row idle1000")
    parser.add_argument("--list", action="store_true", help="list the rows, and measure nothing")
    parser.add_argument("--markdown", action="store_true", help="print the latest results, and measure nothing")
    parser.add_argument("--plot", action="store_true", help="draw the latest results again, and measure nothing")
    given = parser.parse_args()
    if given.list:
        print("\n".join(f"{row.name:11} {row.what}: {', '.join(t.what for t in row.targets)}" for row in ROWS))
        return 0
    path, picture = given.dir / "results.json", given.dir / "results.png"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}
    if given.markdown:
        print(report.markdown(given.rows, results))
        return 0
    if not given.plot:
        given.dir.mkdir(parents=True, exist_ok=True)
        if (kind := file_system(given.dir)) in IN_MEMORY:
            parser.error(f"{given.dir} is in memory ({kind}), not on a disk; name another directory with DIR=")
        interruptible()
        fresh_processes()
        results["machine"] = _machine()
        try:
            measure(given.rows, given, results, path)
        except KeyboardInterrupt:
            print("bench: interrupted; its processes are ended", file=sys.stderr)
            return 130
    report.draw(ROWS, results, picture)
    report.show(given.rows, results, Console(width=160))
    print(f"results  {path}\nplot     {picture}")
    if missing := report.not_met(given.rows, results):
        print("\nnot met:\n" + "\n".join(f"  {line}" for line in missing))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
