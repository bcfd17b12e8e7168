"""Holds a checkpoint that is to be read against the `ckptconv.json` it came with (`--check`): every byte of the result is read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from ckptconv.checkpoint import Stored
from ckptconv.errors import FormatError
from ckptconv.executor.fingerprint import manifest_path
from ckptconv.executor.manifest import FileEntry, Manifest, damage, home, manifest_of, read_manifest

SHOWN = 20
ALONE = "only checksums inside the files were compared (safetensors files have none)"


def check_manifest(source: Path, stored: Stored) -> tuple[str, ...]:
    """Refuse a result of ours that is no longer what was written; notes on what could not be held against a manifest.

    A checkpoint that others wrote has no manifest, or (one that was trained on, in the folder of a result) only one of
    other files.
    """
    # a source may be one iteration, a folder below the one that has the manifest
    result = next((path for path in (source, source.parent) if os.path.lexists(manifest_of(path))), None)
    manifest = read_manifest(result) if result is not None else None
    if result is None or manifest is None:
        return (_without(source),)
    folder, called = Path(home(result)), os.path.basename(manifest_of(result))
    listed = {os.path.realpath(folder / name) for name in manifest.files}
    weights = {os.path.realpath(path) for path in _weight_files(stored)}
    if not weights & listed:
        return (f"--check: {called} is of other files, so {ALONE}",)
    problems = _implausible(folder, manifest)
    problems += [f"{Path(path).name} is read, but not listed there: added later?" for path in sorted(weights - listed)]
    problems = problems or damage(result, manifest)
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        lines = [f"is not what ckptconv wrote, by its {called}:", *problems[:SHOWN], *more]
        advice = f"\nIf another file was put in its place on purpose, remove {called}." if result.is_file() else ""
        raise FormatError(result, "\n  ".join(lines) + advice)
    return ()


def _without(source: Path) -> str:
    """What is said where there is no manifest. A single file's may not have come yet, if a run was stopped at its end."""
    told = f"--check: there is no {os.path.basename(manifest_of(source))}, so {ALONE}"
    partial = os.path.realpath(source) + ".partial"
    if source.is_file() and os.path.lexists(manifest_path(partial, single=False)):
        told += (
            f"; there is one in {partial}: a run that was to make this file was stopped, the same command finishes it"
        )
    return told


def _weight_files(stored: Stored) -> set[str]:
    tensors = (tensor for rank in stored.ranks.values() for tensor in rank.values())
    return {move.source.path for tensor in tensors for move in tensor.lower() if move.source is not None}


def _implausible(folder: Path, manifest: Manifest) -> list[str]:
    """What would make reading by it unsafe or endless: files elsewhere, pipes, ranges that overlap or leave the file."""
    real = os.path.realpath(folder)
    problems = []
    for name, entry in manifest.files.items():
        path = os.path.realpath(folder / name)
        if os.path.commonpath([real, path]) != real:
            problems.append(f"{name}: is a link that leaves the folder")
        elif not _is_file(path):
            problems.append(f"{name}: is not there, or not a regular file")
        elif not _in_order((t.offset, t.nbytes) for t in sorted(entry.tensors, key=lambda t: t.offset)):
            problems.append(f"{name}: the manifest gives tensors in it that overlap")
        elif _end(entry) > entry.size:
            problems.append(f"{name}: the manifest gives tensors up to byte {_end(entry)} of {entry.size}")
    return problems


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _in_order(ranges: Iterable[tuple[int, int]]) -> bool:
    at = 0
    for offset, nbytes in ranges:
        if offset < at or nbytes < 0:
            return False
        at = offset + nbytes
    return True


def _end(entry: FileEntry) -> int:
    return max((t.offset + t.nbytes for t in entry.tensors), default=0)
