"""Starting `measure.py` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("measure.py")
ROOT = Path(__file__).parents[2]


def measured(*arguments: object) -> dict[str, float]:
    command = [sys.executable, str(CHILD), *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    if done.returncode:
        pytest.fail(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found
