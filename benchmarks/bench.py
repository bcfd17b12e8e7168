"""Durable time of conversions against `cp -r` of the same source in the same rounds; prints a table. See results.md.

`bench.py [--gb 1.2] [--rounds 5] [--folder /tmp] [--cold] [CASE ...]`. Every run is a fresh process; a copy counts as done
when each of its files is fsynced. Cold: the source is dropped from the page cache before each run. Needs three times the
disk space of the source. A case is a name and a function from the source folder to a plan: add real conversions to CASES.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from ckptconv.dtypes import BF16, FP32
from ckptconv.executor.execute import ExecuteOptions, execute
from ckptconv.leaves import contiguous
from ckptconv.nodes import concat
from ckptconv.plan import File, Plan
from ckptconv.source import Source
from ckptconv.tensor import Shape, Tensor
from ckptconv.testing.plans import Named, carve, plain_file, summed_file, write_source
from ckptconv.values import Cast

HIDDEN, FFN, HEADS, GROUPS, HEAD = 3072, 8192, 24, 8, 128
SHAPES: dict[str, Shape] = {
    "norm": (HIDDEN,),
    "q": (HEADS * HEAD, HIDDEN),
    "k": (GROUPS * HEAD, HIDDEN),
    "v": (GROUPS * HEAD, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD),
    "gate": (FFN, HIDDEN),
    "up": (FFN, HIDDEN),
    "down": (HIDDEN, FFN),
}
LAYER_BYTES = sum(2 * n * (s[0] if s else 1) for s, n in (((a[1:] or (1,)), a[0]) for a in SHAPES.values()))
SMALL: Shape = (32, 1024)

Layer = dict[str, Tensor]


def layers_of(source: Path) -> list[Layer]:
    """The tensors of a made-up model, one file for every ten layers."""
    found = []
    for path in sorted(source.glob("part*")):
        flat = carve(path, [*SHAPES.values()] * (path.stat().st_size // LAYER_BYTES))
        found += [dict(zip(SHAPES, flat[i : i + len(SHAPES)], strict=True)) for i in range(0, len(flat), len(SHAPES))]
    return found


def write_model(folder: Path, nbytes: int) -> None:
    left, number = max(1, nbytes // LAYER_BYTES), 0
    while left:
        n = min(left, 10)
        write_source(folder / f"part{number:03}", n * LAYER_BYTES, number)
        left, number = left - n, number + 1


def cut(tensor: Tensor, axis: int, rank: int, ranks: int) -> Tensor:
    n = tensor.shape[axis] // ranks
    return tensor.narrow(axis, rank * n, rank * n + n)


def fused(layer: Layer, rank: int, tp: int) -> Iterator[Named]:
    """A layer as Megatron stores it on one rank: query groups interleaved, gate over up, row-parallel outputs."""
    yield "norm", layer["norm"]
    parts = [cut(layer[name], 0, rank, tp) for name in "qkv"]
    groups = GROUPS // tp
    qkv = concat([part.unfold(0, groups, part.shape[0] // groups) for part in parts], 1)
    yield "qkv", qkv.fold(0)
    yield "o", cut(layer["o"], 1, rank, tp)
    yield "fc1", concat([cut(layer["gate"], 0, rank, tp), cut(layer["up"], 0, rank, tp)], 0)
    yield "fc2", cut(layer["down"], 1, rank, tp)


def to_ranks(layers: list[Layer], tp: int, pp: int) -> Plan:
    files = []
    for stage in range(pp):
        mine = list(enumerate(layers))[stage * len(layers) // pp : (stage + 1) * len(layers) // pp]
        for rank in range(tp):
            named = [(f"{i}.{name}", t) for i, layer in mine for name, t in fused(layer, rank, tp)]
            files.append(summed_file(f"mp_rank_{rank:02}_{stage:03}/model.pt", named))
    return Plan(tuple(files))


def from_ranks(source: Path) -> Plan:
    """The model out of what `to_ranks(tp=2, pp=1)` wrote (offsets by running it again over stand-ins)."""
    count = int((source / "layers").read_text())
    flat = carve(source / "nowhere", [*SHAPES.values()] * count)
    wanted = [dict(zip(SHAPES, flat[i : i + 8], strict=True)) for i in range(0, len(flat), 8)]
    ranks = [stored(source, file) for file in to_ranks(wanted, 2, 1).files]
    named: list[Named] = []
    for i in range(count):
        a, b = ({name: rank[f"{i}.{name}"] for name in ("norm", "qkv", "o", "fc1", "fc2")} for rank in ranks)
        halves = [x["qkv"].unfold(0, GROUPS // 2, (HEADS // GROUPS + 2) * HEAD) for x in (a, b)]
        at = 0
        for name, n in (("q", HEADS // GROUPS), ("k", 1), ("v", 1)):
            lo, hi = at * HEAD, (at + n) * HEAD
            named.append((f"{i}.{name}", concat([half.narrow(1, lo, hi).fold(0) for half in halves], 0)))
            at += n
        named += [(f"{i}.norm", a["norm"]), (f"{i}.o", concat([a["o"], b["o"]], 1))]
        named += [
            (f"{i}.{x}", concat([cut(r["fc1"], 0, k, 2) for r in (a, b)], 0)) for k, x in enumerate(("gate", "up"))
        ]
        named.append((f"{i}.down", concat([a["fc2"], b["fc2"]], 1)))
    return Plan((plain_file("model.safetensors", named),))


def stored(folder: Path, file: File) -> dict[str, Tensor]:
    """The tensors of a written file."""
    return {
        s.name: contiguous(Source(str(folder / file.path), s.offset, s.nbytes), s.body.shape, s.body.dtype)
        for s in file.segments
        if isinstance(s.body, Tensor)
    }


def widened(source: Path) -> Plan:
    tensors = [
        (f"{i}.{n}", t.map(Cast(BF16, FP32), FP32)) for i, x in enumerate(layers_of(source)) for n, t in x.items()
    ]
    return Plan((plain_file("model.safetensors", tensors),))


def small_tensors(source: Path) -> Plan:
    path = source / "part000"
    found = carve(path, [SMALL] * (path.stat().st_size // (2 * SMALL[0] * SMALL[1])))
    return Plan((summed_file("model.pt", [(f"t{i}", t) for i, t in enumerate(found)]),))


class Case(NamedTuple):
    """`source`: which of the made-up sources; the most times the copy's time it may take, warm."""

    source: str
    plan: Callable[[Path], Plan]
    limit: float


CASES = {
    "tp2 pp2": Case("model", lambda source: to_ranks(layers_of(source), 2, 2), 1.10),
    "tp2 back": Case("ranks", from_ranks, 1.10),
    "tp2": Case("model", lambda source: to_ranks(layers_of(source), 2, 1), 1.10),
    "tp8": Case("model", lambda source: to_ranks(layers_of(source), 8, 1), 1.21),
    "to fp32": Case("model", widened, 2.2),
    "64 KB tensors": Case("small", small_tensors, 1.80),
}


def write_source_folder(kind: str, folder: Path, nbytes: int) -> None:
    folder.mkdir()
    if kind == "small":
        write_source(folder / "part000", nbytes // (64 << 10) * (64 << 10))
    elif kind == "model":
        write_model(folder, nbytes)
    else:
        write_source_folder("model", folder.with_name("whole"), nbytes)
        layers = layers_of(folder.with_name("whole"))
        folder.rmdir()
        execute(to_ranks(layers, 2, 1), folder)
        (folder / "layers").write_text(str(len(layers)))
        (folder / "ckptconv.json").unlink()
        shutil.rmtree(folder.with_name("whole"))
    os.sync()


def copied(source: Path, dst: Path) -> float:
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(dst)], check=True)
    for path in dst.rglob("*"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return time.perf_counter() - started


class Measured(NamedTuple):
    seconds: float
    process: float
    peak: int


def converted(case: str, source: Path, dst: Path) -> Measured:
    started = time.perf_counter()
    command = [sys.executable, __file__, "--child", case, str(source), str(dst)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak = json.loads(done.stdout)
    return Measured(seconds, time.perf_counter() - started, peak)


def child(case: str, source: str, dst: str) -> None:
    """Plan and execute; the time is without the interpreter's start."""
    started = time.perf_counter()
    report = execute(CASES[case].plan(Path(source)), Path(dst), ExecuteOptions(memory=10**9))
    sys.stdout.write(json.dumps([time.perf_counter() - started, report.peak_memory]))


def drop(folder: Path) -> None:
    """Out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def measure(names: list[str], source: Path, dst: Path, rounds: int, cold: bool) -> None:
    """One source's cases and the copy in turn, so that a slow minute slows all of them."""
    copies: list[float] = []
    runs: dict[str, list[Measured]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in ("cp", *names):
            if cold:
                drop(source)
            else:
                subprocess.run(
                    ["cat", *(p for p in source.rglob("*") if p.is_file())], stdout=subprocess.DEVNULL, check=True
                )
            if name == "cp":
                copies.append(copied(source, dst))
            else:
                runs[name].append(converted(name, source, dst))
            shutil.rmtree(dst)
            os.sync()
    base = statistics.median(copies)
    size = sum(p.stat().st_size for p in source.rglob("*") if p.is_file())
    say(f"{'cold' if cold else 'warm'} | cp -r of {size / 1e9:.2f} GB | {base:.2f} | | | {size / base / 1e9:.2f} |")
    for name, found in runs.items():
        seconds = statistics.median(m.seconds for m in found)
        whole, peak = statistics.median(m.process for m in found), max(m.peak for m in found)
        cells = (
            f"{seconds:.2f} | {seconds / base:.2f} | {whole / base:.2f} | {size / seconds / 1e9:.2f} | {peak / 1e6:.0f}"
        )
        say(f"{'cold' if cold else 'warm'} | {name} | {cells}")


def say(row: str) -> None:
    sys.stdout.write(f"| {row} |\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--gb", type=float, default=1.2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--cold", action="store_true", help="cold only; without it warm only")
    options = parser.parse_args()
    say("cache | case | s, durable | times cp | with start-up | GB/s read | peak MB")
    say("--- | --- | --- | --- | --- | --- | ---")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for kind in dict.fromkeys(case.source for case in CASES.values()):
            names = [n for n, c in CASES.items() if c.source == kind and n in (options.cases or CASES)]
            if names:
                source = Path(folder) / kind
                write_source_folder(kind, source, int(options.gb * 1e9))
                measure(names, source, Path(folder) / "out", options.rounds, options.cold)
                shutil.rmtree(source)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
