"""The memory bound holds for the whole process, whatever is done to the tensors and however large they are together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("measure.py")
ROOT = Path(__file__).parents[2]


def measured(folder: Path, kind: str, tensors: int, memory: int) -> dict[str, int]:
    """What a fresh process took (a forked one would inherit this one's peak)."""
    source = folder / "source"
    with source.open("wb") as file:
        file.truncate(400 << 20)  # sparse: reading it costs no disk
    command = [sys.executable, str(CHILD), str(source), str(folder / "out"), kind, str(tensors), str(memory)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True, timeout=100)
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind", ["copy", "split", "turn", "joined"])
def test_peak_stays_within_the_bound(tmp_path: Path, kind: str) -> None:
    found = measured(tmp_path, kind, 12, 64 * 10**6)
    assert found["written"] > 12 * 4096 * 1536 * 2
    assert found["peak"] <= 64 * 10**6


def test_peak_does_not_grow_with_size(tmp_path: Path) -> None:
    few = measured(tmp_path, "copy", 2, 64 * 10**6)
    (tmp_path / "two").mkdir()
    many = measured(tmp_path / "two", "copy", 24, 64 * 10**6)
    assert many["written"] > 11 * few["written"]
    assert many["peak"] < few["peak"] + 3 * 10**6


def test_many_tensors_take_two_kilobytes_each(tmp_path: Path) -> None:
    found = measured(tmp_path, "small", 5000, 64 * 10**6)
    assert found["peak"] - found["start"] < 8 * 10**6 + 5000 * 2200
