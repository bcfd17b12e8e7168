"""Import: stored names of all ranks to the canonical graph; every stored tensor is accounted for, or all that do not fit are listed."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Mapping as Dict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ckptconv.assemble import assemble
from ckptconv.bind import Binding, bind, take_apart
from ckptconv.checkpoint import Checkpoint, Key, Origin, Replica, Stored
from ckptconv.errors import CoverageError, FormatError
from ckptconv.tensor import Shape, Tensor
from ckptconv.topology import Rank

SUGGESTED = 20  # nearest names are looked up for so many strays: the search is quadratic


def canonicalize(stored: Stored, drop: Sequence[str] = ()) -> Checkpoint:
    """Every stored tensor taken apart into atoms, and the pieces of all ranks joined.

    `drop` lists globs of stored or canonical names to leave out on purpose.
    """
    gathered = _Gathered(stored, tuple(drop))
    for rank, tensors in stored.ranks.items():
        gathered.add_rank(rank, tensors)
    gathered.finish_assembled()
    if gathered.problems():
        raise CoverageError(
            f"the tensors do not fit {stored.mapping.name} ({stored.config.family}):",
            gathered.problems(),
            "Names a mapping does not know can be left out with --drop GLOB, or added with --mapping FILE.",
        )
    tensors = gathered.joined()
    _check_vocabulary(stored, tensors, gathered.dropped)
    origin = Origin(stored.format, stored.mapping.name, stored.variant, stored.topology)
    dropped = tuple(dict.fromkeys(gathered.dropped))
    idle = [f"--drop {glob}: no tensor is called so" for glob in drop if not any(fnmatchcase(n, glob) for n in dropped)]
    extras = replace(stored.extras, notes=(*stored.extras.notes, *idle)) if idle else stored.extras
    return Checkpoint(stored.config, tensors, origin, extras, (*stored.replicas, *gathered.replicas), dropped)


@dataclass(slots=True)
class _Pieces:
    """The pieces of one atom (or assembled tensor) so far, by offset, and where the first of each was found."""

    shape: Shape
    parts: dict[Shape, tuple[Tensor, str]]


class _Gathered:
    """What has been collected over the ranks of a stored checkpoint, and everything that was wrong."""

    def __init__(self, stored: Stored, drop: tuple[str, ...]) -> None:
        self.stored, self.drop = stored, drop
        self.atoms: dict[str, dict[str, _Pieces]] = defaultdict(dict)  # slot -> name: no Key is made for a look-up
        self.assembled: dict[tuple[Key, ...], tuple[Binding, Key, _Pieces]] = {}
        self.replicas: list[Replica] = []
        self.dropped: list[str] = []
        self.missing: dict[str, list[str]] = defaultdict(list)
        self.unexpected: dict[str, list[str]] = defaultdict(list)
        self.misshaped: list[str] = []

    def place(self, rank: Rank) -> str:
        return self.stored.places.get(rank, str(rank))

    def add_rank(self, rank: Rank, tensors: Dict[Key, Tensor]) -> None:
        mapping, where = self.stored.mapping, self.place(rank)
        left: dict[str, dict[str, tuple[Key, Tensor]]] = defaultdict(dict)  # by slot
        for key, tensor in tensors.items():
            name, slot = mapping.rename(key.name), left[key.slot]
            if name in slot:
                raise FormatError(where, f"{key} is stored twice, in an old and a new spelling")
            slot[name] = (key, tensor)
        for binding in bind(mapping, self.stored.variant, self.stored.config, self.stored.topology, rank):
            there = binding.copy
            for slot in left.values():
                if (found := slot.pop(binding.stored, None)) is not None:
                    self.add(binding, *found, where)
                    there = True
            if not there:
                self.missing[binding.stored].append(where)
        for name in dict.fromkeys(name for slot in left.values() for name in slot):
            self.add_stray(name, where)

    def add_stray(self, name: str, where: str) -> None:
        if self.stored.mapping.ignores(name) or self.is_dropped(name):
            self.dropped.append(name)
        else:
            self.unexpected[name].append(where)

    def is_dropped(self, name: str) -> bool:
        return bool(self.drop) and any(fnmatchcase(name, pattern) for pattern in self.drop)

    def add(self, binding: Binding, key: Key, tensor: Tensor, where: str) -> None:
        if tensor.shape != binding.shape:
            self.misshaped.append(f"{where}: {key} has shape {tensor.shape}, expected {binding.shape}")
        elif self.is_dropped(key.name):
            self.dropped.append(key.name)
        elif binding.box is not None:
            atoms = tuple(Key(a, key.slot) for a in binding.atoms)
            kept = self.assembled.setdefault(atoms, (binding, key, _Pieces(binding.expr.shape, {})))
            self.keep(kept[2], (binding.box[0], *(0 for _ in tensor.shape[1:])), tensor, key, where)
        else:
            self.add_atoms(binding, key, tensor, where)

    def add_atoms(self, binding: Binding, key: Key, tensor: Tensor, where: str) -> None:
        atoms = self.atoms[key.slot]
        for name, leaf, piece in take_apart(binding.expr, binding.env, tensor):
            if self.is_dropped(name):
                self.dropped.append(name)
            elif name in atoms:
                self.keep(atoms[name], leaf.offset, piece, key, where)
            else:
                atoms[name] = _Pieces(leaf.whole, {leaf.offset: (piece, where)})

    def keep(self, pieces: _Pieces, offset: Shape, tensor: Tensor, name: Key, where: str) -> None:
        """The first piece at an offset is kept; any other there must be a copy of it."""
        first = pieces.parts.get(offset)
        if first is None:
            pieces.parts[offset] = (tensor, where)
        elif first[0].shape != tensor.shape or first[0].dtype != tensor.dtype:
            self.misshaped.append(
                f"{where}: {name} is {tensor.dtype} {tensor.shape}, but {first[0].dtype} {first[0].shape} at {first[1]}"
            )
        elif first[0] != tensor:
            self.replicas.append(Replica(str(name), first[0], tensor, f"{where} against {first[1]}"))

    def finish_assembled(self) -> None:
        """Tensors that were cut after assembling are gathered first and taken apart then."""
        for binding, key, pieces in self.assembled.values():
            if (whole := self.join(key, pieces)) is not None:
                self.add_atoms(binding, key, whole, "all ranks")

    def join(self, key: Key, pieces: _Pieces) -> Tensor | None:
        if len(pieces.parts) == 1:
            ((alone, _),) = pieces.parts.values()
            if alone.shape == pieces.shape:
                return alone
        dtypes = {t.dtype for t, _ in pieces.parts.values()}
        if len(dtypes) > 1:
            self.misshaped.append(f"{key} is stored as {' and '.join(sorted(map(str, dtypes)))} on different ranks")
            return None
        try:
            return assemble(pieces.shape, [(at, t) for at, (t, _) in pieces.parts.items()])
        except ValueError as error:
            self.misshaped.append(f"{key}: the ranks do not make it whole: {error}")
            return None

    def joined(self) -> dict[Key, Tensor]:
        tensors = {}
        for slot, atoms in self.atoms.items():
            for name, pieces in atoms.items():
                key = Key(name, slot)
                if (tensor := self.join(key, pieces)) is not None:
                    tensors[key] = tensor
        if self.misshaped:
            raise CoverageError("the pieces on the ranks do not make whole tensors:", self.misshaped)
        return tensors

    def problems(self) -> list[str]:
        lines = []
        for name, places in self.missing.items():
            lines.append(f"missing: {name} ({_some(places)})")
        for i, (name, places) in enumerate(self.unexpected.items()):
            near = difflib.get_close_matches(name, self.missing, 1) if i < SUGGESTED else []
            lines.append(f"unexpected: {name} ({_some(places)})" + (f"; did you mean {near[0]}?" if near else ""))
        return lines + self.misshaped


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")


def _check_vocabulary(stored: Stored, tensors: Dict[Key, Tensor], dropped: Sequence[str]) -> None:
    """Every atom that a model of this architecture has must have come out, but for those the mapping says it has no place for."""
    gone, there = set(dropped), {key.name for key in tensors if key.slot == "param"}
    absent = [
        f"missing: {name}"
        for name, _ in stored.mapping.vocabulary.expected(stored.config)
        if name not in there
        and name not in gone
        and not stored.mapping.omits(name)
        and not _was_dropped(name, stored, gone)
    ]
    if absent:
        raise CoverageError(f"{stored.mapping.name} does not say where these parts of the model are stored:", absent)


def _was_dropped(name: str, stored: Stored, gone: set[str]) -> bool:
    """Whether the stored tensor that holds an atom was left out as a whole."""
    return bool(gone) and any(
        b.stored in gone and name in b.atoms
        for rank in stored.ranks
        for b in bind(stored.mapping, stored.variant, stored.config, stored.topology, rank)
    )
