"""Kinds of damage to the zip file that a rank's .pt is: cut, headers that lie or disagree, members renamed or gone."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable, Mapping

from tests.hostile.damage import (
    RANKS,
    Case,
    Row,
    append,
    cases,
    cut,
    edit_records,
    member,
    poke,
    rank_pt,
    shorten,
    text,
)

FIRST, LAST = rank_pt(0, 0), rank_pt(1, 1)
PLACES = {"first rank": FIRST, "last rank": LAST}


def everywhere(edits: Mapping[str, Callable[[str], Row]]) -> dict[str, Row]:
    """Every edit on the first and on the last rank's file."""
    return {f"{place}, {what}": make(name) for what, make in edits.items() for place, name in PLACES.items()}


def local(suffix: str) -> Callable[[bytes], int]:
    return lambda data: data.index(suffix.encode()) - _name_start(data, data.index(suffix.encode()), b"PK\3\4")


def central(suffix: str) -> Callable[[bytes], int]:
    return lambda data: data.rindex(suffix.encode()) - _name_start(data, data.rindex(suffix.encode()), b"PK\1\2")


def _name_start(data: bytes, at: int, magic: bytes) -> int:
    """How far before `at` its header begins."""
    return at - data.rindex(magic, 0, at)


def end_of(magic: bytes) -> Callable[[bytes], int]:
    return lambda data: data.rindex(magic)


def shifted(find: Callable[[bytes], int], by: int) -> Callable[[bytes], int]:
    return lambda data: find(data) + by


RECORDS = {"pickle": "/data.pkl", "first storage": "/data/0", "byte order": "/byteorder"}
FIELDS = {  # name -> (header, offset in it, a lie)
    "local size": (local, 22, b"\x07\0\0\0"),
    "directory size": (central, 24, b"\x07\0\0\0"),
    "local name": (local, 30, b"Z"),
    "directory name": (central, 46, b"Z"),
    "local magic": (local, 0, b"PX"),
    "directory magic": (central, 0, b"PX"),
    "offset": (central, 42, b"\x09\0\0\0"),
    "method": (central, 10, b"\x08"),
    "flags": (central, 8, b"\x01"),
}
END = {
    "fewer records": (b"PK\5\6", 8, struct.pack("<2H", 1, 1)),
    "directory size": (b"PK\5\6", 12, struct.pack("<I", 1 << 30)),
    "directory offset": (b"PK\5\6", 16, struct.pack("<I", 7)),
    "several disks": (b"PK\5\6", 4, b"\x01"),
    "comment": (b"PK\5\6", 20, b"\x09"),
}


def appended(tail: bytes) -> Callable[[str], Row]:
    return lambda name: (append(name, tail), name)


TAILS = (b"\0", bytes(4096), b"PK\5\6" + bytes(18))
KEEPS = (0, 0.001, 0.1, 0.4, 0.8, 0.99)
_BY_A_BYTE: dict[str, Row] = {f"rank {p} {t} by a byte": (shorten(rank_pt(p, t), 1), rank_pt(p, t)) for p, t in RANKS}
_HEADERS: dict[str, Row] = {
    f"{field} of {what}": (poke(FIRST, shifted(find(suffix), by), lie), FIRST)
    for field, (find, by, lie) in FIELDS.items()
    for what, suffix in RECORDS.items()
}
CASES: list[Case] = [
    *cases("rank file cut", "mcore", {f"{p}, at {k:g}": (cut(n, k), n) for k in KEEPS for p, n in PLACES.items()}),
    *cases("rank file cut", "mcore", _BY_A_BYTE),
    *cases("rank file followed by bytes", "mcore", everywhere({str(len(b)): appended(b) for b in TAILS})),
    *cases(
        "rank file followed by bytes", "mcore", {"100 GB of nothing": (lambda f: os.truncate(f / FIRST, 10**11), FIRST)}
    ),
    *cases("zip headers disagree or lie", "mcore", _HEADERS),
    *cases(
        "zip end record lies",
        "mcore",
        {k: (poke(LAST, shifted(end_of(m), by), lie), LAST) for k, (m, by, lie) in END.items()},
    ),
    *cases(
        "rank file is something else",
        "mcore",
        {
            "empty": (text(FIRST, b""), FIRST),
            "zeros": (text(FIRST, bytes(5000)), FIRST),
            "text": (text(LAST, "hello"), LAST),
            "a bare pickle": (text(LAST, pickle.dumps({"model": {}})), LAST),
            "a tar": (text(LAST, bytes(257) + b"ustar" + bytes(300)), LAST),
        },
    ),
    *cases(
        "zip member renamed, missing or twice",
        "mcore",
        everywhere(
            {
                "pickle gone": lambda n: (edit_records(n, lambda r: r.pop(member(r, "data.pkl"))), n, "data.pkl"),
                "storage gone": lambda n: (edit_records(n, lambda r: r.pop(member(r, "data/0"))), n, "data/0"),
                "storage escapes": lambda n: (
                    edit_records(n, lambda r: r.update({"../x": r.pop(member(r, "data/0"))})),
                    n,
                    "../x",
                ),
                "another root": lambda n: (edit_records(n, lambda r: r.update({"other/data/0": b"x"})), n, "folders"),
                "a program": lambda n: (
                    edit_records(n, lambda r: r.update({member(r, "version").replace("version", "code/x.py"): b""})),
                    n,
                    "TorchScript",
                ),
                "big-endian": lambda n: (
                    edit_records(n, lambda r: r.update({member(r, "byteorder"): b"big"})),
                    n,
                    "big-endian",
                ),
            }
        ),
    ),
]
