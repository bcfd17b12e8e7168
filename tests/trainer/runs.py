"""The runs that tests of the trainer make, small enough for two cores."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, isnan
from pathlib import Path

from ckptconv.trainer import checkpoint
from ckptconv.trainer.config import Config, ModelConfig, VisionConfig
from ckptconv.trainer.run import Run, train

EXACT = 1e-12  # float64 over float32 storage: what the order of sums may change
STEPS, SAVED = 6, 3
FORMATS = ("torch", "torch_dist")
DENSE = Config(ModelConfig()).but(precision="fp64", steps=STEPS)
TIED = Config(ModelConfig(tied=True, qkv_bias=True)).but(precision="fp64", steps=STEPS)
EXPERTS = Config(ModelConfig(experts=4)).but(precision="fp64", steps=STEPS)
PROJECTOR = Config(ModelConfig(), VisionConfig()).but(
    precision="fp64", steps=STEPS, data="captions", freeze=("language_model.", "vision_model.")
)  # LLaVA's first stage
TUNING = PROJECTOR.but(data="questions", freeze=("vision_model.",))  # and its second
KINDS = {"dense": DENSE, "tied": TIED, "experts": EXPERTS, "projector": PROJECTOR, "tuning": TUNING}

Curve = list[tuple[float, float]]  # loss and norm of every step


@dataclass
class Watched:
    """A run that was saved on the way in both formats and went on; and runs that took up what it saved."""

    whole: Curve = field(default_factory=list)
    resumed: dict[str, Curve] = field(default_factory=dict)


def watched(config: Config, folder: Path) -> Watched:
    run, seen = Run(config), Watched()
    while run.iteration < STEPS:
        if run.iteration == SAVED:
            for kind in FORMATS:
                run.config = config.but(format=kind)
                checkpoint.save(run, folder / kind)
        seen.whole.append(run.step())
    run.grid.close()
    seen.resumed = {kind: curve(config, folder / kind) for kind in FORMATS}
    return seen


def curve(config: Config, load: Path | None = None, save: Path | None = None) -> Curve:
    history = train(config, load, save)
    return list(zip(history.losses, history.norms, strict=True))


def distance(found: Curve, expected: Curve) -> float:
    """The largest difference; what is no number is as far off as can be."""
    assert len(found) == len(expected) > 0
    gaps = [abs(a - b) for got, wanted in zip(found, expected, strict=True) for a, b in zip(got, wanted, strict=True)]
    return inf if any(map(isnan, gaps)) else max(gaps)
