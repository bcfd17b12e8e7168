"""Megatron-Core 0.12, which still saves and loads zarr, as second judge: the code of the first one, run in a process of its own."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from tests.judge.dist import judge_dist_logits
from tests.judge.dist_write import write_dist
from tests.judge.models import Logits
from tests.judge.optim import Run, Step, train_and_save
from tests.judge.ranks import Layout

VERSION = "0.12.0"
ROOT = Path(__file__).parents[2]
NEEDS = Path(__file__).with_name("old_megatron.txt")
TASKS: dict[str, Callable[..., Any]] = {"judge": judge_dist_logits, "write": write_dist, "train": train_and_save}


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
    try:
        draft.rename(place)
    except OSError:  # another process of this run was quicker
        shutil.rmtree(draft)
        assert place.is_dir()


@dataclass(frozen=True)
class OldMegatron:
    """Its process, for as many questions as there are, and what that says besides."""

    process: subprocess.Popen[bytes]
    said: IO[bytes]

    def judge(self, folder: Path, hf: Path, ids: torch.Tensor, layout: Layout, **options: Any) -> Logits:
        """`judge_dist_logits` by Megatron-Core 0.12."""
        found: Logits = self._ask("judge", folder, hf, ids, layout, **options)
        return found

    def write(self, hf: Path, folder: Path, layout: Layout, **form: Any) -> Path:
        """`write_dist` by Megatron-Core 0.12."""
        self._ask("write", hf, folder, layout, **form)
        return folder

    def train(self, run: Run, places: dict[str, Path]) -> list[Step]:
        """`train_and_save` by Megatron-Core 0.12."""
        steps: list[Step] = self._ask("train", run, places)
        return steps

    def _ask(self, task: str, *args: Any, **options: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            pickle.dump((task, args, options), self.process.stdin)
            self.process.stdin.flush()
            fine, answer = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError):
            self.said.seek(0)
            fine, answer = False, f"its process ended\n{self.said.read().decode()}"
        if not fine:
            raise RuntimeError(f"Megatron-Core {VERSION}: {answer}")
        return answer


@contextmanager
def started() -> Iterator[OldMegatron]:
    """Starting takes longer than an answer; the process ends when nothing more can come."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.mcore_dist.old_megatron"]
    places = {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages()), str(ROOT)])}
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, env=places) as process,
    ):
        yield OldMegatron(process, said)


def _serve() -> None:
    import megatron.core

    assert megatron.core.__version__ == VERSION
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what Megatron-Core prints is no answer
    while True:
        try:
            task, args, options = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = (True, TASKS[task](*args, **options))
        except Exception:  # noqa: BLE001 (told to who asked, whatever it is)
            answer = (False, traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
