"""What formats there are: built-in ones by dotted path, imported when used, and those of installed plug-ins."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from dataclasses import MISSING, Field, fields
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from ckptconv.errors import FormatError, UsageError
from ckptconv.formats import Format

ENTRY_POINTS = "ckptconv.formats"
CHOICES = "choices"  # in the metadata of an option: the only values it takes
BUILT_IN = {
    "hf": "ckptconv.formats.hf:Hf",
    "mcore": "ckptconv.formats.mcore:Mcore",
    "mcore-dist": "ckptconv.formats.mcore_dist:McoreDist",
    "legacy": "ckptconv.formats.legacy:Legacy",
    "nemo": "ckptconv.formats.nemo:Nemo",
    "nemo2": "ckptconv.formats.nemo2:Nemo2",
    "lightning": "ckptconv.formats.lightning:Lightning",
    "openai-clip": "ckptconv.formats.openai_clip:OpenaiClip",
    "mm-projector": "ckptconv.formats.mm_projector:MmProjector",
    "dcp": "ckptconv.formats.dcp:Dcp",
}


@cache
def formats() -> dict[str, tuple[str, Format]]:
    """name -> (where it comes from, the format)."""
    found = {name: ("built-in", _built_in(name)) for name in BUILT_IN}
    return found | {name: (origin, point.load()()) for name, (origin, point) in _plug_ins().items()}


@cache
def _plug_ins() -> dict[str, tuple[str, EntryPoint]]:
    """Those installed, not imported yet; no two formats have one name."""
    found: dict[str, tuple[str, EntryPoint]] = {}
    taken = dict.fromkeys(BUILT_IN, "built-in")
    for point in entry_points(group=ENTRY_POINTS):
        origin = f"plug-in {point.dist.name} {point.dist.version}" if point.dist else "plug-in"
        if point.name in taken:
            raise UsageError(f"{origin} brings a format {point.name!r}, which is already taken by {taken[point.name]}")
        taken[point.name], found[point.name] = origin, (origin, point)
    return found


@cache
def _built_in(name: str) -> Format:
    module, _, attribute = BUILT_IN[name].partition(":")
    fmt: Format = getattr(import_module(module), attribute)()
    return fmt


def get_format(name: str) -> Format:
    _plug_ins()  # refuses names that are taken
    if name in BUILT_IN:  # imported alone: all of them take a tenth of a second
        return _built_in(name)
    for known, (_, fmt) in formats().items():
        if name in (known, *fmt.aliases):
            return fmt
    names = [f"{known} ({', '.join(fmt.aliases)})" if fmt.aliases else known for known, (_, fmt) in formats().items()]
    raise UsageError(f"no format {name!r}; known: {', '.join(names)}")


def sniff(path: Path) -> Format:
    """The one format that recognises a folder."""
    if not path.exists():
        raise FormatError(path, "there is nothing here")
    found = [(name, fmt) for name, (_, fmt) in formats().items() if fmt.sniff(path)]
    if len(found) != 1:
        names = " and ".join(name for name, _ in found) or f"none of {', '.join(formats())}"
        raise FormatError(path, f"it looks like {names}; say which with --loader")
    return found[0][1]


def make_options(kind: type, values: Dict[str, object], flag: str, name: str) -> Any:
    """An options dataclass from names and values (text is read as the field's type)."""
    hints, known = get_type_hints(kind), {f.name: f for f in fields(kind)}
    unknown = [key for key in values if key.replace("-", "_") not in known]
    if unknown:
        given = ", ".join(f"--{flag}.{key}" for key in unknown)
        listed = ", ".join(f"--{flag}.{n.replace('_', '-')}" for n in known) or "none"
        raise UsageError(f"format {name} has no option {given}; it has: {listed}")
    read: dict[str, object] = {}
    for key, value in values.items():
        field = known[key.replace("-", "_")]
        read[field.name] = _read(hints[field.name], value, f"--{flag}.{key}")
        _check_choice(field, read[field.name], f"--{flag}.{key}")
    return kind(**read)


def switches(kind: type) -> set[str]:
    """The options that are off until they are named: they need no value."""
    hints = get_type_hints(kind)
    return {f.name for f in fields(kind) if hints[f.name] is bool and f.default is False}


def _check_choice(field: Field[Any], value: object, flag: str) -> None:
    choices = field.metadata.get(CHOICES, ())
    if choices and value not in (*choices, field.default):
        raise UsageError(f"{flag} {value}: choose {' or '.join(map(str, choices))}")


def _read(hint: object, value: object, flag: str) -> object:
    """A value given as text, as the type a field declares."""
    if not isinstance(value, str):
        return value
    kinds = [k for k in get_args(hint) if k is not type(None)] if get_origin(hint) in (Union, UnionType) else [hint]
    if bool in kinds:
        if value.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise UsageError(f"{flag} {value}: expected true or false")
        return value.lower() in ("true", "1", "yes")
    if int in kinds and (value.lstrip("-").isdecimal() or str not in kinds):
        try:
            return int(value)
        except ValueError:
            raise UsageError(f"{flag} {value}: expected a number") from None
    return Path(value) if Path in kinds else value


class OptionRow(NamedTuple):
    """An option as listings show it."""

    name: str
    default: str
    choices: tuple[str, ...]
    help: str


def option_rows(kind: type) -> list[OptionRow]:
    rows = []
    for f in fields(kind):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        shown = "" if default in (None, MISSING) else str(default)
        choices = tuple(map(str, f.metadata.get(CHOICES, ())))
        rows.append(OptionRow(f.name.replace("_", "-"), shown, choices, str(f.metadata.get("help", ""))))
    return rows
