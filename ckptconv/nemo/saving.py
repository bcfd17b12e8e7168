"""A Stored checkpoint to a `.nemo` archive: configuration, tokenizer and weights, laid out as one file or as the folder it unpacks to."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping as Dict
from dataclasses import dataclass, replace
from pathlib import Path

from ckptconv.checkpoint import Checkpoint, Extras, Stored
from ckptconv.config import ModelConfig
from ckptconv.containers import tar_write, torch_write
from ckptconv.containers.pickled import Ordered
from ckptconv.containers.tar_write import Member
from ckptconv.dtypes import FP32, UINT8
from ckptconv.errors import ConfigError, TopologyError, UsageError
from ckptconv.formats import Request
from ckptconv.leaves import contiguous, full
from ckptconv.mapping_files import load_mapping
from ckptconv.megatron.args_write import dynamic_rope
from ckptconv.megatron.dist_objects import objects
from ckptconv.megatron.dist_saving import Filing, layout, telling
from ckptconv.megatron.extra_state import ExtraState
from ckptconv.megatron.saving import vocab_notes, vocab_rows
from ckptconv.nemo import artifacts, model_config, neva, neva_config, sentencepiece, tokenizer_files
from ckptconv.nemo.loading import DISTRIBUTED, MAX_TOKENIZER, RANK_FILES, TOKENIZER, WEIGHTS, content
from ckptconv.nemo.model_config_write import DIVISOR, Form, Tokenizer, write
from ckptconv.nemo.names import NEMO1, nested_as
from ckptconv.nemo.rope_buffer import NAME as FREQUENCIES
from ckptconv.nemo.rope_buffer import inverse_frequencies
from ckptconv.nodes import concat
from ckptconv.plan import File, Plan, Segment
from ckptconv.source import Source
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank, Topology

LIBRARY = {
    "library": "sentencepiece", "type": None, "vocab_file": None, "merge_file": None, "delimiter": None, "sentencepiece_legacy": False,
}  # fmt: skip
NAMED = {
    "library": "huggingface",
    "type": None,
    "model": None,
    "vocab_file": None,
    "merge_file": None,
    "use_fast": True,
}
LAST_NORM = "decoder.final_layernorm._extra_state/shard_0_1"  # NeMo's files have one; a model without it loads them all the same


@dataclass(frozen=True, slots=True)
class GivenTokenizer:
    """What is asked for in place of the source's tokenizer: files, and the name or folder that NeMo shall load one by."""

    path: Path | None = None
    name: str | None = None

    def files(self, extras: Extras) -> Dict[str, Source]:
        return tokenizer_files.given(self.path, "--saver.tokenizer") if self.path else extras.files

    @property
    def folder(self) -> str | None:
        """What Hugging Face's tokenizers are loaded by."""
        if self.name is not None or self.path is None:
            return self.name
        return str(self.path.parent if self.path.is_file() else self.path)


@dataclass(frozen=True, slots=True)
class Archive:
    """Which of NeMo's models the archive is for, and how it is filed; `pack`: as one file."""

    form: Form
    extra: ExtraState
    distributed: bool
    filing: Filing
    tokenizer: GivenTokenizer
    encoder: neva_config.Encoder
    pack: bool


def raw(extras: Extras) -> dict[str, object]:
    """The configuration of a NeMo source."""
    kept = extras.objects.get("nemo")
    return kept if isinstance(kept, dict) else {}


def divisor(config: ModelConfig, extras: Extras, request: Request) -> int:
    """What the vocabulary is padded to a multiple of, per tensor rank: as asked for, as in the source, or what makes padding least."""
    if request.vocab_divisor is not None:
        return request.vocab_divisor
    kept = raw(extras).get("make_vocab_size_divisible_by")
    if isinstance(kept, int) and not isinstance(kept, bool) and kept > 0:
        return kept
    if neva_config.is_neva(config):
        return DIVISOR  # for the tokens that NeVA adds
    true = config.vocab or config.vocab_rows
    return next(n for n in (DIVISOR, 64, 32, 16, 8, 4, 2, 1) if true % n == 0)


def has_rank_files(extras: Extras) -> bool:
    """Whether a NeMo source has its weights in a file for each rank."""
    return extras.objects.get(RANK_FILES) is True


def refuse_alone(config: ModelConfig, extras: Extras, topology: Topology) -> None:
    """An image encoder has no archive of its own here, and a projector none without the settings of its language model."""
    if config.kind == "vision":
        raise ConfigError("NeMo archives of an image encoder alone are not written: combine it with a language model")
    if config.kind != "projector":
        return
    layers = raw(extras).get("num_layers")
    if not isinstance(layers, int):
        raise ConfigError(
            "a NeVA archive of a projector alone says for which language model it is, which only a NeMo source tells; "
            "--saver mm-projector writes one without"
        )
    if layers % topology.pp:
        raise TopologyError(f"the {layers} layers of the language model cannot be dealt to {topology.pp} equal stages")


def rows(checkpoint: Checkpoint, topology: Topology, tokenizer: GivenTokenizer, request: Request) -> int:
    """Rows of the embedding: all tokens of the tokenizer have one, also those that the model did not know."""
    config, extras = checkpoint.config, checkpoint.extras
    if config.kind != "text":
        return config.vocab_rows
    if config.vocab is not None and (tokens := _tokens(extras, tokenizer)) is not None:
        config = replace(config, vocab=max(config.vocab, tokens))
    return vocab_rows(config, topology, divisor(config, extras, request))


def save(stored: Stored, request: Request, archive: Archive) -> Plan:
    """The archive's members, in one file unless asked otherwise."""
    if slots := sorted({k.slot for tensors in stored.ranks.values() for k in tensors} - {"param"}):
        raise ConfigError(
            f"optimizer state ({', '.join(slots)}) has no place in a .nemo archive: --optimizer drop leaves it out"
        )
    settings = raw(stored.extras)
    tokenizer, members = _tokenizer(stored, archive.tokenizer)
    members += _carried(stored.extras, new_model=bool(members))
    text = write(
        stored.config, stored.topology, archive.form, stored.config.dtype or FP32, tokenizer,
        divisor=divisor(stored.config, stored.extras, request), carried=settings or None, encoder=archive.encoder,
    )  # fmt: skip
    members.append((model_config.NAME, text))
    members += _distributed(stored, archive) if archive.distributed else _ranks(stored, archive)
    told = [*vocab_notes(stored, request), *notes(stored, archive.tokenizer, archive.encoder)]
    about: dict[str, object] = {"format_notes": told}
    if archive.pack:
        return Plan((tar_write.layout("archive.nemo", members),), about=about, single=True)
    return Plan(tuple(_loose(name, body) for name, body in members), about=about)


def notes(stored: Stored, tokenizer: GivenTokenizer, encoder: neva_config.Encoder) -> Iterator[str]:
    """What the source has and the archive has not."""
    extras = stored.extras
    referred = _referred(extras)
    if left := sorted(extras.files.keys() - {TOKENIZER, *(member for member, _ in referred)}):
        yield f"an archive has no place for {', '.join(left)}"
    tokens = _tokens(extras, tokenizer)
    if tokens is not None and stored.config.vocab is not None and tokens > stored.config.vocab:
        yield f"the tokenizer has {tokens} tokens and the model knows {stored.config.vocab}: rows of the others are as padding is"
    yield from dynamic_rope(stored.config, "NeMo")
    if neva_config.is_neva(stored.config) and neva_config.encoder_name(stored.config, raw(extras), encoder) is None:
        yield "mm_cfg.vision_encoder.from_pretrained is empty, and NeMo makes the image encoder by it: --saver.vision-encoder NAME"
    section, packed = _tokenizer(stored, tokenizer)
    if not packed and not any(key in artifacts.TOKENIZER_KEYS for _, key in referred):
        yield _by_name(section.section)


def _by_name(section: Dict[str, object]) -> str:
    """What of a tokenizer NeMo has to find by itself."""
    name = section.get("type") if section.get("library") == NAMED["library"] else None
    if name is not None:
        return f"no tokenizer is packed: NeMo takes {name} of Hugging Face (tokenizer.type; another one: --saver.tokenizer-name)"
    return (
        "no tokenizer is packed, and NeMo does not restore a model without: --saver.tokenizer-name NAME says which one of Hugging "
        "Face it takes, by name or folder (tokenizer.type); --saver.tokenizer FILE packs a sentencepiece model"
    )


def _tokens(extras: Extras, given: GivenTokenizer) -> int | None:
    """Those of a tokenizer that is packed, or that is given for the archive."""
    files = given.files(extras)
    if (source := files.get(TOKENIZER)) is not None:
        return len(sentencepiece.pieces(content(source, source.path, MAX_TOKENIZER), source.path))
    return tokenizer_files.tokens(files) if given.path else None


def _referred(extras: Extras) -> list[tuple[str, str]]:
    """(member, key) for each file of a NeMo source that its configuration refers to."""
    found = artifacts.find(raw(extras), extras.files, model_config.NAME)
    return [(artifact.member, artifact.key) for artifact in found if artifact.member]


def _carried(extras: Extras, *, new_model: bool) -> list[Member]:
    """Those files, under the names they have there; `new_model`: but for the tokenizer's, which is written anew."""
    kept = dict.fromkeys(m for m, key in _referred(extras) if not (new_model and key == artifacts.MODEL))
    return [(member, _copied(member, extras.files[member])) for member in kept]


def _copied(name: str, source: Source) -> File:
    body = contiguous(source, (source.nbytes,), UINT8)
    return File(name, source.nbytes, (Segment(0, body, name),) if source.nbytes else ())


def _loose(name: str, body: File | bytes) -> File:
    return (
        replace(body, path=name) if isinstance(body, File) else File(name, len(body), (Segment(0, body),), final=True)
    )


def _tokenizer(stored: Stored, given: GivenTokenizer) -> tuple[Tokenizer, list[Member]]:
    """The section that names the tokenizer, and the member it names; what NeMo finds by itself (a hub name) is kept."""
    section = raw(stored.extras).get("tokenizer")
    kept = dict(section) if isinstance(section, dict) else {}
    files = given.files(stored.extras)
    if given.name is not None or (source := files.get(TOKENIZER)) is None:
        if not given.folder and (kept or not tokenizer_files.of_hugging_face(files)):
            return Tokenizer(kept), []
        kept = kept if kept.get("library") == NAMED["library"] else {}
        named = given.folder or stored.config.raw.get("_name_or_path") or None
        return Tokenizer({**NAMED, **kept, "type": named}), []
    data = content(source, source.path, MAX_TOKENIZER)
    member = artifacts.stored_name(TOKENIZER, data)
    told = {**LIBRARY, **kept, "library": "sentencepiece", "model": artifacts.uri(member)}
    return Tokenizer(told, _tokens(stored.extras, given)), [(member, _copied(member, source))]


def _distributed(stored: Stored, archive: Archive) -> list[Member]:
    """Whole tensors in chunks, each under `model.`."""
    (tensors,) = stored.ranks.values()
    stacked = "l" in load_mapping(neva.language_of(stored.mapping.name)).stack
    entries = {NEMO1 + key: value for key, value in _objects(stored, archive, stacked=stacked).items()}
    named = {NEMO1 + key.name: tensor for key, tensor in tensors.items()}
    files = [*layout("", named, entries, archive.filing, stacked=stacked), torch_write.layout("common.pt", {})]
    return [
        *((DISTRIBUTED + file.path, file) for file in files),
        (f"{DISTRIBUTED}metadata.json", telling(archive.filing.backend)),
    ]


def _objects(stored: Stored, archive: Archive, *, stacked: bool) -> dict[str, object]:
    """State of modules; NeVA files have parameters alone."""
    if neva_config.is_neva(stored.config):
        return {}
    found = objects(stored.config, archive.extra, stacked=stacked)
    if archive.extra.te is not None:
        found.setdefault(LAST_NORM, next(iter(found.values())))
    return found


def _ranks(stored: Stored, archive: Archive) -> list[Member]:
    """A file for each process, in the folder that says which it is."""
    topology = stored.topology
    members: list[Member] = []
    for pp, tp, ep in topology.processes():
        if ep:
            raise UsageError("a .nemo archive of rank files has no names for expert ranks: use --ep 1")
        rank = Rank(pp, tp, 0, 0, tp % topology.etp)
        tensors = {key.name: tensor for key, tensor in stored.ranks[rank].items()}
        flat = _beside(tensors, stored, archive, last="head" in topology.stage(rank).roles)
        folder = (
            f"tp_rank_{tp:02d}_pp_rank_{pp:03d}/"
            if topology.pp > 1
            else f"mp_rank_{tp:02d}/"
            if topology.tp > 1
            else ""
        )
        named = Ordered({NEMO1 + name: value for name, value in flat.items()})
        members.append((folder + WEIGHTS, torch_write.layout(WEIGHTS, named)))
    return members


def _beside(tensors: dict[str, Tensor], stored: Stored, archive: Archive, *, last: bool) -> Dict[str, object]:
    """A rank's tensors with what else NeMo saves of its model; of NeVA it saves parameters alone."""
    if neva_config.is_neva(stored.config):
        return {nested_as(name, legacy=not archive.form.mcore): tensor for name, tensor in tensors.items()}
    flat = archive.extra.beside(tensors, last=last)
    if not archive.form.mcore and stored.config.rope is not None:
        return _with_frequencies(flat, stored.config)
    return flat


def _with_frequencies(flat: Dict[str, object], config: ModelConfig) -> dict[str, object]:
    """The buffer that NeMo's legacy models demand, behind the embedding."""
    first = {name: value for name, value in flat.items() if name.startswith("language_model.embedding.")}
    rest = {name: value for name, value in flat.items() if name not in first}
    values = inverse_frequencies(config)
    assert values is not None
    return {**first, FREQUENCIES: concat([full((1,), FP32, float(value)) for value in values], 0), **rest}
