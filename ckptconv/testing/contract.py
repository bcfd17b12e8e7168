"""The contracts an author of a format or a mapping inherits, in one place, with pytest's explanations of failed assertions."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(
    "ckptconv.testing.damage_contract", "ckptconv.testing.format_contract", "ckptconv.testing.mapping_contract"
)

from ckptconv.testing.format_contract import FormatContract  # noqa: E402
from ckptconv.testing.mapping_contract import MappingContract  # noqa: E402

__all__ = ["FormatContract", "MappingContract"]
