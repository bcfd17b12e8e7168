"""Plans made by hand over one source file: every kind of segment and unit, at any size."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ckptconv.dtypes import BF16, FP16, FP32, DType
from ckptconv.leaves import contiguous, full
from ckptconv.nodes import concat
from ckptconv.plan import Check, File, Late, Plan, Segment
from ckptconv.source import Source
from ckptconv.tensor import Shape, Tensor
from ckptconv.values import Cast

Named = tuple[str, Tensor]
SEED = 7


def write_source(path: Path, nbytes: int, seed: int = SEED) -> Path:
    """Random bf16 values without infinities, so that casts among float types keep them."""
    rng = np.random.Generator(np.random.SFC64(seed))
    with path.open("wb") as file:
        for start in range(0, nbytes, 8 << 20):
            bits = rng.integers(0, 1 << 16, min(nbytes - start, 8 << 20) // 2, np.uint16)
            file.write((bits & 0x83FF | 0x3C00).tobytes())
    return path


def carve(path: Path, shapes: Iterable[Shape], dtype: DType = BF16, start: int = 0) -> list[Tensor]:
    """Consecutive tensors of a file."""
    tensors, at = [], start
    for shape in shapes:
        n = math.prod(shape) * dtype.itemsize
        tensors.append(contiguous(Source(str(path), at, n), shape, dtype))
        at += n
    return tensors


def plain_file(path: str, tensors: Iterable[Named], header: bytes = b"header--") -> File:
    """A header, then tensors one behind the other (what safetensors is)."""
    segments, at = [Segment(0, header)], len(header)
    for name, tensor in tensors:
        segments.append(Segment(at, tensor, name))
        at += tensor.nbytes
    return File(path, at, tuple(segments))


def summed_file(path: str, tensors: Iterable[Named]) -> File:
    """Each tensor behind a header that carries its checksum, all checksums again at the end (as in a zip)."""
    segments: list[Segment] = []
    crcs: list[tuple[int, int]] = []
    at = 0
    for name, tensor in tensors:
        template = bytes(26) + name.encode()
        template += bytes(-(at + len(template)) % 64)
        segments.append(Segment(at, Late(template, ((14, len(segments) + 1),))))
        at += len(template)
        crcs.append((4 * len(crcs), len(segments)))
        segments.append(Segment(at, tensor, name))
        at += tensor.nbytes
    ending = Late(bytes(4 * len(crcs)) + b"end", tuple(crcs))
    segments.append(Segment(at, ending))
    return File(path, at + ending.nbytes, tuple(segments))


def mixed_plan(source: Path, scale: int = 1) -> Plan:
    """Every way of moving bytes: about 2 + 5 * scale MB; from `scale` 16 on there are tensors of several pieces."""
    rows = 256 * scale
    shapes: list[Shape] = [(rows, 1024), (rows, 1024), (2 * rows, 1024), (512, 300), *[(1000 + i,) for i in range(200)]]
    wide, tall, both, odd, *small = carve(source, shapes)
    width = wide.shape[1]
    files = [
        summed_file(
            f"rank_{r}/model.pt",
            [
                ("column", concat([wide.narrow(0, r * rows // 2, (r + 1) * rows // 2), tall], 0)),
                ("row", both.narrow(1, r * width // 2, (r + 1) * width // 2)),
                ("norm", small[0]),
                ("empty", full((0, 4), BF16, 0)),
                ("padded", concat([odd, odd.narrow(0, 511, 512).squeeze(0).unsqueeze(0).expand(0, 20)], 0)),
                *[(f"small.{i}", tensor) for i, tensor in enumerate(small[1 + r :: 2])],
            ],
        )
        for r in range(2)
    ]
    files.append(
        plain_file(
            "deep/er/model.safetensors",
            [
                ("turned", odd.permute((1, 0))),
                ("interleaved", both.unfold(0, 2, rows).permute((1, 0, 2)).fold(0)),
                ("cast", wide.map(Cast(BF16, FP32), FP32)),
                ("narrowed", tall.map(Cast(BF16, FP16), FP16)),
                ("constant", full((100, 7), FP32, 1.5)),
            ],
        )
    )
    files.append(File("index.json", 6, (Segment(0, b"{}\n\n\n\n"),), final=True))
    check = Check("norm", small[0], small[0], "rank 1")
    checks = (check, Check("both", both, both, "rank 1"))
    return Plan(tuple(files), checks, {"ckptconv": "test", "options": {"scale": scale}}, str(source.parent))


def mixed_bytes(scale: int) -> int:
    """The size of a source that `mixed_plan` of this scale needs."""
    return 2 * (4 * 256 * scale * 1024 + 512 * 300 + sum(1000 + i for i in range(200)))


def expected(plan: Plan) -> dict[str, bytes]:
    """The files of a plan by the simplest way there is, for comparison: everything in memory."""
    import struct
    import zlib

    files = {}
    for file in plan.files:
        parts = [s.body.numpy().tobytes() if isinstance(s.body, Tensor) else s.body for s in file.segments]
        data = b""
        for part in parts:
            if isinstance(part, Late):
                filled = bytearray(part.template)
                for position, index in part.crcs:
                    of = parts[index]
                    assert isinstance(of, bytes)
                    struct.pack_into("<I", filled, position, zlib.crc32(of))
                part = bytes(filled)
            data += part
        files[file.path] = data
    return files


def read_tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
