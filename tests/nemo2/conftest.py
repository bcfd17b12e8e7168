"""Models made once per session."""

from __future__ import annotations

from tests.judge.conftest import expected, hf, ids

__all__ = ["expected", "hf", "ids"]
