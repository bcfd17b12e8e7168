"""Training data that is a function of a sample's number alone, so that the data position is one integer.

Text: stretches of the bytes of text.txt. Captions: a picture of one shape and a sentence about it. Questions: the same picture,
a question, and an answer, which alone counts in the loss.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib.resources import files

import torch
from torch import Tensor

from ckptconv.trainer.config import Config, VisionConfig

TEXT = files("ckptconv.trainer").joinpath("text.txt").read_bytes()
COLORS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "white": (1.0, 1.0, 1.0)}
SIDES = {"top": (0, None), "bottom": (1, None), "left": (None, 0), "right": (None, 1)}


def batch(config: Config, samples: Sequence[int]) -> dict[str, Tensor]:
    """tokens, labels and loss_mask, each [batch, sequence], and images [batch, 3, size, size] where the model sees."""
    rows = [_sample(config, number) for number in samples]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _sample(config: Config, number: int) -> dict[str, Tensor]:
    dice = random.Random(f"{config.training.seed}:{number}")
    if config.vision is None:
        length = config.model.seq + 1
        start = dice.randrange(len(TEXT) - length)
        return _row(TEXT[start : start + length], 0, config.model.seq)
    color, side = dice.choice(list(COLORS)), dice.choice(list(SIDES))
    question, answer = "", f"{color}, {side}"
    if config.training.data == "questions":
        question, answer = dice.choice([("where? ", side), ("colour? ", color)])
    said = (question + answer + "\n").encode()
    image = _picture(config.vision, color, side, dice.getrandbits(48))
    return _row(said, len(question), config.model.seq) | {"images": image}


def _row(said: bytes, asked: int, length: int) -> dict[str, Tensor]:
    """Each byte is to be told from those before it, but the `asked` first are given, and what pads the row does not count."""
    padded = torch.tensor(list(said[: length + 1].ljust(length + 1, b"\0")))
    place = torch.arange(length)
    counts = (place >= asked - 1) & (place < len(said) - 1)
    return {"tokens": padded[:-1], "labels": padded[1:], "loss_mask": counts.to(torch.float32)}


def _picture(vision: VisionConfig, color: str, side: str, noise: int) -> Tensor:
    """A half in one colour, on faint noise."""
    size = vision.image
    image = torch.randn(3, size, size, generator=torch.Generator().manual_seed(noise)) * 0.1
    halves = (slice(0, size // 2), slice(size // 2, size))
    rows, columns = (slice(None) if half is None else halves[half] for half in SIDES[side])
    image[:, rows, columns] += torch.tensor(COLORS[color])[:, None, None]
    return image
