"""Hugging Face folders: safetensors read and written, single or in shards; .bin read; config.json kept as it is."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckptconv.canonicalize import canonicalize
from ckptconv.checkpoint import Checkpoint, Extras, Key, Stored, Target
from ckptconv.config import SHOWN, ModelConfig
from ckptconv.containers import json_file
from ckptconv.containers.dcp_metadata import NAME as METADATA
from ckptconv.containers.folder import inside
from ckptconv.dialect import detect, prefix_of
from ckptconv.errors import CkptconvError, ConfigError, UsageError
from ckptconv.formats import Request, refuse_more_than_weights, refuse_projector_alone
from ckptconv.huggingface.config_codecs import Table
from ckptconv.huggingface.config_table import USAGE
from ckptconv.huggingface.family_config import (
    check_fits,
    config_text,
    dummy_heads,
    family_named,
    family_of,
    is_family,
    needs_config,
    own_section,
    read_config,
    with_families,
    with_rows,
    write_config,
)
from ckptconv.huggingface.files import (
    CONFIG,
    folder_of,
    has_weights,
    is_side_file,
    left_behind,
    read_weights,
    side_files,
)
from ckptconv.huggingface.folder_write import copied, final, weight_files
from ckptconv.huggingface.sections import DTYPES, of_parts, part_mapping, refuse_strangers
from ckptconv.huggingface.sight import not_said, with_image_token
from ckptconv.huggingface.template import as_family, as_template
from ckptconv.mapping import Mapping
from ckptconv.mapping_files import chosen, families, families_of_parts, family_names
from ckptconv.plan import Plan
from ckptconv.sizes import parse_size
from ckptconv.source import Source, whole
from ckptconv.topology import Rank, Topology, even
from ckptconv.tower_passes import VISION, vision_tower

ALONE = ("", "vision_model.", "radio_model.")  # prefixes that the classes of vision towers read
SHARD_FLAG = "--saver.max-shard-size"
UNTRUSTED = {  # what arguments and shapes do not tell for certain, by kind of model
    "text": (
        "rope_theta (converters of Megatron-LM save 10000 for every model)",
        "rope_scaling",
        "rms_norm_eps",
        "max_position_embeddings",
        "sliding_window",
        "bos_token_id, eos_token_id, pad_token_id",
    ),
    "vision": ("hidden_act", "layer_norm_eps"),
}
SETTINGS = (
    "rope",
    "norm_eps",
    "max_positions",
    "sliding_window",
)  # the fields that UNTRUSTED is about, of a language model


@dataclass(frozen=True, slots=True)
class HfLoad:
    config: Path | None = field(
        default=None,
        metadata={"help": "folder or config.json that states the architecture, instead of the checkpoint's own"},
    )


@dataclass(frozen=True, slots=True)
class HfSave:
    max_shard_size: str = field(
        default="5GB", metadata={"help": "largest weight file, as transformers counts it (KB, MB, GB, TB)"}
    )
    template: Path | None = field(
        default=None, metadata={"help": "Hugging Face folder whose config.json and tokenizer to start from"}
    )
    family: str | None = field(
        default=None,
        metadata={"help": "family to write, if another than the source's (of several parts: llava(mistral,clip))"},
    )
    image_token: int | None = field(
        default=None,
        metadata={
            "help": "id of the token that stands for a piece of an image (default: the family's, or the source's)"
        },
    )
    prefix: str | None = field(
        default=None,
        metadata={"help": "what all names of a vision tower begin with: vision_model. (transformers 4) or nothing (5)"},
    )
    config_from_args: bool = field(
        default=False,
        metadata={"help": "make config.json from the checkpoint's arguments (needs --family): not all can be trusted"},
    )


class Hf:
    """Folders that transformers loads with from_pretrained."""

    name = "hf"
    summary = "Hugging Face: safetensors or pytorch_model.bin, with config.json"
    aliases: tuple[str, ...] = ("huggingface", "transformers", "llama_mistral")
    Load = HfLoad
    Save = HfSave

    def sniff(self, path: Path) -> bool:
        if not path.is_dir():
            return False
        try:
            if has_weights(path):
                return True
            return not (path / METADATA).exists() and "model_type" in json_file.read(path / CONFIG)
        except CkptconvError:
            return False

    def load(self, path: Path, options: HfLoad, request: Request) -> Stored:
        folder = folder_of(path)
        named = family_named(request.family, request.mappings)
        config_file = _config_file(folder, options.config, named)
        raw = json_file.read(config_file) if config_file.exists() else {}
        known = [*families(), *request.mappings]
        family = (
            with_families(named, raw, known, str(config_file)) if named else family_of(raw, known, str(config_file))
        )
        mapping = chosen(family.name, request.mappings)
        weights = read_weights(folder, request.check)
        shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
        config = read_config(own_section(raw, mapping), str(config_file), mapping, shapes)
        config = replace(config, family=family.name)
        if config.layers > len(weights.tensors):
            found = len(weights.tensors)
            raise ConfigError(f"{config_file}: {config.layers} layers, but {folder} holds only {found} tensors")
        config = with_rows(config, weights.tensors, mapping, request.vocab, str(config_file))
        topology = even(config.layers)
        ranks = {Rank(): {Key(name): tensor for name, tensor in weights.tensors.items()}}
        mapping, variant = detect([mapping], config, topology, ranks)
        files = side_files(folder)
        behind = left_behind(folder, [*weights.files, *files])
        notes = (f"left behind in the source: {', '.join(behind)}",) if behind else ()
        if config_file.exists():
            files[CONFIG] = whole(str(config_file))
        extras = Extras(files=files, notes=notes)
        return Stored(self.name, mapping, variant, topology, config, ranks, {Rank(): str(path)}, extras)

    def target(self, checkpoint: Checkpoint, topology: Topology, options: HfSave, request: Request) -> Target:
        config = checkpoint.config
        parse_size(options.max_shard_size, SHARD_FLAG)
        refuse_projector_alone(config, "Hugging Face")
        refuse_more_than_weights(checkpoint, topology, request, "Hugging Face")
        mapping = chosen(_family(config, options, request), request.mappings)
        config, donor = self._completed(checkpoint, mapping, options, request)
        check_fits(config, mapping)
        refuse_strangers(mapping)
        rows = config.vocab_rows if config.kind != "text" else request.vocab or config.vocab
        if rows is None:
            raise ConfigError(
                f"how many of the embedding's {config.vocab_rows} rows are real is not known: give --vocab-size"
            )
        like = checkpoint.origin if checkpoint.origin.format == self.name else donor.origin if donor else None
        origin = like.variant if like else frozenset[str]()
        variant = frozenset(_written(group, origin, config, options) for group in mapping.variants)
        _refuse_other_prefix(options, variant, mapping)
        heads = self._heads(checkpoint, mapping)
        return Target(mapping, variant, even(config.layers), rows, heads=heads, config=config, donor=donor)

    def _heads(self, checkpoint: Checkpoint, mapping: Mapping) -> int | None:
        """As many as the class asks for; a tower that was alone keeps the dummy ones that its file has."""
        tower = vision_tower(checkpoint.config)
        if tower is None:
            return None
        if mapping.parts:
            return (tower.true_heads or tower.heads) + dummy_heads(mapping)
        origin = checkpoint.origin
        return None if (origin.format, origin.mapping) == (self.name, mapping.name) else tower.true_heads

    def _completed(
        self, checkpoint: Checkpoint, mapping: Mapping, options: HfSave, request: Request
    ) -> tuple[ModelConfig, Checkpoint | None]:
        """A vision tower with what its source does not tell, and the model of the template to take its absent parts from."""
        config, extras = checkpoint.config, checkpoint.extras
        if (tower := vision_tower(config)) is None:
            return config, None
        if options.template is None:
            beside = CONFIG in extras.files or "hf_config" in extras.objects
            told = tower.raw or (tower is config and beside)
            return config if told else as_family(config, part_mapping(mapping, VISION)), None
        path = _template_config(options.template)
        if has_weights(options.template):
            asked = Request(family=mapping.name, mappings=request.mappings)
            donor = canonicalize(self.load(options.template, HfLoad(), asked))
            return as_template(config, donor.config), donor
        raw = json_file.parse(json_file.read_bytes(path), str(path))
        return as_template(config, read_config(own_section(raw, mapping), str(path), mapping)), None

    def save(self, stored: Stored, options: HfSave, request: Request) -> Plan:
        start = _start(stored, options, request)
        text = stored.config.kind == "text"
        config, kept = _as_template(stored, start) if text and options.template is not None else (stored.config, [])
        if config.towers and start.base is not None:
            config = _keeping_dtype(config, start.base, stored)
        table, changes = write_config(config, start.base, stored.mapping)
        table = with_image_token(table, stored.mapping, config.vocab_rows, options.image_token)
        changes = changes or ([f"image token: {options.image_token}"] if options.image_token is not None else [])
        config_json = start.text if start.text is not None and not changes else config_text(table)
        (tensors,) = stored.ranks.values()
        files = weight_files({k.name: t for k, t in tensors.items()}, parse_size(options.max_shard_size, SHARD_FLAG))
        files += [copied(name, source) for name, source in sorted(start.files.items())]
        files.append(final(CONFIG, config_json))
        if config.towers:
            kept += not_said(config, start.base, table, stored.mapping)
        about: dict[str, object] = {"config_changes": [*changes, *kept], "config_untrusted": list(start.untrusted)}
        return Plan(tuple(files), about=about)

    def usage(self, stored: Stored, dst: str, options: HfSave) -> str:
        if USAGE in stored.mapping.config or stored.config.kind == "vision":
            return _said_usage(stored, dst)
        names = {name for name in stored.extras.files if name.startswith(("tokenizer", "vocab", "spiece"))}
        lines = [
            f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if names else ''}",
            f'model = AutoModelForCausalLM.from_pretrained({dst!r}, torch_dtype="auto")  # from 5 on: dtype="auto"',
        ]
        if names:
            lines.append(f"tokenizer = AutoTokenizer.from_pretrained({dst!r})")
        return "\n".join(lines)


def _written(group: tuple[str, ...], origin: Container[str], config: ModelConfig, options: HfSave) -> str:
    """Which of several forms is written: the prefix asked for, else the source's form, else the first.

    A tower does not keep the prefix that it has inside a larger model: its own class would not find its tensors.
    """
    prefixes = {prefix_of(tag): tag for tag in group}
    if options.prefix in prefixes and options.prefix is not None:
        return prefixes[options.prefix]
    kept = next((tag for tag in group if tag in origin), group[0])
    return group[0] if config.kind == "vision" and prefix_of(kept) not in (None, *ALONE) else kept


def _refuse_other_prefix(options: HfSave, variant: Iterable[str], mapping: Mapping) -> None:
    if options.prefix is not None and options.prefix not in map(prefix_of, variant):
        known = [repr(prefix_of(tag)) for group in mapping.variants for tag in group if prefix_of(tag) is not None]
        raise UsageError(
            f"--saver.prefix {options.prefix!r}: names in {mapping.name} begin with {' or '.join(known) or 'no prefix'}"
        )


def _said_usage(stored: Stored, dst: str) -> str:
    """As the family's mapping says; else by the class of transformers that config.json names."""
    if (said := stored.mapping.config.get(USAGE)) is not None:
        return str(said).replace("DST", repr(dst)).rstrip()
    table, _ = write_config(stored.config, None, stored.mapping)
    names = table["architectures"]
    name = names[0] if isinstance(names, list) else "AutoModel"
    return f'from transformers import {name}\nmodel = {name}.from_pretrained({dst!r}, torch_dtype="auto")'


def _family(config: ModelConfig, options: HfSave, request: Request) -> str:
    """The family to write: as asked for, else the source's, else the template's."""
    if (named := family_named(options.family or request.family, request.mappings)) is not None:
        return of_parts(named, config).name
    alone = not config.towers and config.family in (*family_names(), *(m.name for m in request.mappings))
    if alone or families_of_parts(config.family):
        return config.family
    if options.template is None:
        raise ConfigError(
            "the source does not say which family of Hugging Face models it belongs to: give --saver.template FOLDER "
            "(a Hugging Face folder of the same model), or --family NAME with --saver.config-from-args "
            "(--saver.family NAME for a model of several parts); "
            f"known families: {', '.join(family_names())}"
        )
    path = _template_config(options.template)
    base = json_file.parse(json_file.read_bytes(path), str(path))
    return family_of(base, [*families(), *request.mappings], str(path)).name


def _config_file(folder: Path, given: Path | None, family: Mapping | None) -> Path:
    """config.json of the checkpoint, or the one the user points to. A family that it says nothing of needs none."""
    if given is None:
        if not os.path.lexists(folder / CONFIG):
            if family is not None and not needs_config(family):
                return folder / CONFIG
            raise ConfigError(
                f"{folder}: no {CONFIG}, so the architecture is not known; give --loader.config FOLDER|FILE"
            )
        return inside(folder, CONFIG)
    path = given / CONFIG if given.is_dir() else given
    if not path.is_file():
        raise UsageError(f"--loader.config {given}: there is no {CONFIG}")
    return path


def _template_config(template: Path) -> Path:
    if not os.path.lexists(template / CONFIG):
        raise UsageError(f"--saver.template {template}: not a folder with a {CONFIG} in it")
    return inside(template, CONFIG)


@dataclass(frozen=True, slots=True)
class _Start:
    """What a new folder starts from: the config.json to change as little as possible, and the files beside it."""

    base: Table | None
    text: bytes | None
    files: Dict[str, Source]
    untrusted: tuple[str, ...] = ()


def _start(stored: Stored, options: HfSave, request: Request) -> _Start:
    """The template if one is given, else the source's own config.json, else nothing but the checkpoint's arguments."""
    files = {name: source for name, source in stored.extras.files.items() if is_side_file(name)}
    if options.template is not None:
        path = _template_config(options.template)
        text = json_file.read_bytes(path)
        files = {**files, **side_files(options.template)}
        return _from_text(text, str(path), files, stored, request)
    if stored.config.towers and not _is_own(stored):
        return _Start(None, None, files)  # joined here: each part brings its own config
    if (source := stored.extras.files.get(CONFIG)) is not None:
        text = json_file.read_bytes(source)
        return _from_text(text, source.path, files, stored, request)
    beside = stored.extras.objects.get("hf_config")
    if isinstance(beside, dict):
        return _Start(_checked(beside, "the hf/ folder of the source", stored, request), None, files)
    untrusted = UNTRUSTED.get(stored.config.kind, ())
    if not needs_config(stored.mapping):
        return _Start(None, None, files)
    if options.config_from_args and request.family is not None:
        return _Start(None, None, files, untrusted)
    raise ConfigError(
        "the source says nothing of a Hugging Face config.json: give --saver.template FOLDER (a Hugging Face folder of "
        "the same model), or --saver.config-from-args with --family NAME to make one from the checkpoint's arguments, "
        f"which do not tell these for certain: {'; '.join(untrusted)}"
    )


def _is_own(stored: Stored) -> bool:
    """Whether the configuration that a model of several parts brings along is one of the family that is written."""
    raw, mapping = stored.config.raw, stored.mapping
    if not is_family(raw, mapping):
        return False
    return family_of(raw, [*families(), mapping]).name.partition("(")[0] == mapping.name.partition("(")[0]


def _from_text(text: bytes, where: str, files: Dict[str, Source], stored: Stored, request: Request) -> _Start:
    """A config.json as it is; of a larger model's only what is this family's."""
    table = _checked(json_file.parse(text, where), where, stored, request)
    own = own_section(table, stored.mapping)
    return _Start(own, text if own is table else None, files)


def _as_template(stored: Stored, start: _Start) -> tuple[ModelConfig, list[str]]:
    """With the template's tiles, image token, and settings that arguments of a checkpoint do not tell for certain; and which differ."""
    assert start.base is not None
    ours, theirs = stored.config, read_config(start.base, "the template", stored.mapping)
    settings = () if CONFIG in stored.extras.files else SETTINGS
    differing = [n for n in (*settings, *SHOWN) if getattr(theirs, n) != getattr(ours, n)]
    lines = [
        f"{n}: {getattr(theirs, n)} as in the template, the checkpoint says {getattr(ours, n)}"
        for n in differing
        if n in settings or getattr(ours, n) is not None
    ]
    return replace(ours, **{n: getattr(theirs, n) for n in differing}), lines


def _keeping_dtype(config: ModelConfig, base: Table, stored: Stored) -> ModelConfig:
    """A model whose parts have several dtypes keeps what its config.json says, as long as some tensors are of that."""
    said = {base[key] for key in DTYPES if key in base}
    held = {tensor.dtype.torch for tensors in stored.ranks.values() for tensor in tensors.values()}
    return replace(config, dtype=None) if said & held else config


def _checked(base: Table, where: str, stored: Stored, request: Request) -> Table:
    """A config.json of another family would describe another model."""
    own = stored.mapping.match.get("model_type")
    if request.family is None and base.get("model_type") not in (own if isinstance(own, list) else [own]):
        raise ConfigError(
            f"{where}: model_type is {base.get('model_type')!r}, but the checkpoint is {stored.config.family} "
            f"({own!r}); give a config.json of the same family, or say the family with --family"
        )
    return base
