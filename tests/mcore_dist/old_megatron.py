"""Megatron-Core 0.12, which still saves and loads zarr, as second judge: the same code as the first one's, run in a process of its own."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.judge.dist import judge_dist_logits
from tests.judge.dist_write import write_dist
from tests.judge.models import Logits
from tests.judge.ranks import Layout

VERSION = "0.12.0"
ROOT = Path(__file__).parents[2]
NEEDS = Path(__file__).with_name("old_megatron.txt")
TASKS: dict[str, Callable[..., Any]] = {"judge": judge_dist_logits, "write": write_dist}


def packages() -> Path:
    """The folder of its packages. They stand in front of the environment's own, whose torch and numpy they share."""
    return Path(sys.prefix) / f"old-megatron-{hashlib.sha256(NEEDS.read_bytes()).hexdigest()[:12]}"


def install() -> None:
    """Some seconds and 120 MB, once per environment; a CalledProcessError has pip's words."""
    place = packages()
    if place.is_dir():
        return
    draft = place.with_name(f"{place.name}.{os.getpid()}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", draft, "--requirement", NEEDS], check=True, capture_output=True, text=True)
    draft.rename(place)


def old_judge(folder: Path, hf: Path, ids: torch.Tensor, layout: Layout, **options: Any) -> Logits:
    """`judge_dist_logits` by Megatron-Core 0.12."""
    found: Logits = _ask("judge", folder, hf, ids, layout, **options)
    return found


def old_write(hf: Path, folder: Path, layout: Layout, **form: Any) -> Path:
    """`write_dist` by Megatron-Core 0.12."""
    _ask("write", hf, folder, layout, **form)
    return folder


def _ask(task: str, *args: Any, **options: Any) -> Any:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages()), str(ROOT)])}
    order = pickle.dumps((task, args, options))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.mcore_dist.old_megatron"],
        input=order, env=environment, capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"Megatron-Core {VERSION}:\n{done.stderr.decode()}")
    return pickle.loads(done.stdout.rpartition(MARK)[2])


MARK = b"\nANSWER\n"  # Megatron-Core talks on the same line


def _answer() -> None:
    import megatron.core

    assert megatron.core.__version__ == VERSION
    task, args, options = pickle.loads(sys.stdin.buffer.read())
    answer = TASKS[task](*args, **options)
    sys.stdout.buffer.write(MARK + pickle.dumps(answer))


if __name__ == "__main__":
    _answer()
