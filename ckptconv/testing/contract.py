"""The contracts an author of a format or a mapping inherits, in one place, with pytest's explanations of failed assertions."""

from __future__ import annotations

import sys

import pytest

_EXPLAINED = [f"ckptconv.testing.{name}" for name in ("damage_contract", "format_contract", "mapping_contract")]
pytest.register_assert_rewrite(*(name for name in _EXPLAINED if name not in sys.modules))

from ckptconv.testing.format_contract import FormatContract  # noqa: E402
from ckptconv.testing.mapping_contract import MappingContract  # noqa: E402

__all__ = ["FormatContract", "MappingContract"]
