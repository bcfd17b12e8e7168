"""Optimizer state for a distributed checkpoint: its tensors under keys made of the model's, and what common.pt says of it.

The distributed optimizer's form is `fully_reshardable`, which Megatron-Core loads at any layout; the other one is that of an
optimizer that is not distributed, which all versions load so.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping as Dict
from dataclasses import dataclass

from ckptconv.checkpoint import EXP_AVG, EXP_AVG_SQ, MASTER, STATE, Key, Stored, TrainingState
from ckptconv.dtypes import FP32
from ckptconv.errors import ConfigError
from ckptconv.leaves import full
from ckptconv.megatron.optimizer.members import Settings, has_decay
from ckptconv.megatron.optimizer.writing import keeps_rng
from ckptconv.megatron.saving import carried
from ckptconv.megatron.versions import Core, show
from ckptconv.nodes import Fill
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank
from ckptconv.values import Cast

FULLY = "fully_reshardable"
FULLY_SINCE = (0, 15)
KEYS_SHARED_SINCE = (0, 14)  # before, keys say which optimizer of a chain they are of
SAID = {"chained_optim_avoid_prefix": True}
SAID_DISTRIBUTED = {"distrib_optim_sharding_type": FULLY, "distrib_optim_fully_reshardable_mem_efficient": False}
EXPERTS = ".experts.experts."


@dataclass(frozen=True, slots=True)
class Filing:
    """`distributed`: the optimizer that loads it is; `experts_apart`: experts have one of their own, as with expert parallelism."""

    core: Core
    distributed: bool
    experts_apart: bool

    def check(self) -> None:
        if self.distributed and self.core.version < FULLY_SINCE:
            raise ConfigError(
                f"Megatron-Core {show(self.core.version)} does not know the form {FULLY} of the distributed optimizer: give "
                f"--saver.mcore-version {show(FULLY_SINCE)} or newer, or --saver.distributed-optimizer false, or --optimizer drop"
            )


def experts_apart(stored: Stored, asked: bool | None) -> bool:
    """As asked for, else as in the source, be it distributed or of rank files."""
    if asked is not None or not stored.config.experts:
        return bool(asked and stored.config.experts)
    known = stored.extras.objects.get("experts_apart")
    ep = carried(stored.extras).get("expert_model_parallel_size")
    return known if isinstance(known, bool) else isinstance(ep, int) and ep > 1


def tensors(held: Dict[Key, Tensor], filing: Filing) -> Iterator[tuple[str, Tensor]]:
    """Every weight's slots. An fp32 weight is its own master, and before the first update moments are zero."""
    master = "param" if filing.distributed else "fp32_param"
    for name, weight in ((key.name, tensor) for key, tensor in held.items() if key.slot == "param"):
        first = (
            f"chained_{int(EXPERTS in name)}."
            if filing.experts_apart and filing.core.version < KEYS_SHARED_SINCE
            else ""
        )
        for slot in STATE:
            if slot == MASTER and weight.dtype == FP32 and not filing.distributed:
                continue
            key = f"{first}optimizer.state.{master if slot == MASTER else slot}.{name}"
            yield key, held.get(Key(name, slot)) or _implied(slot, weight)


def _implied(slot: str, weight: Tensor) -> Tensor:
    if slot in (EXP_AVG, EXP_AVG_SQ):
        return Fill(weight.shape, FP32)
    return weight if weight.dtype == FP32 else weight.map(Cast(weight.dtype, FP32), FP32)


def common(stored: Stored, training: TrainingState, filing: Filing) -> dict[object, object]:
    """The entries of common.pt."""
    chain = [_entry(stored, training, filing, experts=e) for e in ((False, True) if filing.experts_apart else (False,))]
    optimizer: dict[object, object] = dict(enumerate(chain)) if len(chain) > 1 else chain[0]
    return {"optimizer": optimizer, **({"opt_param_scheduler": training.scheduler} if training.scheduler else {})}


def generators(stored: Stored) -> dict[str, object]:
    """The objects of random-number generators, where the layout is that of the source: one process."""
    training, topology = stored.extras.training, stored.topology
    if training is None or not keeps_rng(training, topology):
        return {}
    return {
        f"rng_state/shard_{pp}.{tp}_{topology.pp}.{topology.tp}": state for (pp, tp, _), state in training.rng.items()
    }


def _entry(stored: Stored, training: TrainingState, filing: Filing, *, experts: bool) -> dict[object, object]:
    """One optimizer. FusedAdam, which alone corrects its bias by a setting, counts updates in groups, as all that are distributed."""
    fused = any("bias_correction" in settings for settings in training.groups)
    step: Settings = {"step": training.updates} if fused or filing.distributed else {}
    groups = [
        {**settings, "is_expert_parallel": experts, **step} for settings in _groups(stored, training, experts=experts)
    ]
    scaler: dict[object, object] = {} if training.grad_scaler is None else {"grad_scaler": training.grad_scaler}
    if filing.distributed:
        return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": FULLY, **scaler}
    state = {} if fused or not training.updates else {"common_step": full((), FP32, training.updates)}
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
