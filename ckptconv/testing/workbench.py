"""What a contract does with a format: write a checkpoint through it, read it back, write it without its payload, count what is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckptconv.canonicalize import canonicalize
from ckptconv.checkpoint import Checkpoint, Key, Stored
from ckptconv.executor.execute import ExecuteOptions, Progress, Report, execute
from ckptconv.formats import Format, Request
from ckptconv.formats.hf import Hf, HfLoad
from ckptconv.layout import layout_from
from ckptconv.localize import localize
from ckptconv.passes import resize_vocabulary
from ckptconv.plan import File, Late, Plan, Segment
from ckptconv.registry import make_options
from ckptconv.tensor import Tensor
from ckptconv.testing.checkpoints import WEIGHTS, write_hf
from ckptconv.topology import Rank, Topology

QUICK = ExecuteOptions(workers=1, durable=False)


class Stopped(Exception):
    """Raised in the middle of a run by `StopAfter`."""


class StopAfter:
    """A Progress that stops the run when it has been told of work for the n-th time."""

    def __init__(self, advances: int) -> None:
        self.left = advances

    def start(self, total_bytes: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        self.left -= nbytes > 0
        if self.left <= 0:
            raise Stopped

    def done(self) -> None:
        pass


def degrees(layers: int, wanted: dict[str, int]) -> Topology:
    """A topology from the degrees a contract declares, as the command line makes it."""
    return layout_from({**wanted}).topology(layers, Topology(), keep=False)


NO_LANGUAGE_MODELS = {"openai-clip": "clip"}  # formats of ours that hold others -> one of those
PARTS_ALONE = ("mm-projector",)  # formats of ours that hold what no Hugging Face folder holds alone


@dataclass(frozen=True, slots=True)
class Bench:
    """A format, a folder to work in, and the model that is used where none is asked for."""

    format: Format
    folder: Path
    model: str = "llama"

    def source(self, model: str | None = None, *, dtype: str = "bf16", sparse: bool = False, **over: Any) -> Checkpoint:
        """A tiny model as if it had been loaded from Hugging Face files."""
        folder = self.folder / "source"
        write_hf(folder, model or self.model, dtype=dtype, sparse=sparse, **over)
        return canonicalize(Hf().load(folder, HfLoad(), Request()))

    def stored(
        self, checkpoint: Checkpoint, topology: dict[str, int], options: dict[str, object] | None = None
    ) -> Stored:
        """What the format will hold, in its own names."""
        wanted = make_options(self.format.Save, options or {}, "saver", self.format.name)
        layout = degrees(checkpoint.config.layers, topology)
        target = self.format.target(checkpoint, layout, wanted, Request())
        resized = resize_vocabulary(checkpoint, target.vocab_rows, target.mapping)
        return localize(resized, target, self.format.name)

    def plan(self, stored: Stored, options: dict[str, object] | None = None) -> Plan:
        wanted = make_options(self.format.Save, options or {}, "saver", self.format.name)
        return self.format.save(stored, wanted, Request())

    def write(self, stored: Stored, name: str = "result", options: dict[str, object] | None = None) -> Path:
        """The checkpoint on disk."""
        run(self.plan(stored, options), self.folder / name)
        return self.folder / name

    def hollow(self, stored: Stored) -> Path:
        """The checkpoint on disk, with holes for weights."""
        write_hollow(self.plan(stored), self.folder / "hollow")
        return self.folder / "hollow"

    def load(self, path: Path) -> Stored:
        return self.format.load(path, make_options(self.format.Load, {}, "loader", self.format.name), Request())

    def read(self, path: Path) -> Checkpoint:
        return canonicalize(self.load(path))


def run(plan: Plan, dst: Path, progress: Progress | None = None) -> Report:
    return execute(plan, dst, QUICK, progress)


def payload(plan: Plan) -> Iterator[tuple[File, Segment]]:
    """The segments that hold weights of a `Bench.source`, and not side files."""
    for file in plan.files:
        for segment in file.segments:
            if isinstance(segment.body, Tensor) and _reads_weights(segment.body):
                yield file, segment


def _reads_weights(tensor: Tensor) -> bool:
    return any(move.source is not None and Path(move.source.path).name == WEIGHTS for move in tensor.lower())


def place(plan: Plan, dst: Path, path: str) -> Path:
    """Where a file of the plan is: in the folder `dst`, or `dst` itself."""
    return dst if plan.single else dst / path


def write_hollow(plan: Plan, dst: Path) -> None:
    """The plan's files with a hole wherever a weight should be: headers, sizes and side files are right."""
    weights = {(file.path, segment.offset) for file, segment in payload(plan)}
    for file in plan.files:
        path = place(plan, dst, file.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            out.truncate(file.size)
            for segment in file.segments:
                if (file.path, segment.offset) not in weights:
                    out.seek(segment.offset)
                    out.write(_bytes(segment.body))


def _bytes(body: Tensor | bytes | Late) -> bytes:
    if isinstance(body, Tensor):
        return body.numpy().tobytes()
    return body.template if isinstance(body, Late) else body


def erase_payload(plan: Plan, dst: Path) -> None:
    """Every weight of a written result overwritten with zeros."""
    for file, segment in payload(plan):
        with place(plan, dst, file.path).open("r+b") as out:
            out.seek(segment.offset)
            out.write(bytes(segment.nbytes))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; of a file, itself."""
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def bytes_read() -> int:
    """How many bytes this process has asked the system for so far, whatever the call (Linux)."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    return 0


def changed(stored: Stored, rank: Rank, change: dict[Key, Tensor | None]) -> Stored:
    """The checkpoint with some tensors of one rank replaced, added, or (None) taken away."""
    tensors = {**stored.ranks[rank], **change}
    return replace(stored, ranks={**stored.ranks, rank: {k: t for k, t in tensors.items() if t is not None}})
