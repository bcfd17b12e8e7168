"""Models made once per session, and the second judge, for the tests of distributed checkpoints."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.judge.conftest import expected, hf, ids
from tests.mcore_dist.old_megatron import OldMegatron, install, started
from tests.mcore_dist.optim_runs import trained

__all__ = ["expected", "hf", "ids", "old_megatron", "trained"]


@pytest.fixture(scope="session")
def old_megatron() -> Iterator[OldMegatron]:
    """Megatron-Core 0.12, started. Without a package index its tests are skipped, with the reason; in CI they fail."""
    try:
        install()
    except subprocess.CalledProcessError as error:
        reason = (
            f"Megatron-Core 0.12 is not tested, pip cannot install tests/mcore_dist/old_megatron.txt: {error.stderr}"
        )
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with started() as megatron:
        yield megatron
