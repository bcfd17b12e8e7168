"""Finding mapping files (built in, from plug-ins, or the user's own) and reading them with what they extend and use."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from ckptconv.errors import MappingError, UsageError
from ckptconv.mapping import Alternative, Apply, Expr, Mapping, Part, Rule, named, parse_rules, stacked, validate
from ckptconv.vocabulary import VARIABLE, Vocabulary, parse_vocabulary, words

ENTRY_POINTS = "ckptconv.mappings"
TABLES = {"match", "config", "cut", "deal", "excess", "aliases"}
TOP_LEVEL = {"extends", "block", "ignore", "omit", "prefixes", "variants", "stack", "vocabulary", *TABLES}


def builtin_folder() -> Path:
    """Inside the package when installed from a wheel, beside it in a checkout."""
    here = Path(__file__).parent
    inside = here / "mappings"
    return inside if inside.is_dir() else here.parent / "mappings"


@cache
def _folders() -> tuple[tuple[str, Path], ...]:
    """(origin, folder): ours first, then those of installed plug-ins."""
    found = [("built-in", builtin_folder())]
    for point in entry_points(group=ENTRY_POINTS):
        module = point.load()
        found += [(f"plug-in {point.dist.name if point.dist else point.name}", Path(p)) for p in module.__path__]
    return tuple(found)


@cache
def mapping_paths() -> dict[str, tuple[str, Path]]:
    """Every known mapping: name -> (origin, file). Two files of one name are an error."""
    paths: dict[str, tuple[str, Path]] = {}
    for origin, folder in _folders():
        for path in sorted(folder.glob("*.toml")):
            if path.stem in paths:
                raise MappingError(f"mapping {path.stem!r} exists twice: {paths[path.stem][1]} and {path} ({origin})")
            paths[path.stem] = (origin, path)
    return {name: paths[name] for name in paths if name != "canonical"}


def family_names() -> list[str]:
    return sorted(name for name in mapping_paths() if name.startswith("hf-"))


@cache
def load_mapping(name: str) -> Mapping:
    """A mapping by name; `hf-llava(hf-llama,hf-clip)` is one with the families of its parts."""
    base, _, parts = name.removesuffix(")").partition("(")
    if base not in mapping_paths():
        raise MappingError(f"no mapping {base!r}; known: {', '.join(sorted(mapping_paths()))}")
    mapping = _spelled(_build(base, mapping_paths()[base][1], (), tuple(parts.split(",")) if parts else ()))
    return replace(mapping, name=name)


def with_parts(mapping: Mapping, families: Sequence[str]) -> Mapping:
    """The mapping with each of its open parts of the family given for it."""
    return load_mapping(f"{mapping.name}({','.join(families)})")


def families_of_parts(name: str) -> dict[str, str]:
    """scope -> family, from a name that says them; none from another."""
    return {part.scope: part.family for part in load_mapping(name).parts if part.family} if "(" in name else {}


def load_mapping_file(path: Path) -> Mapping:
    """A mapping of the user's own (or one that a plug-in brings, by its name); it stands for the one it extends."""
    installed = not path.exists() and str(path) in mapping_paths()
    if not installed and not path.exists():
        raise UsageError(f"--mapping {path}: no such file, nor one that is installed: {', '.join(mapping_paths())}")
    mapping = load_mapping(str(path)) if installed else _spelled(_build(path.stem, path, ()))
    if mapping.extends is None:
        raise MappingError(f"{path}: a mapping given with --mapping must say which one it extends")
    return mapping


def families() -> list[Mapping]:
    return [load_mapping(name) for name in family_names()]


def chosen(name: str, given: Sequence[Mapping]) -> Mapping:
    """The mapping `name`, or the user's own that extends it."""
    return next((m for m in given if name in (m.name, m.extends)), None) or load_mapping(name)


def _build(name: str, path: Path, chain: tuple[str, ...], families: tuple[str, ...] = ()) -> Mapping:
    if name in chain:
        raise MappingError(f"mappings extend each other in a circle: {' -> '.join([*chain, name])}")
    raw, parts = _completed(_read(path), families, name)
    parent = _parent(raw, path, (*chain, name), () if parts else families)
    parts = parts or (parent.parts if parent else ())
    stack = tuple(dict.fromkeys([*(parent.stack if parent else ()), *named(raw, "stack", str(path))]))
    mapping = Mapping(
        name=name,
        vocabulary=_vocabulary(raw, parent, str(path)),
        rules=_rules(raw, parent, path, (*chain, name), stack),
        extends=parent.name if parent else None,
        ignore=(*(parent.ignore if parent else ()), *words(raw.get("ignore", ()))),
        omit=_omit(raw, parent, (*chain, name)),
        prefixes=words(raw.get("prefixes", parent.prefixes if parent else ())),
        variants=_variants(raw, parent, (*chain, name)),
        stack=stack,
        match={**(parent.match if parent else {}), **_table(raw, "match", path)},
        config=_merged(parent.config if parent else {}, _table(raw, "config", path)),
        cut=_merged_dimensions(_below("cut", parent, raw, (*chain, name)), _table(raw, "cut", path)),
        deal=_merged_dimensions(_below("deal", parent, raw, (*chain, name)), _table(raw, "deal", path)),
        excess=_strings(_table(raw, "excess", path)) or _joined(_below("excess", parent, raw, (*chain, name))),
        parts=parts,
        aliases={**(parent.aliases if parent else {}), **_strings(_table(raw, "aliases", path))},
    )
    validate(mapping)
    return mapping


def _read(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MappingError(f"{path}: cannot be read as a mapping file: {error}") from None
    if unknown := set(raw) - TOP_LEVEL:
        raise MappingError(f"{path}: unknown top-level keys {sorted(unknown)}; known: {sorted(TOP_LEVEL)}")
    return raw


def _completed(
    raw: dict[str, object], families: tuple[str, ...], name: str
) -> tuple[dict[str, object], tuple[Part, ...]]:
    """The blocks with each open part's glob replaced by the family chosen; a part not chosen yet has no rows."""
    listed = raw.get("block", [])
    blocks = [b for b in listed if isinstance(b, dict)] if isinstance(listed, list) else []
    opened = [b for b in blocks if "config" in b]
    if families and len(families) != len(opened) and (opened or "extends" not in raw):
        raise MappingError(
            f"{name} has {len(opened)} parts to choose, {len(families)} are given: {', '.join(families)}"
        )
    given = dict(zip(map(id, opened), families or [None] * len(opened), strict=bool(opened)))
    parts = tuple(Part(str(b.get("scope", "")), str(b.get("use", "")), str(b["config"]), given[id(b)]) for b in opened)
    for part in parts:
        if part.family is not None and not fnmatchcase(part.family, part.use):
            raise MappingError(f"{name}: its part {part.config} cannot be {part.family}, only {part.use}")
    kept = [b if id(b) not in given else {**b, "use": given[id(b)]} for b in blocks if given.get(id(b), "") is not None]
    return ({**raw, "block": kept} if opened else raw), parts


def _parent(raw: dict[str, object], path: Path, chain: tuple[str, ...], families: tuple[str, ...]) -> Mapping | None:
    """What it extends; where all open parts are that mapping's, the families are for them."""
    name = raw.get("extends")
    if name is None:
        return None
    beside = path.parent / f"{name}.toml"
    if str(name) not in mapping_paths() and not beside.exists():
        raise MappingError(f"{path}: extends {name!r}, which is not known; known: {', '.join(sorted(mapping_paths()))}")
    file = mapping_paths()[str(name)][1] if str(name) in mapping_paths() else beside
    return _build(str(name), file, chain, families)


@cache
def _canonical() -> Vocabulary:
    path = builtin_folder() / "canonical.toml"
    with path.open("rb") as file:
        return parse_vocabulary(tomllib.load(file), str(path))


def _vocabulary(raw: dict[str, object], parent: Mapping | None, where: str) -> Vocabulary:
    base = parent.vocabulary if parent else _canonical()
    own = raw.get("vocabulary")
    if not isinstance(own, dict):
        return base
    added = parse_vocabulary(own, where)
    return Vocabulary({**base.variables, **added.variables}, {**base.atoms, **added.atoms})


def _variants(raw: dict[str, object], parent: Mapping | None, chain: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Our groups, else the parent's; and those of the mappings we use."""
    own = raw.get("variants")
    groups = [words(g) for g in own] if isinstance(own, list) else list(parent.variants if parent else ())
    groups += [g for block in _using(raw) for g in _used(block, chain).variants]
    return tuple(dict.fromkeys(groups))


def _using(raw: dict[str, object]) -> list[dict[str, object]]:
    blocks = raw.get("block", [])
    return [b for b in blocks if "use" in b] if isinstance(blocks, list) else []


def _omit(raw: dict[str, object], parent: Mapping | None, chain: tuple[str, ...]) -> tuple[str, ...]:
    """The parent's globs and ours; and those of the mappings we use, for the atoms as they are called here."""
    globs = [*(parent.omit if parent else ()), *words(raw.get("omit", ()))]
    for block in _using(raw):
        under = f"{block['scope']}." if "scope" in block else ""
        globs += [under + str(block.get("canonical", "")) + glob for glob in _used(block, chain).omit]
    return tuple(dict.fromkeys(globs))


def _used(block: dict[str, object], chain: tuple[str, ...]) -> Mapping:
    name = str(block["use"])
    if name not in mapping_paths():
        raise MappingError(
            f"{chain[-1]}: uses {name!r}, which is not known; known: {', '.join(sorted(mapping_paths()))}"
        )
    return _spelled(_build(name, mapping_paths()[name][1], chain))


def _spelled(mapping: Mapping) -> Mapping:
    """Every row once under each prefix that names may have; which of them a checkpoint's have is a variant."""
    if not mapping.prefixes:
        return mapping
    tags = {prefix: f"{mapping.name}:{prefix}" for prefix in mapping.prefixes}
    rules = [
        replace(
            rule,
            stored=prefix + rule.stored,
            alternatives=tuple(replace(a, when=(*a.when, tag)) for a in rule.alternatives),
        )
        for prefix, tag in tags.items()
        for rule in mapping.rules
    ]
    return replace(mapping, rules=tuple(rules), variants=(*mapping.variants, tuple(tags.values())), prefixes=())


def _rules(
    raw: dict[str, object], parent: Mapping | None, path: Path, chain: tuple[str, ...], stack: Sequence[str]
) -> tuple[Rule, ...]:
    """The parent's rules with ours in their place; a new one stands behind the last that has the same first index variable."""
    rules = list(parent.rules) if parent else []
    for block in _using(raw):
        rules += _prefixed(_used(block, chain).rules, block)
    rules = [stacked(rule, stack, str(path)) for rule in rules]
    own = parse_rules(raw, str(path), stack)
    if not rules:
        return tuple(rule for rule in own.values() if rule is not None)
    added: dict[tuple[str, ...], list[Rule]] = {}
    for stored, rule in own.items():
        at = next((i for i, known in enumerate(rules) if known.stored == stored), None)
        if at is not None:
            rules[at : at + 1] = [rule] if rule else []
        elif rule is not None:
            added.setdefault(_variables(stored)[:1], []).append(rule)
    for first, new in added.items():
        alike = [i for i, known in enumerate(rules) if _variables(known.stored)[:1] == first]
        at = alike[-1] + 1 if alike else len(rules)
        rules[at:at] = new
    return tuple(rules)


def _variables(stored: str) -> tuple[str, ...]:
    return tuple(VARIABLE.findall(stored))


def _prefixed(rules: Sequence[Rule], block: dict[str, object]) -> list[Rule]:
    stored, canonical, when = (
        str(block.get("stored", "")),
        str(block.get("canonical", "")),
        words(block.get("when", ())),
    )

    def renamed(expr: Expr) -> Expr:
        if isinstance(expr, str):
            return canonical + expr
        return Apply(expr.op, expr.params, tuple(renamed(a) for a in expr.args), expr.over)

    return [
        Rule(
            stored + r.stored,
            tuple(Alternative(renamed(a.expr), (*when, *a.when), a.on, a.copy) for a in r.alternatives),
            r.scope or str(block.get("scope", "")),
        )
        for r in rules
    ]


def _table(raw: dict[str, object], key: str, path: Path) -> dict[str, object]:
    value = raw.get(key, {})
    if not isinstance(value, dict):
        raise MappingError(f"{path}: [{key}] must be a table")
    return value


def _merged(parent: dict[str, object], own: dict[str, object]) -> dict[str, object]:
    """Tables are merged key by key, one level deep; anything else is replaced."""
    out = dict(parent)
    for key, value in own.items():
        below = out.get(key)
        out[key] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    return out


def _below(table: str, parent: Mapping | None, raw: dict[str, object], chain: tuple[str, ...]) -> list[dict[str, str]]:
    """What the parent and the mappings we use say in a table: of a tower under its name, but that towers are dealt out to nothing."""
    below = [getattr(parent, table)] if parent else []
    for block in _using(raw):
        under = f"{block['scope']}." if "scope" in block else ""
        if not (under and table == "deal"):
            below.append({under + name: how for name, how in getattr(_used(block, chain), table).items()})
    return below


def _joined(tables: Sequence[dict[str, str]]) -> dict[str, str]:
    return {key: value for table in tables for key, value in table.items()}


def _merged_dimensions(below: Sequence[dict[str, str]], own: dict[str, object]) -> dict[str, str]:
    """dimension -> names, as written, to name -> dimension; `false` takes away what mappings below say of a dimension."""
    kept = {name: dimension for table in below for name, dimension in table.items() if own.get(dimension) is not False}
    return {**kept, **{name: dimension for dimension, names in own.items() for name in words(names)}}


def _strings(table: dict[str, object]) -> dict[str, str]:
    return {str(k): str(v) for k, v in table.items()}
