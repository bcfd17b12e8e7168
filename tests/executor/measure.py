"""Runs one execution in a fresh process and says what it took: `measure.py SOURCE DST KIND TENSORS MEMORY`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ckptconv.executor.execute import ExecuteOptions, execute, peak_memory
from ckptconv.nodes import concat
from ckptconv.plan import Plan
from ckptconv.testing.plans import carve, plain_file, summed_file


def plan_of(kind: str, source: Path, tensors: int) -> Plan:
    """`copy`: as they are; `split`: row-parallel over four ranks; `turn`: transposed; `small`: 64 KB each."""
    shape = (32, 1024) if kind == "small" else (4096, 1536)
    found = list(enumerate(carve(source, [shape] * tensors)))
    if kind == "split":
        width = shape[1] // 4
        ranks = [[(f"t{i}", t.narrow(1, r * width, r * width + width)) for i, t in found] for r in range(4)]
        return Plan(tuple(summed_file(f"rank{r}", rank) for r, rank in enumerate(ranks)))
    if kind == "turn":
        return Plan((plain_file("all", [(f"t{i}", t.permute((1, 0))) for i, t in found]),))
    if kind == "joined":
        parts = [concat([t.narrow(1, k * 96, k * 96 + 96) for k in range(15, -1, -1)], 1) for _, t in found]
        return Plan((plain_file("all", [(f"t{i}", t) for i, t in enumerate(parts)]),))
    return Plan((summed_file("all", [(f"t{i}", t) for i, t in found]),))


def main() -> None:
    source, dst, kind, tensors, memory = sys.argv[1:]
    start = peak_memory()
    plan = plan_of(kind, Path(source), int(tensors))
    planned = peak_memory()
    report = execute(plan, Path(dst), ExecuteOptions(memory=int(memory), workers=4, durable=False))
    told = {"start": start, "planned": planned, "peak": report.peak_memory, "written": report.bytes_written}
    sys.stdout.write(json.dumps({**told, "seconds": report.seconds}))


if __name__ == "__main__":
    main()
