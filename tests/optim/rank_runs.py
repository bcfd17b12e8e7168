"""Runs of real Megatron-Core that save and resume rank files, in the steps of its training/checkpointing.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.judge.dist_write import Form, megatron_args
from tests.judge.fill import read_whole
from tests.judge.judge import named, rank_folder
from tests.judge.optim import PLAIN, SAVED_AT, STEPS, Run, Step, Trainer, _ranks

RANK_FILE, FLAT_FILE, NAMED = "model_optim_rng.pt", "distrib_optim.pt", "by_name.pt"


def train_and_save(run: Run, folder: Path, distributed: Path) -> list[Step]:
    """Steps of an uninterrupted run, which after SAVED_AT of them saves its state, once more as a distributed checkpoint."""
    _, whole = read_whole(run.hf, run.layout, run.divisor)
    saved, again = folder / f"iter_{SAVED_AT:07d}", distributed / f"iter_{SAVED_AT:07d}"
    again.mkdir(parents=True)

    def job() -> list[Step]:
        trainer = RankTrainer(run, whole)
        steps = [trainer.step(number) for number in range(SAVED_AT)]
        trainer.save_rank(saved / rank_folder(run.layout))
        trainer.save("fully_reshardable" if run.distributed else PLAIN, again)
        return steps + [trainer.step(number) for number in range(SAVED_AT, STEPS)]

    steps = _ranks(run.layout, job)[0]
    for place in (folder, distributed):
        (place / "latest_checkpointed_iteration.txt").write_text(str(SAVED_AT))
    return steps


def resume(run: Run, folder: Path) -> list[Step]:
    """The remaining steps of a run that goes on from `folder`; its weights are NaN until they are loaded."""

    def job() -> list[Step]:
        trainer = RankTrainer(run, None)
        trainer.load_rank(folder / f"iter_{SAVED_AT:07d}" / rank_folder(run.layout))
        return [trainer.step(number) for number in range(SAVED_AT, STEPS)]

    return _ranks(run.layout, job)[0]


class RankTrainer(Trainer):
    """One rank's part of a run that keeps rank files."""

    def save_rank(self, folder: Path) -> None:
        """Whoever holds the only copy writes; who has gathered the distributed optimizer's buffers is up to it."""
        from megatron.core import parallel_state as ps

        folder.mkdir(parents=True, exist_ok=True)
        if self.run.distributed:
            self.optimizer.save_parameter_state(str(folder / FLAT_FILE))
        if ps.get_expert_data_parallel_rank() > 0:
            return
        run = self.run
        form = Form(bf16=run.bf16, iteration=SAVED_AT, divisor=run.divisor)
        args = megatron_args(run.config, self.spec, run.layout, form)
        args.use_distributed_optimizer, args.no_save_optim, args.ckpt_format = run.distributed, False, "torch"
        state: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": SAVED_AT}
        state |= {name: chunk.state_dict_for_save_checkpoint() for name, chunk in named(self.chunks).items()}
        state["optimizer"] = self.optimizer.state_dict()
        state["opt_param_scheduler"] = self.scheduler.state_dict()
        torch.save(state, folder / RANK_FILE)
        torch.save(self.by_name(), folder / NAMED)

    def by_name(self) -> dict[str, dict[str, torch.Tensor]]:
        """Slots under the names of their parameters, as this Megatron-Core knows them; not of optimizers that are distributed."""
        held = {p: state for o in self.optimizer.chained_optimizers for p, state in o.optimizer.state.items()}
        named_parameters = [
            (f"{chunk}.{name}", parameter)
            for chunk, module in named(self.chunks).items()
            for name, parameter in module.named_parameters()
        ]
        mains = [(name, p if p.dtype == torch.float32 else p.main_param) for name, p in named_parameters]
        return {} if self.run.distributed else {name: {"master": main, **held[main]} for name, main in mains}

    def load_rank(self, folder: Path) -> None:
        state = torch.load(folder / RANK_FILE, weights_only=False)
        with torch.no_grad():
            for name, chunk in named(self.chunks).items():
                chunk.load_state_dict(state[name], strict=True)
            self.optimizer.load_state_dict(state["optimizer"])
            if self.run.distributed:
                self.optimizer.load_parameter_state(str(folder / FLAT_FILE))
        for optimizer in self.optimizer.chained_optimizers:
            for moments in optimizer.optimizer.state.values():
                moments["step"] = moments["step"].clone()  # else one tensor for all, which each of them counts up
        self.scheduler.load_state_dict(state["opt_param_scheduler"])
