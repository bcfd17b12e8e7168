"""What lies in a Hugging Face folder: the weights that count, side files that travel along, what stays behind."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ckptconv.containers import json_file, safetensors, torch_file
from ckptconv.containers.folder import inside
from ckptconv.errors import CoverageError, FormatError
from ckptconv.source import Source, whole
from ckptconv.tensor import Tensor

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SETS = ((INDEX, "model.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model.bin"))  # the first found counts
SIDE_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "chat_template.json", "chat_template.jinja",
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "LICENSE*", "NOTICE*", "README.md", "USE_POLICY.md", "*.py",
)  # fmt: skip
UNMENTIONED = ("ckptconv.json", ".*")
SHARD = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|bin)$")
_FORBIDDEN = frozenset("/\\\0")  # in the name of a file that stays in its folder


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a folder by stored name, and the files that they (and the index) lie in."""

    tensors: dict[str, Tensor]
    files: tuple[str, ...]


def folder_of(path: Path) -> Path:
    if not path.is_dir():
        raise FormatError(path, "is not a folder; expected the one that holds config.json and the weights")
    return path


def read_weights(folder: Path, check: bool = False) -> Weights:
    """The index decides, else safetensors before bin; sets are never mixed."""
    for index, single in SETS:
        if os.path.lexists(folder / index):
            return _sharded(folder, index, single.rpartition(".")[2], check)
        if os.path.lexists(folder / single):
            return Weights(read_tensors(inside(folder, single), check), (single,))
        suffix = single.rpartition(".")[2]
        if strays := sorted(p.name for p in folder.glob(f"*.{suffix}") if SHARD.search(p.name)):
            raise FormatError(folder, f"shards without {index}, which says what they hold: {', '.join(strays)}")
    wanted = ", ".join(name for pair in SETS for name in pair)
    found = ", ".join(sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())) or "nothing"
    raise FormatError(folder, f"no weights that are read here; expected one of {wanted}; found {found}")


def has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for pair in SETS for name in pair)


def read_tensors(path: Path, check: bool) -> dict[str, Tensor]:
    """All tensors of one file, lazily; `check` compares checksums where the container has them."""
    if path.suffix == ".safetensors":
        return dict(safetensors.read(path).tensors)
    state = torch_file.read(path, check=check)
    if not isinstance(state, dict):
        raise FormatError(path, f"holds a {type(state).__name__}, expected a table of tensors by name")
    odd = [f"{k!r}: {type(v).__name__}" for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if odd:
        shown = ", ".join(odd[:5])
        raise FormatError(path, f"expected a table of tensors by name, found {len(odd)} other entries: {shown}")
    return dict(state)


def _sharded(folder: Path, index: str, suffix: str, check: bool) -> Weights:
    named = _weight_map(inside(folder, index), suffix)
    shards = list(dict.fromkeys(named.values()))
    if missing := [s for s in shards if not os.path.lexists(folder / s)]:
        lines = [f"{s} is not there ({sum(v == s for v in named.values())} tensors)" for s in missing]
        raise CoverageError(f"{folder / index} names files that are missing:", lines, "Fetch the checkpoint again.")
    held = {shard: read_tensors(inside(folder, shard), check) for shard in shards}
    problems = [f"{n} is not in {s}, where the index says it is" for n, s in named.items() if n not in held[s]]
    for shard, tensors in held.items():
        for name in (n for n in tensors if named.get(n) != shard):
            said = f"says it is in {named[name]}" if name in named else "does not list it"
            problems.append(f"{name} is in {shard}, and the index {said}")
    if problems:
        title = f"{folder / index} and the shards do not agree:"
        raise CoverageError(title, problems, "Shards of different versions may be mixed here.")
    return Weights({name: held[shard][name] for name, shard in named.items()}, (index, *shards))


def _weight_map(path: Path, suffix: str) -> dict[str, str]:
    """tensor -> file, of an index whose file names all stay in the folder. `total_size` says nothing that is needed."""
    table = json_file.read(path, json_file.MAX_INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise FormatError(path, "has no weight_map (tensor name -> file name), or an empty one")
    for name, shard in table.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise FormatError(path, f"puts {name} into {shard!r}, which is not a plain file name in this folder")
        if not shard.endswith("." + suffix):
            raise FormatError(path, f"puts {name} into {shard!r}, expected a .{suffix} file")
    return table


def _is_plain(name: str) -> bool:
    try:
        return name not in ("", ".", "..") and _FORBIDDEN.isdisjoint(name) and len(name.encode()) <= 255
    except UnicodeEncodeError:
        return False


def side_files(folder: Path) -> dict[str, Source]:
    """Files that travel along, by an allow-list; they are copied and never run."""
    names = sorted(p.name for p in folder.iterdir() if is_side_file(p.name) and not p.is_dir())
    return {name: whole(str(inside(folder, name))) for name in names}


def is_side_file(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in SIDE_FILES)


def left_behind(folder: Path, used: Iterable[str]) -> list[str]:
    """What else is in the folder, hidden files aside."""
    known = {CONFIG, *used}
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    return [n for n in names if n not in known and not any(fnmatchcase(n, pattern) for pattern in UNMENTIONED)]
