"""What the weights themselves tell of an architecture: the [config.told] table of a family's mapping.

field = { stored = "name" }     a flag: whether there is a tensor of this name (a prefix may stand before it); a number: its rows
axis = 1                        entries along another axis; `stored` with {l} counts the tensors instead
per = [3, "head_dim"]           divided by these numbers and fields
square = true                   the side of what is then left
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping as Dict
from dataclasses import dataclass
from typing import Any

from ckptconv.errors import ConfigError, MappingError
from ckptconv.huggingface.config_codecs import Fields
from ckptconv.mapping import Mapping
from ckptconv.tensor import Shape

TOLD = "told"


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the table, for one field."""

    field: str
    stored: str
    axis: int = 0
    per: tuple[int | str, ...] = ()
    square: bool = False


def told(mapping: Mapping, shapes: Dict[str, Shape], known: Fields, flags: frozenset[str], where: str) -> Fields:
    """The fields that the tensors there tell; a number about which nothing is stored is not among them."""
    found: Fields = {}
    for row in _rows(mapping):
        alike = [name for name in shapes if _pattern(row.stored).fullmatch(name)]
        if row.field in flags:
            found[row.field] = bool(alike)
        elif "{l}" in row.stored and alike:
            found[row.field] = len(alike)
        elif alike:
            found[row.field] = _number(row, alike[0], shapes[alike[0]], {**known, **found}, where)
    return found


def told_fields(mapping: Mapping) -> set[str]:
    return {row.field for row in _rows(mapping)}


def _number(row: _Row, name: str, shape: Shape, known: Fields, where: str) -> int:
    parts = [known[p] if isinstance(p, str) else p for p in row.per]
    share = math.prod(int(str(part)) for part in parts)
    if len(shape) <= row.axis or not share or shape[row.axis] % share:
        said = " x ".join(
            [*(f"{p} {n}" if isinstance(p, str) else str(n) for p, n in zip(row.per, parts, strict=True))]
        )
        raise ConfigError(
            f"{where}: {name} has shape {shape}: axis {row.axis} is no multiple of {said or 1}, which {row.field} follows from"
        )
    number = shape[row.axis] // share
    side = math.isqrt(number) if row.square else number
    if row.square and side * side != number:
        raise ConfigError(f"{where}: {name} has shape {shape}: {number} is no square, whose side would be {row.field}")
    return side


def _pattern(stored: str) -> re.Pattern[str]:
    return re.compile(r"(.*\.)?" + re.escape(stored).replace(r"\{l\}", r"\d+"))


def _rows(mapping: Mapping) -> list[_Row]:
    table = mapping.config.get(TOLD, {})
    rows = []
    for field, given in table.items() if isinstance(table, dict) else ():
        entry: dict[str, Any] = dict(given) if isinstance(given, dict) else {}
        if "stored" not in entry or set(entry) - {"stored", "axis", "per", "square"}:
            raise MappingError(
                f"mapping {mapping.name!r}, [config.told] {field}: expected stored, and perhaps axis, per and square, found {given!r}"
            )
        rows.append(_Row(field, **{**entry, "per": tuple(entry.get("per", ()))}))
    return rows
