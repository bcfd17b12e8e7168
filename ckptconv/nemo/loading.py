"""A `.nemo` archive, or the folder it unpacks to, as a Stored checkpoint: tensors stay where they lie inside the archive."""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Mapping as Dict
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from ckptconv.checkpoint import Stored
from ckptconv.containers import dcp, gzipped, json_file, tar, torch_file, zarr2
from ckptconv.containers.dcp_metadata import NAME as METADATA
from ckptconv.containers.ranges import HeaderReader
from ckptconv.containers.tar import Tar
from ckptconv.errors import FormatError, UsageError
from ckptconv.formats import Request
from ckptconv.huggingface.files import UNMENTIONED
from ckptconv.mapping import Mapping
from ckptconv.mapping_files import chosen
from ckptconv.megatron import extra_state, hf_beside
from ckptconv.megatron.args_read import ArgsLayout, Statement
from ckptconv.megatron.dist_loading import (
    COMMON,
    TELLING,
    TORCH_DIST,
    ZARR,
    Contents,
    from_whole,
    of_torch_dist,
    of_zarr,
)
from ckptconv.megatron.folders import DIGESTS, RankFile
from ckptconv.megatron.hf_beside import Beside
from ckptconv.megatron.loading import Kind, from_ranks
from ckptconv.megatron.measure import MCORE
from ckptconv.megatron.rank_file import KNOWN, RankContent, model_tensors, state_of, step_of
from ckptconv.nemo import artifacts, model_config
from ckptconv.nemo.artifacts import Artifact
from ckptconv.nemo.model_config import NemoConfig
from ckptconv.nemo.names import LEGACY, joined_gates, prefix_of
from ckptconv.sizes import human
from ckptconv.source import Source, whole
from ckptconv.tensor import Shape, Tensor

WEIGHTS, DISTRIBUTED = "model_weights.ckpt", "model_weights/"
IN_DISTRIBUTED = (METADATA, TELLING, COMMON, DIGESTS)
RANKS = re.compile(r"(?:mp_rank_(\d{2,6})/|tp_rank_(\d{2,6})_pp_rank_(\d{3,6})/)?" + re.escape(WEIGHTS))
KINDS = {  # what a dialect says; distributed tensors have the same names with TransformerEngine and without
    "nemo-legacy": {"mcore_gpt": False},
    "nemo-mcore": {"mcore_gpt": True, "transformer_engine": True},
    "nemo-mcore-local": {"mcore_gpt": True, "transformer_engine": False},
}
MAX_CONFIG, MAX_TOKENIZER = 4 << 20, 64 << 20
TOKENIZER = "tokenizer.model"


@dataclass(frozen=True, slots=True)
class Opened:
    """An archive, its configuration, the sentencepiece model (what the vocabulary is known by), and the files referred to."""

    archive: Tar
    config: NemoConfig
    tokenizer: Source | None
    artifacts: tuple[Artifact, ...]
    notes: tuple[str, ...] = ()


def is_nemo(path: Path) -> bool:
    """Whether a file or folder looks like one, from names alone."""
    if path.is_dir():
        return (path / model_config.NAME).is_file()
    return path.is_file() and (path.suffix == ".nemo" or tar.is_tar(path))


def open_archive(path: Path, scratch: Path | None, tokenizer: Path | None, *, plain_rope: bool) -> Opened:
    """The archive in place; a gzip'ed one is unpacked once, into the folder `scratch`."""
    notes: tuple[str, ...] = ()
    if path.is_dir():
        archive = tar.open_folder(path)
    elif gzipped.is_gzip(path):
        if scratch is None:
            raise UsageError(
                f"{path} is compressed and has to be unpacked once: say into which folder with --loader.scratch FOLDER"
            )
        plain = gzipped.unpacked(path, scratch)
        archive = tar.open_tar(plain, str(path))
        notes = (f"unpacked into {plain} ({human(plain.stat().st_size)}): remove it when the result is there",)
    else:
        archive = tar.open_tar(path)
    member = archive.members.get(model_config.NAME)
    if member is None:
        raise FormatError(path, f"has no {model_config.NAME}: it is no checkpoint of NeMo")
    where = f"{path}!{model_config.NAME}"
    config = model_config.read(content(member, where, MAX_CONFIG), where, plain_rope=plain_rope)
    found = artifacts.find(config.raw, [name for name in archive.members if not _is_own(name)], where)
    packed = next((a.member for a in found if a.key == artifacts.MODEL and a.member and config.sentencepiece), None)
    given = whole(str(tokenizer)) if tokenizer is not None else None
    return Opened(archive, config, given or (archive.members[packed] if packed else None), found, notes)


def _is_own(name: str) -> bool:
    """Whether a member is the configuration or weights, and so none of the files that the configuration refers to."""
    return name == model_config.NAME or name.startswith(DISTRIBUTED) or RANKS.fullmatch(name) is not None


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
    forms = _forms(archive)
    if len(forms) > 1:
        raise FormatError(path, f"holds the weights in more than one form: {' and '.join(forms)}; which of them count?")
    inside = archive.below(DISTRIBUTED.removesuffix("/"))
    if inside:
        stored = _whole(path, inside, nemo, said, beside, request, format_name)
    else:
        contents = _ranks(path, archive, check=request.check)
        shapes = {name: tensor.shape for rank in contents for name, tensor in rank.chunks[0].items()}
        _refuse_without_language_model(nemo, shapes, ", ".join(forms), path)
        stored = from_ranks(contents, said, beside, request, _kind(contents, nemo, request, format_name), path)
    referred = {a.member: archive.members[a.member] for a in opened.artifacts if a.member}
    files = {**stored.extras.files, **referred, **({TOKENIZER: opened.tokenizer} if opened.tokenizer else {})}
    objects = {**stored.extras.objects, "nemo": nemo.raw | _kind_of(stored.mapping)}
    notes = (*opened.notes, *nemo.notes, *stored.extras.notes, *_behind(opened))
    extras = replace(stored.extras, files=files, objects=objects, notes=notes)
    return replace(stored, config=replace(stored.config, dtype=nemo.dtype), extras=extras)


def _kind_of(mapping: Mapping) -> dict[str, bool]:
    """What the names of the tensors say of the model, where the configuration may be silent or wrong."""
    names = (mapping.name, mapping.extends)
    return next((kind for name, kind in KINDS.items() if name in names), {"mcore_gpt": True})


def _behind(opened: Opened) -> Iterator[str]:
    """What of the archive does not go everywhere, or nowhere."""
    referred = {a.member for a in opened.artifacts if a.member}
    model = next((a.member for a in opened.artifacts if a.key == artifacts.MODEL and opened.config.sentencepiece), None)
    if other := sorted(name for name in referred if name and name != model):
        yield f"travel to another .nemo archive, and nowhere else: {', '.join(other)}"
    rest = [name for name in opened.archive.members if not _is_own(name) and name not in referred]
    if rest := sorted(name for name in rest if not any(fnmatchcase(name, pattern) for pattern in UNMENTIONED)):
        yield f"left behind in the archive: {', '.join(rest)}"


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


def _refuse_without_language_model(nemo: NemoConfig, shapes: Dict[str, Shape], form: str, path: Path) -> None:
    """NeVA saves what it trained: often its projector alone."""
    if nemo.multimodal and not any(name.endswith("word_embeddings.weight") for name in shapes):
        listed = "".join(f"\n  {name} {list(shape)}" for name, shape in sorted(shapes.items()))
        raise FormatError(
            path,
            f"is an image model (NeVA) saved without its language model, which is not supported yet\n"
            f"  {model_config.NAME}: target {nemo.raw.get('target')}\n  weights: {form}{listed}",
        )


def _whole(
    path: Path,
    files: Dict[str, Source],
    nemo: NemoConfig,
    said: Statement,
    beside: Beside,
    request: Request,
    format_name: str,
) -> Stored:
    """A distributed checkpoint inside the archive, with what its `common.pt` holds."""
    _check_kind(nemo, legacy=False)
    where = f"{path}!{DISTRIBUTED}"
    zarr = TELLING in files and json_file.read(files[TELLING]).get("sharded_backend") == ZARR
    held = (
        of_zarr(zarr2.interpret(where, files))
        if zarr
        else of_torch_dist(dcp.interpret(where, files), check=request.check)
    )
    held = _bare(held, where)
    _refuse_without_language_model(nemo, held.shapes, f"{DISTRIBUTED} ({ZARR if zarr else TORCH_DIST})", path)
    stored = from_whole(held, replace(said, layout=ArgsLayout()), beside, request, str(path), format_name)
    common = _common(files, where)
    state = list(dict.fromkeys([*state_of(common), *stored.extras.state]))
    notes = [*stored.extras.notes]
    if strays := sorted(str(key)[:60] for key in common if key not in KNOWN or key == "args"):
        notes.append(f"left behind in {COMMON}: {', '.join(strays)}")
    if strays := sorted(name for name in files if not _is_of_backend(name, zarr=zarr)):
        notes.append(f"left behind in {DISTRIBUTED}: {', '.join(strays)}")
    if zarr and request.check:
        notes.append("--check: the chunks of zarr arrays have no checksums of their own")
    step = step_of(common, Path(where + COMMON))
    extras = replace(stored.extras, step=step, notes=tuple(notes), objects={"state": state})
    return replace(stored, extras=extras)


def _common(files: Dict[str, Source], where: str) -> dict[object, object]:
    """What is not cut over ranks: nothing, in files as NeMo writes them."""
    saved = torch_file.read(files[COMMON], where=where + COMMON) if COMMON in files else {}
    if not isinstance(saved, dict):
        raise FormatError(where + COMMON, f"holds a {type(saved).__name__}, expected a dictionary")
    return saved


def _is_of_backend(name: str, *, zarr: bool) -> bool:
    """Whether a file's place in a distributed checkpoint is known; arrays are folders, of which no file is left out."""
    return name in IN_DISTRIBUTED or (zarr and "/" in name) or (not zarr and name.endswith(dcp.SUFFIX))


def _bare(contents: Contents, where: str) -> Contents:
    """The same without what NeMo puts before every name of the model."""
    prefix = prefix_of([*contents.shapes, *contents.objects], where)
    full = {key.removeprefix(prefix): key for key in (*contents.shapes, *contents.objects)}

    def tensors(keys: list[str]) -> dict[str, Tensor]:
        found = contents.tensors([full[key] for key in keys])
        return {key: found[full[key]] for key in keys}

    return Contents(
        {key: contents.shapes[name] for key, name in full.items() if name in contents.shapes},
        {key: contents.objects[name] for key, name in full.items() if name in contents.objects},
        tensors,
        lambda key: contents.value(full[key]),
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
        extra = (value for key, value in saved.items() if str(key).endswith(extra_state.NAME))
        found[numbers] = RankContent(file, (tensors,), None, None, None, strays=tuple(extra_state.contents(extra)))
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
