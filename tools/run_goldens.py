"""Runs every golden of a folder through ckptconv and prints a table; exits 1 on any difference.

usage: python tools/run_goldens.py FOLDER [--only TEXT]
FOLDER holds CASE/case.json, CASE/hf and CASE/out-*, as written by the official converters, or CASE/ckpt and CASE/hf:
distributed checkpoints of Megatron-Core.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tools.golden_args import Row, args_rows, unexplained
from tools.golden_cases import goldens, with_optimizer
from tools.golden_checks import backward, forward, weights_of_training
from tools.golden_dist import back, distributed
from tools.golden_table import Check, arguments, print_table


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
    asked = arguments(__doc__)
    passed, failed = print_table(checks(asked.folder), asked.only)
    rows = [] if asked.only else args_of_all(asked.folder)
    if rows:
        print_args(rows)
    lost = unexplained(rows)
    print(f"\n{passed} passed, {failed + len(lost)} failed")
    return 1 if failed or lost or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
