"""The frequencies of a rotary embedding: a buffer that NeMo saves with legacy models, and demands when it loads them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ckptconv.config import ModelConfig

NAME = "language_model.rotary_pos_emb.inv_freq"  # on every pipeline stage


def inverse_frequencies(config: ModelConfig) -> npt.NDArray[np.float32] | None:
    """base ** (-2i / n) in fp32, as NeMo computes them (torch's pow may differ in the last bit); None for learned positions."""
    if config.rope is None:
        return None
    turned = int(config.head_dim * config.rope.percent)
    exponents = np.arange(0, turned, 2, dtype=np.float32) / np.float32(turned)
    powers = np.float64(config.rope.base) ** exponents.astype(np.float64)
    return np.float32(1) / powers.astype(np.float32)
