"""What plug-in authors test with: contracts, tiny checkpoints, strategies; nothing in the core imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptconv.testing.contract import FormatContract, MappingContract

__all__ = ["FormatContract", "MappingContract"]


def __getattr__(name: str) -> object:
    """The contracts need pytest, which nothing else here does."""
    if name not in __all__:
        raise AttributeError(f"module 'ckptconv.testing' has no attribute {name!r}")
    from ckptconv.testing import contract

    return getattr(contract, name)
