"""Adding tokens, from a tokenizer to a new one: a file, a folder, or a folder with a checkpoint that has grown."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ckptconv.dtypes import UINT8
from ckptconv.errors import PlanError, UsageError
from ckptconv.executor.execute import ExecuteOptions, Progress, execute
from ckptconv.executor.outputs import sync_folder
from ckptconv.huggingface.files import CONFIG, left_behind, side_files
from ckptconv.leaves import contiguous
from ckptconv.pipeline import VERSION, check_places
from ckptconv.plan import File, Plan, Segment
from ckptconv.source import Source
from ckptconv.tokenizer.folder import LISTS, OF_TOKENIZER, extend_folder
from ckptconv.tokenizer.growth import Growth, plan_growth
from ckptconv.tokenizer.pieces import extend_model
from ckptconv.tokenizer.tokens import Extended, Wanted


def add_tokens(
    src: Path,
    dst: Path,
    wanted: Wanted,
    growth: Growth | None = None,
    options: ExecuteOptions | None = None,
    progress: Progress | None = None,
) -> Extended:
    """Write SRC with new tokens to DST, whole or not at all: a sentencepiece file to a file, a folder to a folder."""
    options = options or ExecuteOptions()
    check_places(src, dst)
    if not src.is_dir():
        if growth is not None:
            raise UsageError(
                f"{src}: a checkpoint takes a whole tokenizer: give the folder, with its tokenizer_config.json"
            )
        extended = extend_model(src, wanted)
        (text,) = extended.files.values()
        write_file(dst, text, force=options.force)
        return extended
    if growth is not None:
        check_places(growth.checkpoint, dst)
    extended, plan = plan_folder(src, wanted, growth)
    execute(plan, dst, options, progress)
    return extended


def plan_folder(src: Path, wanted: Wanted, growth: Growth | None) -> tuple[Extended, Plan]:
    """The new folder: changed files, the others of the tokenizer, and the checkpoint or the source's other side files."""
    extended = extend_folder(src, wanted)
    sides = side_files(src)
    if growth is None:
        plan, notes = Plan((), root=str(src)), tuple(_left(src, sides))
    else:
        plan, notes = plan_growth(growth, extended)
        sides = {name: source for name, source in sides.items() if name in OF_TOKENIZER}
    notes = (*_unchanged(sides.keys() - extended.files.keys()), *notes)
    extended = replace(extended, notes=(*extended.notes, *notes))
    files = [file for file in plan.files if file.path not in OF_TOKENIZER]
    files += [_copied(name, source) for name, source in sides.items() if name not in extended.files]
    files += [File(name, len(text), (Segment(0, text),)) for name, text in extended.files.items()]
    about = {
        **plan.about,
        "ckptconv": VERSION,
        "tokenizer": {"kind": wanted.kind, "added": extended.ids, "size": extended.size},
        "notes": list(extended.notes),
    }
    return extended, replace(plan, files=tuple(files), about=about)


def write_file(dst: Path, text: bytes, *, force: bool) -> None:
    """A file that appears whole, and replaces another only if that is asked for."""
    if dst.is_dir():
        raise PlanError(f"{dst} is a folder: the source is a file, and so is the result")
    if not dst.parent.is_dir():
        raise PlanError(f"{dst.parent} is not a folder: make it first")
    partial = dst.with_name(dst.name + ".partial")
    try:
        with partial.open("xb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise PlanError(f"{partial} is in the way: remove it, unless this is being made elsewhere") from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    try:
        _put_in_place(partial, dst, force)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(str(dst.parent))


def _put_in_place(partial: Path, dst: Path, force: bool) -> None:
    if force:
        partial.replace(dst)
        return
    try:
        os.link(partial, dst)  # unlike a rename it never replaces a file
    except FileExistsError:
        raise PlanError(f"{dst} exists (--force replaces it once the new one is complete)") from None
    except OSError:  # a file system without links
        partial.rename(dst)


def _copied(name: str, source: Source) -> File:
    body = (Segment(0, contiguous(source, (source.nbytes,), UINT8), name),) if source.nbytes else ()
    return File(name, source.nbytes, body)


def _unchanged(names: Iterable[str]) -> list[str]:
    """What lists tokens and goes on without the new ones."""
    lists = sorted(name for name in names if name in LISTS)
    return [f"copied as they are, without the new tokens: {', '.join(lists)}"] if lists else []


def _left(src: Path, sides: Iterable[str]) -> list[str]:
    behind = left_behind(src, sides)
    if os.path.lexists(src / CONFIG):
        behind.insert(0, CONFIG)
    return [f"left behind in the source: {', '.join(behind)}"] if behind else []
