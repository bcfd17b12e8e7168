"""Optimizer state of a distributed checkpoint: every slot under the name of its tensor, in whichever form it is stored."""

from __future__ import annotations

import re
from collections.abc import Mapping as Dict
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptconv.checkpoint import EXP_AVG, EXP_AVG_SQ, MASTER, STATE, Key, Replica, Stored
from ckptconv.dtypes import FP32
from ckptconv.errors import FormatError
from ckptconv.formats import Request
from ckptconv.mapping_files import chosen
from ckptconv.megatron import dist_optim_flat
from ckptconv.megatron.dist_keys import OPTIMIZER
from ckptconv.megatron.dist_optim_groups import OBJECT, rng_shards, training_state
from ckptconv.megatron.optimizer import generators
from ckptconv.megatron.optimizer.agreement import without_copies
from ckptconv.megatron.optimizer.members import rules
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank

if TYPE_CHECKING:
    from ckptconv.megatron.dist_loading import Contents

FILED = {"param": MASTER, "fp32_param": MASTER, EXP_AVG: EXP_AVG, EXP_AVG_SQ: EXP_AVG_SQ}
_SLOT = re.compile(rf"(?:chained_\d+\.)?optimizer\.state\.({'|'.join(FILED)})\.(?P<name>.+)")
Slots = dict[Key, Tensor]


def is_there(contents: Contents) -> bool:
    """Whether there are moments, and not param groups alone."""
    return any(OPTIMIZER.match(key) for key in (*contents.shapes, *contents.objects))


def attach(stored: Stored, contents: Contents, common: Dict[object, object], request: Request, where: str) -> Stored:
    """The checkpoint with its optimizer state."""
    _refuse_unknown(contents, where)
    extras, weights = stored.extras, stored.ranks[Rank()]
    said = extras.objects.get("args")
    args = said if isinstance(said, dict) else {}
    found, copies = by_name(contents), list[Replica]()
    if not found:
        dialects = {local: chosen("mcore-local" if local else "mcore", request.mappings) for local in (False, True)}
        found, copies = dist_optim_flat.slots(stored, contents, args, dialects)
    _refuse_incomplete(found, weights, rules(stored.config, stored.topology, args).frozen, where)
    tensors, pairs = without_copies({**weights, **found}, stored.places[Rank()])
    states = rng_shards(contents)
    objects = {**extras.objects, "state": [], **({generators.FILED: states} if states else {})}
    training = replace(training_state(contents, common, where), rng=generators.by_process(states))
    return replace(
        stored,
        ranks={Rank(): tensors},
        extras=replace(extras, training=training, objects=objects),
        replicas=(*stored.replicas, *copies, *pairs),
    )


def by_name(contents: Contents) -> Slots:
    """Slots that are whole tensors already, under names made of those of the model's."""
    filed: dict[Key, str] = {}
    for key in contents.shapes:
        if match := _SLOT.fullmatch(key):
            first = filed.setdefault(Key(match["name"], FILED[match[1]]), key)
            if first != key:
                raise FormatError(key, f"is the same slot of the same parameter as {first}, expected one of them")
    tensors = contents.tensors(list(filed.values()))
    return {slot: tensors[key] for slot, key in filed.items()}


def _refuse_unknown(contents: Contents, where: str) -> None:
    keys = [key for key in (*contents.shapes, *contents.objects) if OPTIMIZER.match(key)]
    forms = (_SLOT, dist_optim_flat.BUCKET, OBJECT)
    if unknown := [key for key in keys if not any(form.fullmatch(key) for form in forms)]:
        raise FormatError(
            where,
            f"{len(unknown)} entries of the optimizer are of a kind that is not known, such as {unknown[0]}; only Adam's state is; "
            "--optimizer drop converts the weights alone",
        )


def _refuse_incomplete(found: Slots, weights: Dict[Key, Tensor], frozen: tuple[str, ...], where: str) -> None:
    """Each weight has the same slots, but that one which is fp32 needs no master, and one which is frozen has none."""
    known = {Key(key.name, slot) for key in weights if not key.name.startswith(frozen) for slot in STATE}
    needed = {key for key in known if key.slot != MASTER or weights[Key(key.name)].dtype != FP32}
    problems = [f"missing: {key}" for key in sorted(needed - found.keys())]
    strays = sorted(found.keys() - known)
    problems += [f"of {'a frozen' if Key(key.name) in weights else 'no'} weight: {key}" for key in strays]
    if problems:
        raise FormatError(where, "the optimizer's state is not that of the model:\n  " + "\n  ".join(problems[:20]))
