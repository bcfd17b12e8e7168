"""The trainer's command line: python -m ckptconv.trainer --config run.toml, or the same under torchrun."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch.distributed as dist

from ckptconv.trainer.config import Config, read
from ckptconv.trainer.launch import joined, launch
from ckptconv.trainer.plot import draw
from ckptconv.trainer.run import History, train


def main() -> None:
    parser, options = _options()
    try:
        config = read(options.config) if options.config else Config()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    degrees = {d: n for d in ("tp", "pp", "vpp", "ep") if (n := getattr(options, d)) is not None}
    at = replace(config.layout, **degrees)
    if min(at.tp, at.pp, at.vpp, at.ep, 1 if options.dp is None else options.dp) < 1:
        parser.error(f"{at}: every degree is at least 1")
    config = replace(config, layout=at)
    config = config if options.steps is None else config.but(steps=options.steps)

    def job() -> History:
        history = train(config, options.load, options.save, fresh=options.fresh, tell=partial(print, flush=True))
        if options.plot and dist.get_rank() == 0:
            draw(history, options.plot)
        return history

    if "RANK" in os.environ:  # a process of torchrun's
        dist.init_process_group("gloo")
        joined(job)
    else:
        launch(at.tp * at.pp * (options.dp or at.ep), job)


def _options() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser("python -m ckptconv.trainer", description=__doc__)
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file; without it, a small decoder on text")
    parser.add_argument("--steps", type=int, help="train up to this step")
    for degree in ("tp", "pp", "vpp", "ep", "dp"):
        parser.add_argument(f"--{degree}", type=int, help="in place of the file's; dp where torchrun does not say it")
    parser.add_argument("--load", type=Path, metavar="FOLDER", help="go on from this checkpoint")
    parser.add_argument("--fresh", action="store_true", help="take its parameters only, and begin at step 0")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="save here after the last step")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the losses")
    return parser, parser.parse_args()


if __name__ == "__main__":
    main()
