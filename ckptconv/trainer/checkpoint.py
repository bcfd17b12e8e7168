"""Megatron's checkpoint of one file per rank: model_optim_rng.pt, and distrib_optim.pt beside it for a distributed optimizer.

A rank's file holds its own part of everything, under names whose layer and expert numbers begin at 0 on each rank. So it can be
resumed at the layout it was saved at (the number of data-parallel copies may change); other layouts need it resharded.
"""

from __future__ import annotations

import random
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ckptconv.trainer.config import Config
from ckptconv.trainer.model import Stage
from ckptconv.trainer.optimizer import SLOTS, Member
from ckptconv.trainer.parallel import Weight

if TYPE_CHECKING:
    from ckptconv.trainer.run import Run

LATEST = "latest_checkpointed_iteration.txt"


def save(run: Run, folder: Path) -> None:
    """Writes iteration folder and tracker; every rank takes part."""
    place = folder / f"iter_{run.iteration:07d}"
    place.mkdir(parents=True, exist_ok=True)
    _save_ranks(run, place)
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / LATEST).write_text(str(run.iteration))
    dist.barrier()


def load(run: Run, folder: Path, *, weights_only: bool = False) -> None:
    """Takes up the latest checkpoint of a folder: all of it, or the parameters alone."""
    place = folder / f"iter_{int((folder / LATEST).read_text()):07d}"
    _load_ranks(run, place, weights_only)


def args(config: Config, world: int, run: Run) -> Namespace:
    """The settings by which others know what the checkpoint is, under Megatron's names."""
    m, t, at = config.model, config.training, config.layout
    return Namespace(
        num_layers=m.layers, hidden_size=m.hidden, ffn_hidden_size=m.ffn, num_attention_heads=m.heads,
        group_query_attention=True, num_query_groups=m.kv_heads, kv_channels=m.head_dim,
        max_position_embeddings=config.positions, seq_length=config.positions, position_embedding_type="rope",
        rotary_base=int(m.rope_theta), rotary_percent=1.0, use_rope_scaling=False, normalization="RMSNorm",
        norm_epsilon=m.norm_eps, swiglu=True, add_bias_linear=False, add_qkv_bias=m.qkv_bias, qk_layernorm=False,
        untie_embeddings_and_output_weights=not m.tied, hidden_dropout=m.dropout, attention_dropout=0.0,
        vocab_size=m.vocab, padded_vocab_size=m.vocab, make_vocab_size_divisible_by=1,
        num_experts=m.experts or None, moe_router_topk=m.topk, moe_ffn_hidden_size=m.ffn if m.experts else None,
        moe_grouped_gemm=False, moe_layer_freq=1, moe_router_pre_softmax=False,
        tensor_model_parallel_size=at.tp, pipeline_model_parallel_size=at.pp,
        virtual_pipeline_model_parallel_size=at.vpp if at.vpp > 1 else None,
        num_layers_per_virtual_pipeline_stage=m.layers // (at.pp * at.vpp) if at.vpp > 1 else None,
        expert_model_parallel_size=at.ep, expert_tensor_parallel_size=at.tp, context_parallel_size=1,
        data_parallel_size=world // (at.tp * at.pp), world_size=world, sequence_parallel=False,
        params_dtype=t.stored, bf16=t.precision == "bf16", fp16=False, transformer_impl="local",
        use_legacy_models=False, ckpt_format=t.format, use_dist_ckpt=t.format == "torch_dist",
        use_distributed_optimizer=t.distributed_optimizer, data_parallel_random_init=False, tokenizer_type="NullTokenizer",
        iteration=run.iteration, consumed_train_samples=run.samples, consumed_valid_samples=0,
        global_batch_size=t.global_batch, micro_batch_size=t.micro_batch, seed=t.seed,
        lr=t.lr, min_lr=t.min_lr, weight_decay=t.weight_decay, clip_grad=t.clip,
        adam_beta1=t.beta1, adam_beta2=t.beta2, adam_eps=t.eps,
    )  # fmt: skip


def rng_state() -> dict[str, object]:
    """The states of the generators. No CUDA here: its entries are there, and empty."""
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.zeros(0, dtype=torch.uint8),
        "rng_tracker_states": {},
    }


def restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])


def _rank_folder(run: Run, place: Path, ep_rank: int) -> Path:
    g = run.grid
    name = f"mp_rank_{g.tp_rank:02d}"
    name += f"_{g.pp_rank:03d}" if g.pp > 1 else ""
    return place / (name + (f"_{ep_rank:03d}" if g.ep > 1 else ""))


def _save_ranks(run: Run, place: Path) -> None:
    folder, members = _rank_folder(run, place, run.grid.ep_rank), run.optimizer.members
    flat = [_flat_state(run, m) for m in members] if members[0].distributed else []
    if run.grid.replica:
        return  # another copy writes the same
    folder.mkdir(parents=True, exist_ok=True)
    if flat:
        torch.save(_single(flat), folder / "distrib_optim.pt")
    chunks = [_parameters(run.config, c) for c in run.chunks]
    saved = {
        "args": args(run.config, dist.get_world_size(), run),
        "checkpoint_version": 3.0,
        "iteration": run.iteration,
        **({"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": c for i, c in enumerate(chunks)}),
        "optimizer": _single([_optimizer_state(run.config, m) for m in members]),
        "opt_param_scheduler": run.scheduler.state(),
        "num_floating_point_operations_so_far": 0.0,
        "rng_state": [rng_state()],
    }
    torch.save(saved, folder / "model_optim_rng.pt")


def _load_ranks(run: Run, place: Path, weights_only: bool) -> None:
    folder, members = _rank_folder(run, place, run.grid.ep_rank), run.optimizer.members
    saved = _read(run, folder / "model_optim_rng.pt")
    for i, chunk in enumerate(run.chunks):
        chunk.load_state_dict(saved["model" if len(run.chunks) == 1 else f"model{i}"])
    if weights_only:
        for member in members:
            member.reload()
        return
    states = [saved["optimizer"]] if len(members) == 1 else saved["optimizer"]
    for i, (member, state) in enumerate(zip(members, states, strict=True)):
        if (
            member.distributed
        ):  # all copies of the dense parameters, whatever their expert rank, are in the first one's file
            home = _rank_folder(run, place, run.grid.ep_rank if member.experts else 0)
            shares = torch.load(home / "distrib_optim.pt", weights_only=False)
            _restore_flat(member, shares if len(members) == 1 else shares[i], state)
        else:
            _restore_plain(run.config, member, state)
    run.scheduler.restore(saved["opt_param_scheduler"])
    run.iteration, run.samples = saved["iteration"], saved["args"].consumed_train_samples
    restore_rng(saved["rng_state"][0])


def _read(run: Run, path: Path) -> dict[str, Any]:
    """The file of this rank, if the checkpoint was saved at this layout."""
    if path.is_file():
        saved: dict[str, Any] = torch.load(path, weights_only=False)
        mine, theirs = vars(args(run.config, dist.get_world_size(), run)), vars(saved["args"])
        degrees = [k for k in mine if k.endswith("_parallel_size") and not k.startswith("data")]
        other = {k: theirs.get(k) for k in degrees if theirs.get(k) != mine[k] and k in theirs}
        if not other and mine["use_distributed_optimizer"] == theirs["use_distributed_optimizer"]:
            return saved
        raise ValueError(
            f"{path} was saved with {other or 'another optimizer'}; reshard it to {run.config.layout} first"
        )
    raise ValueError(
        f"{path} is missing; was the checkpoint saved at another layout than {run.config.layout}? Reshard it"
    )


def _single(states: list[Any]) -> Any:
    """A chain of one is filed without a list."""
    return states[0] if len(states) == 1 else states


def _parameters(config: Config, chunk: Stage) -> OrderedDict[str, Tensor | None]:
    dtype = config.training.stored
    return OrderedDict((k, v if v is None else v.detach().to(dtype, copy=True)) for k, v in chunk.state_dict().items())


def _optimizer_state(config: Config, member: Member) -> dict[str, Any]:
    """As Megatron's three optimizers have it: moments with torch's own numbering, masters in lists by group."""
    state = member.adam.state_dict()
    if member.distributed:
        groups = [
            {k: v for k, v in g.items() if k != "params"} | {"step": float(member.steps)} for g in state["param_groups"]
        ]
        return {"optimizer": {"param_groups": groups}}
    if config.training.precision != "bf16":
        return state
    masters = [[_marked(w, member.pieces[w].master) for w in weights] for weights in member.groups.values()]
    return {"optimizer": state, "fp32_from_fp16_params": masters}


def _restore_plain(config: Config, member: Member, state: dict[str, Any]) -> None:
    masters = state.get("fp32_from_fp16_params")
    adam = state["optimizer"] if masters is not None else state
    for i, weights in enumerate(member.groups.values()):
        for j, w in enumerate(weights):
            member.pieces[w].master.data.copy_(w if masters is None else masters[i][j])
    member.adam.load_state_dict(adam)
    member.steps = max((int(s["step"]) for s in adam["state"].values()), default=0)


def _marked(w: Weight, master: Tensor) -> Tensor:
    """A master with the attributes that Megatron gives to parts of tensors."""
    made = master.detach().clone()
    if w.cut is not None:
        vars(made).update(tensor_model_parallel=True, partition_dim=w.cut, partition_stride=w.pieces)
    return made


def _flat_state(run: Run, member: Member) -> dict[object, Any] | None:
    """The buffers of all owners, on the one rank that has the file: data-parallel rank 0 of this member's group."""
    dtypes = (run.config.training.stored, torch.float32)
    buffers: dict[object, Any] = {"buckets_coalesced": True}
    for i, (b, slots) in enumerate(zip(member.buffers, member.slots(), strict=True)):
        flats = {slot: b.without_padding(flat) for slot, flat in slots.items()}
        buffers[i] = {dtypes: {**flats, "numel_unpadded": len(flats["param"])}}
    return None if (run.grid.replica if member.experts else run.grid.dp_rank) else buffers


def _restore_flat(member: Member, shares: dict[object, Any], state: dict[str, Any]) -> None:
    member.steps = int(state["optimizer"]["param_groups"][0]["step"])
    for i, b in enumerate(member.buffers):
        (stored,) = shares[i].values()
        flats = {slot: b.with_padding(stored[slot]) for slot in SLOTS}
        for w in b.starts:
            member.restore(w, {slot: b.of(w, flat) for slot, flat in flats.items()}, member.steps)
