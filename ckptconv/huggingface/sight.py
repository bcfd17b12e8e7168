"""How a model sees images, in a config.json: rows of its family's [config], and what follows from its vision tower.

image_size      the key of the tower's image size, and
image_length    that of how many entries the projector makes of an image: both follow from the parts, in a config.json from nothing

A config.json made from nothing says what is known of the source; of the rest it has what [config.const] says is usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ckptconv.config import COMPUTED, SHOWN, ModelConfig
from ckptconv.errors import ConfigError, UsageError
from ckptconv.huggingface.config_codecs import Section, Table, put
from ckptconv.huggingface.config_table import CODECS, IMAGE_LENGTH, IMAGE_SIZE, entries, fixed, says
from ckptconv.mapping import Mapping

_IDENTITY = ("architectures", "model_type", "auto_map")


def read_sight(raw: Table, where: str, mapping: Mapping) -> dict[str, Any]:
    """How the model sees images: what its config.json says, its class takes, or its family always does."""
    said = {entry.field: CODECS[entry.codec].read(Section(raw, where), entry, {}) for entry in entries(mapping)}
    return fixed(mapping) | said


def write_sight(out: Table, config: ModelConfig, mapping: Mapping, *, fresh: bool) -> None:
    """What is known of how the model sees images; of the rest a config.json made from nothing says what is usual."""
    vision, projector = config.towers.get("vision"), config.towers.get("projector")
    if fresh and config.feature_select is None and vision is not None and not vision.class_tokens:
        config = replace(config, feature_select="full")  # "patch" would cost the first patch
    if fresh and vision is not None and projector is not None and projector.inputs:
        seen = (vision.image // vision.patch) ** 2 + (vision.class_tokens if config.feature_select == "full" else 0)
        for name, value in ((IMAGE_SIZE, vision.image), (IMAGE_LENGTH, seen * vision.hidden // projector.inputs)):
            if name in mapping.config:
                put(out, str(mapping.config[name]), value)
    known = {name: getattr(config, name) for name in (*COMPUTED, *SHOWN)}
    for entry in entries(mapping):
        if known[entry.field] is not None and not says(out, entry, known):
            CODECS[entry.codec].write(out, entry, config, fresh=fresh)


def check_sight(config: ModelConfig, mapping: Mapping) -> None:
    """Refuse a model that would compute something else of the same image."""
    if other := _unsayable(config, mapping, COMPUTED):
        lines = "".join(f"\n  {name} is {ours!r}, this family has {theirs!r}" for name, ours, theirs in other)
        raise ConfigError(f"{mapping.name} makes something else of an image than this model:{lines}")


def not_said(config: ModelConfig, base: Table | None, out: Table, mapping: Mapping) -> list[str]:
    """What a config.json cannot say of how the model is given images, and words of a family that another has otherwise."""
    lines = [
        f"{name} is {ours!r}, {mapping.name} has {'no word for it' if theirs is None else repr(theirs)}"
        for name, ours, theirs in _unsayable(config, mapping, SHOWN)
    ]
    translated = {entry.key for entry in entries(mapping)} | {*_IDENTITY}
    usual = mapping.config.get("const", {}) if base is None else {}
    assert isinstance(usual, dict)
    changed = [key for key in usual if key in config.raw and key not in translated and config.raw[key] != out[key]]
    return lines + [f"{key}: {config.raw[key]!r} -> {out[key]!r}" for key in changed]


def _unsayable(config: ModelConfig, mapping: Mapping, names: Sequence[str]) -> list[tuple[str, object, object]]:
    """(field, what the model has, what the family always has) of fields without a key."""
    keyed, always = {entry.field for entry in entries(mapping)}, fixed(mapping)
    found = [(name, getattr(config, name), always.get(name)) for name in names if name not in keyed]
    return [(name, ours, theirs) for name, ours, theirs in found if ours not in (None, theirs)]


def check_image_token(table: Table, mapping: Mapping, rows: int) -> None:
    """The image token of a config.json must have a row in the embedding."""
    key = _token_key(mapping)
    token = table.get(key) if key else None
    if isinstance(token, int) and token >= rows:
        raise ConfigError(
            f"{key} is {token}, but the embedding has only {rows} rows: --vocab-rows {token + 1} or more makes it larger (combine), "
            "--saver.image-token N names another token (--saver hf)"
        )


def with_image_token(table: Table, mapping: Mapping, rows: int, wanted: int | None) -> Table:
    """The config.json with the image token asked for."""
    if wanted is not None:
        if not (key := _token_key(mapping)):
            raise UsageError(
                f"--saver.image-token {wanted}: {mapping.name} does not say its image token in config.json"
            )
        if wanted < 0:
            raise UsageError(f"--saver.image-token {wanted}: expected the number of a row of the embedding, 0 or more")
        table = {**table, key: wanted}
    check_image_token(table, mapping, rows)
    return table


def _token_key(mapping: Mapping) -> str:
    return next((entry.key for entry in entries(mapping) if entry.field == "image_token"), "")
