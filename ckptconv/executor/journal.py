"""The journal of unfinished work: which pieces are safely on disk. What follows its last whole block never happened.

`ckptconv-journal 1 <plan digest>`, a line of JSON that says what the digest stands for, then blocks closed by
`= <crc32 of the block>`. Lines: `file segment piece xxh3_128 crc32 [to_inf to_zero]`;
`- file` (its earlier claims are void); `! inode force single` (all is complete, only the commit is left).
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterable
from typing import NamedTuple, Self

from ckptconv.errors import ResumeError
from ckptconv.executor.fingerprint import Fingerprint, differences
from ckptconv.executor.outputs import sync_folder
from ckptconv.executor.units import Claim
from ckptconv.source import Identity
from ckptconv.values import NO_LOSS, Loss

_MAGIC = "ckptconv-journal 1 "


class Proof(NamedTuple):
    """What is known of a finished piece; the CRC32 is 0 where no checksum of the file needs it."""

    digest: bytes
    crc: int
    loss: Loss = NO_LOSS


class Seal(NamedTuple):
    """The result is complete. `inode` is its number, folder or `single` file: the destination has it once it is in place."""

    inode: int
    force: bool
    single: bool = False


class Journal:
    """One run holds it at a time. `done` and `seal` are what earlier runs, and then this one, made durable."""

    def __init__(self, path: str, fd: int, durable: bool) -> None:
        self.path, self._fd, self._durable = path, fd, durable
        self.done: dict[Claim, Proof] = {}
        self.seal: Seal | None = None
        self.identity: Fingerprint | None = None  # None: nothing in it yet
        self._size = 0

    @classmethod
    def open(cls, path: str, durable: bool = True) -> Self:
        """Read what is there, or make an empty one (nothing is written before `begin`)."""
        journal = cls(path, _locked(path), durable)
        try:
            journal._load()
        except BaseException:
            journal.close()
            raise
        return journal

    def begin(self, identity: Fingerprint) -> None:
        """Become the journal of this plan, or refuse, saying what changed since it was begun for another."""
        if self.identity is None:
            os.ftruncate(self._fd, 0)
            self._size = 0
            told = {"about": identity.about, "sources": identity.sources}
            self._write(f"{_MAGIC}{identity.digest}\n{json.dumps(told)}\n".encode())
            if self._durable:
                sync_folder(os.path.dirname(self.path))
            self.identity = identity
        elif self.identity.digest != identity.digest:
            changed = "\n".join(f"  {line}" for line in differences(self.identity, identity))
            raise ResumeError(
                f"unfinished work recorded in {self.path} was begun with other inputs or options:\n{changed}\n"
                "undo that to continue it, or remove the journal and the unfinished folder to start anew"
            )

    def append(self, claims: Iterable[tuple[Claim, Proof]]) -> None:
        """Record pieces whose bytes are durable."""
        claims = list(claims)
        self._block([_claim_line(claim, proof) for claim, proof in claims])
        self.done.update(claims)

    def retract(self, files: Iterable[int]) -> None:
        """Forget the claims on files that are not there any more; must precede making them anew."""
        gone = set(files)
        self._block([f"- {file}" for file in sorted(gone)])
        self._drop(gone)

    def finish(self, seal: Seal) -> None:
        self._block([f"! {seal.inode} {int(seal.force)} {int(seal.single)}"])
        self.seal = seal

    def clear(self) -> None:
        """Hold nothing any more, as if just opened for the first time."""
        os.ftruncate(self._fd, 0)
        self._size, self.identity, self.seal = 0, None, None
        self.done.clear()

    def remove(self) -> None:
        os.unlink(self.path)
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _block(self, lines: list[str]) -> None:
        if lines:
            body = "".join(line + "\n" for line in lines).encode()
            self._write(body + b"= %08x\n" % zlib.crc32(body))

    def _write(self, data: bytes) -> None:
        """Append, durably. A block that did not fit is taken away again, or the ones after it would not count."""
        view = memoryview(data)
        try:
            at = self._size
            while view:
                n = os.pwrite(self._fd, view, at)
                view, at = view[n:], at + n
            if self._durable:
                os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            error.filename = self.path
            raise
        self._size += len(data)

    def _load(self) -> None:
        with open(self.path, "rb") as lines:
            head, told = lines.readline(), lines.readline()
            if not _MAGIC.encode().startswith(head[: len(_MAGIC)]):
                raise ResumeError(f"{self.path} is not a journal of ckptconv: move it away")
            if not told.endswith(b"\n"):
                return  # the very first write was cut short
            try:
                facts = json.loads(told)
                sources = {path: Identity(*values) for path, values in facts["sources"].items()}
                self.identity = Fingerprint(head[len(_MAGIC) :].decode().strip(), facts["about"], sources)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ResumeError(f"{self.path} is damaged: remove it, and the unfinished folder beside it") from None
            self._size = len(head) + len(told)
            block: list[bytes] = []
            for line in lines:
                if not line.startswith(b"= "):
                    block.append(line)
                    continue
                body = b"".join(block)
                if line != b"= %08x\n" % zlib.crc32(body):
                    break
                for entry in block:
                    self._take(entry.decode().split())
                self._size += len(body) + len(line)
                block = []
        os.ftruncate(self._fd, self._size)

    def _drop(self, files: set[int]) -> None:
        for claim in [claim for claim in self.done if claim.file in files]:
            del self.done[claim]

    def _take(self, words: list[str]) -> None:
        if words[0] == "-":
            self._drop({int(words[1])})
        elif words[0] == "!":
            self.seal = Seal(int(words[1]), *(word == "1" for word in words[2:]))
        else:
            file, segment, piece, digest, crc, *lost = words
            loss = Loss(*map(int, lost)) if lost else NO_LOSS
            self.done[Claim(int(file), int(segment), int(piece))] = Proof(bytes.fromhex(digest), int(crc, 16), loss)


def _claim_line(claim: Claim, proof: Proof) -> str:
    lost = f" {proof.loss.to_inf} {proof.loss.to_zero}" if proof.loss != NO_LOSS else ""
    return f"{claim.file} {claim.segment} {claim.piece} {proof.digest.hex()} {proof.crc:08x}{lost}"


def _locked(path: str) -> int:
    """Open and lock; the file may be unlinked by the run that held it while we wait to open it, so look again."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise ResumeError(f"another run is at work on this destination (it holds {path})") from None
        except OSError:  # a file system without locks
            return fd
        os.close(fd)
