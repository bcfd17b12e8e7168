"""Topology: how many ways each dimension is cut, which layers and roles each pipeline stage has, and what a rank holds of an axis."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ckptconv.errors import TopologyError

MOST_RANKS = 1 << 18  # a table of them must fit in memory
ROLES = ("embed", "norm", "head", "head_apart")


class Rank(NamedTuple):
    """One model chunk of one process. `vpp` counts the chunks a process holds; `etp` is its place among expert-tensor ranks."""

    pp: int = 0
    tp: int = 0
    ep: int = 0
    vpp: int = 0
    etp: int = 0

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in zip(self._fields, self, strict=True) if value) or "rank 0"


class Cut(NamedTuple):
    """Entries lo..hi of an axis: part `part` of `parts` different ones."""

    lo: int
    hi: int
    part: int
    parts: int


@dataclass(frozen=True, slots=True)
class Stage:
    """A virtual pipeline stage: its layers (global numbers) and which of the model's ends it holds.

    `head_apart` marks a last stage that is not also the first: tied embeddings have a second copy there.
    """

    layers: tuple[int, ...] = ()
    roles: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Topology:
    """Degrees of parallelism and the stage table, in (vpp, pp) order: stage v*pp + p is chunk v of pipeline rank p."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    stages: tuple[Stage, ...] = ()

    def degree(self, dimension: str) -> int:
        return int(getattr(self, dimension))

    def ranks(self) -> Iterator[Rank]:
        """Every chunk of every process, each once; processes in (pp, then tensor rank) order."""
        for pp in range(self.pp):
            for tp, ep, etp in self._places():
                for vpp in range(self.vpp):
                    yield Rank(pp, tp, ep, vpp, etp)

    def processes(self) -> Iterator[tuple[int, int, int]]:
        """(pp, tp, ep) of every file of a per-rank checkpoint."""
        for pp in range(self.pp):
            for tp, ep, _ in self._places():
                yield pp, tp, ep

    def _places(self) -> list[tuple[int, int, int]]:
        """Megatron numbers the same processes twice: dense ranks by tp, expert ranks by etp, then ep."""
        places = range(self.processes_per_stage)
        return sorted({(r % self.tp, r // self.etp % self.ep, r % self.etp) for r in places})

    @property
    def processes_per_stage(self) -> int:
        return math.lcm(self.tp, self.ep * self.etp)

    def stage(self, rank: Rank) -> Stage:
        return self.stages[rank.vpp * self.pp + rank.pp]

    def check(self, layers: int) -> None:
        """The stage table must hold every layer once, and each role once."""
        for name in ("tp", "pp", "vpp", "ep", "etp"):
            if self.degree(name) < 1:
                raise TopologyError(f"{name} is {self.degree(name)}: it must be at least 1")
        if (ranks := self.pp * self.vpp * self.processes_per_stage) > MOST_RANKS:
            raise TopologyError(f"the layout has {ranks:,} ranks, the most there can be are {MOST_RANKS:,}")
        if len(self.stages) != self.pp * self.vpp:
            raise TopologyError(f"{len(self.stages)} stages were given for pp {self.pp} x vpp {self.vpp}")
        held = [layer for stage in self.stages for layer in stage.layers]
        if held != list(range(layers)):
            raise TopologyError(f"the stages hold {len(held)} layers ({held}), the model has {layers}")
        if self.tp % self.etp:
            raise TopologyError(
                f"expert tensor parallel size {self.etp} does not divide tensor parallel size {self.tp}: "
                "per-rank files have no place for such experts"
            )

    def layers_of(self, rank: Rank) -> list[tuple[int, int]]:
        """(global, local) numbers of the layers a rank holds."""
        return [(layer, local) for local, layer in enumerate(self.stage(rank).layers)]

    def dealt(self, dimension: str, count: int, rank: Rank, what: str) -> list[tuple[int, int]]:
        """(global, local) numbers of the members of an index variable that a rank holds when they are dealt in blocks."""
        n = self.degree(dimension)
        if count % n:
            raise TopologyError(f"{count} {what} cannot be dealt to {dimension} {n}: it does not divide them")
        k = count // n
        first = getattr(rank, dimension) * k
        return [(first + i, i) for i in range(k)]

    def cut(self, axis: str, dimension: str, size: int, units: int, rank: Rank, *, replicate: bool = False) -> Cut:
        """What `rank` holds of an axis of `size` entries in `units` indivisible ones, cut along `dimension`."""
        n, r = self.degree(dimension), int(getattr(rank, dimension))
        if units % n == 0:
            width = size // n
            return Cut(r * width, (r + 1) * width, r, n)
        if replicate and n % units == 0:
            part, width = r * units // n, size // units
            return Cut(part * width, (part + 1) * width, part, units)
        raise TopologyError(f"axis {axis!r} has {units} units: they cannot be cut {n} ways ({dimension} {n})")


def with_stages(topology: Topology, counts: Sequence[Sequence[int]]) -> Topology:
    """The stage table from layer counts, counts[v][p]: chunk v of pipeline rank p."""
    stages, at, last = [], 0, topology.pp * topology.vpp - 1
    for i, count in enumerate(n for chunk in counts for n in chunk):
        roles = {"embed"} if i == 0 else set()
        if i == last:
            roles |= {"norm", "head"} | ({"head_apart"} if last else set())
        stages.append(Stage(tuple(range(at, at + count)), frozenset(roles)))
        at += count
    return Topology(topology.tp, topology.pp, topology.vpp, topology.ep, topology.etp, tuple(stages))


def even_counts(layers: int, pp: int, vpp: int, first: int | None = None, last: int | None = None) -> list[list[int]]:
    """Layers per chunk as Megatron splits them: evenly, or with a first and a last stage of their own sizes."""
    middle = layers - (first or 0) - (last or 0)
    stages = pp - (first is not None) - (last is not None)
    if (
        stages < 0
        or (stages == 0 and middle)
        or (stages and middle % (stages * vpp))
        or (first or 0) % vpp
        or (last or 0) % vpp
    ):
        given = "".join(f", {name} stage {n}" for name, n in (("first", first), ("last", last)) if n is not None)
        raise TopologyError(
            f"{layers} layers do not divide over pp {pp} x vpp {vpp}{given}; give each stage's layers with --pp-layers"
        )
    row = [middle // stages // vpp] * stages if stages else []
    row = ([] if first is None else [first // vpp]) + row + ([] if last is None else [last // vpp])
    return [row] * vpp


def even(layers: int, *, tp: int = 1, pp: int = 1, vpp: int = 1, ep: int = 1, etp: int | None = None) -> Topology:
    """The usual topology: every stage the same number of layers, experts cut as the rest unless said otherwise."""
    topology = Topology(tp, pp, vpp, ep, tp if etp is None else etp)
    return with_stages(topology, even_counts(layers, pp, vpp))


def account_counts(layers: int, pp: int, vpp: int, *, embedding: bool, loss: bool) -> list[list[int]]:
    """Layers per chunk when the embedding and the loss each count as one layer of their stage."""
    total = layers + embedding + loss
    if total % (pp * vpp):
        raise TopologyError(
            f"{layers} layers with embedding and loss counted ({total}) do not divide over {pp} x {vpp}"
        )
    counts = [[total // pp // vpp] * pp for _ in range(vpp)]
    counts[0][0] -= embedding
    counts[-1][-1] -= loss
    return counts


def parse_layout(text: str, pp: int, layers: int) -> list[list[int]]:
    """Megatron's pipeline layout string: stages between `|`, E embedding, t layer, L loss, `x*n` and `(...)*n` repeat."""
    flat = text.replace(",", "").replace(" ", "")
    while group := re.search(r"\(([^()]*)\)\*(\d+)", flat):
        flat = flat[: group.start()] + group[1] * int(group[2]) + flat[group.end() :]
    flat = re.sub(r"([A-Za-z|])\*(\d+)", lambda m: m[1] * int(m[2]), flat)
    rows = flat.split("|")
    if not re.fullmatch(r"[Etm|L]*", flat) or len(rows) % pp or sum(row.count("t") for row in rows) != layers:
        raise TopologyError(f"pipeline layout {text!r} does not describe {layers} layers over pp {pp}")
    if "m" in flat or not rows[0].startswith("E") or not rows[-1].endswith("L"):
        raise TopologyError(
            f"pipeline layout {text!r}: multi-token prediction, or an embedding or loss away from the ends, is not supported"
        )
    counts = [row.count("t") for row in rows]
    return [counts[i : i + pp] for i in range(0, len(counts), pp)]
