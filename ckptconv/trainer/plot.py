"""A loss curve as a picture, by matplotlib."""

from __future__ import annotations

from pathlib import Path

from ckptconv.trainer.run import History


def draw(history: History, path: Path) -> None:
    """Loss over steps, in the format that the name ends in."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError("a curve is drawn by matplotlib: pip install 'ckptconv[plot]'") from missing
    figure = Figure(layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot(range(history.start + 1, history.start + 1 + len(history.losses)), history.losses)
    figure.savefig(path)
