"""Training state for every process of a layout: what its rank file has beside the model, and its file of flat buffers."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ckptconv.checkpoint import EXP_AVG, Key, Stored, TrainingState
from ckptconv.dtypes import FP32, DType
from ckptconv.errors import ConfigError
from ckptconv.megatron.grid import Process
from ckptconv.megatron.optimizer import buffers, generators, lists
from ckptconv.megatron.optimizer.lists import Slot
from ckptconv.megatron.optimizer.members import Member, Settings, has_decay, rules
from ckptconv.megatron.optimizer.slots import all_slots
from ckptconv.megatron.versions import Core
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank

GROUPS_ALIGNED, GROUPS_SORTED = (0, 14), (0, 16)  # since when all ranks have all groups, and in one order
Names = Dict[Process, Sequence[Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Filing:
    """How optimizer state is filed, and for which software. `args` are the source's: settings of the run."""

    core: Core
    distributed: bool
    args: Dict[str, object] = field(default_factory=dict)


class Writer:
    """Files the training state of a checkpoint. `names`: of each process and chunk, in the order of the modules."""

    def __init__(self, stored: Stored, names: Names, filing: Filing) -> None:
        assert stored.extras.training is not None
        self.stored, self.filing = stored, filing
        self.training: TrainingState = stored.extras.training
        self.topology = stored.topology
        given = rules(stored.config, stored.topology, filing.args)
        self.members = {
            process: given.members([self.weights(process, i, chunk) for i, chunk in enumerate(chunks)])
            for process, chunks in names.items()
        }
        self.kinds = {(m.expert, m.decays) for members in self.members.values() for m in members}
        self.half = stored.config.dtype not in (None, FP32)
        self.settings = {has_decay(settings): settings for settings in self.training.groups}
        if lacking := {decays for _, decays in self.kinds} - self.settings.keys():
            raise ConfigError(
                f"the optimizer has no param group {'with' if True in lacking else 'without'} weight decay, but there are such parameters"
            )

    def weights(self, process: Process, chunk: int, names: Sequence[str]) -> dict[str, Tensor]:
        rank = self.rank(process, chunk)
        return {name: rank[Key(name)] for name in names}

    def rank(self, process: Process, chunk: int) -> Dict[Key, Tensor]:
        pp, tp, ep = process
        return self.stored.ranks[Rank(pp, tp, ep, chunk, tp % self.topology.etp)]

    def beside(self, process: Process) -> dict[object, object]:
        """The keys of the rank file. Generators are those of the source if it had the same processes."""
        chain = [self.entry(process, expert) for expert in self.chain(process)]
        saved: dict[object, object] = {"optimizer": chain if len(chain) > 1 else chain[0]}
        if self.training.scheduler is not None:
            saved["opt_param_scheduler"] = self.training.scheduler
        if generators.kept(self.stored, distributed=False):
            saved["rng_state"] = self.training.rng[process]
        return saved

    def chain(self, process: Process) -> list[bool]:
        """The optimizers of a process: of experts or not. Newer versions make one even where there are none of its parameters."""
        everywhere = self.filing.core.version >= GROUPS_ALIGNED
        experts = any(m.expert for m in self.members[process]) or (everywhere and (True, True) in self.kinds)
        return [False, True] if experts else [False]

    def entry(self, process: Process, expert: bool) -> dict[object, object]:
        groups, updates = self.groups(process, expert), self.training.updates
        saved: dict[object, object]
        if self.filing.distributed:
            saved = {"optimizer": {"param_groups": [{**group, "step": updates} for group in groups]}}
        else:
            own = self.own(process, expert)
            slots = self.slots(process, own)
            inner = lists.write(groups, own, slots, updates, fused=self.fused, moments=self.moments)
            if not self.half:
                return inner
            saved = {"optimizer": inner, "fp32_from_fp16_params": lists.masters(groups, own, slots)}
        return saved | ({} if self.training.grad_scaler is None else {"grad_scaler": self.training.grad_scaler})

    @property
    def moments(self) -> bool:
        """Whether any are stored: also after 0 updates they may be."""
        return any(key.slot == EXP_AVG for tensors in self.stored.ranks.values() for key in tensors)

    @property
    def fused(self) -> bool:
        """Whether the optimizer is FusedAdam of apex or TransformerEngine, which alone has this setting."""
        return any("bias_correction" in settings for settings in self.training.groups)

    def own(self, process: Process, expert: bool) -> list[Member]:
        return [m for m in self.members[process] if m.expert == expert]

    def groups(self, process: Process, expert: bool) -> list[Settings]:
        """The param groups in the order in which a run makes them: as its parameters come, before versions sorted them."""
        kinds = list(dict.fromkeys(m.decays for m in self.own(process, expert)))
        if self.filing.core.version >= GROUPS_ALIGNED:
            kinds += sorted({decays for e, decays in self.kinds if e == expert} - set(kinds), reverse=True)
        if self.filing.core.version >= GROUPS_SORTED:
            kinds.sort(reverse=True)
        return [{"is_expert_parallel": expert, **self.settings[decays]} for decays in kinds]

    def flat(self, process: Process) -> object:
        """The file of flat buffers; None where another process writes all of them."""
        if not self.filing.distributed:
            return None
        replicas = self.topology.processes_per_stage // self.topology.tp  # as the args of these files say
        bucket = buffers.bucket_size({**self.filing.args, "data_parallel_size": replicas}, process[0])
        parts = [
            buffers.write(own, self.slots(process, own), self.grads, bucket) if self.gathers(process, expert) else None
            for expert in self.chain(process)
            for own in [self.own(process, expert)]
        ]
        return None if not any(parts) else parts if len(parts) > 1 else parts[0]

    @property
    def grads(self) -> DType | None:
        """The dtype gradients are summed in: fp32 for bf16 unless the run says otherwise, else that of the parameters."""
        told = self.filing.args.get("accumulate_allreduce_grads_in_fp32")
        bf16 = self.stored.config.dtype is not None and self.stored.config.dtype.name == "bf16"
        return FP32 if told is True or (told is None and bf16) else None

    def gathers(self, process: Process, expert: bool) -> bool:
        """Whether a process is the first of those that hold the same parameters: that one saves the state of all."""
        t, (_, tp, ep) = self.topology, process
        number = next(i for i in range(t.processes_per_stage) if (i % t.tp, i // t.etp % t.ep) == (tp, ep))
        return number < (t.etp * t.ep if expert else t.tp)

    def slots(self, process: Process, members: Sequence[Member]) -> dict[Slot, Tensor]:
        """Every slot of these members."""
        slots: dict[Slot, Tensor] = {}
        for member in members:
            held = all_slots(self.rank(process, member.chunk), member.name, self.training.updates)
            slots |= {(member, slot): tensor for slot, tensor in held.items()}
        if unlike := sorted({f"{m.name} [{slot}] {t.dtype}" for (m, slot), t in slots.items() if t.dtype != FP32}):
            raise ConfigError(
                f"optimizer state is fp32 in these files, but {len(unlike)} tensors are not: {', '.join(unlike[:4])}"
            )
        return slots
