"""Reading tar archives in place: where each member's bytes lie, from the headers alone; nothing is unpacked.

tarfile is not used: it takes a damaged header for the end, a truncated archive for a whole one, and the last of two
members of one name for the only one. A gzip'ed archive has no places to read from: see `gzipped.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ckptconv.containers.folder import listed, located
from ckptconv.containers.problems import fail
from ckptconv.containers.ranges import HeaderReader, Place, locate
from ckptconv.containers.tar_header import BLOCK, Damaged, Header, Pax, pax_of, read_header
from ckptconv.errors import FormatError
from ckptconv.source import Source

MAX_MEMBERS = 1 << 20
MAX_EXTENDED = 1 << 20  # bytes of one header's long name or pax records
MAX_NAME = 4096
MAX_DEPTH = 32
MAX_TAIL = 1 << 26  # zeros after the end: a tape's block at the very most
CHUNK = 1 << 20
REFUSED = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
    b"S": "a sparse file", b"K": "a link of long name", b"M": "a part of an archive in several volumes",
    b"V": "the label of a volume", b"D": "a dump of a folder",
}  # fmt: skip
FILES, FOLDER = (b"0", b"\0", b"7"), b"5"
LONG_NAME = b"L"  # of GNU
EXTENDED = (b"x", b"g", LONG_NAME)  # pax, of the next member and of all; they are no members themselves
_NOT_PLAIN = re.compile(r"//|/\.{1,2}/")


@dataclass(frozen=True, slots=True)
class Tar:
    """The files of an archive, or of a folder that holds what one would, by name; and the names of all folders in it.

    Names are relative and plain: a leading `./` is dropped, and the folder that all is in has no name. `mark` stands
    between `where` and a name in messages: `/` for a folder.
    """

    where: str
    members: dict[str, Source]
    folders: frozenset[str]
    mark: str = "!"

    def below(self, folder: str) -> dict[str, Source]:
        """The files below a folder, by their names there. Everything is below the one that has no name."""
        start = f"{folder}/" if folder else ""
        return {name.removeprefix(start): source for name, source in self.members.items() if name.startswith(start)}

    def title(self, name: str) -> str:
        """How messages name a member."""
        return f"{self.where}{self.mark}{name}"


def is_tar(place: Place) -> bool:
    """Whether it begins with the header of a tar archive, its checksum right."""
    source = locate(place)
    if source.nbytes < BLOCK:
        return False
    with HeaderReader(source, source.path) as reader:
        try:
            return read_header(reader.read(0, BLOCK, "the first header")) is not None
        except Damaged:
            return False


def open_tar(place: Place, where: str = "") -> Tar:
    """The members of an archive. Every header is read and checked; all that is wrong is in one FormatError.

    Links, devices and other kinds that hold no bytes of their own are refused, as are two members of one name.
    """
    source = locate(place)
    with HeaderReader(source, where or source.path) as reader:
        walk = _Walk(reader)
        try:
            end = walk.run()
            _check_tail(reader, end)
        except Damaged as damaged:
            walk.problems.append(str(damaged))
    return _sound(reader.where, walk.names, walk.problems, "!")


def open_folder(folder: Path) -> Tar:
    """An archive that was unpacked: its files. Links may not lead out of it; links to folders are refused."""
    names = _Names()
    problems: list[str] = []
    _list(folder, "", names, problems)
    return _sound(str(folder), names, problems, "/")


@dataclass(slots=True)
class _Names:
    files: dict[str, Source] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)


def _sound(where: str, names: _Names, problems: list[str], mark: str) -> Tar:
    above: set[str] = set()  # folders need not have an entry of their own
    for name in (*names.files, *names.folders):
        folder = name.rpartition("/")[0]
        while folder and folder not in above:
            above.add(folder)
            folder = folder.rpartition("/")[0]
    folders = names.folders | above
    problems += [f"{name}: is a file and a folder too" for name in sorted(names.files.keys() & folders)]
    fail(where, problems)
    return Tar(where, names.files, frozenset(folders), mark)


def plain_name(text: str) -> str:
    """A name without leading `./` or the `/` after a folder's; ValueError where it is not a plain relative path."""
    name = text[: MAX_NAME + 1]
    while name.startswith("./"):
        name = name[2:]
    rooted = name.startswith("/")
    name = "" if name == "." else name.removesuffix("/")
    odd = rooted or "\\" in name or not name.isprintable() or (name and _NOT_PLAIN.search(f"/{name}/"))
    if odd or len(text) > MAX_NAME:
        raise ValueError(f"the member name {text[:80]!r} is not a plain relative path")
    if name.count("/") >= MAX_DEPTH:
        raise ValueError(f"the member name {text[:80]!r} is of more than {MAX_DEPTH} folders in each other")
    return name


# -- an archive -------------------------------------------------------------------------------------------------------


class _Member(NamedTuple):
    """A header with what the extended headers before it say: where its data begins, how long it is."""

    name: bytes
    kind: bytes
    start: int
    nbytes: int


class _Walk:
    """From header to header. What is wrong with a member is noted; what makes the next one unfindable ends it."""

    def __init__(self, reader: HeaderReader) -> None:
        self.reader = reader
        self.names = _Names()
        self.problems: list[str] = []

    def run(self) -> int:
        """Take all members; the offset after the two blocks of zeros that end them."""
        at, count, pending = 0, 0, Pax()
        while header := self._header(at):
            start, nbytes, count = at + BLOCK, header.nbytes, count + 1
            if count > MAX_MEMBERS:
                raise Damaged(f"has more than {MAX_MEMBERS:,} members")
            if header.kind in EXTENDED:
                told = self._extended(header, start)
                if told != Pax() and (header.kind == b"g" or pending != Pax()):
                    raise Damaged(f"the header at {at} names more than one member, or one that was named before")
                pending = told if told != Pax() else pending
            else:
                nbytes = nbytes if pending.nbytes is None else pending.nbytes
                self._take(_Member(pending.name or header.name, header.kind, start, nbytes))
                pending = Pax()
            at = self._after(start, nbytes)
        if pending != Pax():
            raise Damaged(f"ends at {at} with the name or size of a member that does not follow (truncated?)")
        return self._end(at)

    def _header(self, at: int) -> Header | None:
        size = self.reader.source.nbytes
        if at + BLOCK > size:
            raise Damaged(f"ends at {size} without the two blocks of zeros that close an archive (truncated?)")
        try:
            return read_header(self.reader.read(at, BLOCK, "a header"))
        except Damaged as damaged:
            raise Damaged(f"the header at {at} {damaged}{'' if at else '; is this a tar archive?'}") from None

    def _extended(self, header: Header, start: int) -> Pax:
        """What an extended header says of the members after it."""
        if header.nbytes > MAX_EXTENDED:
            raise Damaged(f"the extended header at {start} has {header.nbytes:,} bytes; more than {MAX_EXTENDED:,}")
        self._after(start, header.nbytes)
        content = self.reader.read(start, header.nbytes, "an extended header")
        return Pax(content.rstrip(b"\0")) if header.kind == LONG_NAME else pax_of(content, start)

    def _after(self, start: int, nbytes: int) -> int:
        end = start + nbytes + -nbytes % BLOCK
        if end > self.reader.source.nbytes:
            size = self.reader.source.nbytes
            raise Damaged(f"the member at {start} of {nbytes:,} bytes runs past the end at {size} (truncated?)")
        return end

    def _take(self, member: _Member) -> None:
        shown = member.name[:80].decode(errors="backslashreplace")
        if member.kind not in FILES and member.kind != FOLDER:
            kind = REFUSED.get(member.kind, f"of kind {member.kind!r}")
            self.problems.append(f"{shown}: is {kind}; only files and folders are read")
            return
        try:
            name = plain_name(member.name.decode())
        except UnicodeDecodeError:
            self.problems.append(f"the member name {member.name[:80]!r} is not text in UTF-8")
            return
        except ValueError as error:
            self.problems.append(str(error))
            return
        if member.kind == FOLDER or (member.kind == b"\0" and member.name.endswith(b"/")):
            self._take_folder(name, member)
        elif not name or member.name.endswith(b"/"):
            self.problems.append(f"{shown}: is a file with the name of a folder")
        elif name in self.names.files:
            self.problems.append(f"{name}: is there twice; which one counts?")
        else:
            self.names.files[name] = self.reader.source.inside(member.start, member.nbytes)

    def _take_folder(self, name: str, member: _Member) -> None:
        if member.nbytes:
            self.problems.append(f"{name or '.'}: is a folder, yet takes {member.nbytes:,} bytes")
        elif name:
            self.names.folders.add(name)

    def _end(self, at: int) -> int:
        size = self.reader.source.nbytes
        if at + 2 * BLOCK > size or any(self.reader.read(at + BLOCK, BLOCK, "the end")):
            raise Damaged(f"has one block of zeros at {at}, an archive ends with two (truncated or damaged)")
        return at + 2 * BLOCK


def _check_tail(reader: HeaderReader, at: int) -> None:
    """After the end there may be zeros alone: else it is two archives in one, or something hidden."""
    left = reader.source.nbytes - at
    if left > MAX_TAIL:
        raise Damaged(f"ends at {at}, yet {left:,} bytes follow")
    if any(any(piece) for piece in reader.chunks(reader.source.inside(at, left), CHUNK)):
        raise Damaged(f"ends at {at}, yet bytes other than zeros follow: two archives joined?")


# -- a folder ---------------------------------------------------------------------------------------------------------


def _list(home: Path, above: str, names: _Names, problems: list[str]) -> None:
    try:
        items = listed(home / above)
    except FormatError as error:
        problems.append(str(error))
        return
    for item in items:
        try:
            name = plain_name(above + item.name)
            if item.is_dir(follow_symlinks=False):
                names.folders.add(name)
                _list(home, f"{name}/", names, problems)
            else:
                names.files[name] = located(home, name)
        except (FormatError, ValueError) as error:
            problems.append(str(error))
