"""Megatron-Core trains on a CPU: steps by its own optimizers, their states saved in every form it has, and runs that go on from one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.judge.dist import State, read_common
from tests.judge.dist_write import Form, megatron_args, rng_state
from tests.judge.fill import Tensors, filled, read_whole
from tests.judge.judge import iteration_folder, named
from tests.judge.models import build
from tests.judge.optim_patches import prepare_training
from tests.judge.patches import prepare
from tests.judge.ranks import Layout, run_ranks
from tests.judge.spec import spec_from_hf

BATCHES, ROWS, LENGTH = 4, 2, 16  # per step, whatever the layout; sentences in each; words in each of those
SAVED_AT = 2  # steps before the save
STEPS = 4  # steps of a whole run
PLAIN = "plain"  # the form that an optimizer which is not distributed has
OLD = "fully_sharded_model_space"  # that of a distributed one before 0.13, when checkpoints did not name it

Step = tuple[float, float]  # the loss, and the norm of the gradient


@dataclass(frozen=True)
class Run:
    """A model in training. `distributed`: the optimizer is, over data parallel ranks.

    `rows` of padding count in the loss, so every layout pads the vocabulary to a multiple of the same number.
    """

    hf: Path
    layout: Layout = field(default_factory=Layout)
    bf16: bool = True
    distributed: bool = True
    rows: int = 256
    backend: str = "torch_dist"

    @property
    def divisor(self) -> int:
        return self.rows // self.layout.tp

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.hf / "config.json").read_text())
        return found


def train_and_save(run: Run, places: Mapping[str, Path]) -> list[Step]:
    """Steps of an uninterrupted run, which after SAVED_AT of them saves its state in each form (a sharding type, or PLAIN)."""
    _, whole = read_whole(run.hf, run.layout, run.divisor)
    folders = {form: place / f"iter_{SAVED_AT:07d}" for form, place in places.items()}
    for folder in folders.values():
        folder.mkdir(parents=True)

    def job() -> list[Step]:
        trainer = Trainer(run, whole)
        steps = [trainer.step(number) for number in range(SAVED_AT)]
        for form, folder in folders.items():
            trainer.save(form, folder)
        return steps + [trainer.step(number) for number in range(SAVED_AT, STEPS)]

    answers = _ranks(run.layout, job)
    for place in places.values():
        (place / "latest_checkpointed_iteration.txt").write_text(str(SAVED_AT))
    return answers[0]


def resume(run: Run, folder: Path) -> list[Step]:
    """The remaining steps of a run that goes on from the checkpoint in `folder`; its weights are NaN until they are loaded."""
    saved = iteration_folder(folder)

    def job() -> list[Step]:
        trainer = Trainer(run, None)
        trainer.load(saved)
        return [trainer.step(number) for number in range(SAVED_AT, STEPS)]

    return _ranks(run.layout, job)[0]


def generators(layout: Layout, folder: Path) -> list[Any]:
    """What each rank would set its random-number generators to, as Megatron-Core reads it."""
    saved = iteration_folder(folder)

    def job() -> Any:
        from megatron.core import dist_checkpointing

        (states,) = dist_checkpointing.load({"rng_state": rng_state()}, str(saved))["rng_state"]
        return {k: v.tolist() if isinstance(v, torch.Tensor) else pickle.dumps(v) for k, v in states.items()}

    return run_ranks(layout, job)


def _ranks(layout: Layout, job: Any) -> list[list[Step]]:
    prepare()
    import megatron.core.distributed
    import megatron.core.optimizer
    import megatron.core.optimizer_param_scheduler
    import megatron.core.pipeline_parallel  # noqa: F401 (before the fork: it takes seconds)

    def trained() -> list[Step]:
        prepare_training()
        with torch.enable_grad():
            steps: list[Step] = job()
        return steps

    answers = run_ranks(layout, trained)
    assert all(str(answer) == str(answers[0]) for answer in answers)  # in words, for NaN equals nothing
    return answers


class Trainer:
    """One rank's part of a run."""

    def __init__(self, run: Run, whole: Tensors | None) -> None:
        self.run = run
        self.spec = replace(spec_from_hf(run.config, run.layout.tp, run.divisor), bf16=run.bf16)
        with torch.no_grad():
            self.chunks = filled(self.spec, run.layout, whole) if whole else build(self.spec, run.layout)
        self.wrapped, self.optimizer, self.scheduler = _wrapped(run, self.chunks)

    def step(self, number: int) -> Step:
        from megatron.core import parallel_state as ps
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        rank, ranks = ps.get_data_parallel_rank(), ps.get_data_parallel_world_size()
        mine = list(self.batches(number))[rank::ranks]
        losses = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=[iter(mine) for _ in self.wrapped] if len(self.wrapped) > 1 else iter(mine),
            model=self.wrapped,
            num_microbatches=len(mine),
            seq_length=LENGTH,
            micro_batch_size=ROWS,
            forward_only=False,
        )
        _, norm, _ = self.optimizer.step()
        self.scheduler.step(increment=BATCHES * ROWS)
        return _agreed_loss(losses), float(norm)

    def batches(self, number: int) -> Iterator[torch.Tensor]:
        """The sentences of a step: the same for every layout."""
        generator = torch.Generator().manual_seed(100 + number)
        for _ in range(BATCHES):
            yield torch.randint(0, self.run.config["vocab_size"], (ROWS, LENGTH + 1), generator=generator)

    def save(self, form: str, folder: Path) -> None:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy

        said = metadata(form)
        args = megatron_args(
            self.run.config,
            self.spec,
            self.run.layout,
            Form(bf16=self.run.bf16, iteration=SAVED_AT, divisor=self.run.divisor, backend=self.run.backend),
        )
        args.use_distributed_optimizer, args.no_save_optim = form != PLAIN, False
        args.transformer_impl = (
            "local"  # flat buffers are in the order of the modules, whatever their tensors are called
        )
        beside: State = {"args": args, "checkpoint_version": 3.0, "iteration": SAVED_AT, "rng_state": rng_state()}
        beside["opt_param_scheduler"] = self.scheduler.state_dict()
        state = {**self.state(said, loading=False), **beside}
        strategy = get_default_save_sharded_strategy(self.run.backend)
        dist_checkpointing.save(state, str(folder), strategy, **({"content_metadata": said} if _tells() else {}))

    def load(self, saved: Path) -> None:
        """Into the form that the checkpoint says it has, as Megatron's training code does."""
        from megatron.core import dist_checkpointing

        common = read_common(saved)
        for optimizer in self.optimizer.chained_optimizers if self.run.distributed else ():
            optimizer._init_optimizer_states_with_dummy_values()  # for torch's AdamW, which else has no step to restore
        said = common.get("content_metadata") or metadata(OLD)
        state = dist_checkpointing.load(self.state(said, loading=True), str(saved))
        with torch.no_grad():
            for name, chunk in named(self.chunks).items():
                chunk.load_state_dict(state[name])
            self.optimizer.load_state_dict(state["optimizer"])
        for optimizer in self.optimizer.chained_optimizers:
            for moments in optimizer.optimizer.state.values():
                moments["step"] = moments["step"].clone()  # else one tensor for all, which each of them counts up
        self.scheduler.load_state_dict(common["opt_param_scheduler"])

    def state(self, said: State, *, loading: bool) -> State:
        """Models and optimizer as Megatron-Core shards them."""
        from megatron.core import parallel_state as ps

        told = {**said, "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
        state: State = {name: chunk.sharded_state_dict(metadata=told) for name, chunk in named(self.chunks).items()}
        form: dict[str, Any] = {"metadata": told} if _tells() else {}  # 0.12 has but one unless told otherwise
        return {**state, "optimizer": self.optimizer.sharded_state_dict(state, is_loading=loading, **form)}


def _tells() -> bool:
    """Whether this Megatron-Core says in a checkpoint how it names and cuts tensors: since 0.13."""
    from megatron.core import dist_checkpointing

    return hasattr(dist_checkpointing, "load_content_metadata")


def metadata(form: str) -> State:
    """What a run says of how it names and cuts tensors, for this form of optimizer state."""
    said: State = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if form == "fully_reshardable":
        said["distrib_optim_fully_reshardable_mem_efficient"] = False
    return said if form == PLAIN else {**said, "distrib_optim_sharding_type": form}


def _wrapped(run: Run, chunks: list[Any]) -> tuple[list[Any], Any, Any]:
    """The chunks made ready for training, their optimizer and its scheduler."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    config = chunks[0].config
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    config.finalize_model_grads_func = finalize_model_grads
    config.overlap_p2p_comm, config.batch_p2p_comm = (
        bool(run.layout.vpp),
        not run.layout.vpp,
    )  # else 2 stages mix up messages
    sharing = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=run.distributed)
    wrapped = [DistributedDataParallel(config, sharing, chunk.to(dtype).train()) for chunk in chunks]
    adam = OptimizerConfig(
        optimizer="adam", lr=1e-3, min_lr=1e-4, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, clip_grad=1.0,
        bf16=run.bf16, params_dtype=dtype, use_distributed_optimizer=run.distributed,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(adam, wrapped)
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=1e-3, min_lr=1e-4, lr_warmup_steps=2, lr_decay_steps=10, lr_decay_style="cosine",
        start_wd=0.1, end_wd=0.1, wd_incr_steps=10, wd_incr_style="constant",
    )  # fmt: skip
    return wrapped, optimizer, scheduler


def _forward(batches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    words = next(batches)
    places = torch.arange(LENGTH)[None].expand(ROWS, -1)
    out = model(words[:, :-1].contiguous(), places, None, labels=words[:, 1:].contiguous())

    def loss(out: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mean = out.float().mean()
        return mean, {"loss": mean.detach().clone()}

    return out, loss


def _agreed_loss(losses: list[dict[str, torch.Tensor]]) -> float:
    """The mean over all batches, which the ranks of the last stage know, told to all."""
    from megatron.core import parallel_state as ps

    mean = torch.stack([found["loss"] for found in losses]).mean() if losses else torch.zeros(())
    if losses:
        dist.all_reduce(mean, group=ps.get_data_parallel_group())
        mean /= ps.get_data_parallel_world_size()
    told = [mean.item()]
    last, group = ps.get_pipeline_model_parallel_last_rank(), ps.get_pipeline_model_parallel_group()
    dist.broadcast_object_list(told, last, group=group)
    return told[0]
