"""How a vision tower's fields stand in a config.json where that is more than a rename: most have no key and follow from others."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping as Dict
from dataclasses import dataclass

from ckptconv.config import ModelConfig
from ckptconv.errors import ConfigError
from ckptconv.huggingface.config_codecs import ABSENT, Codec, Entry, Fields, Rename, Section, Table, put

Sizes = Dict[str, int]


@dataclass(frozen=True, slots=True)
class Derived:
    """A field without a key: what others make it."""

    of: Callable[[Sizes], int]

    def read(self, section: Section, entry: Entry, known: Fields) -> object:
        return self._derived(entry, known, section.where)

    def write(self, out: Table, entry: Entry, config: ModelConfig, *, fresh: bool) -> None:
        known: Fields = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
        wanted = self._derived(entry, known, "config.json")
        if known[entry.field] != wanted:
            raise ConfigError(
                f"{entry.field} is {known[entry.field]}, this family has no key for it and its other sizes make it {wanted}"
            )

    def _derived(self, entry: Entry, known: Fields, where: str) -> int:
        sizes = {name: value for name, value in known.items() if isinstance(value, int)}
        try:
            return self.of(sizes)
        except (KeyError, ZeroDivisionError, ValueError) as error:
            raise ConfigError(f"{where}: {entry.field} does not follow from the other sizes: {error}") from None


def _as_heads(sizes: Sizes) -> int:
    return sizes["heads"]


def _hidden_per_head(sizes: Sizes) -> int:
    hidden, heads = sizes["hidden"], sizes.get("true_heads", sizes["heads"])
    if hidden % heads:
        raise ValueError(f"hidden size {hidden} is no multiple of {heads} heads")
    return hidden // heads


def _patch_grid(sizes: Sizes) -> int:
    """One position for every patch of the image, and for every class token."""
    side = sizes["image"] // sizes["patch"]
    return side * side + sizes.get("class_tokens", 0)


class TrueHeads(Rename):
    """Attention heads without the dummy ones that may be stored."""

    def write(self, out: Table, entry: Entry, config: ModelConfig, *, fresh: bool) -> None:
        out[entry.key] = config.true_heads or config.heads


class Side(Rename):
    """The side of a square: one number, or the same twice."""

    def read(self, section: Section, entry: Entry, known: Fields) -> object:
        value = section.get(entry.key)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            return Section({"side": value[0]}, section.where).typed("side", entry.kind)
        return super().read(section, entry, known)

    def write(self, out: Table, entry: Entry, config: ModelConfig, *, fresh: bool) -> None:
        out[entry.key] = [getattr(config, entry.field)] * 2


class Words:
    """A value by another word: the parameters are ours = "theirs"."""

    def read(self, section: Section, entry: Entry, known: Fields) -> object:
        words = dict(entry.params)
        ours = {theirs: name for name, theirs in words.items()}
        name = section.typed(entry.key, entry.kind, words.get(str(entry.default), ABSENT))
        if name is not None and name not in ours:
            raise section.wrong(entry.key, name, " or ".join(map(str, ours)))
        return ours.get(name)

    def write(self, out: Table, entry: Entry, config: ModelConfig, *, fresh: bool) -> None:
        words, value = dict(entry.params), getattr(config, entry.field)
        if value not in words:
            raise ConfigError(f"{entry.field} is {value!r}, this family has {' and '.join(words)}")
        put(out, entry.key, words[value])


class ClipClass:
    """The projection into CLIP's shared space: CLIPVisionModel states its size, but only another class has it."""

    def read(self, section: Section, entry: Entry, known: Fields) -> object:
        names = section.get("architectures")
        has = isinstance(names, list) and _PROJECTED in names
        return section.typed(entry.key, entry.kind, 0) if has else 0

    def write(self, out: Table, entry: Entry, config: ModelConfig, *, fresh: bool) -> None:
        out["architectures"] = [_PROJECTED if config.projection else _PLAIN]
        if config.projection:
            out[entry.key] = config.projection


_PLAIN, _PROJECTED = "CLIPVisionModel", "CLIPVisionModelWithProjection"
TOWER_CODECS: dict[str, Codec] = {
    "as_heads": Derived(_as_heads),
    "hidden_per_head": Derived(_hidden_per_head),
    "patch_grid": Derived(_patch_grid),
    "true_heads": TrueHeads(),
    "side": Side(),
    "words": Words(),
    "clip_class": ClipClass(),
}
