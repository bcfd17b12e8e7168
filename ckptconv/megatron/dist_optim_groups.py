"""What a distributed checkpoint says of its optimizer beside tensors: param groups, how many updates were made; and generators."""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Mapping as Dict
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptconv.checkpoint import TrainingState
from ckptconv.errors import FormatError
from ckptconv.megatron.optimizer import generators
from ckptconv.megatron.optimizer.agreement import agreed, check_counted
from ckptconv.megatron.optimizer.entries import chain, entries, settings_of, table

if TYPE_CHECKING:
    from ckptconv.megatron.dist_loading import Contents

OBJECT = re.compile(
    r"(?:chained_(?P<chain>\d+)\.)?optimizer\.distributed\.dp_group_idx_(?P<group>\d+)\."
    r"(?P<what>optimizer|grad_scaler|param_state|per_bucket_numel|per_bucket_numel_unpadded)/shard_0_1"
)
Saved = dict[object, object]


def training_state(contents: Contents, common: Dict[object, object], where: str) -> TrainingState:
    """From the common state, or, where the optimizer's form is by process, from the objects of all processes."""
    said = [*_in_common(common.get("optimizer"), where), *_in_objects(contents)]
    scheduler = common.get("opt_param_scheduler", common.get("lr_scheduler"))
    if not said:
        raise FormatError(where, "has tensors of the optimizer, and no param groups")
    told = [entry for saved in said for entry in entries(saved, where)]
    check_counted(told, where)
    return replace(
        agreed(told),
        experts_apart=len(chain(common.get("optimizer"))) > 1,
        scheduler=None if scheduler is None else settings_of(scheduler, "opt_param_scheduler"),
    )


def rng_shards(contents: Contents) -> generators.Shards:
    """The states of generators as a rank file has them, a list of one, in which zarr files do not wrap them once more."""
    found = {key: contents.value(key) for key in contents.objects if key.startswith("rng_state/")}
    unwrapped = {key: (alone(value, key), value) for key, value in found.items()}
    return {key: inner if isinstance(inner, list) else value for key, (inner, value) in unwrapped.items()}


def _in_common(optimizer: object, where: str) -> Iterator[Saved]:
    for saved in (table(one, where) for one in chain(optimizer) if one is not None):
        if "optimizer" in saved or "param_groups" in saved:
            yield _counted(saved, where)


def _counted(saved: Saved, where: str) -> Saved:
    """Param groups that all say the count of updates, which an optimizer that is not distributed has beside them."""
    inner = table(saved.get("optimizer", saved), where)
    step = table(inner.get("state", {}), where).get("common_step")
    groups = inner.get("param_groups")
    if step is not None and isinstance(groups, list):
        groups = [{**table(group, where), "step": step} for group in groups]
    return {**{k: v for k, v in saved.items() if k == "grad_scaler"}, "optimizer": {"param_groups": groups}}


def _in_objects(contents: Contents) -> Iterator[Saved]:
    found: dict[tuple[str, str], Saved] = {}
    for key in contents.objects:
        if (match := OBJECT.fullmatch(key)) and match["what"] in ("optimizer", "grad_scaler"):
            held = found.setdefault((match["chain"], match["group"]), {})
            held[match["what"]] = alone(contents.value(key), key)
    yield from found.values()


def alone(value: object, key: str) -> object:
    """The object in the list of one that Megatron-Core wraps it in."""
    if not isinstance(value, list) or len(value) != 1:
        raise FormatError(key, f"is a {type(value).__name__}, expected a list of one object")
    return value[0]
