"""Runs one execution and kills itself at a chosen call of the system: `child.py SOURCE DST SCALE SINGLE FORCE PHASE NUMBER`.

A phase that never comes (`-`) runs to the end and prints how many calls each phase made. Writes are cut in half before the kill.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from ckptconv.executor import complete, destination, execute, fingerprint, journal, worker
from ckptconv.plan import File, Late, Plan, Segment
from ckptconv.testing.plans import mixed_plan

PHASES = ["planning", "first", "middle", "final", "rename"]
CALLS = ["pwrite", "fsync", "fdatasync", "rename", "link", "unlink", "rmdir", "ftruncate", "makedirs", "open", "stat"]


def single_plan(source: Path, scale: int) -> Plan:
    """The files of `mixed_plan` one behind another in a single one, as in a tar."""
    plan = mixed_plan(source, scale)
    segments: list[Segment] = []
    at = 0
    for file in plan.files:
        first = len(segments)
        for s in file.segments:
            body = s.body
            if isinstance(body, Late):
                body = Late(body.template, tuple((position, first + of) for position, of in body.crcs))
            segments.append(Segment(at + s.offset, body, s.name and f"{file.path}: {s.name}"))
        at += file.size
    return replace(plan, files=(File("title", at, tuple(segments)),), single=True)


class Killer:
    """Counts calls in each phase; at the chosen one, no more happens."""

    def __init__(self, phase: str, number: int) -> None:
        self.aim, self.phase, self.count, self.lock = (phase, number), PHASES[0], Counter[str](), Lock()

    def on(self, owner: Any, name: str, enter: str | None = None, leave: str | None = None) -> None:
        """Count calls of a function; the phase changes before or behind it."""
        real: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if enter:
                self.advance(enter)
            with self.lock:
                self.count[self.phase] += 1
                if self.aim == (self.phase, self.count[self.phase]):
                    if name == "pwrite":
                        real(args[0], memoryview(args[1])[: len(args[1]) // 2], args[2])
                    os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if leave:
                self.advance(leave)
            return result

        setattr(owner, name, counted)

    def advance(self, phase: str) -> None:
        with self.lock:
            self.phase = max(self.phase, phase, key=PHASES.index)


def main() -> None:
    source, dst, scale, single, force, phase, number = sys.argv[1:]
    killer = Killer(phase, int(number))
    worker.BARRIER = 1 << 20
    for name in CALLS:
        killer.on(os, name)
    for owner, name in [(fingerprint, "identity"), (execute, "locate"), (execute, "fit"), (destination, "exchange")]:
        killer.on(owner, name)
    killer.on(journal.Journal, "begin", enter="first")
    killer.on(worker.Ledger, "finished", leave="middle")
    killer.on(complete.Completion, "write_rest", enter="final")
    killer.on(journal.Journal, "finish", enter="rename")
    options = execute.ExecuteOptions(force=force == "1", workers=2)
    plan = (single_plan if single == "1" else mixed_plan)(Path(source), int(scale))
    execute.execute(plan, Path(dst), options)
    sys.stdout.write(json.dumps(killer.count))


if __name__ == "__main__":
    main()
