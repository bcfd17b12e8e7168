"""A `.nemo` archive, or the folder it unpacks to, as a Stored checkpoint: tensors stay where they lie inside the archive."""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Mapping as Dict
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from ckptconv.checkpoint import Extras, Stored
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
from ckptconv.nemo import artifacts, distributed, model_config, neva, tokenizer_files, vocabulary
from ckptconv.nemo.artifacts import Artifact
from ckptconv.nemo.model_config import NemoConfig
from ckptconv.nemo.names import LEGACY, is_legacy, joined_gates, prefix_of
from ckptconv.nemo.neva import Encoder, Given
from ckptconv.sizes import human
from ckptconv.source import Source
from ckptconv.topology import Rank

WEIGHTS, DISTRIBUTED = "model_weights.ckpt", "model_weights/"
IN_DISTRIBUTED = (METADATA, TELLING, COMMON, DIGESTS)
RANKS = re.compile(r"(?:mp_rank_(\d{2,6})/|tp_rank_(\d{2,6})_pp_rank_(\d{3,6})/)?" + re.escape(WEIGHTS))
KINDS = {  # what a dialect says; distributed tensors have the same names with TransformerEngine and without
    "nemo-legacy": {"mcore_gpt": False},
    "nemo-mcore": {"mcore_gpt": True, "transformer_engine": True},
    "nemo-mcore-local": {"mcore_gpt": True, "transformer_engine": False},
}
MAX_CONFIG, MAX_TOKENIZER = 4 << 20, 64 << 20
TOKENIZER, TOKENIZER_FLAG = "tokenizer.model", "--loader.tokenizer"
RANK_FILES = "nemo_rank_files"  # among the objects: the weights were filed by rank


@dataclass(frozen=True, slots=True)
class Opened:
    """An archive, its configuration, the files of the tokenizer (`given` with --loader.tokenizer, or packed), and those referred to."""

    archive: Tar
    config: NemoConfig
    tokenizer: dict[str, Source]
    given: bool
    artifacts: tuple[Artifact, ...]
    notes: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()


def is_nemo(path: Path) -> bool:
    """Whether a file or folder looks like one, from names alone."""
    if path.is_dir():
        return (path / model_config.NAME).is_file()
    return path.is_file() and (path.suffix == ".nemo" or tar.is_tar(path))


def open_archive(path: Path, scratch: Path | None, tokenizer: Path | None, *, plain_rope: bool) -> Opened:
    """The archive in place; a gzip'ed one is unpacked once, into the folder `scratch`."""
    notes: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    if path.is_dir():
        archive = tar.open_folder(path)
    elif gzipped.is_gzip(path):
        if scratch is None:
            raise UsageError(
                f"{path} is compressed and has to be unpacked once: say into which folder with --loader.scratch FOLDER"
            )
        plain = gzipped.unpacked(path, scratch)
        archive = tar.open_tar(plain, str(path))
        notes = (f"unpacked into the scratch folder ({human(plain.stat().st_size)}), until the result is there",)
        made = (str(plain),)
    else:
        archive = tar.open_tar(path)
    member = archive.members.get(model_config.NAME)
    if member is None:
        raise FormatError(path, f"has no {model_config.NAME}: it is no checkpoint of NeMo")
    where = f"{path}!{model_config.NAME}"
    config = model_config.read(content(member, where, MAX_CONFIG), where, plain_rope=plain_rope)
    found = artifacts.find(config.raw, [name for name in archive.members if not _is_own(name)], where)
    packed = next((a.member for a in found if a.key == artifacts.MODEL and a.member and config.sentencepiece), None)
    files = {TOKENIZER: archive.members[packed]} if packed else {}
    if tokenizer is not None:
        files = tokenizer_files.given(tokenizer, TOKENIZER_FLAG)
    return Opened(archive, config, files, tokenizer is not None, found, notes, made)


def _is_own(name: str) -> bool:
    """Whether a member is the configuration or weights, and so none of the files that the configuration refers to."""
    return name == model_config.NAME or name.startswith(DISTRIBUTED) or RANKS.fullmatch(name) is not None


def content(source: Source, where: str, limit: int) -> bytes:
    """A small member, whole."""
    if source.nbytes > limit:
        raise FormatError(where, f"has {source.nbytes:,} bytes; more than {limit:,} are not read")
    with HeaderReader(source, where) as reader:
        return reader.read(0, source.nbytes, "its bytes")


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of a checkpoint besides its weights, and what is asked of the loader."""

    path: Path
    nemo: NemoConfig
    said: Statement
    beside: Beside
    given: Given
    request: Request
    format: str

    @property
    def where(self) -> str:
        return str(self.path)


def load(
    path: Path, opened: Opened, config: Path | None, encoder: Encoder, request: Request, format_name: str
) -> Stored:
    """Describe the checkpoint from the headers of its members."""
    nemo, archive = opened.config, opened.archive
    vocab = request.vocab or model_config.true_vocabulary(nemo, _tokens(path, opened), given=opened.given)
    said = model_config.statement(nemo, vocab)
    beside = hf_beside.find(config, None, request)
    forms = _forms(archive)
    if len(forms) > 1:
        raise FormatError(path, f"holds the weights in more than one form: {' and '.join(forms)}; which of them count?")
    told = Told(path, nemo, said, beside, neva.given(encoder, beside.config, request), request, format_name)
    inside = archive.below(DISTRIBUTED.removesuffix("/"))
    stored = _whole(inside, told) if inside else _of_ranks(_ranks(path, archive, check=request.check), told)
    referred = {a.member: archive.members[a.member] for a in opened.artifacts if a.member}
    files = {**stored.extras.files, **referred, **opened.tokenizer}
    filed = {} if inside else {RANK_FILES: True}
    objects = {**stored.extras.objects, "nemo": nemo.raw | _kind_of(stored.mapping, nemo), **filed}
    doubt = vocabulary.doubt(nemo.override, stored.config.vocab, f"{model_config.NAME}: override_vocab_size")
    notes = (*opened.notes, *nemo.notes, *doubt, *stored.extras.notes, *_behind(opened), *_frozen(stored, nemo))
    extras = replace(stored.extras, files=files, objects=objects, notes=notes, scratch=opened.scratch)
    return replace(stored, config=replace(stored.config, dtype=nemo.dtype), extras=extras)


def _tokens(path: Path, opened: Opened) -> int | None:
    """How many tokens NeMo finds in the tokenizer that is at hand."""
    if tokenizer_files.of_hugging_face(opened.tokenizer) or TOKENIZER not in opened.tokenizer:
        return tokenizer_files.tokens(opened.tokenizer)
    where = f"{path}!{TOKENIZER}"
    return model_config.tokens(opened.config, content(opened.tokenizer[TOKENIZER], where, MAX_TOKENIZER), where)


def _frozen(stored: Stored, nemo: NemoConfig) -> Iterator[str]:
    """What of an image model is elsewhere, since it was not trained."""
    if nemo.multimodal and stored.config.kind == "projector":
        yield "the language model is not in the file: it was not trained (mm_cfg.llm.freeze)"
    if nemo.multimodal and "vision" not in stored.config.towers:
        yield (
            f"the image encoder is not in the file: it was not trained, and NeMo takes it from {nemo.encoder_name}; "
            f"{neva.ENCODER_FLAG} FOLDER puts it in"
        )


def _kind_of(mapping: Mapping, nemo: NemoConfig) -> dict[str, bool]:
    """What the names of the tensors say of the model, where the configuration may be silent or wrong."""
    if mapping.name.startswith(neva.ALONE):
        return {"mcore_gpt": nemo.mcore is not False}
    language = next((part.family for part in mapping.parts if not part.scope), mapping.name)
    names = (language, mapping.name, mapping.extends)
    return next((kind for name, kind in KINDS.items() if name in names), {"mcore_gpt": True})


def _behind(opened: Opened) -> Iterator[str]:
    """What of the archive does not go everywhere, or nowhere."""
    referred = {a.member for a in opened.artifacts if a.member}
    model = next((a.member for a in opened.artifacts if a.key == artifacts.MODEL and opened.config.sentencepiece), None)
    if other := sorted(name for name in referred if name and name != model):
        yield f"travel to another .nemo archive, and nowhere else: {', '.join(other)}"
    if opened.config.tokenizer.get("library") == "huggingface" and not opened.given:
        name = opened.config.tokenizer.get("type") or "one that it is not told (tokenizer.type)"
        yield (
            f"the tokenizer is not packed: NeMo takes {name} of Hugging Face; {TOKENIZER_FLAG} FOLDER brings its files and says how "
            "many tokens it has"
        )
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


def _of_ranks(contents: list[RankContent], told: Told) -> Stored:
    """The files of ranks: a language model, with parts of NeVA in its embedding or without, or such parts alone."""
    text, parts = neva.of_ranks(contents)
    if not any(content.chunks[0] for content in text):
        files, tp, pp = neva.by_rank(contents, told.said.layout, told.where)
        _check_kind(told.nemo, legacy=any(is_legacy(content.chunks[0]) for content in contents))
        found = {rank: parts[content.where()] for rank, content in files.items()}
        return neva.alone(found, tp, pp, told.given, Extras(files=told.beside.files), told.format, told.where)
    stored = from_ranks(text, told.said, told.beside, told.request, _kind(text, told), told.path)
    found = {rank: parts[place] for rank, place in stored.places.items() if parts[place]}
    return neva.joined(stored, found, told.given, told.nemo.raw, told.where) if found or told.given.tensors else stored


def _whole(files: Dict[str, Source], told: Told) -> Stored:
    """A distributed checkpoint inside the archive, with what its `common.pt` holds."""
    where, check = f"{told.path}!{DISTRIBUTED}", told.request.check
    zarr = TELLING in files and json_file.read(files[TELLING]).get("sharded_backend") == ZARR
    held = of_zarr(zarr2.interpret(where, files)) if zarr else of_torch_dist(dcp.interpret(where, files), check=check)
    stored = _of_contents(distributed.bare(held, where), told)
    common = distributed.common(files.get(COMMON), where + COMMON)
    state = list(dict.fromkeys([*state_of(common), *stored.extras.state]))
    notes = [*stored.extras.notes]
    if strays := sorted(str(key)[:60] for key in common if key not in KNOWN or key == "args"):
        notes.append(f"left behind in {COMMON}: {', '.join(strays)}")
    if strays := sorted(name for name in files if not _is_of_backend(name, zarr=zarr)):
        notes.append(f"left behind in {DISTRIBUTED}: {', '.join(strays)}")
    if zarr and check:
        notes.append("--check: the chunks of zarr arrays have no checksums of their own")
    step = step_of(common, Path(where + COMMON))
    return replace(stored, extras=replace(stored.extras, step=step, notes=tuple(notes), objects={"state": state}))


def _of_contents(held: Contents, told: Told) -> Stored:
    """The same of whole tensors."""
    _check_kind(told.nemo, legacy=False)
    text, parts = neva.split(held.shapes)
    tensors = {Rank(): held.tensors(list(parts))}
    if parts and not text:
        return neva.alone(tensors, 1, 1, told.given, Extras(files=told.beside.files), told.format, told.where)
    said = replace(told.said, layout=ArgsLayout())
    stored = from_whole(replace(held, shapes=text), said, told.beside, told.request, told.where, told.format)
    return (
        neva.joined(stored, tensors, told.given, told.nemo.raw, told.where) if parts or told.given.tensors else stored
    )


def _is_of_backend(name: str, *, zarr: bool) -> bool:
    """Whether a file's place in a distributed checkpoint is known; arrays are folders, of which no file is left out."""
    return name in IN_DISTRIBUTED or (zarr and "/" in name) or (not zarr and name.endswith(dcp.SUFFIX))


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


def _kind(contents: list[RankContent], told: Told) -> Kind:
    """Which of NeMo's models the names are of."""
    nemo, given = told.nemo, told.request.mappings
    old = is_legacy(contents[0].chunks[0])
    _check_kind(nemo, legacy=old)
    if old:
        return Kind(told.format, (chosen("nemo-legacy", given),), LEGACY, lambda _: nemo.variant, joined_gates)
    core = (chosen("nemo-mcore", given), chosen("nemo-mcore-local", given))
    return Kind(told.format, core, MCORE, lambda _: frozenset())
