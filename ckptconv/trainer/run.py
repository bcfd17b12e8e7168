"""One training run on the ranks of a process group: built, stepped, saved, resumed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ckptconv.trainer import checkpoint, data, pipeline
from ckptconv.trainer.config import Config
from ckptconv.trainer.model import Stage, initialize, named_weights
from ckptconv.trainer.optimizer import Optimizer, Scheduler
from ckptconv.trainer.parallel import Grid, Weight
from ckptconv.trainer.vlm import VisionLanguageStage

Tell = Callable[[str], object]


@dataclass
class History:
    """Loss and gradient norm of every step, the first having the number `start`."""

    start: int
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


class Run:
    """The state of training, everything of which is in a checkpoint: parameters, optimizer, scheduler, position, RNG."""

    def __init__(self, config: Config) -> None:
        self.config, self.grid, at, t = config, Grid(config), config.layout, config.training
        stages = [c * at.pp + self.grid.pp_rank for c in range(at.vpp)]
        kind = VisionLanguageStage if config.vision else Stage
        self.chunks: list[nn.Module] = [kind(self.grid, number) for number in stages]
        for chunk in self.chunks:
            initialize(chunk, self.grid)
        self.optimizer = Optimizer(self.grid, self.chunks)
        self.scheduler = Scheduler(t, self.optimizer)
        self.iteration = self.samples = 0
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(t.seed + 100 * self.grid.pp_rank)  # ranks of one stage must drop the same activations

    def weights(self) -> list[tuple[str, Weight]]:
        return [pair for chunk in self.chunks for pair in named_weights(chunk)]

    def step(self) -> tuple[float, float]:
        """One global batch; the loss and the gradient's norm, the same on all ranks."""
        t, grid = self.config.training, self.grid
        per_copy = t.global_batch // (t.micro_batch * grid.dp)
        first = [self.samples + (j * grid.dp + grid.dp_rank) * t.micro_batch for j in range(per_copy)]
        batches = [data.batch(self.config, range(n, n + t.micro_batch)) for n in first]
        loss = pipeline.run(self.chunks, grid, batches)
        dist.all_reduce(loss)
        norm = self.optimizer.step()
        self.scheduler.advance(t.global_batch)
        self.iteration += 1
        self.samples += t.global_batch
        return loss.item() / (grid.dp * grid.tp), norm


def train(
    config: Config, load: Path | None = None, save: Path | None = None, *, fresh: bool = False, tell: Tell | None = None
) -> History:
    """Trains up to the last step, from the start or a checkpoint, and saves; `fresh` takes only its parameters, for a new stage."""
    run = Run(config)
    if load is not None:
        checkpoint.load(run, load, weights_only=fresh)
    history = History(run.iteration)
    while run.iteration < config.training.steps:
        loss, norm = run.step()
        history.losses.append(loss)
        history.norms.append(norm)
        if tell and dist.get_rank() == 0:
            tell(f"step {run.iteration:4d}  loss {loss:.6f}  norm {norm:.6f}")
    if save is not None:
        checkpoint.save(run, save)
    run.grid.close()
    return history
