"""The canonical vocabulary: the names, axes and conditions of all atoms, read from canonical.toml and from mappings that add to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ckptconv.config import AXES, TAGS, TOWERS, ModelConfig
from ckptconv.dtypes import DTYPES, DType
from ckptconv.errors import MappingError
from ckptconv.tensor import Shape

VARIABLE = re.compile(r"\{(\w+)\}")
INDEX = re.compile(r"\.\d+(?=\.|$)")
Indices = dict[str, str]  # hole of a template -> what stands there


@dataclass(frozen=True, slots=True)
class Atom:
    """A canonical tensor (or family of them, `{l}` and `{e}` standing for indices)."""

    name: str
    axes: tuple[str, ...]
    when: tuple[str, ...] = ()
    dtype: DType | None = None

    def shape(self, config: ModelConfig) -> Shape:
        return tuple(config.size(axis) for axis in self.axes)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Index variables (name -> what of ModelConfig counts their members) and atoms by template."""

    variables: dict[str, str]
    atoms: dict[str, Atom]
    _unnumbered: dict[str, Atom] = field(init=False, repr=False, compare=False)  # by name, every index a #

    def __post_init__(self) -> None:
        unnumbered = {re.sub(r"\.\{\w+\}", ".#", name): atom for name, atom in self.atoms.items()}
        object.__setattr__(self, "_unnumbered", unnumbered)

    def count(self, variable: str, config: ModelConfig) -> int:
        return int(getattr(config, self.variables[variable]))

    def expected(self, config: ModelConfig) -> Iterator[tuple[str, Atom]]:
        """Every concrete atom a model of this architecture has, those of its towers under their names."""
        for atom in self.atoms.values():
            for layer in range(self.count("l", config)) if "{l}" in atom.name else (None,):
                if all(config.has(tag, layer) for tag in atom.when):
                    for name in self._names(atom.name.replace("{l}", str(layer)), config):
                        yield name, atom
        for tower, its in config.towers.items():
            for name, atom in self.expected(its):
                yield f"{tower}.{name}", atom

    def _names(self, template: str, config: ModelConfig) -> list[str]:
        """The template with every index that it leaves open."""
        names = [template]
        for variable in VARIABLE.findall(template):
            indices = list(map(str, range(self.count(variable, config))))
            names = [name.replace(hole(variable), index) for name in names for index in indices]
        return names

    def atom_of(self, name: str) -> Atom | None:
        """The atom a concrete name belongs to."""
        first, _, rest = name.partition(".")
        return self._unnumbered.get(INDEX.sub(".#", rest if first in TOWERS else name))


def hole(variable: str) -> str:
    """How an index variable stands in a template."""
    return f"{{{variable}}}"


def filled(template: str, indices: Indices) -> str:
    """A template with these holes filled."""
    for name, index in indices.items():
        template = template.replace(name, index)
    return template


def parse_vocabulary(raw: dict[str, object], where: str) -> Vocabulary:
    """The tables `vars` and `tensors` of canonical.toml, or of a mapping's own [vocabulary]."""
    variables = {str(k): str(v) for k, v in _table(raw, "vars", where).items()}
    atoms = {}
    for name, row in _table(raw, "tensors", where).items():
        if not isinstance(row, dict) or not set(row) <= {"axes", "when", "dtype"} or "axes" not in row:
            raise MappingError(f"{where}: {name!r} must be a table with axes, and perhaps when and dtype")
        axes, when = tuple(map(str, row["axes"])), words(row.get("when", ()))
        unknown = [a for a in axes if a not in AXES] + [t for t in when if t.lstrip("!") not in TAGS]
        if unknown or row.get("dtype", "fp32") not in DTYPES:
            raise MappingError(f"{where}: {name!r} uses unknown axes, tags or dtype: {unknown or row['dtype']}")
        atoms[name] = Atom(name, axes, when, DTYPES.get(str(row.get("dtype"))))
    return Vocabulary(variables, atoms)


def words(value: object) -> tuple[str, ...]:
    """A string or a list of strings, as data files may write either."""
    return (value,) if isinstance(value, str) else tuple(map(str, value)) if isinstance(value, (list, tuple)) else ()


def _table(raw: dict[str, object], key: str, where: str) -> dict[str, object]:
    value = raw.get(key, {})
    if not isinstance(value, dict):
        raise MappingError(f"{where}: [{key}] must be a table")
    return value
