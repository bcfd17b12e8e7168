"""The [config] table of a family's mapping, row by row: where config.json keeps the fields of ModelConfig.

field = "key"                         the same value under another name (dots go into nested tables)
field = { key = "…", codec = "…" }    more than a rename: see config_codecs.py; further entries are its parameters
field = false                         the parent's key does not exist in this family
[config.default]                      field -> value when the key is absent, and always if there is no key; false (of a
                                      field that is no flag) takes the parent's default away
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ckptconv.config import ModelConfig, Rope
from ckptconv.errors import ConfigError, MappingError
from ckptconv.huggingface.config_codecs import ABSENT, Codec, Entry, Section, Table, plain
from ckptconv.huggingface.config_codecs import CODECS as TEXT_CODECS
from ckptconv.huggingface.told import TOLD
from ckptconv.huggingface.tower_codecs import TOWER_CODECS
from ckptconv.mapping import Mapping

CODECS: dict[str, Codec] = {**TEXT_CODECS, **TOWER_CODECS}
SECTION, USAGE = "section", "usage"
SECTIONS, FAMILIES, PROJECTOR, BUILT, SIZES = OF_PARTS = ("sections", "families", "projector", "projector_is", "sizes")
DUMMIES, IMAGE_SIZE, IMAGE_LENGTH = OF_WHOLE = ("vision_dummy_heads", "image_size", "image_length")
NO_FIELDS = ("default", "const", TOLD, SECTION, USAGE, *OF_PARTS, *OF_WHOLE)
KINDS = {f.name: str(f.type) for f in fields(ModelConfig)}
FLAGS = frozenset(name for name, kind in KINDS.items() if kind == "bool")


def entries(mapping: Mapping) -> tuple[Entry, ...]:
    """The [config] table, checked: plain fields first, then those whose codec builds upon them."""
    if not mapping.config:
        raise MappingError(
            f"mapping {mapping.name!r} has no [config]: it is a dialect, not a family of Hugging Face models"
        )
    rows = [(k, v) for k, v in mapping.config.items() if k not in NO_FIELDS and v is not False]
    table = [_entry(name, row, mapping) for name, row in rows]
    return tuple(sorted(table, key=lambda e: e.codec not in ("rename", "read_only")))


def _entry(name: str, row: object, mapping: Mapping) -> Entry:
    where = f"mapping {mapping.name!r}, [config] {name}"
    if name not in KINDS:
        raise MappingError(f"{where}: ModelConfig has no such field; it has {', '.join(KINDS)}")
    given: dict[str, Any] = {"key": row} if isinstance(row, str) else dict(row) if isinstance(row, dict) else {}
    key, codec = given.pop("key", ""), given.pop("codec", "rename")
    if codec not in CODECS or not isinstance(key, str) or (codec == "rename" and not key):
        raise MappingError(
            f"{where}: expected a key of config.json, or a table with a codec ({', '.join(CODECS)}), found {row!r}"
        )
    return Entry(name, KINDS[name], key, codec, fixed_or_default(mapping).get(name, ABSENT), tuple(given.items()))


def fixed_or_default(mapping: Mapping) -> Table:
    """[config.default]: what a field is when its key is absent, or in every model of a family that has no key for it."""
    given = mapping.config.get("default", {})
    unknown = set(given) - set(KINDS) if isinstance(given, dict) else {str(given)}
    if unknown or not isinstance(given, dict):
        raise MappingError(
            f"mapping {mapping.name!r}, [config.default]: expected fields of ModelConfig, found {sorted(unknown)}"
        )
    return {k: v for k, v in given.items() if not (v is False and not KINDS[k].startswith("bool"))}


def fixed(mapping: Mapping) -> dict[str, Any]:
    """Fields that a family has no key for, only a value."""
    return {k: v for k, v in fixed_or_default(mapping).items() if mapping.config.get(k, False) is False}


def says(out: Table, entry: Entry, known: Table) -> bool:
    """Whether `out` already says what it should; what cannot even be read does not."""
    try:
        found = CODECS[entry.codec].read(Section(out, "config.json"), entry, known)
    except ConfigError:
        return False
    return _comparable(found) == _comparable(known[entry.field])


def _comparable(value: object) -> object:
    return replace(value, scaling=plain(value.scaling)) if isinstance(value, Rope) else value
