"""Saves a run and takes it up again: what a checkpoint holds beside tensors, and Megatron's form with one file per rank.

A rank's file holds its own part of everything, under names whose layer and expert numbers begin at 0 on each rank. So it can be
resumed at the layout it was saved at (the number of data-parallel copies may change); other layouts need it resharded.
"""

from __future__ import annotations

import random
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ckptconv.trainer import torch_dist
from ckptconv.trainer.optimizer import SLOTS, Member, Slots
from ckptconv.trainer.parallel import Weight

if TYPE_CHECKING:
    from ckptconv.trainer.run import Run

LATEST = "latest_checkpointed_iteration.txt"
LAYOUT = [f"{axis}_model_parallel_size" for axis in ("tensor", "pipeline", "virtual_pipeline", "expert")]
LAYOUT += ["use_distributed_optimizer"]  # without its layout a file of a rank cannot be resumed
GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "random_rng_state": (random.getstate, random.setstate),
    "np_rng_state": (np.random.get_state, np.random.set_state),
    "torch_rng_state": (torch.get_rng_state, torch.set_rng_state),
}


def save(run: Run, folder: Path) -> None:
    """Every rank takes part; the tracker is written when all is there."""
    place = folder / f"iter_{run.iteration:07d}"
    place.mkdir(parents=True, exist_ok=True)
    rng = {key: state() for key, (state, _) in GENERATORS.items()}
    rng |= {"cuda_rng_state": torch.zeros(0, dtype=torch.uint8), "rng_tracker_states": {}}  # of no use without CUDA
    common = {
        "args": args(run), "checkpoint_version": 3.0, "iteration": run.iteration, "opt_param_scheduler": run.scheduler.state,
        "num_floating_point_operations_so_far": 0.0, "rng_state": [rng],
    }  # fmt: skip
    (torch_dist.save if run.config.training.format == "torch_dist" else _save_ranks)(run, place, common)
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / LATEST).write_text(str(run.iteration))
    dist.barrier()


def load(run: Run, folder: Path, *, weights_only: bool = False) -> None:
    """Takes up the latest checkpoint of a folder, in whichever format it is: all of it, or the parameters alone."""
    place = folder / f"iter_{int((folder / LATEST).read_text()):07d}"
    saved = (torch_dist.load if (place / "metadata.json").exists() else _load_ranks)(run, place, weights_only)
    if weights_only:
        for member in run.optimizer.members:
            member.restore([{} for _ in member.buffers], ())
        return
    run.scheduler.restore(saved["opt_param_scheduler"])
    run.iteration, run.samples = saved["iteration"], saved["args"].consumed_train_samples
    for states in saved.get("rng_state") or ():  # another layout has other generators: they begin anew
        for key, (_, restore) in GENERATORS.items():
            restore(states[key])


def args(run: Run) -> Namespace:
    """The settings by which others know what the checkpoint is, under Megatron's names."""
    config = run.config
    m, t, at, v = config.model, config.training, config.layout, config.vision
    seeing = {} if v is None else {
        "language_model_type": "llama", "vision_model_type": None, "img_h": v.image, "img_w": v.image, "patch_dim": v.patch,
        "disable_vision_class_token": True, "freeze_LM": "language_model." in t.freeze, "freeze_ViT": "vision_model." in t.freeze,
    }  # fmt: skip
    return Namespace(
        num_layers=m.layers, hidden_size=m.hidden, ffn_hidden_size=m.ffn, num_attention_heads=m.heads,
        group_query_attention=True, num_query_groups=m.kv_heads, kv_channels=m.hidden // m.heads,
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
        data_parallel_size=run.grid.dp, world_size=dist.get_world_size(), sequence_parallel=False,
        params_dtype=t.stored, bf16=t.precision == "bf16", fp16=False, transformer_impl="local",
        use_legacy_models=False, ckpt_format=t.format, use_dist_ckpt=t.format == "torch_dist",
        use_distributed_optimizer=t.distributed_optimizer, data_parallel_random_init=False, tokenizer_type="NullTokenizer",
        iteration=run.iteration, consumed_train_samples=run.samples, consumed_valid_samples=0,
        global_batch_size=t.global_batch, micro_batch_size=t.micro_batch, seed=t.seed,
        lr=t.lr, min_lr=t.min_lr, weight_decay=t.weight_decay, clip_grad=t.clip,
        adam_beta1=t.beta1, adam_beta2=t.beta2, adam_eps=t.eps, **seeing,
    )  # fmt: skip


def _save_ranks(run: Run, place: Path, common: dict[str, Any]) -> None:
    g, members, t = run.grid, run.optimizer.members, run.config.training
    gathered = [m.gathered() for m in members]  # every rank takes part
    if g.replica:
        return  # another copy writes the same
    folder = _folder(run, place, g.ep_rank)
    folder.mkdir(parents=True, exist_ok=True)
    for key, chunk in _chunks(run):
        state = {k: v if v is None else v.detach().to(t.stored, copy=True) for k, v in chunk.state_dict().items()}
        common[key] = OrderedDict(state)
    pairs = list(zip(members, gathered, strict=True))
    if t.distributed_optimizer:  # the dense parameters of all expert ranks are in the first one's file
        common["optimizer"] = _filed([{"optimizer": {"param_groups": m.settings()}} for m in members])
        held = [_buffers(m, flats, t.stored) if m.experts or not g.ep_rank else None for m, flats in pairs]
        torch.save(_filed(held), folder / "distrib_optim.pt")
    else:
        common["optimizer"] = _filed([_lists(m, m.views(flats), t.precision == "bf16") for m, flats in pairs])
    torch.save(common, folder / "model_optim_rng.pt")


def _load_ranks(run: Run, place: Path, weights_only: bool) -> dict[str, Any]:
    """Fills the model and, unless `weights_only`, the optimizer; everything that was saved."""
    saved = _read(run, _folder(run, place, run.grid.ep_rank) / "model_optim_rng.pt")
    for key, chunk in _chunks(run):
        chunk.load_state_dict(saved[key])
    for i, m in enumerate(() if weights_only else run.optimizer.members):
        state = _chained(saved["optimizer"])[i]
        if m.distributed:
            home = _folder(run, place, run.grid.ep_rank if m.experts else 0)
            held = torch.load(home / "distrib_optim.pt", weights_only=False)
            _take_buffers(m, _chained(held)[i], state["optimizer"])
        else:
            _take_lists(m, state.get("optimizer", state), state.get("fp32_from_fp16_params", ()))
    return saved


def _filed(members: list[Any]) -> Any:
    """A chain of one is filed without a list."""
    return members[0] if len(members) == 1 else members


def _chained(filed: Any) -> list[Any]:
    return filed if isinstance(filed, list) else [filed]


def _folder(run: Run, place: Path, ep_rank: int) -> Path:
    g = run.grid
    numbers = [f"{g.tp_rank:02d}"] + [f"{g.pp_rank:03d}"] * (g.pp > 1) + [f"{ep_rank:03d}"] * (g.ep > 1)
    return place / "_".join(["mp_rank", *numbers])


def _chunks(run: Run) -> list[tuple[str, nn.Module]]:
    return [("model" if len(run.chunks) == 1 else f"model{i}", chunk) for i, chunk in enumerate(run.chunks)]


def _read(run: Run, path: Path) -> dict[str, Any]:
    """The file of this rank, if the checkpoint was saved at this layout."""
    at, sharded = run.config.layout, run.config.training.distributed_optimizer
    if not path.is_file():
        raise ValueError(f"{path} is missing: was the checkpoint saved at another layout than {at}? Then reshard it")
    saved: dict[str, Any] = torch.load(path, weights_only=False)
    had, now = ({key: vars(found)[key] for key in LAYOUT} for found in (saved["args"], args(run)))
    if had != now:
        raise ValueError(f"{path}: saved with {had}; this run is {at}, distributed optimizer {sharded}: reshard it")
    return saved


def _buffers(m: Member, flats: list[Slots], stored: torch.dtype) -> dict[object, Any]:
    held: dict[object, Any] = {"buckets_coalesced": True}
    for n, (b, slots) in enumerate(zip(m.buffers, flats, strict=True)):
        filed = {slot: flat[b.filed] for slot, flat in slots.items()}
        held[n] = {(stored, torch.float32): {**filed, "numel_unpadded": len(b.filed)}}
    return held


def _lists(m: Member, slots: dict[Weight, Slots], masters: bool) -> dict[str, Any]:
    """As Megatron's plain optimizers have it: moments under torch's own numbers, and a list of masters per group if there are any."""
    numbers, groups = {w: i for i, w in enumerate(m.params)}, m.settings()
    state = {i: {slot: slots[w][slot].clone() for slot in SLOTS[1:]} for w, i in numbers.items()}
    state = {i: {"step": torch.tensor(float(m.steps)), **moments} for i, moments in state.items()}
    for group, own in zip(groups, m.groups, strict=True):
        group["params"] = [numbers[w] for w in own["params"]]
    inner = {"state": state, "param_groups": groups}
    lists = [[_marked(w, slots[w]["param"]) for w in group["params"]] for group in m.groups]
    return {"optimizer": inner, "fp32_from_fp16_params": lists} if masters else inner


def _marked(w: Weight, master: Tensor) -> Tensor:
    """A master with the attributes that Megatron gives to parts of tensors."""
    made = master.clone()
    if w.cut is not None:
        vars(made).update(tensor_model_parallel=True, partition_dim=w.cut, partition_stride=w.pieces)
    return made


def _take_buffers(m: Member, held: dict[object, Any], state: dict[str, Any]) -> None:
    flats = m.blank(SLOTS)
    for n, (b, slots) in enumerate(zip(m.buffers, flats, strict=True)):
        (filed,) = held[n].values()
        for slot, flat in slots.items():
            flat[b.filed] = filed[slot]
    m.restore(flats, [group["step"] for group in state["param_groups"]])


def _take_lists(m: Member, state: dict[str, Any], masters: list[list[Tensor]]) -> None:
    flats, held = m.blank(SLOTS if masters else SLOTS[1:]), state["state"]
    slots = m.views(flats)
    for (n, w), slot in product(enumerate(m.params), SLOTS[1:]):
        slots[w][slot].copy_(held[n][slot])
    for w, master in zip(m.params, chain(*masters), strict=bool(masters)):
        slots[w]["param"].copy_(master)
    m.restore(flats, [float(entry["step"]) for entry in held.values()])
