"""Optimizer state that the processes of one layout filed each in flat buffers of its own: every slot, as whole tensors.

Two forms of the distributed optimizer are so: `dp_reshardable` has a tensor for each bucket, `dp_zero_gather_scatter` an object
with all buffers of a process. Neither names parameters: they are found by laying out the buffers again (docs/formats/torch_dist.md).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Mapping as Dict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptconv.bind import bind
from ckptconv.canonicalize import canonicalize
from ckptconv.checkpoint import STATE, Key, Replica, Stored, Target
from ckptconv.containers.pickled import TorchDType
from ckptconv.dtypes import DType
from ckptconv.errors import FormatError
from ckptconv.localize import localize
from ckptconv.mapping import Mapping
from ckptconv.megatron.args_read import layout
from ckptconv.megatron.dist_optim_groups import OBJECT, alone
from ckptconv.megatron.grid import Process
from ckptconv.megatron.module_order import position
from ckptconv.megatron.optimizer import buffers
from ckptconv.megatron.optimizer.members import Member, Rules, rules
from ckptconv.megatron.versions import LOCAL
from ckptconv.nodes import Fill, concat
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank, Topology, with_stages

if TYPE_CHECKING:
    from ckptconv.megatron.dist_loading import Contents

BUCKET = re.compile(
    r"(?:chained_(?P<chain>\d+)\.)?optimizer\.distributed\.dp_group_idx_(?P<group>\d+)\.gbuf_idx_(?P<buffer>\d+)\."
    r"dtype_\(torch\.(?P<dtype>\w+), torch\.(?P<grads>\w+)\)\.bucket_idx_(?P<bucket>\d+)\.(?P<slot>param|exp_avg|exp_avg_sq)"
)
Buffers = dict[object, object]  # as the distributed optimizer saves those of one process
Filed = dict[tuple[bool, int], tuple[Buffers, str]]  # (of experts?, data parallel group) -> buffers, and where they lie
Slots = dict[Key, Tensor]


@dataclass(frozen=True, slots=True)
class Run:
    """The run that saved the buffers: its dialect, layout and rules. `dtypes` are those of its weights."""

    mapping: Mapping
    variant: frozenset[str]
    topology: Topology
    rules: Rules
    args: Dict[str, object]
    dtypes: Dict[str, DType]


def slots(
    stored: Stored, contents: Contents, args: Dict[str, object], dialects: Dict[bool, Mapping]
) -> tuple[Slots, list[Replica]]:
    """Every slot under the names of the whole tensors, and what ranks held more than once. `dialects`: by whether modules are local."""
    run = _run(stored, args, dialects)
    ranks: dict[str, dict[Rank, dict[Key, Tensor]]] = {slot: defaultdict(dict) for slot in STATE}
    filed = _filed(contents, run)
    for process in run.topology.processes():
        for (member, slot), tensor in _of_process(stored, run, filed, process):
            pp, tp, ep = process
            rank = Rank(pp, tp, ep, member.chunk, tp % run.topology.etp)
            ranks[slot][rank][Key(member.name)] = tensor
    found: Slots = {}
    copies: list[Replica] = []
    for slot, held in ranks.items():
        one = Stored(stored.format, run.mapping, run.variant, run.topology, stored.config, held)
        whole = canonicalize(one)
        copies += [replica._replace(name=f"{replica.name} [{slot}]") for replica in whole.replicas]
        target = Target(stored.mapping, stored.variant, stored.topology, stored.config.vocab_rows)
        ((_, tensors),) = localize(whole, target, stored.format).ranks.items()
        found |= {Key(key.name, slot): tensor for key, tensor in tensors.items()}
    return found, copies


def _run(stored: Stored, args: Dict[str, object], dialects: Dict[bool, Mapping]) -> Run:
    said = layout(args, "args")
    if said.tp is None or said.pp is None:
        raise FormatError(
            "the optimizer",
            "is filed by process, and args do not say which layout the processes had (tensor and pipeline parallel)",
        )
    topology = Topology(said.tp, said.pp, said.vpp or 1, said.ep or 1, said.etp or said.tp)
    topology = with_stages(topology, said.counts or [[stored.config.layers]])
    topology.check(stored.config.layers)
    local = args.get("transformer_impl") == LOCAL
    grouped, legacy = args.get("moe_grouped_gemm") is True, args.get("moe_use_legacy_grouped_gemm") is True
    experts = "sequential" if not grouped else "grouped" if local or legacy else "te"
    dtypes = {key.name: tensor.dtype for key, tensor in canonicalize(stored).tensors.items()}
    return Run(
        dialects[local], frozenset({f"experts_{experts}"}), topology, rules(stored.config, topology, args), args, dtypes
    )


def _of_process(
    stored: Stored, run: Run, filed: Filed, process: Process
) -> Iterator[tuple[tuple[Member, str], Tensor]]:
    pp, tp, ep = process
    t = run.topology
    members = run.rules.members([_chunk(stored, run, process, vpp) for vpp in range(t.vpp)])
    groups = {False: pp * t.tp + tp, True: (pp * t.ep + ep) * t.etp + tp % t.etp}
    for experts, group in groups.items():
        own = [member for member in members if member.expert == experts]
        if not own:
            continue
        if (experts, group) not in filed:
            what = (
                "experts" if experts else "parameters other than experts" if run.rules.experts_apart else "parameters"
            )
            raise FormatError(
                "the optimizer", f"has no state of the {what} of pp={pp} tp={tp} ep={ep} (dp_group_idx_{group})"
            )
        saved, where = filed[experts, group]
        yield from buffers.read(saved, own, buffers.bucket_size(run.args, pp), where)


def _chunk(stored: Stored, run: Run, process: Process, vpp: int) -> dict[str, Tensor]:
    """The parameters of one model chunk in the order of its modules: their shapes and dtypes."""
    pp, tp, ep = process
    rank = Rank(pp, tp, ep, vpp, tp % run.topology.etp)
    rows = bind(run.mapping, run.variant, stored.config, run.topology, rank)
    held: dict[str, Tensor] = {row.stored: Fill(row.shape, run.dtypes[row.atoms[0]]) for row in rows if not row.copy}
    return {name: held[name] for name in sorted(held, key=position)}


def _filed(contents: Contents, run: Run) -> Filed:
    found = [*_objects(contents).items(), *_buckets(contents).items()]
    known: dict[str | None, bool] = {None: False, "0": False, "1": True} if run.rules.experts_apart else {None: False}
    if unlike := sorted(str(chain) for (chain, _), _ in found if chain not in known):
        raise FormatError(
            "the optimizer", f"is a chain whose members are not known: chained_{', chained_'.join(unlike)}"
        )
    filed: Filed = {}
    for (chain, group), (saved, where) in found:
        _, first = filed.setdefault((known[chain], group), (saved, where))
        if first != where:
            raise FormatError(where, f"holds the same buffers as {first}, expected one of them")
    return filed


def _objects(contents: Contents) -> dict[tuple[str | None, int], tuple[Buffers, str]]:
    found = {}
    for key in contents.objects:
        if (match := OBJECT.fullmatch(key)) and match["what"] == "param_state":
            saved = alone(contents.value(key), key)
            if not isinstance(saved, dict):
                raise FormatError(key, f"holds a {type(saved).__name__}, expected the buffers of a process")
            found[match["chain"], int(match["group"])] = saved, key
    return found


def _buckets(contents: Contents) -> dict[tuple[str | None, int], tuple[Buffers, str]]:
    """The buckets of every buffer joined, as a process saves them in the file that is its own in other formats."""
    matches = {key: match for key in contents.shapes if (match := BUCKET.fullmatch(key))}
    tensors = contents.tensors(list(matches))
    parts: dict[tuple[str, ...], list[tuple[int, Tensor]]] = defaultdict(list)
    for key, match in matches.items():
        parts[match.group("chain", "group", "buffer", "dtype", "grads", "slot")].append(
            (int(match["bucket"]), tensors[key])
        )
    found: dict[tuple[str | None, int], tuple[Buffers, str]] = {}
    for (chain, group, buffer, dtype, grads, slot), buckets in parts.items():
        place = f"{'' if chain is None else f'chained_{chain}.'}optimizer.distributed.dp_group_idx_{group}"
        numbers, ordered = zip(*sorted(buckets, key=lambda bucket: bucket[0]), strict=True)
        if numbers != tuple(range(len(numbers))):
            raise FormatError(place, f"gbuf_idx_{buffer} has buckets {', '.join(map(str, numbers))}")
        saved, _ = found.setdefault((chain, int(group)), ({"buckets_coalesced": True}, place))
        kinds = saved.setdefault(int(buffer), {})
        assert isinstance(kinds, dict)
        kinds.setdefault((TorchDType(dtype), TorchDType(grads)), {})[slot] = concat(ordered, 0)
    return found
