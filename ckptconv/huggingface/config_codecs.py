"""How fields of ModelConfig stand in a config.json where that is more than a rename: one codec each, both directions."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Protocol

from ckptconv.config import ModelConfig, Rope
from ckptconv.dtypes import BY_TORCH
from ckptconv.errors import ConfigError

Table = dict[str, object]
Fields = dict[str, object]


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


ABSENT = _Absent()
KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a family's [config] table: a field, its place in config.json, and what the class takes without it."""

    field: str
    kind: str
    key: str = ""
    codec: str = "rename"
    default: object = ABSENT
    params: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A config.json and where it came from; every complaint names file and key."""

    data: Table
    where: str

    def get(self, key: str) -> object:
        """The value at a path of keys, or ABSENT."""
        value: object = self.data
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return ABSENT
            value = value[part]
        return value

    def typed(self, key: str, kind: str, default: object = ABSENT) -> object:
        """The value, checked; `kind` may end in `| None`, and then null and nothing mean None."""
        value, optional, base = self.get(key), kind.endswith("| None"), kind.removesuffix("| None").strip()
        if value is ABSENT:
            if default is ABSENT and not optional:
                raise ConfigError(f"{self.where}: {key} is missing (expected {NAMES[base]})")
            return None if default is ABSENT else default
        if value is None and optional:
            return None
        if not isinstance(value, KINDS[base]) or (isinstance(value, bool) and base != "bool"):
            raise self.wrong(key, value, NAMES[base] + (" or null" if optional else ""))
        if base != "float":
            return value
        try:
            number = float(str(value))
        except (OverflowError, ValueError):  # a whole number of thousands of digits
            number = math.inf
        if not math.isfinite(number):
            raise self.wrong(key, value, "a finite number")
        return number

    def wrong(self, key: str, value: object, expected: str) -> ConfigError:
        text = json.dumps(value, default=repr)
        return ConfigError(f"{self.where}: {key} is {text[:80]}, expected {expected}")


class Codec(Protocol):
    """`known` holds the fields read so far: all plain ones come before those with a codec."""

    def read(self, section: Section, entry: Entry, known: Fields) -> object: ...

    def write(self, out: Table, entry: Entry, config: ModelConfig, *, fresh: bool) -> None:
        """Make `out` say what `config` does; `fresh`: it was made from nothing."""
        ...


def put(out: Table, key: str, value: object) -> None:
    *path, last = key.split(".")
    for part in path:
        below = out.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(f"config.json: {part} is {below!r}, expected a table to hold {key}")
        out = below
    out[last] = value


class Rename:
    """The same value under another name."""

    def read(self, section: Section, entry: Entry, known: Fields) -> object:
        return section.typed(entry.key, entry.kind, entry.default)

    def write(self, out: Table, entry: Entry, config: ModelConfig, *, fresh: bool) -> None:
        put(out, entry.key, getattr(config, entry.field))


class ReadOnly(Rename):
    """A second field with the value of a key that another field owns."""

    def write(self, out: Table, entry: Entry, config: ModelConfig, *, fresh: bool) -> None:
        pass


class OrHeads(Rename):
    """Key/value heads: null means as many as attention heads, and so does nothing unless the class says otherwise."""

    def read(self, section: Section, entry: Entry, known: Fields) -> object:
        value = section.typed(entry.key, "int | None", entry.default)
        return known["heads"] if value is None else value


class OrHiddenPerHead(Rename):
    """Size of a head: null means hidden size over heads, and so does nothing unless the class says otherwise."""

    def read(self, section: Section, entry: Entry, known: Fields) -> object:
        value = section.typed(entry.key, "int | None", entry.default)
        if value is not None:
            return value
        hidden, heads = known["hidden"], known["heads"]
        assert isinstance(hidden, int)
        assert isinstance(heads, int)
        if heads < 1 or hidden % heads:
            raise ConfigError(
                f"{section.where}: {entry.key} is not given, and hidden size {hidden} is no multiple of {heads} heads"
            )
        return hidden // heads


class EveryLayer:
    """Experts in all layers or in none: the family has no key for it."""

    def read(self, section: Section, entry: Entry, known: Fields) -> object:
        layers = known["layers"]
        assert isinstance(layers, int)
        return tuple(range(layers))

    def write(self, out: Table, entry: Entry, config: ModelConfig, *, fresh: bool) -> None:
        if config.moe_layers != tuple(range(config.layers)):
            raise ConfigError(
                f"the family has experts in every layer, this model only in layers {list(config.moe_layers)}"
            )


class Dtype:
    """`torch_dtype` (transformers before 5) or `dtype`. A config.json that does not say it is left so."""

    def read(self, section: Section, entry: Entry, known: Fields) -> object:
        name = section.typed("dtype", "str | None")
        older = section.typed("torch_dtype", "str | None")
        if name is not None and older is not None and name != older:
            raise ConfigError(f"{section.where}: dtype is {name!r} and torch_dtype is {older!r}; take one away")
        text = name or older
        if text is None:
            return None
        dtype = BY_TORCH.get(str(text).removeprefix("torch."))
        if dtype is None:
            raise section.wrong("dtype" if name else "torch_dtype", text, 'a torch dtype such as "bfloat16"')
        return dtype

    def write(self, out: Table, entry: Entry, config: ModelConfig, *, fresh: bool) -> None:
        if config.dtype is None:
            return
        for key in ["torch_dtype"] if fresh else [k for k in ("dtype", "torch_dtype") if k in out]:
            out[key] = config.dtype.torch


def plain(scaling: Table | None) -> Table | None:
    """A rope scaling in one spelling, to compare: `type` is the old name of `rope_type`."""
    if scaling is None:
        return None
    return {
        "rope_type": scaling.get("rope_type", scaling.get("type")),
        **{k: v for k, v in scaling.items() if k != "type"},
    }


class RopeCodec:
    """`rope_theta` with `rope_scaling` (transformers before 5), or everything in `rope_parameters`.

    `theta` is the base where none is said; `scaling` lists the kinds that a class has whose tables are `type` and `factor` alone.
    """

    def read(self, section: Section, entry: Entry, known: Fields) -> object:
        tables = [self._table(section, key) for key in ("rope_scaling", "rope_parameters")]
        older, newer = tables
        if older and newer and plain(self._scaling(older, section)) != plain(self._scaling(newer, section)):
            raise ConfigError(
                f"{section.where}: rope_scaling {older} and rope_parameters {newer} contradict each other"
            )
        table = older or newer or {}
        base, percent = (
            self._number(section, table, "rope_theta"),
            self._number(section, table, "partial_rotary_factor"),
        )
        theta = dict(entry.params).get("theta", 10000.0)
        base = float(str(theta)) if base is None else base
        if not base > 0:
            raise section.wrong("rope_theta", base, "a number above 0")
        rope = Rope(base, 1.0 if percent is None else percent, self._scaling(table, section))
        _refuse_other_scaling(rope, entry, f"{section.where}: ")
        return rope

    def _table(self, section: Section, key: str) -> Table | None:
        value = section.get(key)
        if value is ABSENT or value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise section.wrong(key, value, "a table or null")
        if any(isinstance(v, dict) for v in value.values()):
            raise ConfigError(
                f"{section.where}: {key} differs between kinds of layers ({', '.join(value)}): not supported yet"
            )
        return value

    def _scaling(self, table: Table, section: Section) -> Table | None:
        """What remains of the table when base and part are taken out; None for the plain embedding."""
        if not table or set(table) <= {"rope_theta", "partial_rotary_factor"}:
            return None
        kind = table.get("rope_type", table.get("type"))
        if not isinstance(kind, str):
            raise section.wrong("rope_scaling", table, "a table that names its rope_type")
        if table.get("type", kind) != kind and table.get("type") != "default":
            raise ConfigError(f"{section.where}: rope scaling is of type {table['type']!r} and of rope_type {kind!r}")
        return (
            None
            if kind == "default"
            else {k: v for k, v in table.items() if k not in ("rope_theta", "partial_rotary_factor")}
        )

    def _number(self, section: Section, table: Table, key: str) -> float | None:
        """A number that may stand inside the table or beside it; where it is twice it must be the same."""
        places = [s for s in (Section(table, section.where), section) if s.get(key) is not ABSENT]
        found = [float(str(place.typed(key, "float"))) for place in places]
        if len(set(found)) > 1:
            raise ConfigError(f"{section.where}: {key} is {found[0]} inside the rope table and {found[1]} beside it")
        return found[0] if found else None

    def write(self, out: Table, entry: Entry, config: ModelConfig, *, fresh: bool) -> None:
        rope = _in_short(config.rope or Rope(), entry)
        if out.get("rope_parameters") is not None:
            out["rope_parameters"] = {**(rope.scaling or {"rope_type": "default"}), "rope_theta": rope.base}
            if "rope_theta" in out:
                out["rope_theta"] = rope.base
            if "rope_scaling" in out:
                out["rope_scaling"] = rope.scaling
            return
        inside = out.get("rope_scaling")
        if isinstance(inside, dict) and "rope_theta" in inside and rope.scaling is not None:
            out["rope_scaling"] = {**rope.scaling, "rope_theta": rope.base}
        elif rope.scaling is not None or "rope_scaling" in out or fresh:
            out["rope_scaling"] = rope.scaling
        out["rope_theta"] = rope.base


def _refuse_other_scaling(rope: Rope, entry: Entry, where: str = "") -> None:
    kinds = dict(entry.params).get("scaling")
    if rope.scaling is not None and isinstance(kinds, list) and rope.kind not in kinds:
        raise ConfigError(f"{where}rope scaling {rope.kind!r}: this family has only {' and '.join(kinds)}")


def _in_short(rope: Rope, entry: Entry) -> Rope:
    """A scaling as a class reads it that takes `type` and a factor with a decimal point, and nothing else."""
    if rope.scaling is None or "scaling" not in dict(entry.params):
        return rope
    _refuse_other_scaling(rope, entry)
    factor = rope.scaling.get("factor")
    return replace(rope, scaling={"type": rope.kind, "factor": float(factor) if isinstance(factor, int) else factor})


class LayerWindows:
    """Qwen's sliding window: a switch, a size, and the first layer it is for; newer files list layer kinds too."""

    def read(self, section: Section, entry: Entry, known: Fields) -> object:
        layers, kinds = known["layers"], section.get("layer_types")
        assert isinstance(layers, int)
        window = section.typed("sliding_window", "int | None", 4096)
        first = section.typed("max_window_layers", "int", 28)
        assert isinstance(first, int)
        if kinds is ABSENT or kinds is None:
            slide = [i >= first for i in range(layers)]
        elif (
            isinstance(kinds, list)
            and len(kinds) == layers
            and set(map(str, kinds)) <= {"full_attention", "sliding_attention"}
        ):
            slide = [k == "sliding_attention" for k in kinds]
        else:
            raise section.wrong(
                "layer_types", kinds, f"full_attention or sliding_attention for each of {layers} layers"
            )
        if not section.typed("use_sliding_window", "bool", False) or not any(slide):
            return None
        if window is not None and not all(slide):
            raise ConfigError(
                f"{section.where}: a sliding window in {sum(slide)} of {layers} layers is not supported yet"
            )
        return window

    def write(self, out: Table, entry: Entry, config: ModelConfig, *, fresh: bool) -> None:
        window = config.sliding_window
        out["use_sliding_window"] = window is not None
        out["sliding_window"] = window
        out["max_window_layers"] = 0 if window is not None else config.layers
        if "layer_types" in out:
            out["layer_types"] = ["full_attention" if window is None else "sliding_attention"] * config.layers


CODECS: dict[str, Codec] = {
    "rename": Rename(),
    "read_only": ReadOnly(),
    "or_heads": OrHeads(),
    "or_hidden_per_head": OrHiddenPerHead(),
    "every_layer": EveryLayer(),
    "dtype": Dtype(),
    "rope": RopeCodec(),
    "layer_windows": LayerWindows(),
}
