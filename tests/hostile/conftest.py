"""Tiny checkpoints in every form, written once; the hostile tests damage copies of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.bases import make_all


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each clean checkpoint by name."""
    return make_all(tmp_path_factory.mktemp("bases"))
