"""Optimizer state for a distributed checkpoint: its tensors under keys made of the model's, and what common.pt says of it.

The distributed optimizer's form is `fully_reshardable`, which Megatron-Core loads at any layout; the other one is that of an
optimizer that is not distributed, which all versions load so.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field

from ckptconv.checkpoint import MASTER, Key, Stored, TrainingState
from ckptconv.dtypes import FP32
from ckptconv.errors import ConfigError
from ckptconv.leaves import full
from ckptconv.megatron.optimizer import generators
from ckptconv.megatron.optimizer.members import Settings, has_decay, rules
from ckptconv.megatron.optimizer.slots import all_slots
from ckptconv.megatron.saving import carried, refuse_half_a_state
from ckptconv.megatron.versions import Core, show
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank

FULLY = "fully_reshardable"
FULLY_SINCE = (0, 15)
KEYS_SHARED_SINCE = (0, 14)  # before, keys say which optimizer of a chain they are of
SAID = {"chained_optim_avoid_prefix": True}
SAID_DISTRIBUTED = {"distrib_optim_sharding_type": FULLY, "distrib_optim_fully_reshardable_mem_efficient": False}
EXPERTS = ".experts.experts."


@dataclass(frozen=True, slots=True)
class OptimizerForm:
    """`distributed`: the optimizer that loads it is; `experts_apart`: experts have one of their own, as with expert parallelism."""

    core: Core
    distributed: bool
    experts_apart: bool

    @property
    def metadata(self) -> dict[str, object]:
        return SAID | (SAID_DISTRIBUTED if self.distributed else {})


@dataclass(frozen=True, slots=True)
class Filed:
    """What goes where: tensors and objects by key, entries of common.pt, and words of its `content_metadata`."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    objects: dict[str, object] = field(default_factory=dict)
    common: dict[object, object] = field(default_factory=dict)
    metadata: dict[str, object] = field(default_factory=dict)


def filed(stored: Stored, form: OptimizerForm) -> Filed:
    """The training state of a checkpoint, which may have none."""
    refuse_half_a_state(stored)
    training = stored.extras.training
    if training is None:
        return Filed()
    if form.distributed and form.core.version < FULLY_SINCE:
        raise ConfigError(
            f"Megatron-Core {show(form.core.version)} does not know the form {FULLY} of the distributed optimizer: give "
            f"--saver.mcore-version {show(FULLY_SINCE)} or newer, or --saver.distributed-optimizer false, or --optimizer drop"
        )
    frozen = rules(stored.config, stored.topology, carried(stored.extras)).frozen
    held = stored.ranks[Rank()]
    names = [key.name for key in held if key.slot == "param" and not key.name.startswith(frozen)]
    tensors = {key: t for name in names for key, t in _slots(held, name, form, training.updates)}
    return Filed(tensors, generators.shards(stored), _common(stored, training, form), form.metadata)


def experts_apart(stored: Stored, asked: bool | None) -> bool:
    """As asked for, else as in the source."""
    training = stored.extras.training
    source = training is not None and training.experts_apart
    return bool(stored.config.experts) and (source if asked is None else asked)


def _slots(held: Dict[Key, Tensor], name: str, form: OptimizerForm, updates: int) -> Iterator[tuple[str, Tensor]]:
    """A weight's slots by key. An fp32 weight is its own master, which only the distributed optimizer files once more."""
    master = "param" if form.distributed else "fp32_param"
    first = f"chained_{int(EXPERTS in name)}." if form.experts_apart and form.core.version < KEYS_SHARED_SINCE else ""
    for slot, tensor in all_slots(held, name, updates).items():
        if slot != MASTER or form.distributed or held[Key(name)].dtype != FP32:
            yield f"{first}optimizer.state.{master if slot == MASTER else slot}.{name}", tensor


def _common(stored: Stored, training: TrainingState, form: OptimizerForm) -> dict[object, object]:
    """The entries of common.pt."""
    chain = [_entry(stored, training, form, experts=e) for e in ((False, True) if form.experts_apart else (False,))]
    optimizer: dict[object, object] = dict(enumerate(chain)) if len(chain) > 1 else chain[0]
    return {"optimizer": optimizer, **({"opt_param_scheduler": training.scheduler} if training.scheduler else {})}


def _entry(stored: Stored, training: TrainingState, form: OptimizerForm, *, experts: bool) -> dict[object, object]:
    """One optimizer. FusedAdam, which alone corrects its bias by a setting, counts updates in groups, as all that are distributed."""
    fused = any("bias_correction" in settings for settings in training.groups)
    step: Settings = {"step": training.updates} if fused or form.distributed else {}
    groups = [
        {**settings, "is_expert_parallel": experts, **step} for settings in _groups(stored, training, experts=experts)
    ]
    scaler: dict[object, object] = {} if training.grad_scaler is None else {"grad_scaler": training.grad_scaler}
    if form.distributed:
        return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": FULLY, **scaler}
    state = {} if fused else {"common_step": full((), FP32, training.updates)}  # also 0: there are moments
    inner: dict[object, object] = {"param_groups": groups, "state": state}
    half = any(tensor.dtype != FP32 for key, tensor in stored.ranks[Rank()].items() if key.slot == "param")
    return {"optimizer": inner, **scaler} if half else inner


def _groups(stored: Stored, training: TrainingState, *, experts: bool) -> list[Settings]:
    """The kinds of param groups of these parameters: norms and biases have no weight decay, and experts have no norms."""
    settings = {has_decay(group): group for group in training.groups}
    kinds = [True, False] if not experts or stored.config.mlp_bias else [True]
    if lacking := [kind for kind in kinds if kind not in settings]:
        raise ConfigError(
            f"the optimizer has no param group {'with' if lacking[0] else 'without'} weight decay, but there are such parameters"
        )
    return [settings[kind] for kind in kinds]
