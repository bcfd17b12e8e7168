"""Models made once per session, and the second judge, for the tests of distributed checkpoints."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.judge.conftest import expected, hf, ids
from tests.mcore_dist.old_megatron import install

__all__ = ["expected", "hf", "ids", "old_megatron"]


@pytest.fixture(scope="session")
def old_megatron() -> None:
    """Megatron-Core 0.12 is there. Without a package index its tests are skipped, with the reason; never in CI."""
    try:
        install()
    except subprocess.CalledProcessError as error:
        reason = (
            f"Megatron-Core 0.12 is not tested, pip cannot install tests/mcore_dist/old_megatron.txt: {error.stderr}"
        )
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
