"""Runs every golden of a folder through ckptconv and prints a table; exits 1 on any difference.

usage: python tools/run_goldens.py FOLDER [--only TEXT]
FOLDER holds CASE/case.json, CASE/hf and CASE/out-*, as written by the official converters, or CASE/ckpt and CASE/hf:
distributed checkpoints of Megatron-Core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tools.golden_args import Row, args_rows, unexplained
from tools.golden_cases import goldens, with_optimizer
from tools.golden_checks import backward, forward, weights_of_training
from tools.golden_dist import back, distributed

Check = Callable[[Path], list[str]]


def checks(folder: Path) -> Iterator[tuple[str, str, Check]]:
    """(output, what is compared, the comparison)."""
    for golden in goldens(folder):
        if golden.command:
            way = "from hf" if golden.source == golden.hf else f"from {golden.source.name}"
            yield golden.title, way, partial(forward, golden)
        yield golden.title, "back to hf", partial(backward, golden)
    for path in with_optimizer(folder):
        yield path.name, "weights, optimizer dropped", partial(weights_of_training, path)
    for saved in distributed(folder):
        yield saved.title, "back to hf", partial(back, saved)


def run(check: Check) -> list[str]:
    with tempfile.TemporaryDirectory() as work:
        try:
            return check(Path(work) / "out")
        except Exception as error:  # noqa: BLE001 (a row of the table, whatever it is)
            where = traceback.extract_tb(error.__traceback__)[-1]
            return [
                f"{type(error).__name__}: {error}".replace("\n", " ") + f" ({Path(where.filename).name}:{where.lineno})"
            ]


def args_of_all(folder: Path) -> list[Row]:
    rows: list[Row] = []
    for golden in goldens(folder):
        if golden.command and golden.source == golden.hf:
            with tempfile.TemporaryDirectory() as work:
                rows += args_rows(golden, Path(work) / "out")
    return rows


def print_args(rows: list[Row]) -> None:
    print("\nargs fields we write with another value than the official tool:\n")
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.field, row.reason), []).append(row)
    for (field, reason), same in sorted(grouped.items()):
        values = sorted({f"{row.theirs} -> {row.ours}" for row in same})
        print(f"  {field}: {', '.join(values)}; in {len(same)} output(s)\n      {reason}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="outputs whose name has this text")
    asked = parser.parse_args()
    failed = total = 0
    for title, what, check in checks(asked.folder):
        if asked.only in title:
            wrong = run(check)
            total, failed = total + 1, failed + bool(wrong)
            print(f"{'ok ' if not wrong else 'BAD'}  {title:55} {what}", flush=True)
            for line in wrong[:8] + ([f"… and {len(wrong) - 8} more"] if len(wrong) > 8 else []):
                print(f"       {line[:300]}")
    rows = [] if asked.only else args_of_all(asked.folder)
    if rows:
        print_args(rows)
    lost = unexplained(rows)
    print(f"\n{total - failed} passed, {failed + len(lost)} failed")
    return 1 if failed or lost or not total else 0


if __name__ == "__main__":
    sys.exit(main())
