"""The table of goldens: each comparison carried out by itself, a line for it, and what differs."""

from __future__ import annotations

import argparse
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

SHOWN = 8  # differences of one comparison
Check = Callable[[Path], list[str]]


def arguments(usage: str | None) -> argparse.Namespace:
    """`folder`, and `only`: a part of the names that count."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="outputs whose name has this text")
    return parser.parse_args()


def print_table(checks: Iterable[tuple[str, str, Check]], only: str) -> tuple[int, int]:
    """Carries out those (output, what is compared, comparison) that count; how many passed and how many failed."""
    passed = failed = 0
    for title, what, check in checks:
        if only not in title:
            continue
        wrong = _run(check)
        passed, failed = passed + (not wrong), failed + bool(wrong)
        print(f"{'BAD' if wrong else 'ok '}  {title:55} {what}", flush=True)
        for line in wrong[:SHOWN] + ([f"… and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []):
            print(f"       {line[:300]}")
    return passed, failed


def _run(check: Check) -> list[str]:
    with tempfile.TemporaryDirectory() as work:
        try:
            return check(Path(work) / "out")
        except Exception as error:  # noqa: BLE001 (a row of the table, whatever it is)
            where = traceback.extract_tb(error.__traceback__)[-1]
            return [
                f"{type(error).__name__}: {error}".replace("\n", " ") + f" ({Path(where.filename).name}:{where.lineno})"
            ]
