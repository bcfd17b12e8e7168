"""A config.json of several parts: each part's section is read and written by its family, and what stands beside them joins the parts.

[config.sections]    section -> what it says where the file leaves it out whole; its model_type also where only that is left out
[config.families]    class of the whole model -> family of the part whose keys stand among the whole model's (section ".")
[config.projector]   field of the projector = key; its sizes are told by the tensors
[config.projector_is]  field of the projector = what the class builds; a word is the language model's field of that name
[config.sizes]       of a part's family: key -> what its class takes where a section leaves it out
vision_dummy_heads   attention heads that the model's code adds to those of its vision section

Its other rows say how the model sees images: see sight.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from collections.abc import Mapping as Dict
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

from ckptconv.config import TOWERS, ModelConfig, projector_config
from ckptconv.errors import ConfigError, MappingError
from ckptconv.huggingface.config_codecs import ABSENT, Section, Table, put
from ckptconv.huggingface.config_table import BUILT, FAMILIES, PROJECTOR, SECTIONS, SIZES
from ckptconv.huggingface.sight import check_sight, read_sight, write_sight
from ckptconv.mapping import Mapping, Part
from ckptconv.mapping_files import families_of_parts, load_mapping, with_parts
from ckptconv.tensor import Shape

WHOLE = "."  # the section of a part whose keys stand among those of the whole model
TIED, DTYPES = "tie_word_embeddings", ("dtype", "torch_dtype")
_VISION, _PROJECTOR = TOWERS


class Read(Protocol):
    """Reading the config of one family."""

    def __call__(
        self, raw: Table, where: str, mapping: Mapping, shapes: Dict[str, Shape] | None = None
    ) -> ModelConfig: ...


class Write(Protocol):
    """Writing the config of one family."""

    def __call__(self, config: ModelConfig, base: Table | None, mapping: Mapping) -> tuple[Table, list[str]]: ...


def part_families(
    raw: Table, mapping: Mapping, known: Sequence[Mapping], where: str, by_type: Callable[[Table, str], Mapping]
) -> list[str]:
    """The family of each part: as its section's class says, else its model_type, which some files have wrong."""
    return [
        _part_family(section_of(raw, part, mapping, where), part, mapping, known, where, by_type)
        for part in mapping.parts
    ]


def _part_family(
    section: Table,
    part: Part,
    mapping: Mapping,
    known: Sequence[Mapping],
    where: str,
    by_type: Callable[[Table, str], Mapping],
) -> str:
    if "*" not in part.use:
        return part.use
    classes = section.get("architectures")
    if part.config == WHOLE:
        families = _table(mapping, FAMILIES)
        found = next((families[c] for c in classes if c in families), None) if isinstance(classes, list) else None
        if found is None:
            raise ConfigError(f"{where}: architectures is {classes}, expected one of {', '.join(families)}")
        return str(found)
    of_class = [
        m.name for m in known if fnmatchcase(m.name, part.use) and _table(m, "const").get("architectures") == classes
    ]
    return of_class[0] if classes and of_class else by_type(section, f"{where}: {part.config}").name


def _with_sizes(section: Table, family: Mapping) -> Table:
    return section | {key: size for key, size in _table(family, SIZES).items() if key not in section}


def of_parts(mapping: Mapping, config: ModelConfig) -> Mapping:
    """The mapping of a model of several parts with the families that a model's parts have."""
    if all(part.family for part in mapping.parts):
        return mapping
    scopes = {"": config.family, **{scope: tower.family for scope, tower in config.towers.items()}}
    scopes |= families_of_parts(config.family)
    chosen = []
    for part in mapping.parts:
        family = scopes.get(part.scope, "") if "*" in part.use else part.use
        if not fnmatchcase(family, part.use):
            raise ConfigError(
                f"{mapping.name}: which family its {part.scope or 'language model'} is of is not known (it says {family or 'nothing'!r}); "
                f"name all: --family '{mapping.name}({','.join(p.use for p in mapping.parts)})'"
            )
        chosen.append(family)
    return with_parts(mapping, chosen)


def part_mapping(mapping: Mapping, scope: str) -> Mapping:
    """The family of one part; of a family with no parts, the family."""
    return next((_chosen(part, mapping) for part in mapping.parts if part.scope == scope), mapping)


def section_of(raw: Table, part: Part, mapping: Mapping, where: str) -> Table:
    """What a config.json says of a part; a dtype may be said of the whole model."""
    if part.config == WHOLE:
        return raw
    usual, found = _table(mapping, SECTIONS).get(part.config, {}), raw.get(part.config)
    assert isinstance(usual, dict)
    found = usual if found is None else found
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: {part.config} is {str(found)[:80]!r}, expected a table")
    said = {"model_type", "architectures"} & set(found)
    named = {"model_type": usual["model_type"]} if "model_type" in usual and not said else {}
    outer = {key: raw[key] for key in DTYPES if key in raw} if not set(DTYPES) & set(found) else {}
    return found | outer | named


def read(raw: Table, where: str, mapping: Mapping, shapes: Dict[str, Shape] | None, one: Read) -> ModelConfig:
    """The language model's config, with those of the other parts as its towers.

    A tower that has a section must be there; one without may be left out of the file. Without shapes nothing is told of it,
    nor of the projector.
    """
    named = None if shapes is None else {mapping.rename(name): shape for name, shape in shapes.items()}
    parts = {}
    for part in mapping.parts:
        if part.scope and part.config == WHOLE and not _stored(mapping, part.scope, named or {}):
            continue
        family = _chosen(part, mapping)
        section = _with_sizes(section_of(raw, part, mapping, where), family)
        parts[part.scope] = one(section, f"{where}: {part.config}", family, named)
    if named is not None and _stored(mapping, _PROJECTOR, named):
        parts[_PROJECTOR] = _stated(_measured(mapping, named), Section(raw, where), mapping)
    language = parts.pop("")
    tied = _tied(language, Section(raw, where), mapping, named)
    seen = read_sight(raw, where, mapping)
    return replace(language, family=mapping.name, raw=raw, towers=parts, tied=tied, **seen)


def _tied(language: ModelConfig, section: Section, mapping: Mapping, named: Dict[str, Shape] | None) -> bool:
    """Said of the whole model or of its language model; where they contradict each other, the tensors tell."""
    outer = section.typed(TIED, "bool", language.tied)
    if outer == language.tied:
        return language.tied
    heads = [r.stored for r in mapping.rules if not r.scope and any(a.expr == "head.weight" for a in r.alternatives)]
    return named is None or not set(heads) & set(named)


def _measured(mapping: Mapping, named: Dict[str, Shape]) -> ModelConfig:
    """The projector's sizes, and which of the tensors that it may have are there."""
    of_atom = {
        a.expr: named[r.stored]
        for r in mapping.rules
        for a in r.alternatives
        if r.scope == _PROJECTOR and r.stored in named and isinstance(a.expr, str)
    }
    ffn, inputs = _matrix(of_atom, "fc1.weight")
    hidden, _ = _matrix(of_atom, "fc2.weight")
    norm = "layernorm" if "input_norm.bias" in of_atom or "input_norm.weight" not in of_atom else "rmsnorm"
    projector = projector_config(
        inputs, ffn, hidden, pre_norm="input_norm.weight" in of_atom, norm=norm, mlp_bias="fc1.bias" in of_atom
    )
    return replace(projector, newline="newline.weight" in of_atom)


def _matrix(of_atom: Dict[str, Shape], name: str) -> Shape:
    shape = of_atom.get(name, ())
    return shape if len(shape) == 2 else (0, 0)


def _stated(projector: ModelConfig, section: Section, mapping: Mapping) -> ModelConfig:
    """With what config.json says of it."""
    said: dict[str, Any] = {}
    for field, key in _keys(mapping).items():
        measured = getattr(projector, field)
        said[field] = section.typed(key, type(measured).__name__, measured)
    return replace(projector, **said)


def write(config: ModelConfig, base: Table | None, mapping: Mapping, one: Write) -> Table:
    """The config.json with what each part's family says in its section."""
    out: Table = dict(_table(mapping, "const")) if base is None else copy.deepcopy(base)
    for part in mapping.parts:
        if not part.scope or part.scope in config.towers:
            _write_section(out, config, part, mapping, one, fresh=base is None)
    if (projector := config.towers.get(_PROJECTOR)) is not None:
        for field, key in _keys(mapping).items():
            if base is None or Section(out, "").get(key) is not ABSENT:
                put(out, key, getattr(projector, field))
    write_sight(out, config, mapping, fresh=base is None)
    if base is None or TIED in out:
        out[TIED] = config.tied
    if config.dtype is not None:
        for key in ["torch_dtype"] if base is None else [key for key in DTYPES if key in out]:
            out[key] = config.dtype.torch
    return out


def _write_section(out: Table, config: ModelConfig, part: Part, mapping: Mapping, one: Write, *, fresh: bool) -> None:
    """Only what changes in a section that is there; what its class takes anyway need not be said."""
    family = _chosen(part, mapping)
    its = replace(config.towers[part.scope], dtype=config.dtype) if part.scope else replace(config, towers={})
    if fresh:
        table = one(its, own_config(its, family), family)[0]
        out.update(table | out) if part.config == WHOLE else out.update({part.config: table})
        return
    there = section_of(out, part, mapping, "config.json")
    if not part.scope and TIED in out and part.config != WHOLE and config.tied:
        its = replace(its, tied=bool(there.get(TIED, False)))  # said of the whole model, which is enough
    usual = _table(family, SIZES)
    new, _ = one(its, _with_sizes(there, family), family)
    changed = {key: value for key, value in new.items() if key in there or value != usual.get(key, ABSENT)}
    if part.config == WHOLE:
        out.update(changed)
    else:
        own = out.get(part.config) or {}
        assert isinstance(own, dict)
        out[part.config] = {k: v for k, v in changed.items() if k in own or v != there.get(k, ABSENT)}


def own_config(config: ModelConfig, family: Mapping) -> Table | None:
    """The config.json that a part had before it was joined, if it is of its family."""
    wanted = family.match.get("model_type")
    said = config.raw.get("model_type")
    return config.raw if said is not None and said in (wanted if isinstance(wanted, list) else [wanted]) else None


def parts_that_fit(config: ModelConfig, mapping: Mapping, check: Callable[[ModelConfig, Mapping], None]) -> None:
    """Refuse a model that has other parts than the family, or one whose parts do not fit their families."""
    scopes = {part.scope for part in mapping.parts if part.scope}
    optional = {part.scope for part in mapping.parts if part.config == WHOLE}
    wanted = {*scopes, _PROJECTOR}
    if (found := set(config.towers)) - wanted or wanted - found - optional:
        theirs = " and ".join(sorted(found)) or "no other part"
        raise ConfigError(
            f"{mapping.name} is a language model with {' and '.join(sorted(wanted))}, this model has {theirs}"
        )
    check_sight(config, mapping)
    _check_projector(config, mapping)
    for part in mapping.parts:
        if not part.scope or part.scope in found:
            check(config.towers[part.scope] if part.scope else replace(config, towers={}), _chosen(part, mapping))


def _check_projector(config: ModelConfig, mapping: Mapping) -> None:
    """Refuse a projector that is not as the family's class builds it: the class could not load it."""
    projector = config.towers[_PROJECTOR]
    for field, wanted in _table(mapping, BUILT).items():
        built = getattr(config, wanted) if isinstance(wanted, str) else wanted
        if (found := getattr(projector, field)) != built:
            why = f" (the language model's {wanted})" if isinstance(wanted, str) else ""
            raise ConfigError(
                f"{mapping.name}: the projector's {field} is {found}, its class builds one with {built}{why}; "
                "--saver.family names a family that has such a one"
            )


def own_code(mapping: Mapping) -> bool:
    """Whether a family's code comes with its models (trust_remote_code): transformers does not have it."""
    return "auto_map" in _table(mapping, "const")


def refuse_strangers(mapping: Mapping) -> None:
    """A class of transformers makes its parts of classes that it knows."""
    strangers = [part.family for part in mapping.parts if own_code(_chosen(part, mapping))]
    if strangers and not own_code(mapping):
        raise ConfigError(
            f"{mapping.name}: transformers does not have the code of {' and '.join(map(str, strangers))}, which its class would need; "
            "give each part a family that it has, as in --saver.family 'internvl(llama,internvl-vision)', or name a family with "
            "code of its own, such as internvl-chat"
        )


def _chosen(part: Part, mapping: Mapping) -> Mapping:
    if part.family is None:
        raise MappingError(f"{mapping.name}: the family of its part {part.config} is not chosen yet")
    return load_mapping(part.family)


def _stored(mapping: Mapping, scope: str, named: Dict[str, Shape]) -> bool:
    """Whether there are tensors of a part."""
    beginnings = {rule.stored.partition("{")[0] for rule in mapping.rules if rule.scope == scope}
    return any(name.startswith(tuple(beginnings)) for name in named)


def _keys(mapping: Mapping) -> dict[str, str]:
    return {field: str(key) for field, key in _table(mapping, PROJECTOR).items()}


def _table(mapping: Mapping, name: str) -> Table:
    table = mapping.config.get(name, {})
    if not isinstance(table, dict):
        raise MappingError(f"mapping {mapping.name!r}: [config.{name}] must be a table")
    return table
