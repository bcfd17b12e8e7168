"""config.json of Hugging Face to ModelConfig and back, as the [config] table of a family's mapping says (config_table.py).

[config.const]                        key -> value, what a config.json made from nothing says besides
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from collections.abc import Mapping as Dict
from dataclasses import MISSING, fields, replace
from typing import Any

from ckptconv.config import SIGHT, ModelConfig
from ckptconv.errors import ConfigError, UsageError
from ckptconv.huggingface import config_table, sections
from ckptconv.huggingface.config_codecs import Entry, Fields, Section, Table
from ckptconv.huggingface.config_table import CODECS, DUMMIES, FLAGS, KINDS, SECTION, entries, says
from ckptconv.huggingface.told import told, told_fields
from ckptconv.mapping import Mapping
from ckptconv.mapping_files import chosen, family_names, with_parts
from ckptconv.tensor import Shape, Tensor

MAX_INDEX = 8192  # layers or experts: a file that claims more is lying, and would cost its number in memory
MAX_SIZE = 1 << 40
NOT_HELD = {
    "family",
    "raw",
    "vocab",
    "vocab_rows",
    "dtype",
    "experts",
    "moe_ffn",
    "router_topk",
    "true_heads",
    "image",
    *SIGHT,
}
TOKENS = ("bos_token_id", "eos_token_id")  # unlike the class's own defaults, null claims nothing about a tokenizer
REQUIRED = [f.name for f in fields(ModelConfig) if f.default is MISSING and f.default_factory is MISSING]


def family_of(raw: Table, mappings: Sequence[Mapping], where: str = "config.json") -> Mapping:
    """The family whose `match` this config.json fulfils, the one that asks most of it; with the families of its parts."""
    fitting = [m for m in mappings if is_family(raw, m)]
    if fitting:
        return with_families(max(fitting, key=lambda m: len(m.match)), raw, mappings, where)
    known = ", ".join(f"{m.match.get('model_type', '?')} ({m.name})" for m in mappings if m.match)
    found = f"model_type is {raw['model_type']!r}" if "model_type" in raw else "there is no model_type"
    raise ConfigError(
        f"{where}: {found}, and no family is for that; known: {known}. "
        "If the model is one of these under another name, say so with --family NAME; a new one needs a mapping file"
    )


def is_family(raw: Table, mapping: Mapping) -> bool:
    """Whether a config.json is one of the family's."""
    return bool(mapping.match) and all(_matches(raw.get(key), wanted) for key, wanted in mapping.match.items())


def with_families(mapping: Mapping, raw: Table, known: Sequence[Mapping], where: str) -> Mapping:
    """The mapping of a model of several parts with the family of each."""
    if all(part.family for part in mapping.parts):
        return mapping

    def by_type(section: Table, there: str) -> Mapping:
        return family_of(section, [m for m in known if not m.parts], there)

    return with_parts(mapping, sections.part_families(raw, mapping, known, where, by_type))


def family_named(name: str | None, given: Sequence[Mapping]) -> Mapping | None:
    """The family that --family names, with or without its prefix, among those known and the user's own.

    One of several parts may be followed by theirs: llava(mistral,clip).
    """
    if name is None:
        return None
    known = list(dict.fromkeys([*family_names(), *(m.name for m in given)]))
    whole, _, parts = name.removesuffix(")").partition("(")
    for full in (whole, f"hf-{whole}"):
        if full in known:
            found = chosen(full, [m for m in given if m.name == full])
            named = [f"hf-{part}" if f"hf-{part}" in known else part for part in parts.split(",") if part]
            return with_parts(found, named) if named else found
    raise UsageError(f"--family {name}: no such family; known: {', '.join(known)}")


def _matches(value: object, wanted: object) -> bool:
    return value in wanted if isinstance(wanted, list) else value == wanted


def own_section(raw: Table, mapping: Mapping) -> Table:
    """A config.json as the family itself would write it: a larger model's holds the family's in a section."""
    inner = raw.get(str(mapping.config.get(SECTION)))
    if not isinstance(inner, dict):
        return raw
    const = mapping.config.get("const", {})
    assert isinstance(const, dict)
    own = {key: const[key] for key in ("architectures", "model_type") if key in const}
    outer = {key: raw[key] for key in ("dtype", "torch_dtype") if key in raw}
    return {**own, **outer, **inner, **own}


def read_config(raw: Table, where: str, mapping: Mapping, shapes: Dict[str, Shape] | None = None) -> ModelConfig:
    """The architecture a config.json states, and the shapes of the tensors tell. Everything wrong with it is listed in one error."""
    if raw.get("quantization_config") is not None:
        raise ConfigError(
            f"{where}: quantization_config is there: quantised weights are not supported yet; use the original ones"
        )
    if mapping.parts:
        return sections.read(raw, where, mapping, shapes, read_config)
    section, known, problems = Section(raw, where), dict(_fixed(mapping)), list[str]()
    for entry in entries(mapping):
        if problems and entry.codec not in ("rename", "read_only"):
            break  # what the codecs build upon is missing
        try:
            known[entry.field] = CODECS[entry.codec].read(section, entry, known)
            _check_size(entry, known[entry.field], where)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    known = _with_told(known, told(mapping, shapes or {}, known, FLAGS, where))
    if unknown := [name for name in REQUIRED if name not in known and name != "family"]:
        raise ConfigError(f"{where}: neither it nor the weights tell {', '.join(unknown)} of this {mapping.name} model")
    config = ModelConfig(family=mapping.name, raw=raw, **known)
    try:
        config.check()
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return config


def _with_told(known: Fields, told: Fields) -> dict[str, Any]:
    """What the weights tell goes before what is stated, but for heads: those beyond the stated ones are dummies."""
    more = "heads" in known and told.get("heads", known["heads"]) != known["heads"]
    return {**known, **told, **({"true_heads": known["heads"]} if more else {})}


def _check_size(entry: Entry, value: object, where: str) -> None:
    limit = MAX_INDEX if entry.field in ("layers", "experts") else MAX_SIZE
    if type(value) is int and not 0 <= value <= limit:
        raise ConfigError(f"{where}: {entry.key} is {value}, expected 0 to {limit}")


def with_rows(
    config: ModelConfig, tensors: Dict[str, Tensor], mapping: Mapping, vocab: int | None, where: str
) -> ModelConfig:
    """The vocabulary held against the rows the embedding has: transformers wants them equal."""
    stored = [r.stored for r in mapping.rules if any(a.expr == "embed.weight" and not a.copy for a in r.alternatives)]
    tensor = next((tensors[name] for name in stored if name in tensors), None)
    rows = tensor.shape[0] if tensor is not None and tensor.shape else config.vocab_rows
    if vocab is not None:
        if vocab > rows:
            raise ConfigError(f"--vocab-size {vocab}: the embedding has only {rows} rows")
        return replace(config, vocab=vocab, vocab_rows=rows)
    if rows != config.vocab_rows:
        raise ConfigError(
            f"{where}: vocab_size is {config.vocab_rows}, but the embedding ({stored[0]}) has {rows} rows; "
            "if the rest is padding, say how many are real with --vocab-size"
        )
    return config


def write_config(config: ModelConfig, base: Table | None, mapping: Mapping) -> tuple[Table, list[str]]:
    """A config.json for this architecture, and what it says differently from `base`, line by line.

    With a base only what the architecture forces is changed, in the base's own spelling. Without one a complete
    config.json is made, in the spelling of transformers 4, which 5 reads as well.
    """
    check_fits(config, mapping)
    if mapping.parts:
        nested = tuple(part.config for part in mapping.parts)
        return _in_order(sections.write(config, base, mapping, write_config), base, nested)
    fresh = base is None
    out: Table = _from_nothing(mapping) if base is None else copy.deepcopy(base)
    known = {name: getattr(config, name) for name in KINDS}
    for entry in entries(mapping):
        if fresh or not says(out, entry, known):
            CODECS[entry.codec].write(out, entry, config, fresh=fresh)
    return _in_order(out, base)


def _in_order(out: Table, base: Table | None, nested: Sequence[str] = ()) -> tuple[Table, list[str]]:
    """With what it says differently from `base`, of `nested` tables key by key."""
    if base is None or list(base) == sorted(base):
        out = dict(sorted(out.items()))
    return out, [] if base is None else _changes(base, out, nested)


def _from_nothing(mapping: Mapping) -> Table:
    const = mapping.config.get("const", {})
    assert isinstance(const, dict)
    return {**const, **(dict.fromkeys(TOKENS) if "vocab_rows" in mapping.config else {})}


def _changes(base: Table, out: Table, nested: Sequence[str] = (), under: str = "") -> list[str]:
    def text(table: Table, key: str) -> str:
        return json.dumps(table[key]) if key in table else "(absent)"

    lines = []
    for key in {**base, **out}:
        a, b = base.get(key), out.get(key)
        if key in nested and isinstance(a, dict) and isinstance(b, dict):
            lines += _changes(a, b, under=f"{key}.")
        elif text(base, key) != text(out, key):
            lines.append(f"{under}{key}: {text(base, key)} -> {text(out, key)}")
    return lines


def config_text(table: Table) -> bytes:
    """The file as transformers writes it."""
    return (json.dumps(table, indent=2) + "\n").encode()


def check_fits(config: ModelConfig, mapping: Mapping) -> None:
    """Refuse an architecture that a family has no words for, with everything that does not fit."""
    if mapping.parts:
        sections.parts_that_fit(config, mapping, check_fits)
        return
    table = entries(mapping)
    keyed, fixed = {e.field for e in table} | told_fields(mapping), _fixed(mapping)
    problems = []
    for field in fields(ModelConfig):
        if field.name in keyed or field.name in NOT_HELD or field.default is MISSING:
            continue
        wanted = fixed.get(field.name, field.default)
        if (found := getattr(config, field.name)) != wanted:
            problems.append(f"{field.name} is {found!r}, this family has {wanted!r}")
    if config.towers:
        problems.append(f"it has towers ({', '.join(config.towers)}), this family is a language model alone")
    problems += _disagreements(config, [e for e in table if e.codec == "rename"])
    if "rope" in keyed and (config.rope is None or config.rope.percent != 1.0):
        problems.append(f"rope is {config.rope}, this family turns whole heads")
    if problems:
        lines = "".join(f"\n  {p}" for p in problems)
        raise ConfigError(f"{mapping.name} cannot hold this model:{lines}\nName the right family with --family.")


def _disagreements(config: ModelConfig, table: Iterable[Entry]) -> list[str]:
    """Fields that share a key must have one value."""
    problems, owner = [], dict[str, str]()
    for entry in table:
        first = owner.setdefault(entry.key, entry.field)
        a, b = getattr(config, first), getattr(config, entry.field)
        if a != b:
            problems.append(
                f"{first} is {a!r} and {entry.field} is {b!r}, this family has one key for both ({entry.key})"
            )
    return problems


def needs_config(mapping: Mapping) -> bool:
    """Whether a config.json says anything of the family's models."""
    return bool(mapping.parts or entries(mapping))


def dummy_heads(mapping: Mapping) -> int:
    """How many attention heads the class adds to those of its vision section."""
    count = mapping.config.get(DUMMIES, 0)
    assert isinstance(count, int)
    return count


def _fixed(mapping: Mapping) -> dict[str, Any]:
    """Fields that a family has no key for. One that says nothing of rotary embeddings has none."""
    fixed = config_table.fixed(mapping)
    return fixed if "rope" in mapping.config else {"rope": None, **fixed}
