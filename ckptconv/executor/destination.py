"""Where a result goes, folder or single file: the folder it is made in, its journal, and the steps that make it appear at once."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ckptconv.errors import PlanError
from ckptconv.executor.fingerprint import MANIFEST, OURS, manifest_path
from ckptconv.executor.journal import Seal
from ckptconv.executor.system import exchange


class Destination(NamedTuple):
    """`partial` and `journal` are siblings of `final`, or inside it (`inside`) where none can be put in its place.

    `title` is for a result that is a single file: its path below `partial`.
    """

    final: str
    partial: str
    journal: str
    inside: bool
    title: str = ""

    @property
    def complete(self) -> str:
        """What becomes `final`."""
        return f"{self.partial}/{self.title}" if self.title else self.partial

    @property
    def manifest(self) -> str:
        """Where the manifest will be."""
        return manifest_path(self.final, bool(self.title))

    @property
    def aside(self) -> str:
        """Where an old result waits for the new one, where the two names cannot be swapped in one step."""
        return self.final + ".replaced"


def locate(dst: Path, title: str = "") -> Destination:
    """Choose the place to work in (`title`: for a single file); nothing is made or changed."""
    final = os.path.realpath(dst)
    parent, name = os.path.split(final)
    if not name:
        raise PlanError(f"{dst} cannot be a destination")
    if not os.path.isdir(parent):
        raise PlanError(f"{parent} is not a folder: make it first")
    inside = not title and os.path.isdir(final) and (not os.access(parent, os.W_OK | os.X_OK) or _mounted(final))
    if inside:
        return Destination(final, f"{final}/{OURS}partial", f"{final}/{OURS}journal", True)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PlanError(f"{parent} cannot be written to")
    return Destination(final, final + ".partial", final + ".journal", False, title)


def check_free(place: Destination, force: bool, sources: Iterable[str]) -> None:
    """The destination must be absent or an empty folder; what is or holds a source is never replaced."""
    if os.path.lexists(place.final):
        for path in sorted({os.path.realpath(path) for path in sources}):
            if os.path.commonpath([path, place.final]) == place.final:
                raise PlanError(f"{place.final} is or holds the source {path}: choose another destination")
    if place.title:
        _check_file(place.final, force)
        _check_file(place.manifest, force)
        return
    if force and not place.inside and os.path.lexists(place.aside):
        raise PlanError(f"{place.aside} is in the way: remove it first")
    if not os.path.lexists(place.final):
        return
    if os.path.isdir(place.final) and all(name.startswith(OURS) for name in os.listdir(place.final)):
        return
    if place.inside:
        raise PlanError(f"{place.final} is not empty, and its parent cannot take a folder that would replace it")
    if not force:
        raise PlanError(
            f"{place.final} exists and is not an empty folder (--force replaces it once the new one is complete)"
        )


def _check_file(path: str, force: bool) -> None:
    """A single file, and its manifest, replace a file at most."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise PlanError(f"{path} is {found}, the result is a single file: choose another destination")
    if not force:
        raise PlanError(f"{path} exists (--force replaces it once the new one is complete)")


def check_space(place: Destination, sizes: Iterable[int]) -> None:
    """The file system must have room for what is still to be written."""
    needed = sum(-(-size // 4096) * 4096 for size in sizes)
    folder = place.final if place.inside else os.path.dirname(place.final)
    available = shutil.disk_usage(folder).free
    if needed > available:
        raise PlanError(
            f"{folder} has {available:,} bytes free, the result needs {needed:,}: {needed - available:,} too few"
        )


def in_place(place: Destination, seal: Seal) -> bool:
    """Whether the sealed result already stands at the destination."""
    try:
        return not place.inside and os.stat(place.final).st_ino == seal.inode
    except FileNotFoundError:
        return False


def commit(place: Destination, seal: Seal, sync: Callable[[str], None]) -> None:
    """Make what is complete the result. Stopped anywhere, old or new is whole; doing it again ends it."""
    if place.inside:
        _move_out(place, sync)
        return
    if not in_place(place, seal):
        if seal.single:
            _put_file_in_place(place, seal, sync)
        else:
            _put_in_place(place, seal)
    sync(os.path.dirname(place.final))
    if seal.single:
        _put_manifest_beside(place, seal, sync)
        _remove(place.partial)
    elif seal.force:  # the result that was replaced has either name
        _remove(place.partial)
        _remove(place.aside)


def _put_in_place(place: Destination, seal: Seal) -> None:
    if seal.force and os.path.lexists(place.final):
        if exchange(place.partial, place.final):
            return
        os.rename(place.final, place.aside)
    try:
        os.rename(place.partial, place.final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _appeared(place.final) from None
        raise


def _put_file_in_place(place: Destination, seal: Seal, sync: Callable[[str], None]) -> None:
    """An old manifest goes before the file it speaks of, so that none ever stands beside a file that it does not describe."""
    if seal.force:
        with suppress(FileNotFoundError):
            os.unlink(place.manifest)
            sync(os.path.dirname(place.final))
    _name_file(place.complete, place.final, seal.force)


def _put_manifest_beside(place: Destination, seal: Seal, sync: Callable[[str], None]) -> None:
    made = manifest_path(place.partial, single=False)
    if os.path.exists(made):
        _name_file(made, manifest_path(place.final, single=True), seal.force)
        sync(os.path.dirname(place.final))


def _name_file(path: str, name: str, force: bool) -> None:
    """Give a complete file its name in one step; only with `force` another file may lose it."""
    if not force:
        try:
            os.link(path, name)  # unlike a rename it replaces nothing; the old name goes with the partial folder
            return
        except OSError:
            if os.path.lexists(name):
                if os.path.samestat(os.lstat(path), os.lstat(name)):
                    return  # an earlier run came this far
                raise _appeared(name) from None
    try:  # without `force`: on a file system that has no links
        os.rename(path, name)
    except IsADirectoryError:
        raise _appeared(name) from None


def _appeared(path: str) -> PlanError:
    return PlanError(f"{path} appeared meanwhile; the result is complete: remove it, and run this again")


def _move_out(place: Destination, sync: Callable[[str], None]) -> None:
    """File by file, the manifest last: where it stands, all does."""
    with suppress(FileNotFoundError):
        for name in sorted(os.listdir(place.partial), key=lambda name: (name == MANIFEST, name)):
            if name == MANIFEST:
                sync(place.final)
            os.rename(f"{place.partial}/{name}", f"{place.final}/{name}")
        os.rmdir(place.partial)
    sync(place.final)


def discard(place: Destination) -> None:
    """Take unfinished work away."""
    _remove(place.partial)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)


def _mounted(path: str) -> bool:
    """Whether a file system is mounted here (a bind mount too): such a folder cannot be replaced."""
    if os.path.ismount(path):
        return True
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            return any(line.split(" ")[4].encode().decode("unicode_escape") == path for line in lines)
    except OSError:
        return False
