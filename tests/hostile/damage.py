"""Damage as data: each case says what is done to which clean checkpoint, and how it must be refused. Also: edits of files."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ckptconv.errors import CkptconvError, FormatError
from tests.unit.helpers.containers import stored_zip

Act = Callable[[Path], object]
Errors = type[CkptconvError] | tuple[type[CkptconvError], ...]
TRACKER = "latest_checkpointed_iteration.txt"
ITERATION = "iter_0000001"
PT = "model_optim_rng.pt"


@dataclass(frozen=True, slots=True)
class Case:
    """`act` damages a copy of the checkpoint `base`; the message must hold all of `named`. `other` is laid beside it.

    `harmless`: the damage may also mean nothing, which is proven by a result with the same bytes.
    """

    kind: str
    place: str
    base: str
    act: Act
    error: Errors
    named: tuple[str, ...]
    other: str | None = None
    harmless: bool = False
    wishes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.place}".replace(" ", "_")


Row = tuple[Act, *tuple[str, ...]]


def cases(kind: str, base: str, rows: Mapping[str, Row], error: Errors = FormatError, **more: Any) -> list[Case]:
    """One case for each row: a place, what is done there, and what the message must name."""
    return [
        Case(kind, place, base, act, error, named, **more)
        for place, (act, *named_) in rows.items()
        for named in [tuple(named_)]
    ]


def rank_dir(pp: int, tp: int) -> str:
    """The folder of a rank of the tp2 pp2 checkpoints."""
    return f"{ITERATION}/mp_rank_{tp:02d}_{pp:03d}"


def rank_pt(pp: int, tp: int) -> str:
    return f"{rank_dir(pp, tp)}/{PT}"


RANKS = [(0, 0), (0, 1), (1, 0), (1, 1)]


# -- edits of any file -----------------------------------------------------------------------------------------------


def cut(name: str, keep: float) -> Act:
    """Only the first part of a file is left (a fraction of it, or for 0 nothing)."""
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * keep))


def shorten(name: str, nbytes: int) -> Act:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - nbytes)


def text(name: str, content: str | bytes) -> Act:
    """The file holds something else."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def append(name: str, content: bytes) -> Act:
    def act(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.write(content)

    return act


def remove(*names: str) -> Act:
    def act(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


def instead(name: str, put: Callable[[Path], object]) -> Act:
    """Something else takes the place of a file."""

    def act(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        put(folder / name)

    return act


def link(name: str, target: str) -> Act:
    return instead(name, lambda path: path.symlink_to(target))


def link_out(name: str) -> Act:
    """The file is moved out of the folder, and linked to."""

    def act(folder: Path) -> None:
        outside = folder.parent.parent / "outside"
        (folder / name).replace(outside)
        (folder / name).symlink_to(outside)

    return act


def from_other(name: str, to: str | None = None) -> Act:
    """A file or folder of the checkpoint laid beside takes the place of one here."""

    def act(folder: Path) -> None:
        source, target = folder.parent / "other" / name, folder / (to or name)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)

    return act


def copied(name: str, to: str) -> Act:
    def act(folder: Path) -> None:
        source, target = folder / name, folder / to
        shutil.copytree(source, target, dirs_exist_ok=True) if source.is_dir() else shutil.copyfile(source, target)

    return act


def moved(name: str, to: str) -> Act:
    return lambda folder: (folder / name).rename(folder / to)


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Act:
    def act(folder: Path) -> None:
        table = json.loads((folder / name).read_text())
        change(table)
        (folder / name).write_text(json.dumps(table))

    return act


def replaced(name: str, old: str, new: str) -> Act:
    def act(folder: Path) -> None:
        before = (folder / name).read_bytes()
        assert old.encode() in before
        (folder / name).write_bytes(before.replace(old.encode(), new.encode(), 1))

    return act


# -- edits of torch files --------------------------------------------------------------------------------------------


def edit_pt(name: str, change: Callable[[dict[str, Any]], object]) -> Act:
    """The object is loaded by torch, changed, and saved by torch again: a well-formed file that says something else."""

    def act(folder: Path) -> None:
        state = torch.load(folder / name, weights_only=False)
        changed = change(state)
        torch.save(changed if isinstance(changed, dict | list) else state, folder / name)

    return act


def edit_args(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda state: vars(state["args"]).update(values)


def edit_records(name: str, change: Callable[[dict[str, bytes]], object]) -> Act:
    """The zip is written anew with other records, every checksum right."""

    def act(folder: Path) -> None:
        with zipfile.ZipFile(folder / name) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        change(records)
        stored_zip(records, folder / name)

    return act


def member(records: Mapping[str, bytes], suffix: str) -> str:
    """The full name of a record."""
    return next(name for name in records if name.endswith("/" + suffix))


def poke(name: str, find: Callable[[bytes], int], value: bytes) -> Act:
    """Bytes of a file overwritten at a place that is looked for in it."""

    def act(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        at = find(bytes(data))
        assert at >= 0
        data[at : at + len(value)] = value
        (folder / name).write_bytes(data)

    return act
