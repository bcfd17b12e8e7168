"""What is written once all tensors are: checksums, bytes between tensors, final files, the manifest."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator

import numpy as np
import xxhash

from ckptconv.executor.crc import crc32, crc32_combine
from ckptconv.executor.fingerprint import MANIFEST, Fingerprint
from ckptconv.executor.journal import Proof
from ckptconv.executor.manifest import FileEntry, Names, TensorEntry, digest_of, relative, render
from ckptconv.executor.outputs import Outputs, write_file
from ckptconv.executor.units import CHUNK, PIECE, Claim, pieces
from ckptconv.moves import Reader
from ckptconv.plan import File, Late, Plan
from ckptconv.tensor import Tensor
from ckptconv.values import Loss


class Completion:
    """`done` has a proof for every piece of every tensor outside final files; those of final files are added to it."""

    def __init__(self, plan: Plan, outputs: Outputs, done: dict[Claim, Proof]) -> None:
        self._plan, self._outputs, self._done = plan, outputs, done
        self.wrote: Callable[[int], None] = lambda _: None  # told how many bytes, for the progress
        self._rest: dict[int, str] = {}  # file -> digest of what is not in a tensor

    def write_rest(self, covered: set[tuple[int, int]]) -> None:
        """All that is not a tensor, but for segments that went with a batch."""
        for f, file in enumerate(self._plan.files):
            if not file.final:
                self._write_plain(f, file, covered)

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
            self._write_plain(f, file, set())
            self._outputs.sync([f])

    def write_manifest(self, folder: str, identity: Fingerprint, durable: bool) -> None:
        root = self._plan.root
        sources = {relative(path, root): known.size for path, known in sorted(identity.sources.items())}
        write_file(f"{folder}/{MANIFEST}", render(identity.about, sources, self._entries(root)), durable)

    def losses(self) -> dict[str, Loss]:
        """What casts lost, by `file: tensor`."""
        lost: dict[str, Loss] = {}
        for claim, proof in sorted(self._done.items()):
            if any(proof.loss):
                file = self._plan.files[claim.file]
                name = f"{file.path}: {file.segments[claim.segment].name}"
                lost[name] = lost.get(name, Loss()).plus(proof.loss)
        return lost

    def _write_plain(self, f: int, file: File, covered: set[tuple[int, int]]) -> None:
        rest = xxhash.xxh3_128()
        for s, segment in enumerate(file.segments):
            if isinstance(segment.body, Tensor):
                continue
            data = self._plain(f, file, s)
            rest.update(data)
            if (f, s) not in covered:
                self._outputs.write_at(f, memoryview(data), segment.offset)
                self.wrote(len(data))
        self._rest[f] = rest.hexdigest()

    def _plain(self, f: int, file: File, s: int) -> bytes:
        body = file.segments[s].body
        if isinstance(body, bytes):
            return body
        assert isinstance(body, Late)
        data = bytearray(body.template)
        for position, of in body.crcs:
            struct.pack_into("<I", data, position, self._crc(f, file, of))
        return bytes(data)

    def _crc(self, f: int, file: File, s: int) -> int:
        segment = file.segments[s]
        if isinstance(segment.body, bytes):
            return crc32(segment.body, 0)
        total, nbytes = self._done[Claim(f, s, 0)].crc, segment.nbytes
        for piece, lo, hi in pieces(nbytes) if nbytes > PIECE else ():
            if piece:
                total = crc32_combine(total, self._done[Claim(f, s, piece)].crc, hi - lo)
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
            self._done[Claim(f, s, piece)] = Proof(digest.digest(), crc, loss)

    def _entries(self, root: str) -> Iterator[FileEntry]:
        names = Names(root)
        for f, file in enumerate(self._plan.files):
            tensors = []
            for s, segment in enumerate(file.segments):
                if isinstance(segment.body, Tensor):
                    nbytes = segment.nbytes
                    parts = [self._done[Claim(f, s, piece)].digest for piece, _, _ in pieces(nbytes)]
                    came = names.of(segment.body)
                    tensors.append(TensorEntry(segment.name, segment.offset, nbytes, digest_of(parts), came))
            yield FileEntry(file.path, file.size, self._rest[f], tuple(tensors))


def folders(root: str, files: tuple[File, ...]) -> list[str]:
    """All folders of a result, a folder before what is in it."""
    found = {root}
    for file in files:
        parts = file.path.split("/")[:-1]
        found.update(f"{root}/{'/'.join(parts[: i + 1])}" for i in range(len(parts)))
    return sorted(found, key=lambda path: (path.count(os.sep), path))
