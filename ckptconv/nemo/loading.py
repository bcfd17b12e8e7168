"""A `.nemo` archive, or the folder it unpacks to, as a Stored checkpoint: tensors stay where they lie inside the archive."""

from __future__ import annotations

import re
from collections.abc import Collection
from collections.abc import Mapping as Dict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ckptconv.checkpoint import Stored
from ckptconv.containers import dcp, gzipped, json_file, tar, torch_file, zarr2
from ckptconv.containers.ranges import HeaderReader
from ckptconv.containers.tar import Tar
from ckptconv.errors import FormatError, UsageError
from ckptconv.formats import Request
from ckptconv.mapping_files import chosen
from ckptconv.megatron import hf_beside
from ckptconv.megatron.args_read import ArgsLayout
from ckptconv.megatron.dist_loading import TELLING, ZARR, Contents, from_whole, of_torch_dist, of_zarr
from ckptconv.megatron.folders import RankFile
from ckptconv.megatron.loading import Kind, from_ranks
from ckptconv.megatron.measure import MCORE
from ckptconv.megatron.rank_file import RankContent, model_tensors
from ckptconv.nemo import artifacts, model_config
from ckptconv.nemo.model_config import NemoConfig
from ckptconv.nemo.names import LEGACY, joined_gates, prefix_of
from ckptconv.source import Source, whole
from ckptconv.tensor import Tensor

WEIGHTS, DISTRIBUTED = "model_weights.ckpt", "model_weights/"
RANKS = re.compile(r"(?:mp_rank_(\d{2,6})/|tp_rank_(\d{2,6})_pp_rank_(\d{3,6})/)?" + re.escape(WEIGHTS))
MAX_CONFIG, MAX_TOKENIZER = 4 << 20, 64 << 20
TOKENIZER = "tokenizer.model"


@dataclass(frozen=True, slots=True)
class Opened:
    """An archive, its configuration, and the tokenizer: what the model's vocabulary is known by."""

    archive: Tar
    config: NemoConfig
    tokenizer: Source | None


def is_nemo(path: Path) -> bool:
    """Whether a file or folder looks like one, from names alone."""
    if path.is_dir():
        return (path / model_config.NAME).is_file()
    return path.is_file() and (path.suffix == ".nemo" or tar.is_tar(path))


def open_archive(path: Path, scratch: Path | None, tokenizer: Path | None, *, plain_rope: bool) -> Opened:
    """The archive in place; a gzip'ed one is unpacked once, into the folder `scratch`."""
    if path.is_dir():
        archive = tar.open_folder(path)
    elif gzipped.is_gzip(path):
        if scratch is None:
            raise UsageError(
                f"{path} is compressed and has to be unpacked once: say into which folder with --loader.scratch FOLDER"
            )
        archive = tar.open_tar(gzipped.unpacked(path, scratch), str(path))
    else:
        archive = tar.open_tar(path)
    member = archive.members.get(model_config.NAME)
    if member is None:
        raise FormatError(path, f"has no {model_config.NAME}: it is no checkpoint of NeMo")
    where = f"{path}!{model_config.NAME}"
    config = model_config.read(content(member, where, MAX_CONFIG), where, plain_rope=plain_rope)
    found = artifacts.find(config.raw, archive.members, where)
    packed = next((a.member for a in found if a.key == "tokenizer.model" and a.member), None)
    given = whole(str(tokenizer)) if tokenizer is not None else None
    return Opened(archive, config, given or (archive.members[packed] if packed else None))


def content(source: Source, where: str, limit: int) -> bytes:
    """A small member, whole."""
    if source.nbytes > limit:
        raise FormatError(where, f"has {source.nbytes:,} bytes; more than {limit:,} are not read")
    with HeaderReader(source, where) as reader:
        return reader.read(0, source.nbytes, "its bytes")


def load(path: Path, opened: Opened, config: Path | None, request: Request, format_name: str) -> Stored:
    """Describe the checkpoint from the headers of its members."""
    nemo, archive = opened.config, opened.archive
    tokens = content(opened.tokenizer, f"{path}!{TOKENIZER}", MAX_TOKENIZER) if opened.tokenizer else None
    said = model_config.statement(nemo, request.vocab or model_config.vocabulary(nemo, tokens, f"{path}!{TOKENIZER}"))
    beside = hf_beside.find(config, None, request)
    inside = {n.removeprefix(DISTRIBUTED): s for n, s in archive.members.items() if n.startswith(DISTRIBUTED)}
    forms = _forms(archive)
    if len(forms) > 1:
        raise FormatError(path, f"holds the weights in more than one form: {' and '.join(forms)}; which of them count?")
    if inside:
        _check_kind(nemo, legacy=False)
        said = replace(said, layout=ArgsLayout())
        held = _contents(f"{path}!{DISTRIBUTED}", inside, check=request.check)
        _refuse_without_language_model(nemo, held.shapes, path)
        stored = from_whole(held, said, beside, request, str(path), format_name)
    else:
        contents = _ranks(path, archive, check=request.check)
        _refuse_without_language_model(nemo, [name for rank in contents for name in rank.chunks[0]], path)
        stored = from_ranks(contents, said, beside, request, _kind(contents, nemo, request, format_name), path)
    files = {**stored.extras.files, **({TOKENIZER: opened.tokenizer} if opened.tokenizer else {})}
    objects = {**stored.extras.objects, "nemo": nemo.raw}
    notes = (*nemo.notes, *stored.extras.notes)
    extras = replace(stored.extras, files=files, objects=objects, notes=notes)
    return replace(stored, config=replace(stored.config, dtype=nemo.dtype), extras=extras)


def _forms(archive: Tar) -> list[str]:
    """The ways in which weights are filed here; an archive has one."""
    found = [match for name in archive.members if (match := RANKS.fullmatch(name))]
    forms = {
        f"{DISTRIBUTED} (distributed)": any(name.startswith(DISTRIBUTED) for name in archive.members),
        WEIGHTS: any(match.lastindex is None for match in found),
        f"mp_rank_XX/{WEIGHTS}": any(match[1] for match in found),
        f"tp_rank_XX_pp_rank_XXX/{WEIGHTS}": any(match[2] for match in found),
    }
    return [form for form, there in forms.items() if there]


def _check_kind(nemo: NemoConfig, *, legacy: bool) -> None:
    """Where the configuration says which of NeMo's models it is for, the names of the tensors are that one's."""
    if nemo.mcore is legacy:
        told, found = ("true", "legacy models") if legacy else ("false", "Megatron-Core models")
        raise FormatError(nemo.where, f"says mcore_gpt: {told}, yet the tensors have the names of {found}; correct one")


def _refuse_without_language_model(nemo: NemoConfig, names: Collection[str], path: Path) -> None:
    """NeVA saves what it trained: often its projector alone."""
    if nemo.multimodal and not any(name.endswith("word_embeddings.weight") for name in names):
        listed = "".join(f"\n  {name}" for name in sorted(names))
        raise FormatError(
            path,
            f"is an image model (NeVA) saved without its language model, which is not supported yet; it holds{listed}",
        )


def _contents(where: str, files: Dict[str, Source], *, check: bool) -> Contents:
    """A distributed checkpoint inside the archive, under the names that Megatron-Core has for it."""
    told = json_file.read(files[TELLING]) if TELLING in files else {}
    if told.get("sharded_backend") == ZARR:
        return _bare(of_zarr(zarr2.interpret(where, files)), where)
    return _bare(of_torch_dist(dcp.interpret(where, files), check=check), where)


def _bare(contents: Contents, where: str) -> Contents:
    """The same without what NeMo puts before every name."""
    prefix = prefix_of([*contents.shapes, *contents.objects], where)
    n = len(prefix)

    def tensors(keys: list[str]) -> dict[str, Tensor]:
        return {key[n:]: tensor for key, tensor in contents.tensors([prefix + key for key in keys]).items()}

    return Contents(
        {key[n:]: shape for key, shape in contents.shapes.items()},
        {key[n:]: nbytes for key, nbytes in contents.objects.items()},
        tensors,
        lambda key: contents.value(prefix + key),
        contents.unused,
    )


def _ranks(path: Path, archive: Tar, *, check: bool) -> list[RankContent]:
    """What each rank's file holds, in order of the ranks' numbers."""
    found: dict[tuple[int, ...], RankContent] = {}
    for name, source in archive.members.items():
        if (match := RANKS.fullmatch(name)) is None:
            continue
        numbers = tuple(int(n) for n in match.groups() if n is not None) or (0,)
        where = f"{path}!{name}"
        saved = torch_file.read(source, check=check, where=where)
        if not isinstance(saved, dict):
            raise FormatError(where, f"holds a {type(saved).__name__}, expected the dictionary of a model")
        prefix = prefix_of([str(key) for key in saved], where)
        tensors = model_tensors(saved, partial(_without, prefix), where)
        file = RankFile(numbers, Path(name if "/" in name else f"{path.name}/{name}"))
        found[numbers] = RankContent(file, (tensors,), None, None, None)
    if not found:
        raise FormatError(
            path, f"holds no weights: neither {WEIGHTS} (alone, or in folders of ranks) nor {DISTRIBUTED}"
        )
    return [found[numbers] for numbers in sorted(found)]


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def _kind(contents: list[RankContent], nemo: NemoConfig, request: Request, format_name: str) -> Kind:
    """Which of NeMo's models the names are of."""
    is_legacy = any(name.startswith("language_model.") for name in contents[0].chunks[0])
    _check_kind(nemo, legacy=is_legacy)
    if is_legacy:
        legacy = (chosen("nemo-legacy", request.mappings),)
        return Kind(format_name, legacy, LEGACY, lambda _: nemo.variant, joined_gates)
    core = (chosen("nemo-mcore", request.mappings), chosen("nemo-mcore-local", request.mappings))
    return Kind(format_name, core, MCORE, lambda _: frozenset())
