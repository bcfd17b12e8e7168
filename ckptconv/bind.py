"""Binding: a mapping met with a model, a layout and a rank becomes the finite table of stored names and how each is assembled.

Export and import walk this one table in opposite directions; no name is ever matched by a pattern.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ckptconv.config import ModelConfig, units
from ckptconv.errors import MappingError, TopologyError
from ckptconv.mapping import Alternative, Apply, Expr, Mapping, Rule, atoms_of, stacked_over
from ckptconv.ops import OPS, Op
from ckptconv.tensor import Shape, Tensor
from ckptconv.topology import Cut, Rank, Stage, Topology
from ckptconv.vocabulary import VARIABLE, Indices, filled, hole

Box = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Leaf:
    """An atom (template) and this rank's part of it: `offset` and `shape` inside `whole`."""

    atom: str
    offset: Shape
    shape: Shape
    whole: Shape

    def pick(self, tensor: Tensor) -> Tensor:
        if tensor.shape == self.shape == self.whole:
            return tensor
        for axis, (lo, n) in enumerate(zip(self.offset, self.shape, strict=True)):
            tensor = tensor.narrow(axis, lo, lo + n)
        return tensor


@dataclass(frozen=True, slots=True)
class Node:
    """An op with everything known but the index variables of its atoms.

    A stack has one argument, which stands for as many operands as `over` has values of its variable.
    """

    op: Op
    args: tuple[Node | Leaf, ...]
    shape: Shape
    over: tuple[Indices, ...] = ()

    def operands(self, env: Indices) -> list[tuple[Node | Leaf, Indices]]:
        """Each operand with the indices of its atoms."""
        if self.over:
            return [(self.args[0], env | value) for value in self.over]
        return [(arg, env) for arg in self.args]


@dataclass(slots=True)  # frozen ones take four times as long to make, and there is one for each stored tensor
class Binding:
    """One row of the table. `box`: the rows of the assembled tensor this rank holds, where a dialect cuts after assembling."""

    stored: str
    expr: Node | Leaf
    env: Indices
    copy: bool = False
    box: Box | None = None

    @property
    def shape(self) -> Shape:
        return self.expr.shape if self.box is None else (self.box[1] - self.box[0], *self.expr.shape[1:])

    @property
    def atoms(self) -> list[str]:
        return list(_atoms(self.expr, self.env))


def _atoms(expr: Node | Leaf, env: Indices) -> Iterator[str]:
    if isinstance(expr, Leaf):
        yield filled(expr.atom, env)
    else:
        for arg, inner in expr.operands(env):
            yield from _atoms(arg, inner)


def put_together(expr: Node | Leaf, env: Indices, get: Callable[[str], Tensor]) -> Tensor:
    """The expression applied to the cut atoms."""
    if isinstance(expr, Leaf):
        return expr.pick(get(filled(expr.atom, env)))
    return expr.op.forward([put_together(arg, inner, get) for arg, inner in expr.operands(env)])


def take_apart(expr: Node | Leaf, env: Indices, whole: Tensor) -> list[tuple[str, Leaf, Tensor]]:
    """(atom, where, piece) of every atom in an assembled tensor: the inverse, walked from the root."""
    if isinstance(expr, Leaf):
        return [(filled(expr.atom, env), expr, whole)]
    operands = expr.operands(env)
    pieces = expr.op.inverse(whole, [arg.shape for arg, _ in operands])
    rows = zip(operands, pieces, strict=True)
    return [found for (arg, inner), piece in rows for found in take_apart(arg, inner, piece)]


def bind(
    mapping: Mapping,
    variant: frozenset[str],
    config: ModelConfig,
    topology: Topology,
    rank: Rank,
    *,
    sample: bool = False,
) -> Iterator[Binding]:
    """The table of one rank: rows that share an index variable run index by index, as a module tree does.

    `sample`: of the rows that one rule has at an index of its first variable, the first.
    """
    if not (mapping.cut or mapping.deal) and topology.pp * topology.vpp * topology.processes_per_stage > 1:
        degrees = ", ".join(f"{name} {topology.degree(name)}" for name in ("tp", "pp", "vpp", "ep", "etp"))
        raise TopologyError(f"{mapping.name} holds whole tensors: they cannot be laid out over ranks ({degrees})")
    binders = {"": _Binder(mapping, variant, config, topology, rank)}
    if "embed" in topology.stage(rank).roles:
        binders |= {
            name: _tower(mapping, variant, name, tower, topology, rank) for name, tower in config.towers.items()
        }
    for (scope, variable), rules in itertools.groupby(mapping.rules, _block_of):
        if (binder := binders.get(scope)) is None:
            continue
        compiled = [c for rule in rules if (c := binder.compile(rule)) is not None]
        for values in binder.domain(variable) if variable else [(0, 0)]:
            for row in compiled:
                rows = binder.rows(row, variable, values)
                yield from itertools.islice(rows, 1) if sample else rows


def _block_of(rule: Rule) -> tuple[str, str]:
    """Consecutive rules of one tower with the same first index variable run index by index."""
    return rule.scope, (VARIABLE.findall(rule.stored) or [""])[0]


def _tower(
    mapping: Mapping, variant: frozenset[str], name: str, config: ModelConfig, topology: Topology, rank: Rank
) -> _Binder:
    """The binder of a tower: it stands whole on the first stage, cut as its own dialect says but not dealt."""
    whole = Stage(tuple(range(config.layers)), frozenset({"embed", "norm", "head"}))
    return _Binder(mapping, variant, config, Topology(tp=topology.tp, stages=(whole,)), Rank(tp=rank.tp), f"{name}.")


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A rule whose whole-model conditions hold; each alternative keeps the tags that depend on the layer."""

    rule: Rule
    variables: tuple[str, ...]
    alternatives: tuple[tuple[Alternative, tuple[str, ...]], ...]


class _Binder:
    """Binds the rules of one rank; what does not depend on the index is worked out once."""

    def __init__(
        self,
        mapping: Mapping,
        variant: frozenset[str],
        config: ModelConfig,
        topology: Topology,
        rank: Rank,
        prefix: str = "",
    ) -> None:
        self.mapping, self.variant, self.config, self.topology, self.rank = mapping, variant, config, topology, rank
        self.prefix = prefix  # of the names of atoms, and of axes in the tables that say how they are cut
        self.roles = topology.stage(rank).roles
        self.variant_tags = mapping.variant_tags
        self.cuts: dict[tuple[str, bool], Cut] = {}
        self.domains: dict[str, list[tuple[int, int]]] = {}
        self.combined: dict[tuple[str, ...], list[tuple[Indices, Indices]]] = {}
        self.built: dict[tuple[str, int], tuple[Node | Leaf, Box | None]] = {}

    def has(self, tag: str, layer: int | None) -> bool:
        bare = tag.lstrip("!")
        if bare in self.variant_tags:
            return (bare in self.variant) != tag.startswith("!")
        return self.config.has(tag, layer)

    def compile(self, rule: Rule) -> _Compiled | None:
        """The rule without what cannot hold on this rank; None when nothing can."""
        variables = tuple(dict.fromkeys(VARIABLE.findall(rule.stored)))
        kept = []
        for alternative in rule.alternatives:
            if alternative.on and not alternative.on & self.roles:
                continue
            by_layer = tuple(t for t in alternative.when if "l" in variables and t.lstrip("!") in ("dense", "moe"))
            if all(self.has(t, None) for t in alternative.when if t not in by_layer):
                self.check_layers_alike(rule.stored, alternative)
                kept.append((alternative, by_layer))
        return _Compiled(rule, variables, tuple(kept)) if kept else None

    def check_layers_alike(self, stored: str, alternative: Alternative) -> None:
        """A tensor that all layers share needs them all to be of its kind."""
        if "l" not in stacked_over(alternative.expr):
            return
        count = self.config.layers
        for tag in alternative.when:
            fitting = sum(self.has(tag, layer) for layer in range(count))
            if fitting < count:
                raise MappingError(
                    f"{self.mapping.name}: {stored} has one axis for all {count} layers, but only {fitting} of them are {tag}: "
                    "such a model needs its layers separate (--saver.layers separate)"
                )

    def rows(self, row: _Compiled, variable: str, values: tuple[int, int]) -> Iterator[Binding]:
        """The rows of one rule at one index of its first variable (which is the layer, if it has one)."""
        index, local = values
        layer = index if variable == "l" else None
        holding = [a for a, tags in row.alternatives if all(self.has(t, layer) for t in tags)]
        if len(holding) > 1:
            raise MappingError(
                f"mapping {self.mapping.name!r}: {row.rule.stored!r} has two alternatives that hold at once"
            )
        if not holding:
            return
        expr, box = self.expression(row.rule, holding[0])
        stored, copy = row.rule.stored, holding[0].copy
        if not variable:
            yield Binding(stored, expr, {}, copy, box)
            return
        first = hole(variable)
        stored, outer = stored.replace(first, str(local)), {first: str(index)}
        for ours, theirs in self.combinations(row.variables[1:]):
            yield Binding(filled(stored, theirs), expr, outer | ours, copy, box)

    def combinations(self, variables: tuple[str, ...]) -> list[tuple[Indices, Indices]]:
        """Every choice of an index for each variable: the global ones, and those that this rank stores them under."""
        if variables not in self.combined:
            holes = [hole(v) for v in variables]
            choices = itertools.product(*(self.domain(v) for v in variables))
            self.combined[variables] = [
                (
                    {name: str(i) for name, (i, _) in zip(holes, pairs, strict=True)},
                    {name: str(j) for name, (_, j) in zip(holes, pairs, strict=True)},
                )
                for pairs in choices
            ]
        return self.combined[variables]

    def expression(self, rule: Rule, alternative: Alternative) -> tuple[Node | Leaf, Box | None]:
        key = (rule.stored, rule.alternatives.index(alternative))
        if key not in self.built:
            try:
                self.built[key] = self.build(alternative.expr)
            except (ValueError, TopologyError) as error:
                raise type(error)(f"{self.mapping.name}: {rule.stored} on {self.rank}: {error}") from None
        return self.built[key]

    def build(self, expr: Expr) -> tuple[Node | Leaf, Box | None]:
        if isinstance(expr, str) or not self.exceeds(expr):
            return self.node(expr, whole=False), None
        node = self.node(expr, whole=True)
        rows, n = node.shape[0], self.topology.tp
        if rows % n:
            raise TopologyError(f"{rows} assembled rows cannot be cut {n} ways (tp {n})")
        return node, (rows // n * self.rank.tp, rows // n * (self.rank.tp + 1))

    def exceeds(self, expr: Expr) -> bool:
        """Whether a dimension has more ranks than an axis of the expression has units, and the dialect then cuts the assembled rows."""
        axes = {axis for atom in atoms_of(expr) for axis in self.mapping.vocabulary.atoms[atom].axes}
        return any(
            self.mapping.excess.get(self.prefix + axis) == "assembled"
            and (dimension := self.mapping.cut.get(self.prefix + axis)) is not None
            and self.topology.degree(dimension) > units(self.config, axis)
            for axis in axes
        )

    def node(self, expr: Expr, *, whole: bool) -> Node | Leaf:
        if isinstance(expr, str):
            return self.leaf(expr, whole=whole)
        args = tuple(self.node(arg, whole=whole) for arg in expr.args)
        op = OPS[expr.op](**self.params(expr, whole=whole))
        if expr.over is None:
            return Node(op, args, op.shape([arg.shape for arg in args]))
        over = tuple({hole(expr.over): str(index)} for index, _ in self.domain(expr.over))
        return Node(op, args, op.shape([args[0].shape] * len(over)), over)

    def leaf(self, template: str, *, whole: bool) -> Leaf:
        axes = self.mapping.vocabulary.atoms[template].axes
        cuts = [self.cut(axis, whole=whole) for axis in axes]
        return Leaf(
            self.prefix + template,
            tuple(c.lo for c in cuts),
            tuple(c.hi - c.lo for c in cuts),
            tuple(self.config.size(axis) for axis in axes),
        )

    def params(self, expr: Apply, *, whole: bool) -> dict[str, object]:
        """Axis names in an op's parameters become this rank's numbers."""
        params = dict(expr.params)
        for name in ("groups", "heads"):
            if isinstance(axis := params.get(name), str):
                params[name] = self.groups(axis, whole=whole)
        if isinstance(to := params.get("to"), list):
            params["to"] = tuple(self.local(n, whole=whole) if isinstance(n, str) else int(n) for n in to)
        if isinstance(order := params.get("order"), list):
            params["order"] = tuple(order)
        return params

    def local(self, axis: str, *, whole: bool) -> int:
        cut = self.cut(axis, whole=whole)
        return cut.hi - cut.lo

    def groups(self, axis: str, *, whole: bool) -> int:
        """Local units of an axis; `<axis>_rows` makes every entry a group of its own."""
        if axis.endswith("_rows"):
            return self.local(axis.removesuffix("_rows"), whole=whole)
        return self.local(axis, whole=whole) * units(self.config, axis) // self.config.size(axis)

    def cut(self, axis: str, *, whole: bool) -> Cut:
        if (axis, whole) not in self.cuts:
            dimension, size = self.mapping.cut.get(self.prefix + axis), self.config.size(axis)
            if whole or dimension is None:
                self.cuts[axis, whole] = Cut(0, size, 0, 1)
            else:
                replicate = self.mapping.excess.get(self.prefix + axis) == "replicate"
                count = units(self.config, axis)
                self.cuts[axis, whole] = self.topology.cut(axis, dimension, size, count, self.rank, replicate=replicate)
        return self.cuts[axis, whole]

    def domain(self, variable: str) -> list[tuple[int, int]]:
        """(global, local) indices of a variable on this rank."""
        if variable not in self.domains:
            self.domains[variable] = self._domain(variable)
        return self.domains[variable]

    def _domain(self, variable: str) -> list[tuple[int, int]]:
        dimension = self.mapping.deal.get(variable)
        count = self.mapping.vocabulary.count(variable, self.config)
        if dimension is None:
            return [(i, i) for i in range(count)]
        if variable == "l":
            return self.topology.layers_of(self.rank)
        return self.topology.dealt(dimension, count, self.rank, self.mapping.vocabulary.variables[variable])
