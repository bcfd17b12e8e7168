"""InternViT's layer out of Megatron-Core's parts: what Megatron's multimodal training code adds to them, written anew for the judge.

Megatron-Core has the tower (CLIPViTModel, subtype internvit) but not its layers. They differ from others in three ways: the output
of attention and MLP is scaled entry by entry, q and k are normed over all heads at once, and qkv has no bias beside layers that do.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_layer import TransformerLayer


class ScaledLayer(TransformerLayer):  # type: ignore[misc]
    """`ls1` and `ls2` scale what attention and MLP add."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.ls1 = torch.nn.Parameter(torch.ones(self.config.hidden_size))
        self.ls2 = torch.nn.Parameter(torch.ones(self.config.hidden_size))
        self.self_attn_bda, self.mlp_bda = partial(_scaled, self.ls1), partial(_scaled, self.ls2)


def _scaled(scale: torch.Tensor, training: bool, fused: bool) -> Any:
    def add(out: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float) -> torch.Tensor:
        value, bias = out
        return residual + scale * (value if bias is None else value + bias)

    return add


class NormOverHeads(torch.nn.Module):
    """RMSNorm of all heads of all tensor ranks at once. Dummy heads are zero and add nothing; the mean is over the true entries."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.true, self.eps = config.hidden_size, eps
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.ones(heads * hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squares = x.pow(2).sum((-2, -1), keepdim=True)
        dist.all_reduce(squares, group=ps.get_tensor_model_parallel_group())
        return x * torch.rsqrt(squares / self.true + self.eps) * self.weight.view(x.shape[-2:])

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """Cut along its entries, as Megatron's own class says."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(self.state_dict(), prefix, {"weight": 0}, sharded_offsets)


def internvit_layer() -> Any:
    layer = get_vit_layer_with_local_spec()
    layer.module = ScaledLayer
    attention = layer.submodules.self_attention
    attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    attention.submodules.linear_qkv = WithoutBias
    attention.submodules.q_layernorm = attention.submodules.k_layernorm = NormOverHeads
    return layer


class WithoutBias(ColumnParallelLinear):  # type: ignore[misc]
    def __init__(self, *sizes: Any, bias: bool, **more: Any) -> None:
        super().__init__(*sizes, bias=False, **more)
