"""What is written once all tensors are: checksums, bytes between tensors, final files, the manifest."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping

import numpy as np
import xxhash

from ckptconv.executor.crc import crc32, crc32_combine
from ckptconv.executor.fingerprint import MANIFEST, Fingerprint
from ckptconv.executor.journal import Proof
from ckptconv.executor.manifest import FileEntry, Names, TensorEntry, digest_of, relative, render
from ckptconv.executor.outputs import Outputs, write_file
from ckptconv.executor.units import CHUNK, PIECE, Claim, pieces
from ckptconv.moves import Reader
from ckptconv.plan import File, Late, Plan, Segment
from ckptconv.tensor import Tensor
from ckptconv.values import Loss

Plain = bytes | bytearray
HOLDS = 1 << 23  # bytes of lines worked out while the disk is busy; those beyond wait until they are written


class Completion:
    """`proofs` are of every piece of every tensor outside final files; those of final files are added to it."""

    def __init__(self, plan: Plan, outputs: Outputs, proofs: dict[Claim, Proof]) -> None:
        self._plan, self._outputs, self._proofs = plan, outputs, proofs
        self.wrote: Callable[[int], None] = lambda _: None  # told how many bytes, for the progress
        self._names = Names(plan.root)
        self._rest: dict[int, str] = {}  # file -> digest of all that is no tensor
        self._lines: dict[int, bytes] = {}  # file -> what the manifest says of it, of as many as HOLDS allows
        self._waiting: list[tuple[int, int, Plain]] = []  # (file, offset, bytes) still to be written

    def prepare(self, covered: set[tuple[int, int]]) -> None:
        """Work out all that is not a tensor, but for final files; write nothing yet. Segments in `covered` went with a batch."""
        for f, file in enumerate(self._plan.files):
            if not file.final:
                self._prepare(f, file, covered)

    def write_rest(self) -> None:
        """What is prepared."""
        for f, offset, data in self._waiting:
            self._outputs.write_at(f, memoryview(data), offset)
            self.wrote(len(data))
        self._waiting.clear()

    def write_final(self) -> None:
        """The files that say the others are complete, in the plan's order."""
        for f, file in enumerate(self._plan.files):
            if not file.final:
                continue
            self._outputs.create(f)
            with Reader() as reader:
                for s, segment in enumerate(file.segments):
                    if isinstance(segment.body, Tensor):
                        self._write_tensor(reader, f, s, segment.offset, segment.body)
            self._prepare(f, file, set())
            self.write_rest()
            self._outputs.sync([f])

    def write_manifest(self, folder: str, identity: Fingerprint, durable: bool) -> None:
        sources = {relative(path, self._plan.root): known.size for path, known in sorted(identity.sources.items())}
        entries = (self._lines.get(f) or self._line(f) for f in range(len(self._plan.files)))
        write_file(f"{folder}/{MANIFEST}", render(identity.about, sources, entries), durable)

    def losses(self) -> dict[str, Loss]:
        """What casts lost, by `file: tensor`."""
        lost: dict[str, Loss] = {}
        lossy = [(claim, proof.loss) for claim, proof in self._proofs.items() if any(proof.loss)]
        for claim, loss in sorted(lossy):
            file = self._plan.files[claim.file]
            name = f"{file.path}: {file.segments[claim.segment].name}"
            lost[name] = lost.get(name, Loss()).plus(loss)
        return lost

    def _prepare(self, f: int, file: File, covered: set[tuple[int, int]]) -> None:
        rest, crcs = xxhash.xxh3_128(), self._crcs(f, file)
        for s, (offset, body, _) in enumerate(file.segments):
            if isinstance(body, Tensor):
                continue
            data = body if isinstance(body, bytes) else _summed(body, crcs)
            rest.update(data)
            if (f, s) not in covered:
                self._waiting.append((f, offset, data))
        self._rest[f] = rest.hexdigest()
        if sum(map(len, self._lines.values())) < HOLDS:
            self._lines[f] = self._line(f)

    def _line(self, f: int) -> bytes:
        file = self._plan.files[f]
        tensors = []
        for s, (offset, body, name) in enumerate(file.segments):
            if isinstance(body, Tensor):
                nbytes = body.nbytes
                parts = [self._proofs[Claim(f, s, piece)].digest for piece, _, _ in pieces(nbytes)]
                tensors.append(TensorEntry(name, offset, nbytes, digest_of(parts), self._names.of(body)))
        return FileEntry(file.path, file.size, self._rest[f], tuple(tensors)).line().encode()

    def _crcs(self, f: int, file: File) -> dict[int, int]:
        """The checksums that segments of the file wait for."""
        wanted = {s for segment in file.segments if isinstance(segment.body, Late) for _, s in segment.body.crcs}
        return {s: self._crc(f, s, file.segments[s]) for s in wanted}

    def _crc(self, f: int, s: int, segment: Segment) -> int:
        if isinstance(segment.body, bytes):
            return crc32(segment.body, 0)
        total, nbytes = self._proofs[Claim(f, s, 0)].crc, segment.nbytes
        for piece, lo, hi in pieces(nbytes) if nbytes > PIECE else ():
            if piece:
                total = crc32_combine(total, self._proofs[Claim(f, s, piece)].crc, hi - lo)
        return total

    def _write_tensor(self, reader: Reader, f: int, s: int, base: int, tensor: Tensor) -> None:
        moves = tensor.lower()
        for piece, lo, hi in pieces(tensor.nbytes):
            digest, crc, loss = xxhash.xxh3_128(), 0, Loss()
            for at in range(lo, hi, CHUNK):
                out = np.empty(min(CHUNK, hi - at), np.uint8)
                loss = loss.plus(reader.fill(moves, out, at))
                digest.update(out.data)
                crc = crc32(out.data, crc)
                self._outputs.write_at(f, out.data, base + at)
                self.wrote(len(out))
            self._proofs[Claim(f, s, piece)] = Proof(digest.digest(), crc, loss)


def _summed(late: Late, crcs: Mapping[int, int]) -> bytearray:
    """Its bytes, with the checksums that they waited for."""
    data = bytearray(late.template)
    for position, of in late.crcs:
        struct.pack_into("<I", data, position, crcs[of])
    return data


def folders(root: str, files: tuple[File, ...]) -> list[str]:
    """All folders of a result, a folder before what is in it."""
    found = {root}
    for file in files:
        parts = file.path.split("/")[:-1]
        found.update(f"{root}/{'/'.join(parts[: i + 1])}" for i in range(len(parts)))
    return sorted(found, key=lambda path: (path.count(os.sep), path))
