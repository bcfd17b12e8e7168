"""Laying out a tar archive as one file of a plan: headers ready, members streamed to where they belong in it.

The same as Python's `tarfile` writes for `add(folder, arcname=".")`, which is what NeMo does; only owner and time are
always the same, so that equal members give equal bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from tarfile import DIRTYPE, PAX_FORMAT, RECORDSIZE, TarInfo

from ckptconv.containers.tar import plain_name
from ckptconv.containers.tar_header import BLOCK
from ckptconv.errors import PlanError
from ckptconv.plan import File, Late, Segment
from ckptconv.tensor import Tensor

TIME = 315532800  # 1 January 1980, as in the zip files of torch
FILE_MODE, FOLDER_MODE = 0o644, 0o755

Member = tuple[str, File | bytes]  # its name, such as "model_weights/common.pt"; the path of the File is not looked at


def layout(path: str, members: Sequence[Member]) -> File:
    """The archive of these members, in the order in which `tarfile` meets them, each folder before what is in it.

    A tensor's segment is called by its member and its name there: "model_weights.ckpt!decoder.x".
    """
    _check(members)
    out = _Joined()
    out.add(_folder("./"))
    known: set[str] = set()
    for name, content in sorted(members, key=lambda member: member[0].split("/")):
        for folder in _above(name):
            if folder not in known:
                out.add(_folder(f"./{folder}/"))
                known.add(folder)
        nbytes = content.size if isinstance(content, File) else len(content)
        out.add(_file(f"./{name}", nbytes))
        if isinstance(content, File):
            out.add_file(name, content)
        else:
            out.add(content)
        out.add(bytes(-nbytes % BLOCK))
    out.add(bytes(2 * BLOCK))
    out.add(bytes(-out.size % RECORDSIZE))
    return out.file(path)


def _above(name: str) -> list[str]:
    """The folders that a member is in, outermost first."""
    return [name[:i] for i, letter in enumerate(name) if letter == "/"]


def _check(members: Sequence[Member]) -> None:
    """Every name is one that reading takes, and stands for one thing."""
    names = Counter(name for name, _ in members)
    problems = [f"{name!r} is not a plain relative path" for name in names if not _is_plain(name)]
    problems += [f"{name} is there {count} times" for name, count in names.items() if count > 1]
    above = {folder for name in names for folder in _above(name)}
    problems += [f"{name} is a file and a folder too" for name in names if name in above]
    if problems:
        raise PlanError("the archive cannot be written:\n  " + "\n  ".join(problems))


def _is_plain(name: str) -> bool:
    try:
        return bool(name) and plain_name(name) == name
    except ValueError:
        return False


def _folder(name: str) -> bytes:
    info = TarInfo(name)
    info.type, info.mode, info.mtime = DIRTYPE, FOLDER_MODE, TIME
    return info.tobuf(PAX_FORMAT, "utf-8", "strict")


def _file(name: str, nbytes: int) -> bytes:
    """A header; where the name or a size of 8 GiB and more does not fit, pax records stand before it."""
    info = TarInfo(name)
    info.size, info.mode, info.mtime = nbytes, FILE_MODE, TIME
    return info.tobuf(PAX_FORMAT, "utf-8", "strict")


class _Joined:
    """Segments one after another; bytes that follow each other are one segment."""

    def __init__(self) -> None:
        self.size = 0
        self.segments: list[Segment] = []
        self.pending: list[bytes] = []

    def add(self, content: bytes) -> None:
        self.pending.append(content)
        self.size += len(content)

    def add_file(self, name: str, file: File) -> None:
        """The segments of a file as they are, moved to here."""
        self._flush()
        start, before = self.size, len(self.segments)
        for offset, body, title in file.segments:
            if isinstance(body, Late):
                body = Late(body.template, tuple((at, i + before) for at, i in body.crcs))
            named = f"{name}!{title}" if isinstance(body, Tensor) else title
            self.segments.append(Segment(start + offset, body, named))
        self.size += file.size

    def file(self, path: str) -> File:
        self._flush()
        return File(path, self.size, tuple(self.segments))

    def _flush(self) -> None:
        content = b"".join(self.pending)
        if content:
            self.segments.append(Segment(self.size - len(content), content))
        self.pending.clear()
