"""Lazy tensors as torch tensors, for those who have torch; nothing else in the core knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptconv.errors import ExtraMissingError
from ckptconv.tensor import Tensor

if TYPE_CHECKING:
    import torch


def to_torch(tensor: Tensor) -> torch.Tensor:
    """Read a lazy tensor into a torch tensor of the same dtype, bit for bit."""
    try:
        import torch
    except ImportError:
        raise ExtraMissingError("a torch tensor", "torch") from None
    data = torch.frombuffer(bytearray(tensor.numpy().tobytes()) or bytearray(1), dtype=torch.uint8)[: tensor.nbytes]
    return data.view(getattr(torch, tensor.dtype.torch)).reshape(tensor.shape)
