"""What a checkpoint holds beside tensors: settings, position, RNG; and the folder it is in. Two modules file the rest.

FOLDER/latest_checkpointed_iteration.txt
FOLDER/iter_0000010/        rank_files.py: mp_rank_.._..../; torch_dist.py: .metadata, *.distcp, common.pt
"""

from __future__ import annotations

import random
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from ckptconv.trainer import rank_files, torch_dist

if TYPE_CHECKING:
    from ckptconv.trainer.run import Run

LATEST = "latest_checkpointed_iteration.txt"


def save(run: Run, folder: Path) -> None:
    """Every rank takes part; the tracker is written when all is there."""
    place = folder / f"iter_{run.iteration:07d}"
    place.mkdir(parents=True, exist_ok=True)
    common = {
        "args": args(run),
        "checkpoint_version": 3.0,
        "iteration": run.iteration,
        "opt_param_scheduler": run.scheduler.state(),
        "num_floating_point_operations_so_far": 0.0,
        "rng_state": [rng_state()],
    }
    (torch_dist if run.config.training.format == "torch_dist" else rank_files).save(run, place, common)
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / LATEST).write_text(str(run.iteration))
    dist.barrier()


def load(run: Run, folder: Path, *, weights_only: bool = False) -> None:
    """Takes up the latest checkpoint of a folder, in whichever format it is: all of it, or the parameters alone."""
    place = folder / f"iter_{int((folder / LATEST).read_text()):07d}"
    saved = (torch_dist if (place / "metadata.json").exists() else rank_files).load(run, place, weights_only)
    if weights_only:
        for member in run.optimizer.members:
            member.restore([{} for _ in member.buffers], ())
        return
    run.scheduler.restore(saved["opt_param_scheduler"])
    run.iteration, run.samples = saved["iteration"], saved["args"].consumed_train_samples
    for state in saved.get("rng_state", ()):  # another layout has other generators: they begin anew
        restore_rng(state)


def args(run: Run) -> Namespace:
    """The settings by which others know what the checkpoint is, under Megatron's names."""
    config = run.config
    m, t, at, v = config.model, config.training, config.layout, config.vision
    seeing = {} if v is None else {"language_model_type": "llama", "vision_model_type": "clip", "img_h": v.image, "img_w": v.image,
                                   "patch_dim": v.patch, "disable_vision_class_token": True}  # fmt: skip
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
        data_parallel_size=run.grid.dp, world_size=dist.get_world_size(), sequence_parallel=False,
        params_dtype=t.stored, bf16=t.precision == "bf16", fp16=False, transformer_impl="local",
        use_legacy_models=False, ckpt_format=t.format, use_dist_ckpt=t.format == "torch_dist",
        use_distributed_optimizer=t.distributed_optimizer, data_parallel_random_init=False, tokenizer_type="NullTokenizer",
        iteration=run.iteration, consumed_train_samples=run.samples, consumed_valid_samples=0,
        global_batch_size=t.global_batch, micro_batch_size=t.micro_batch, seed=t.seed,
        lr=t.lr, min_lr=t.min_lr, weight_decay=t.weight_decay, clip_grad=t.clip,
        adam_beta1=t.beta1, adam_beta2=t.beta2, adam_eps=t.eps, **seeing,
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
