"""Reading a torch file (.pt, .bin, .ckpt): its object, with lazy tensors. Nothing it names is imported or called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckptconv.containers import torch_legacy
from ckptconv.containers.pickled import Global
from ckptconv.containers.plain_calls import Call
from ckptconv.containers.ranges import HeaderReader, Place, locate
from ckptconv.containers.torch_sharded import SHARDED_CALLS
from ckptconv.containers.torch_tensors import TORCH_CALLS, StorageId, Storages
from ckptconv.containers.unpickle import Unpickler
from ckptconv.containers.zipdir import Archive, open_archive
from ckptconv.errors import FormatError
from ckptconv.source import Source

MAX_PICKLE = 1 << 28
MAX_SMALL = 1 << 20
Calls = Mapping[Global, Call]
NEWEST_VERSION = 10  # what torch itself reads


@dataclass(frozen=True, slots=True)
class TorchFile:
    """The unpickled object, and the names of storage records that nothing in it refers to."""

    value: object
    unused: tuple[str, ...]


def read(path: Place, *, check: bool = False, where: str = "", calls: Calls | None = None) -> object:
    """The object a torch file holds. `check` also reads every record through to verify its CRC32; `calls` rebuild what
    only the caller knows.
    """
    return inspect(path, check=check, where=where, calls=calls).value


def inspect(
    path: Place, *, check: bool = False, where: str = "", calls: Calls | None = None, script: bool = False
) -> TorchFile:
    """As `read`, with what else is to be known. An old file (before torch 1.6) carries no checksums to check.

    `script`: the file may also be a TorchScript program, and the object then its tree of modules (see torch_script.py).
    """
    source = locate(path)
    where = where or source.path
    with HeaderReader(source, where) as reader:
        head = reader.read(0, min(512, source.nbytes), "the first bytes")
        if head.startswith(b"PK\3\4"):
            return _read_zip(reader, check, {**TORCH_CALLS, **SHARDED_CALLS, **(calls or {})}, script)
        if head.startswith(torch_legacy.MAGIC):
            value, unused = torch_legacy.read(reader)
            return TorchFile(value, unused)
    if head[257:262] == b"ustar":
        raise FormatError(where, "is a tar file: a .nemo file, or one from before torch 0.1.10, which is not supported")
    raise FormatError(
        where, "is not a torch file: neither a zip file nor an old torch pickle (empty, damaged or something else)"
    )


def _read_zip(reader: HeaderReader, check: bool, calls: Calls, script: bool) -> TorchFile:
    archive = open_archive(reader, packed=script)
    root = _root(archive, script)
    _check_small(archive, reader, root)
    if check:
        archive.check(reader)
    member = f"{root}/data.pkl"

    def find(told: StorageId) -> Source:
        name = f"{root}/data/{told.key}"
        record = archive.records.get(name)
        if record is None:
            raise FormatError(f"{reader.where}!{name}", "is missing: a tensor in data.pkl has its bytes there")
        if record.source.nbytes != told.nbytes:
            problem = f"has {record.source.nbytes} bytes, data.pkl says {told.nbytes}"
            raise FormatError(f"{reader.where}!{name}", problem)
        return record.source

    storages = Storages(find)
    data = archive.read(reader, member, MAX_PICKLE)
    unpickler = Unpickler(data, f"{reader.where}!{member}", calls, storages)
    value = unpickler.load()
    if unpickler.pos != len(data):
        raise FormatError(f"{reader.where}!{member}", f"has {len(data) - unpickler.pos} bytes after the pickle")
    used = {f"{root}/data/{key}" for key in storages.keys}
    unused = tuple(n for n in archive.records if n.startswith(f"{root}/data/") and n not in used)
    return TorchFile(value, unused)


def _root(archive: Archive, script: bool) -> str:
    """The one folder that all members are in: what torch called the archive."""
    where = archive.where
    roots = {name.partition("/")[0] for name in (*archive.records, *archive.packed)}
    if len(roots) != 1:
        raise FormatError(where, f"its members are in {len(roots)} folders; a torch file has one")
    (root,) = roots
    if odd := [name for name in archive.packed if not name.startswith(f"{root}/code/")]:
        raise FormatError(f"{where}!{odd[0]}", "is compressed, and no code: torch stores what is read as it is")
    program = f"{root}/constants.pkl" in archive.records or any(n.startswith(f"{root}/code/") for n in archive.records)
    if program and not script:
        raise FormatError(
            where, "is a TorchScript program, not a checkpoint: only its code can say what the tensors are"
        )
    return root


def _check_small(archive: Archive, reader: HeaderReader, root: str) -> None:
    """Read what is not a storage, which verifies it, and see that it is of this byte order and of a version we know."""
    small = {}
    for name, record in archive.records.items():
        if not name.startswith(f"{root}/data/") and name != f"{root}/data.pkl" and record.source.nbytes <= MAX_SMALL:
            small[name.removeprefix(f"{root}/")] = archive.read(reader, name, MAX_SMALL)
    order = small.get("byteorder", b"little")
    if order != b"little":
        what = "big-endian" if order == b"big" else f"of byte order {order[:20]!r}"
        raise FormatError(f"{reader.where}!{root}/byteorder", f"the tensors are {what}, which is not supported")
    version = small.get("version", small.get(".data/version", b"")).strip()
    if not version.isdigit() or not 1 <= int(version[:9]) <= NEWEST_VERSION:
        raise FormatError(
            f"{reader.where}!{root}/version", f"is missing or not one of 1 to {NEWEST_VERSION}: {version[:20]!r}"
        )
