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
from ckptconv.trainer.parallel import Grid
from ckptconv.trainer.vlm import VisionLanguageStage

Report = Callable[[int, float, float], None]


@dataclass
class History:
    """Loss and gradient norm of every step, the first having the number `start`."""

    start: int
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


class Run:
    """The state of training, everything of which is in a checkpoint: parameters, optimizer, scheduler, position, RNG."""

    def __init__(self, config: Config) -> None:
        self.config, self.grid = config, Grid(config)
        at, t = config.layout, config.training
        self.chunks = [build(self.grid, c * at.pp + self.grid.pp_rank) for c in range(at.vpp)]
        self.optimizer = Optimizer(self.grid, self.chunks)
        self.scheduler = Scheduler(t, self.optimizer)
        self.iteration = self.samples = 0
        self._seed(t.seed + 100 * self.grid.pp_rank)

    @staticmethod
    def _seed(seed: int) -> None:
        """Ranks of one stage draw alike, as they must: they drop the same activations."""
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

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


def build(grid: Grid, number: int) -> nn.Module:
    """Virtual stage `number`, started from the seed, with what is frozen frozen."""
    vision, t = grid.config.vision, grid.config.training
    stage = VisionLanguageStage(grid, vision, number) if vision else Stage(grid, number)
    initialize(stage, grid, t.seed)
    for name, w in named_weights(stage):
        w.requires_grad_(not name.startswith(t.freeze))
    return stage


def train(
    config: Config,
    load: Path | None = None,
    save: Path | None = None,
    *,
    fresh: bool = False,
    report: Report | None = None,
) -> History:
    """Trains up to step `config.training.steps`, from the start or from a checkpoint, and saves at the end.

    `fresh` takes only the parameters of the checkpoint: a new stage of training begins. `report` is told of every step.
    """
    run = Run(config)
    if load is not None:
        checkpoint.load(run, load, weights_only=fresh)
    history = History(run.iteration)
    while run.iteration < config.training.steps:
        loss, norm = run.step()
        history.losses.append(loss)
        history.norms.append(norm)
        if report is not None:
            report(run.iteration, loss, norm)
    if save is not None:
        checkpoint.save(run, save)
    run.grid.close()
    return history
