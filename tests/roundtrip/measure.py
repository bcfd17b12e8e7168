"""One job in a fresh process, and what it took: `measure.py plan SOURCE LAYOUT` or `measure.py convert SOURCE DST SAVER LAYOUT MEMORY`.

A fresh one because a forked process inherits its parent's peak. What a job imports when first used is imported before the
clock starts; LAYOUT is JSON. One line of JSON is printed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from ckptconv import ExecuteOptions, Job, Tensor, convert, prepare
from ckptconv.formats import hf, mcore, mcore_dist
from ckptconv.layout import layout_from

LOADED = hf, mcore, mcore_dist


def noted(file: str, field: str) -> int:
    """A number of /proc/self; kB become bytes."""
    (line,) = (x for x in Path("/proc/self", file).read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * (1024 if line.endswith("kB") else 1)


def plan(source: str, layout: str) -> dict[str, float]:
    asked = json.loads(layout)
    counts = asked.pop("pp_layers", None)
    job = Job(Path(source), saver="mcore", layout=layout_from(asked, counts))
    base, read, start = noted("status", "VmHWM"), noted("io", "rchar"), time.process_time()
    files = prepare(job).plan.files
    seconds = time.process_time() - start
    return {
        "seconds": seconds,
        "peak": noted("status", "VmHWM"),
        "grown": noted("status", "VmHWM") - base,
        "read": noted("io", "rchar") - read,
        "files": len(files),
        "tensors": sum(isinstance(s.body, Tensor) for file in files for s in file.segments),
        "bytes": sum(file.size for file in files),
    }


def run(source: str, dst: str, saver: str, layout: str, memory: str) -> dict[str, float]:
    options = ExecuteOptions(memory=int(memory), durable=False)
    report = convert(source, dst, saver=saver, execute_options=options, **json.loads(layout))
    return {"peak": noted("status", "VmHWM"), "tensors": report.tensors, "written": report.bytes_written}


def main() -> None:
    kind, *rest = sys.argv[1:]
    sys.stdout.write(json.dumps((plan if kind == "plan" else run)(*rest)))


if __name__ == "__main__":
    main()
