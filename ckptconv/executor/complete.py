"""What is written once all tensors are: checksums, bytes between tensors, final files, the manifest."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import xxhash

from ckptconv.executor.crc import crc32, crc32_combine
from ckptconv.executor.fingerprint import MANIFEST, Fingerprint
from ckptconv.executor.journal import Proof
from ckptconv.executor.manifest import Origins, digest_of, file_lines, relative, render, tensor_line
from ckptconv.executor.outputs import Outputs, write_file
from ckptconv.executor.units import CHECKS, CHUNK, PIECE, Claim, pieces
from ckptconv.moves import Reader
from ckptconv.plan import File, Late, Plan, Segment
from ckptconv.tensor import Tensor
from ckptconv.values import Loss

Plain = bytes | bytearray
HOLDS = 1 << 23  # bytes of lines worked out while the disk is busy (twice that as objects); the others wait


class Completion:
    """`proofs` are of every piece of every tensor outside final files; those of final files are added to it."""

    def __init__(self, plan: Plan, outputs: Outputs, proofs: dict[Claim, Proof]) -> None:
        self._plan, self._outputs, self._proofs = plan, outputs, proofs
        self.wrote: Callable[[int], None] = lambda _: None  # told how many bytes, for the progress
        self._origins = Origins(plan.root)
        self._rest: dict[int, str] = {}  # file -> digest of all that is no tensor
        self._lines: dict[tuple[int, int], str] = {}  # (file, segment) -> what the manifest says of that tensor
        self._held = 0  # bytes of these lines
        self._waiting: list[tuple[int, int, Plain]] = []  # (file, offset, bytes) still to be written

    def note(self, claims: Iterable[tuple[Claim, Proof]]) -> None:
        """Work out what the manifest will say of tensors that are done; of as many as HOLDS allows."""
        for (f, s, _), proof in claims:
            if f == CHECKS or self._held >= HOLDS:
                continue
            segment = self._plan.files[f].segments[s]
            if segment.nbytes <= PIECE:
                line = self._lines[f, s] = self._line(segment, [proof.digest])
                self._held += len(line)

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
        entries = (self._entry(f, file) for f, file in enumerate(self._plan.files))
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

    def _entry(self, f: int, file: File) -> bytes:
        tensors = [s for s, segment in enumerate(file.segments) if isinstance(segment.body, Tensor)]
        lines = (self._lines.get((f, s)) or self._line(file.segments[s], self._digests(f, s)) for s in tensors)
        return file_lines(file.path, file.size, self._rest[f], lines)

    def _digests(self, f: int, s: int) -> list[bytes]:
        nbytes = self._plan.files[f].segments[s].nbytes
        return [self._proofs[Claim(f, s, piece)].digest for piece, _, _ in pieces(nbytes)]

    def _line(self, segment: Segment, digests: Sequence[bytes]) -> str:
        offset, body, name = segment
        assert isinstance(body, Tensor)
        return tensor_line(name, offset, body.nbytes, digest_of(digests), self._origins.of(body))

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
