"""Single flipped bits: in what is always verified (headers, indexes, pickles, directories), and in payloads under `--check`."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ckptconv.errors import CkptconvError
from tests.hostile.damage import TRACKER, Act, Case, Row, cases, rank_pt
from tests.hostile.damage_hf import BIN, INDEX, ONE, SHARDS

Region = Callable[[Path], tuple[int, int]]  # first byte, and the byte behind the last
FLIPS = 16
SOURCE = "/source"  # a tensor that is missing then is named with its folder


def header(path: Path) -> tuple[int, int]:
    return 0, 8 + int.from_bytes(path.read_bytes()[:8], "little")


def body(path: Path) -> tuple[int, int]:
    return header(path)[1], path.stat().st_size


def whole(path: Path) -> tuple[int, int]:
    return 0, path.stat().st_size


class Member(NamedTuple):
    """Where a zip member's header and data lie."""

    start: int
    data: int
    end: int


def member(path: Path, suffix: str) -> Member:
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith(suffix))
    name, extra = (int.from_bytes(raw[info.header_offset + at :][:2], "little") for at in (26, 28))
    data = info.header_offset + 30 + name + extra
    return Member(info.header_offset, data, data + info.file_size)


def data_of(suffix: str) -> Region:
    return lambda path: member(path, suffix)[1:]


def header_of(suffix: str) -> Region:
    return lambda path: member(path, suffix)[:2]


def directory(path: Path) -> tuple[int, int]:
    raw = path.read_bytes()
    return raw.index(b"PK\1\2", member(path, "/version").end), raw.rindex(b"PK\5\6")


def end_record(path: Path) -> tuple[int, int]:
    raw = path.read_bytes()
    return raw.rindex(b"PK\5\6"), len(raw)


def flip(name: str, region: Region, part: float, bit: int) -> Act:
    """One bit, at a fraction of the way through a region of a file."""

    def act(folder: Path) -> None:
        path = folder / name
        lo, hi = region(path)
        data = bytearray(path.read_bytes())
        data[lo + int(part * (hi - lo))] ^= 1 << bit
        path.write_bytes(data)

    return act


def flips(name: str, region: Region, what: str, named: str | None = None, n: int = FLIPS) -> dict[str, Row]:
    """`n` of them, evenly over the region, each of another bit than its neighbours."""
    said = (name if named is None else named,)
    return {f"{what} at {i}/{n}": (flip(name, region, i / n, i * 5 % 8), *said) for i in range(n)}


# Torch stamps no dates, but aligns its records: padding and the like may be flipped without changing what is read.
PT = {"first rank": rank_pt(0, 0), "last rank": rank_pt(1, 1)}


def verified_cases() -> Iterator[Case]:
    """Regions that are read whole; a flip is refused, or changes nothing in the result."""
    yield from cases(
        "flip in a safetensors header", "hf", flips(ONE, header, "one", SOURCE, 48), CkptconvError, harmless=True
    )
    yield from cases(
        "flip in a safetensors header",
        "shards",
        flips(SHARDS[1], header, "shard", SOURCE),
        CkptconvError,
        harmless=True,
    )
    yield from cases(
        "flip in an index", "shards", flips(INDEX, whole, "index", SOURCE, 32), CkptconvError, harmless=True
    )
    yield from cases(
        "flip in the tracker", "mcore", flips(TRACKER, whole, "tracker", SOURCE, 1) | _bits(), CkptconvError
    )
    for place, name in PT.items():
        yield from cases("flip in a pickle", "mcore", flips(name, data_of("/data.pkl"), place))
        for suffix in ("/data.pkl", "/data/0", "/version"):
            yield from cases(
                "flip in a zip local header",
                "mcore",
                flips(name, header_of(suffix), f"{place}{suffix.replace('/', ' ')}"),
                harmless=True,
            )
        yield from cases("flip in a zip directory", "mcore", flips(name, directory, place, n=32), harmless=True)
        yield from cases("flip in a zip end record", "mcore", flips(name, end_record, place, n=22), harmless=True)
        yield from cases("flip in a small record", "mcore", flips(name, data_of("/version"), f"{place} version", n=1))
        yield from cases(
            "flip in a small record", "mcore", flips(name, data_of("/byteorder"), f"{place} byteorder", n=4)
        )
    yield from cases("flip in a pickle", "bin", flips(BIN, data_of("/data.pkl"), "bin"))
    yield from cases("flip in a zip directory", "bin", flips(BIN, directory, "bin"), harmless=True)


def _bits() -> dict[str, Row]:
    return {f"bit {bit}": (flip(TRACKER, whole, 0, bit), SOURCE) for bit in range(1, 8)}


def payload_cases() -> Iterator[Case]:
    """Regions with a checksum that is compared when asked for."""
    for place, name in PT.items():
        yield from cases(
            "flip in a payload, --check", "mcore", flips(name, data_of("/data/0"), place), wishes={"check": True}
        )
    yield from cases("flip in a payload, --check", "bin", flips(BIN, data_of("/data/1"), "bin"), wishes={"check": True})
    rows = (
        flips(SHARDS[0], body, "shard")
        | flips("config.json", whole, "config", SOURCE, 8)
        | flips("tokenizer.json", whole, "tokenizer", n=2)
    )
    yield from cases("flip by the manifest, --check", "shards", rows, CkptconvError, wishes={"check": True})
    rows = flips("hf/tokenizer.json", whole, "hf tokenizer", n=2) | flips("hf/config.json", whole, "hf config", None, 8)
    yield from cases("flip by the manifest, --check", "mcore", rows, CkptconvError, wishes={"check": True})
    yield from cases(
        "flip in the manifest, --check",
        "shards",
        flips("ckptconv.json", _digests, "digests", SOURCE, 24),
        harmless=True,
        wishes={"check": True},
    )


def _digests(path: Path) -> tuple[int, int]:
    """Where the manifest's files are listed; its head says what was asked for, and nothing of the bytes."""
    raw = path.read_bytes()
    start = raw.index(b'"files"')
    return start, raw.index(b'"from"', start)


CASES = [*verified_cases(), *payload_cases()]
