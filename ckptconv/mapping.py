"""A mapping file as data: the rules saying how each stored tensor is assembled from canonical atoms, and what a dialect cuts and deals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from ckptconv.config import TAGS, TOWERS
from ckptconv.errors import MappingError
from ckptconv.ops import OPS
from ckptconv.topology import ROLES
from ckptconv.vocabulary import VARIABLE, Vocabulary, words

PARAMETERS = {
    "concat": {"axis", "groups"},
    "stack": {"over", "axis"},
    "permute": {"order"},
    "reshape": {"to"},
    "rope": {"heads"},
}
CONDITIONS = {"when", "on", "copy"}
BLOCK_KEYS = {"stored", "canonical", "when", "on", "scope", "tensors", "use", "config"}


@dataclass(frozen=True, slots=True)
class Apply:
    """An op on expressions. `over` names the index variable a stack runs over."""

    op: str
    params: dict[str, object]
    args: tuple[Expr, ...]
    over: str | None = None


Expr = str | Apply


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way a stored name is assembled, and when. A `copy` is accepted when reading and never written."""

    expr: Expr
    when: tuple[str, ...] = ()
    on: frozenset[str] = frozenset()
    copy: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A stored name (template) with its alternatives, of which at most one holds for a given model and rank.

    `scope` names the tower it speaks of: atoms, sizes and tags are that tower's.
    """

    stored: str
    alternatives: tuple[Alternative, ...]
    scope: str = ""


class Part(NamedTuple):
    """A part of a larger model whose family another section of config.json decides: `use` is a glob, `family` the one chosen."""

    scope: str
    use: str
    config: str
    family: str | None


@dataclass(frozen=True, slots=True)
class Mapping:
    """A family or dialect. `rules` stand in the dialect's parameter order; `config` is the raw table for the config codec.

    `stack` lists the variables whose members share one tensor: the rules have them as axes already. `omit` lists globs of
    atoms that the dialect has no place for, and that a file in it may lack. `prefixes` are those that all names may have.
    """

    name: str
    vocabulary: Vocabulary
    rules: tuple[Rule, ...]
    extends: str | None = None
    match: dict[str, object] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)
    cut: dict[str, str] = field(default_factory=dict)
    deal: dict[str, str] = field(default_factory=dict)
    excess: dict[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    variants: tuple[tuple[str, ...], ...] = ()
    stack: tuple[str, ...] = ()
    omit: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()

    def rename(self, name: str) -> str:
        """The current spelling of a stored name; an old one that begins with ^ stands at the beginning only, and then alone."""
        for old, new in self.aliases.items():
            if not old.startswith("^"):
                name = name.replace(old, new)
            elif name.startswith(old[1:]):
                return new + name.removeprefix(old[1:])
        return name

    def ignores(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.ignore)

    def omits(self, atom: str) -> bool:
        return any(fnmatchcase(atom, pattern) for pattern in self.omit)

    @property
    def variant_tags(self) -> frozenset[str]:
        return frozenset(tag for group in self.variants for tag in group)


def parse_rules(raw: dict[str, object], where: str, stack: Sequence[str] = ()) -> dict[str, Rule | None]:
    """The blocks of one file, stored name -> rule, stacked; None takes a parent's rule away."""
    rules: dict[str, Rule | None] = {}
    blocks = raw.get("block", [])
    if not isinstance(blocks, list):
        raise MappingError(f"{where}: blocks are written [[block]]")
    for block in blocks:
        if unknown := set(block) - BLOCK_KEYS:
            raise MappingError(f"{where}: a block has unknown keys {sorted(unknown)}; known: {sorted(BLOCK_KEYS)}")
        if "use" in block:
            if both := set(block) & {"tensors", "on"}:
                raise MappingError(f"{where}: a block that uses {block['use']!r} cannot have {sorted(both)} as well")
            continue
        for name, row in block.get("tensors", {}).items():
            written = block.get("stored", "") + name
            stored = _unnumbered(written, stack, where)
            if stored in rules:
                raise MappingError(f"{where}: {stored!r} is written twice; give alternatives as a list")
            rule = None if row is False else _rule(written, row, block, f"{where}: {written}")
            rules[stored] = rule and stacked(rule, stack, where)
    return rules


def _rule(stored: str, row: object, block: dict[str, object], where: str) -> Rule:
    rows = row if isinstance(row, list) else [row]
    if (scope := str(block.get("scope", ""))) not in ("", *TOWERS):
        raise MappingError(f"{where}: scope is {scope!r}, expected one of {', '.join(TOWERS)}")
    prefix, when, on = str(block.get("canonical", "")), named(block, "when", where), named(block, "on", where)
    alternatives = []
    for one in rows:
        conditions = {k: v for k, v in one.items() if k in CONDITIONS} if isinstance(one, dict) else {}
        body = {k: v for k, v in one.items() if k not in CONDITIONS} if isinstance(one, dict) else one
        alternatives.append(
            Alternative(
                _expr(body, prefix, where),
                (*when, *named(conditions, "when", where)),
                frozenset(named(conditions, "on", where) or on),
                bool(conditions.get("copy", False)),
            )
        )
    return Rule(stored, tuple(alternatives), scope)


def named(table: dict[str, object], key: str, where: str) -> tuple[str, ...]:
    """A name or a list of them. Anything else would otherwise count as none at all."""
    value = table.get(key, ())
    if not isinstance(value, str) and not (isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)):
        raise MappingError(f"{where}: {key} is {value!r}, expected a name or a list of names")
    return words(value)


def _expr(value: object, prefix: str, where: str) -> Expr:
    if isinstance(value, str):
        return value[1:] if value.startswith("/") else prefix + value
    if not isinstance(value, dict):
        raise MappingError(f"{where}: expected an atom's name or a table, found {value!r}")
    if stray := set(value) & CONDITIONS:
        raise MappingError(
            f"{where}: {', '.join(sorted(stray))} stands on an operand; conditions stand on the whole row"
        )
    body = dict(value)
    if set(body) == {"is"}:
        return _expr(body["is"], prefix, where)
    ops = [k for k in body if k in OPS]
    if len(ops) != 1:
        raise MappingError(f"{where}: exactly one of {', '.join(['is', *OPS])} is needed, found {sorted(body)}")
    op = ops[0]
    args = body.pop(op)
    if unknown := set(body) - PARAMETERS[op]:
        raise MappingError(f"{where}: {op} has no {sorted(unknown)}; it takes {sorted(PARAMETERS[op])}")
    over = body.pop("over", None)
    operands = tuple(_expr(a, prefix, where) for a in (args if isinstance(args, list) else [args]))
    return Apply(op, body, operands, str(over) if over is not None else None)


def atoms_of(expr: Expr) -> Iterator[str]:
    if isinstance(expr, str):
        yield expr
    else:
        for arg in expr.args:
            yield from atoms_of(arg)


def stacked_over(expr: Expr) -> Iterator[str]:
    """The variables whose members share one tensor."""
    if isinstance(expr, Apply):
        if expr.over is not None:
            yield expr.over
        for arg in expr.args:
            yield from stacked_over(arg)


def stacked(rule: Rule, variables: Sequence[str], where: str) -> Rule:
    """The rule with an axis in place of each of these variables in its name, the first one outermost."""
    alternatives = rule.alternatives
    for i, variable in enumerate(variables):
        if variable in VARIABLE.findall(rule.stored):
            alternatives = tuple(replace(a, expr=_on_axis(a.expr, variable, variables[:i])) for a in alternatives)
    return Rule(_unnumbered(rule.stored, variables, where), alternatives, rule.scope)


def _unnumbered(stored: str, variables: Sequence[str], where: str) -> str:
    """The stored name without the indices that are axes."""
    name = stored
    for variable in variables:
        name = name.replace(f".{{{variable}}}", "")
    if left := set(VARIABLE.findall(name)) & set(variables):
        raise MappingError(
            f"{where}: {stored!r} cannot be stacked over {', '.join(sorted(left))}: only an index behind a dot can be left out"
        )
    return name


def _on_axis(expr: Expr, variable: str, outer: Sequence[str]) -> Expr:
    """A stack over the variable around the expression, inside those that stand over `outer` ones."""
    if isinstance(expr, Apply) and expr.over in outer:
        return replace(expr, args=(_on_axis(expr.args[0], variable, outer),))
    return Apply("stack", {}, (expr,), variable)


def validate(mapping: Mapping) -> None:
    """Everything that can be wrong with a mapping file before it meets a model, with file and rule named."""
    tags = TAGS | mapping.variant_tags
    problems = []
    for rule in mapping.rules:
        bound = set(VARIABLE.findall(rule.stored))
        for alternative in rule.alternatives:
            problems += [f"{rule.stored}: unknown tag {t!r}" for t in alternative.when if t.lstrip("!") not in tags]
            problems += [f"{rule.stored}: unknown role {r!r}" for r in alternative.on if r not in ROLES]
            problems += [f"{rule.stored}: {p}" for p in _problems(alternative.expr, bound, mapping)]
    names = Counter(rule.stored for rule in mapping.rules)
    problems += [f"{name}: {n} rows have this name" for name, n in names.items() if n > 1]
    problems += [
        f"stack names an unknown variable {v!r}" for v in mapping.stack if v not in mapping.vocabulary.variables
    ]
    axes = {axis for atom in mapping.vocabulary.atoms.values() for axis in atom.axes}
    known = axes | {f"{tower}.{axis}" for tower in TOWERS for axis in axes}
    problems += [f"[cut] names an unknown axis {axis!r}" for axis in mapping.cut if axis not in known]
    problems += [
        f"[deal] names an unknown variable {v!r}" for v in mapping.deal if v not in mapping.vocabulary.variables
    ]
    problems += [
        f"excess of {a!r}: {v!r} is not one of assembled, replicate"
        for a, v in mapping.excess.items()
        if v not in ("assembled", "replicate")
    ]
    if problems:
        raise MappingError("\n  ".join([f"mapping {mapping.name!r} is wrong:", *problems]))


def _problems(expr: Expr, bound: set[str], mapping: Mapping) -> Iterator[str]:
    if isinstance(expr, str):
        if expr not in mapping.vocabulary.atoms:
            yield f"no atom {expr!r} in the vocabulary"
        if loose := set(VARIABLE.findall(expr)) - bound:
            yield f"{expr!r}: nothing runs over {sorted(loose)}"
        return
    if expr.over is not None and expr.over not in mapping.vocabulary.variables:
        yield f"stack over unknown variable {expr.over!r}"
    if (expr.op == "stack") != (expr.over is not None):
        yield "a stack, and only a stack, needs `over`"
    for arg in expr.args:
        yield from _problems(arg, bound | ({expr.over} if expr.over else set()), mapping)
