"""A checkpoint that Lightning saved while NeMo trained (.ckpt files of ranks, of FSDP shards, or a distributed folder) as a Stored one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from collections.abc import Mapping as Dict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ckptconv.checkpoint import Stored
from ckptconv.containers import torch_file, torch_sharded
from ckptconv.errors import ConfigError, FormatError
from ckptconv.formats import Request
from ckptconv.mapping_files import chosen
from ckptconv.megatron import hf_beside
from ckptconv.megatron.args_read import ArgsLayout, Statement
from ckptconv.megatron.dist_loading import COMMON
from ckptconv.megatron.folders import RankFile
from ckptconv.megatron.loading import Kind, from_ranks
from ckptconv.megatron.measure import MCORE
from ckptconv.megatron.rank_file import RankContent, model_tensors
from ckptconv.nemo import artifacts, distributed, model_config, omegaconf, yaml_file
from ckptconv.nemo.model_config import NemoConfig
from ckptconv.nemo.names import LEGACY, joined_gates, prefix_of
from ckptconv.nemo.run_state import HYPER, WEIGHTS, RunState, chunk_keys, refuse_unfinished, run_state
from ckptconv.tensor import Tensor

SUFFIX = ".ckpt"
_RANK = re.compile(
    r"(?=.)(?:mp_rank_(?P<mp>\d{2,6})|tp_rank_(?P<tp>\d{2,6})_pp_rank_(?P<pp>\d{3,6}))?(?:(?:^|_)fsdp_shard_(?P<dp>\d{5,6}))?"
)
Saved = dict[object, object]


@dataclass(frozen=True, slots=True)
class RankFiles:
    """The files of one tensor and pipeline rank: one, or one for each FSDP shard, in order."""

    numbers: tuple[int, ...]
    paths: tuple[Path, ...]


def rank_folders(folder: Path) -> list[Path]:
    """The folders that are named for ranks or shards, if there are any."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and _RANK.fullmatch(p.name))


def find(path: Path) -> tuple[RankFiles, ...]:
    """All files of the checkpoint that `path` is one file, or the folder, of."""
    if path.is_file():
        ranked, name = _RANK.fullmatch(path.parent.name) is not None, path.name
        base = path.parent.parent if ranked else path.parent
        folders = rank_folders(base) if ranked else [base]
    else:
        base, folders = path, rank_folders(path)
        names = sorted({file.name for folder in folders for file in folder.glob(f"*{SUFFIX}")})
        if len(names) != 1:
            told = ", ".join(names) or "none"
            raise FormatError(path, f"expected one checkpoint in folders of ranks, found {told}; give one of its files")
        (name,) = names
    refuse_unfinished(base / name)
    if absent := [folder.name for folder in folders if not (folder / name).is_file()]:
        raise FormatError(base, f"{name} is missing in {', '.join(absent)}; other ranks have it")
    return _grouped([folder / name for folder in folders], base)


def _grouped(paths: Iterable[Path], base: Path) -> tuple[RankFiles, ...]:
    """Files by rank; the shards of a rank count from 0 without a gap."""
    groups: dict[tuple[int, ...], dict[int, Path]] = {}
    for path in paths:
        match = _RANK.fullmatch(path.parent.name)
        found = match.groupdict() if match else {}
        numbers = tuple(int(found[key] or 0) for key in ("mp", "tp", "pp") if found.get(key)) or (0,)
        groups.setdefault(numbers, {})[int(found.get("dp") or 0)] = path
    for numbers, shards in groups.items():
        if sorted(shards) != list(range(len(shards))):
            raise FormatError(base, f"rank {numbers} has the FSDP shards {sorted(shards)}: some are missing")
    if len({len(shards) for shards in groups.values()}) > 1:
        raise FormatError(base, "ranks have different numbers of FSDP shards: some are missing")
    return tuple(RankFiles(n, tuple(groups[n][i] for i in sorted(groups[n]))) for n in sorted(groups))


def load_ranks(path: Path, config: Path | None, request: Request, name: str) -> Stored:
    """Describe the checkpoint from the headers of its files."""
    contents, first, run = [], Saved(), None
    for files in find(path):
        saved = [_read(file, check=request.check) for file in files.paths]
        state = run_state(saved[0], files.paths[0])
        first, run = (first, run) if run else (saved[0], state)
        file = RankFile(files.numbers, files.paths[0])
        contents.append(RankContent(file, _chunks(saved, files), None, None, None, state.state, state.strays))
    nemo = configuration(first, f"{contents[0].file.path.name}: {HYPER}")
    beside = hf_beside.find(config, None, request)
    kind = _kind(contents, nemo, request, name)
    stored = from_ranks(contents, _said(nemo, request), beside, request, kind, path)
    return _finished(stored, nemo, run)


def load_distributed(folder: Path, config: Path | None, request: Request, name: str) -> Stored:
    """The folder that takes the place of a .ckpt where models are of Megatron-Core."""
    refuse_unfinished(folder)
    saved, run = distributed.read_common(folder)
    nemo = configuration(saved, f"{COMMON}: {HYPER}")
    said = _said(nemo, request)
    said = replace(said, layout=ArgsLayout()) if said is not None else None
    stored = distributed.load(folder, run, said, hf_beside.find(config, None, request), request, name)
    return _finished(stored, nemo, run)


def configuration(saved: Dict[object, object], where: str) -> NemoConfig | None:
    """The configuration that a run was started with; None: it was not saved."""
    held = omegaconf.plain(saved.get(HYPER), where)
    return model_config.read(yaml_file.dump(held), where) if isinstance(held, dict) and held else None


def _said(nemo: NemoConfig | None, request: Request) -> Statement | None:
    if nemo is None:
        return None
    return model_config.statement(nemo, request.vocab or model_config.true_vocabulary(nemo, None))


def _finished(stored: Stored, nemo: NemoConfig | None, run: RunState | None) -> Stored:
    extras = replace(stored.extras, step=run.step if run else None)
    if nemo is None:
        return replace(stored, extras=extras)
    extras = replace(extras, notes=(*nemo.notes, *extras.notes), objects={**extras.objects, "nemo": _settings(nemo)})
    return replace(stored, config=replace(stored.config, dtype=nemo.dtype), extras=extras)


def _settings(nemo: NemoConfig) -> dict[str, object]:
    """The configuration without names of files in an archive: there is none here."""
    there = {k: None if isinstance(v, str) and v.startswith(artifacts.SCHEME) else v for k, v in nemo.tokenizer.items()}
    return {**nemo.raw, "tokenizer": there}


def _read(path: Path, *, check: bool) -> Saved:
    saved = torch_file.read(path, check=check, calls=omegaconf.CALLS)
    if not isinstance(saved, dict) or (WEIGHTS not in saved and not chunk_keys(saved)):
        raise FormatError(path, f"is no checkpoint of Lightning: expected a dictionary with {WEIGHTS}")
    return saved


def _chunks(saved: list[Saved], files: RankFiles) -> tuple[dict[str, Tensor], ...]:
    """The model's tensors of one rank, put together from its shards."""
    chunks = []
    for key in chunk_keys(saved[0]) or [WEIGHTS]:
        where = f"{files.paths[0]}: {key}"
        held = [one.get(key) for one in saved]
        tables = [table for table in held if isinstance(table, dict)]
        if len(tables) < len(held) or any(table.keys() != tables[0].keys() for table in tables):
            raise FormatError(where, "the shards do not all hold the same names")
        prefix = prefix_of([str(name) for name in tables[0]], where)
        whole = {name: _whole([table[name] for table in tables], f"{where}: {name}") for name in tables[0]}
        chunks.append(model_tensors(whole, partial(_without, prefix), where))
    return tuple(chunks)


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def _whole(values: list[object], where: str) -> object:
    """A value that all shards have parts of; what is no part is the same in each."""
    parts = [torch_sharded.part(value, where) for value in values]
    found = [part for part in parts if part is not None]
    if not found:
        return values[0]
    if len(found) < len(parts):
        raise FormatError(where, "is cut into parts in some shards and whole in others")
    return torch_sharded.whole(found, where)


def _kind(contents: list[RankContent], nemo: NemoConfig | None, request: Request, name: str) -> Kind:
    """Which of NeMo's models the names are of."""
    if not any(n.startswith("language_model.") for n in contents[0].chunks[0]):
        core = (chosen("nemo-mcore", request.mappings), chosen("nemo-mcore-local", request.mappings))
        return Kind(name, core, MCORE, lambda _: frozenset())
    if nemo is None:
        raise ConfigError(
            f"{contents[0].file.path}: a legacy model without {HYPER}, which say how its tensors are filed"
        )
    return Kind(name, (chosen("nemo-legacy", request.mappings),), LEGACY, lambda _: nemo.variant, joined_gates)
