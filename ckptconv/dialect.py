"""Telling dialects apart: which mapping, and which of its variants, gives exactly the names and shapes that are stored."""

from __future__ import annotations

import itertools
from collections.abc import Mapping as Dict
from collections.abc import Sequence

from ckptconv.bind import bind
from ckptconv.checkpoint import Key
from ckptconv.config import ModelConfig
from ckptconv.errors import CkptconvError, FormatError
from ckptconv.mapping import Mapping
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank, Topology

Dialect = tuple[Mapping, frozenset[str]]


def detect(
    candidates: Sequence[Mapping],
    config: ModelConfig,
    topology: Topology,
    ranks: Dict[Rank, Dict[Key, Tensor]],
    chosen: frozenset[str] = frozenset(),
) -> Dialect:
    """The one dialect whose table fits; `chosen` fixes variants that names cannot tell.

    When none fits exactly, the only one of which a sample is there is returned, or else the nearest, so that what does not
    fit is listed in its terms; two equally near but different ones are an error.
    """
    dialects = [(mapping, variant) for mapping in candidates for variant in variants(mapping, chosen)]
    if (only := _only_possible(dialects, config, topology, ranks)) is not None:
        return only
    scored = []
    for mapping, variant in dialects:
        table = {}
        for rank, tensors in ranks.items():
            table.update({(rank, b.stored): b for b in bind(mapping, variant, config, topology, rank)})
            if any("expert" in key.name for key in tensors) or not mapping.variants:
                break
        misfits = _misfits(mapping, table, ranks)
        if not misfits:
            return mapping, variant
        scored.append((misfits, mapping, variant, frozenset(name for _, name in table)))
    best = min(score for score, *_ in scored)
    nearest = [s for s in scored if s[0] == best]
    if len({names for *_, names in nearest}) > 1:
        forms = [f"{m.name} {' '.join(sorted(v))}" for _, m, v, _ in nearest]
        raise FormatError("the stored names", f"fit none of these dialects and two equally badly: {', '.join(forms)}")
    return nearest[0][1], nearest[0][2]


def _only_possible(
    dialects: Sequence[Dialect], config: ModelConfig, topology: Topology, ranks: Dict[Rank, Dict[Key, Tensor]]
) -> Dialect | None:
    """The dialect of which a sample of the first rank's names is there, if it is so of one alone: no other can fit.

    With experts a sample is little of the table, which it takes long to hold against all names.
    """
    if len(dialects) == 1:
        return dialects[0]
    if not config.experts:
        return None
    rank, tensors = next(iter(ranks.items()))
    possible = []
    for mapping, variant in dialects:
        stored = {mapping.rename(key.name): tensor.shape for key, tensor in tensors.items() if key.slot == "param"}
        try:
            sample = bind(mapping, variant, config, topology, rank, sample=True)
            fits = all(b.copy or stored.get(b.stored) == b.shape for b in sample)
        except (CkptconvError, ValueError):
            return None  # whether that one is ever bound is for the full look to say, which goes in order
        if fits:
            possible.append((mapping, variant))
    return possible[0] if len(possible) == 1 else None


def variants(mapping: Mapping, chosen: frozenset[str] = frozenset()) -> list[frozenset[str]]:
    """Every choice of one tag per group; a group with a chosen tag has only that."""
    groups = [[t for t in group if t in chosen] or list(group) for group in mapping.variants]
    return [frozenset(tags) for tags in itertools.product(*groups)]


def prefix_of(tag: str) -> str | None:
    """The prefix that a variant stands for, if it does."""
    _, colon, prefix = tag.partition(":")
    return prefix if colon else None


def _misfits(mapping: Mapping, table: Dict[tuple[Rank, str], object], ranks: Dict[Rank, Dict[Key, Tensor]]) -> int:
    """How many names of the ranks in the table are missing, unexpected or of another shape."""
    seen = {rank for rank, _ in table}
    stored = {
        (rank, mapping.rename(k.name)): t.shape for rank in seen for k, t in ranks[rank].items() if k.slot == "param"
    }
    wrong = 0
    for place, binding in table.items():
        shape = stored.pop(place, None)
        wrong += not binding.copy if shape is None else shape != binding.shape  # type: ignore[attr-defined]
    return wrong + sum(not mapping.ignores(name) for _, name in stored)


def fits(mapping: Mapping, variant: frozenset[str], config: ModelConfig, topology: Topology) -> CkptconvError | None:
    """Why a checkpoint of this architecture cannot be laid out so; None when it can."""
    try:
        for rank in topology.ranks():
            next(bind(mapping, variant, config, topology, rank), None)
    except CkptconvError as error:
        return error
    return None
