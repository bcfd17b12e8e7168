"""Durable time of real conversions against `cp -r` of the same source in the same rounds; prints a table. See results.md.

`bench.py [--gb 4] [--rounds 5] [--cache warm|cold|both] [--folder /tmp] [CASE ...]`. Every run is a fresh process; a copy
counts as done when each of its files is fsynced. Cold: the source is dropped from the page cache before each run. The
loader is named (to find it out takes another 0.06 s or so). Needs four times the disk space of the source, and fills the
machine's memory with page cache, which can take minutes. "disk / result" is the most that lay on disk beside the source at
any moment.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from ckptconv import ExecuteOptions, Job, convert, prepare
from ckptconv.executor.execute import execute
from ckptconv.huggingface.folder_write import weight_files
from ckptconv.layout import layout_from
from ckptconv.plan import File, Plan, Segment
from ckptconv.tensor import Shape
from ckptconv.testing.plans import carve, write_source

SHARD = 5 * 10**9
LEFT_FREE = 500 << 20
COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LARGE: dict[str, Any] = {
    **COMMON,
    "model_type": "llama",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 8000,
}
# Experts of 64 KB: at 1.3 GB there are 20,000 tensors.
SMALL: dict[str, Any] = {
    **COMMON,
    "model_type": "mixtral",
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 256,
    "num_experts_per_tok": 2,
    "vocab_size": 1000,
}


class Case(NamedTuple):
    """`source`: which of the made-up checkpoints; the most times the copy's time it may take, warm and cold."""

    source: str
    saver: str
    layout: dict[str, str | int | None]
    dtype: str = "keep"
    warm: float = 1.10
    cold: float = 1.00
    wishes: dict[str, Any] | None = None  # what else the job is told


CASES = {
    "hf to tp2 pp2": Case("hf", "mcore", {"tp": 2, "pp": 2}),
    "hf to tp2": Case("hf", "mcore", {"tp": 2}),
    "hf to tp8": Case("hf", "mcore", {"tp": 8}, warm=1.21, cold=1.10),
    "hf to tp2, fp32": Case("hf", "mcore", {"tp": 2}, "fp32", warm=2.20, cold=2.00),
    "tp2 pp2 to hf": Case("mcore", "hf", {}),
    "tp2 pp2 to tp4": Case("mcore", "mcore", {"tp": 4, "pp": 1}),
    "hf to torch_dist": Case("hf", "mcore-dist", {}),
    "torch_dist to tp2 pp2": Case("torch_dist", "mcore", {"tp": 2, "pp": 2}),
    "torch_dist to hf": Case("torch_dist", "hf", {}),
    "hf to nemo": Case("hf", "nemo", {}),
    "nemo to hf": Case("nemo", "hf", {}, wishes={"family": "llama", "saver_options": {"config_from_args": True}}),
    "nemo to tp2 pp2": Case("nemo", "nemo", {"tp": 2, "pp": 2}),
    "64 KB tensors, hf to hf": Case("small", "hf", {}, warm=1.80, cold=1.80),
    "64 KB tensors, hf to ep2": Case("small", "mcore", {"ep": 2}, warm=1.80, cold=1.80),
}


LOADERS = {"small": "hf", "torch_dist": "mcore-dist"}  # of kinds that are not called as their format

# Sources that are made of the large one.
MADE: dict[str, dict[str, Any]] = {
    "mcore": {"saver": "mcore", "tp": 2, "pp": 2},
    "torch_dist": {"saver": "mcore-dist"},
    "nemo": {"saver": "nemo"},  # one file, torch_dist inside
}


def layer_shapes(config: dict[str, Any], layer: int) -> dict[str, Shape]:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        **{
            f"self_attn.{n}_proj.weight": (rows, hidden)
            for n, rows in zip("qkvo", (hidden, kv, kv, hidden), strict=True)
        },
    }
    moe = [("w1", (ffn, hidden)), ("w3", (ffn, hidden)), ("w2", (hidden, ffn))]
    if experts := config.get("num_local_experts"):
        shapes["block_sparse_moe.gate.weight"] = (experts, hidden)
        shapes |= {f"block_sparse_moe.experts.{e}.{n}.weight": shape for e in range(experts) for n, shape in moe}
    else:
        names = {"w1": "gate", "w3": "up", "w2": "down"}
        shapes |= {f"mlp.{names[n]}_proj.weight": shape for n, shape in moe}
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def nbytes(shapes: dict[str, Shape]) -> int:
    return sum(2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes.values())


def write_hf(folder: Path, config: dict[str, Any], wanted: int) -> None:
    """A Hugging Face folder of about so many bytes of random bf16, an even number of layers."""
    outer = dict.fromkeys(
        ("model.embed_tokens.weight", "lm_head.weight"), (config["vocab_size"], config["hidden_size"])
    )
    shapes: dict[str, Shape] = {**outer, "model.norm.weight": (config["hidden_size"],)}
    layers = max(1, round((wanted - nbytes(shapes)) / nbytes(layer_shapes(config, 0)) / 2)) * 2
    for layer in range(layers):
        shapes |= layer_shapes(config, layer)
    values = write_source(folder.with_name("values"), nbytes(shapes))
    tensors = dict(zip(shapes, carve(values, shapes.values()), strict=True))
    text = json.dumps({**config, "num_hidden_layers": layers}).encode()
    files = [*weight_files(tensors, SHARD), File("config.json", len(text), (Segment(0, text),), final=True)]
    execute(Plan(tuple(files)), folder)
    values.unlink()


def write_checkpoint(kind: str, folder: Path, wanted: int) -> None:
    """What the cases of a kind start from; without a manifest, as other tools leave it."""
    if kind in MADE:
        whole = folder.with_name("whole")
        write_hf(whole, LARGE, wanted)
        convert(whole, folder, **MADE[kind])
        shutil.rmtree(whole)
    else:
        write_hf(folder, SMALL if kind == "small" else LARGE, wanted)
    manifest_of(folder).unlink()
    os.sync()


def manifest_of(path: Path) -> Path:
    return path / "ckptconv.json" if path.is_dir() else path.with_name(f"{path.name}.ckptconv.json")


def files_in(path: Path) -> list[Path]:
    """Those of a checkpoint, which may be one file."""
    return [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
        manifest_of(path).unlink(missing_ok=True)


def copied(source: Path, dst: Path) -> float:
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(dst)], check=True)
    for path in [dst, *dst.rglob("*")]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return time.perf_counter() - started


class Measured(NamedTuple):
    """Seconds without and with the interpreter's start; bytes of memory, and of disk at any moment beside the source."""

    seconds: float
    process: float
    peak: int
    disk: int


def converted(case: str, source: Path, dst: Path, memory: int) -> Measured:
    started = time.perf_counter()
    command = [sys.executable, __file__, "--child", case, str(source), str(dst), str(memory)]
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = used(dst.parent)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=usual) as running:
        disk = 0
        while running.returncode is None:
            disk = max(disk, used(dst.parent) - before)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(0.2)
        process = time.perf_counter() - started
        assert running.stdout is not None
        assert running.returncode == 0
        seconds, peak = json.loads(running.stdout.read())
    return Measured(seconds, process, peak, max(disk, used(dst.parent) - before))


def used(folder: Path) -> int:
    """Bytes that a folder takes on disk; what is being renamed or removed counts once."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_blocks * 512
    return total


def child(name: str, source: str, dst: str, memory: str) -> None:
    """Plan and execute, timed without the interpreter's start."""
    started = time.perf_counter()
    case = CASES[name]
    loader = LOADERS.get(case.source, case.source)
    job = Job(
        Path(source),
        loader=loader,
        saver=case.saver,
        layout=layout_from(case.layout),
        dtype=case.dtype,
        **(case.wishes or {}),
    )
    report = execute(prepare(job).plan, Path(dst), ExecuteOptions(memory=int(memory)))
    sys.stdout.write(json.dumps([time.perf_counter() - started, report.peak_memory]))


def drop(folder: Path) -> None:
    """Out of the page cache."""
    for path in files_in(folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def warm(folder: Path) -> None:
    """Into the page cache."""
    subprocess.run(["cat", *files_in(folder)], stdout=subprocess.DEVNULL, check=True)


def fill(folder: Path) -> None:
    """Leave little memory free: the page cache takes it, for holes of a file that needs no disk space.

    On a virtual machine, memory that has been free for seconds may be the host's, and getting it back can cost ten times
    what writing to it does. Taken from the page cache it costs each run the same.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - LEFT_FREE
    if free > 0:
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as holes:
            os.truncate(holes.fileno(), free)
        subprocess.run(["cat", holes.name], stdout=subprocess.DEVNULL, check=True)


def measure(name: str, source: Path, dst: Path, cold: bool, options: argparse.Namespace) -> None:
    """One case and the copy by turns, so that a slow minute slows both; prints the medians.

    Nothing else comes between them: what a run finds depends on what the one before it left behind (see results.md).
    """
    copies: list[float] = []
    found: list[Measured] = []
    for _ in range(options.rounds):
        for run in ("cp", name):
            if cold:
                drop(source)
            fill(dst.parent)
            if not cold:
                warm(source)
            if run == "cp":
                copies.append(copied(source, dst))
            else:
                found.append(converted(name, source, dst, options.memory * 10**6))
            size = sum(p.stat().st_size for p in files_in(dst))
            remove(dst)
            os.sync()
    base, took = statistics.median(copies), statistics.median(m.seconds for m in found)
    whole, peak = statistics.median(m.process for m in found), max(m.peak for m in found)
    read, disk = sum(p.stat().st_size for p in files_in(source)), max(m.disk for m in found)
    say("cold" if cold else "warm", name, f"{read / 1e9:.2f}", f"{base:.2f}", f"{took:.2f}", f"{took / base:.2f}",
        f"{CASES[name].cold if cold else CASES[name].warm:.2f}", f"{whole / base:.2f}", f"{peak / 1e6:.0f}",
        f"{disk / size:.2f}")  # fmt: skip


def say(*cells: str) -> None:
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--gb", type=float, default=4.0, help="of each large source; 64 KB tensors: 1.3 at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, default=1000, help="bound in MB")
    parser.add_argument("--cache", choices=("warm", "cold", "both"), default="both")
    parser.add_argument("--folder", default=None)
    options = parser.parse_args()
    say(
        "cache",
        "case",
        "GB",
        "cp -r, s",
        "s, durable",
        "times cp",
        "at most",
        "with start-up",
        "peak MB",
        "disk / result",
    )
    say(*["---"] * 10)
    for kind in dict.fromkeys(case.source for case in CASES.values()):
        names = [n for n, c in CASES.items() if c.source == kind and n in (options.cases or CASES)]
        if not names:
            continue
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            source = Path(folder) / kind
            write_checkpoint(kind, source, int(min(options.gb, 1.3 if kind == "small" else options.gb) * 1e9))
            for cold in {"warm": [False], "cold": [True], "both": [False, True]}[options.cache]:
                for name in names:
                    measure(name, source, Path(folder) / "out", cold, options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
