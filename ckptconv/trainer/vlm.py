"""Vision: a CLIP-style tower and a projector whose outputs stand before the text, as in LLaVA; named as Megatron's multimodal models.

LLaVA's two stages are two runs: the first with everything but the projector frozen, the second with the tower frozen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ckptconv.trainer.config import Config, VisionConfig
from ckptconv.trainer.model import Attention, Batch, Stage, weights_of
from ckptconv.trainer.parallel import ColumnParallel, Grid, RowParallel, weight


class LayerNorm(nn.Module):
    def __init__(self, config: Config, vision: VisionConfig) -> None:
        super().__init__()
        self.weight = weight(config, (vision.hidden,), init=None)
        self.bias = weight(config, (vision.hidden,), init=0.0)
        self.eps = vision.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class PlainMLP(nn.Module):
    """Two linears with biases and an activation between."""

    def __init__(
        self, config: Config, grid: Grid, inputs: int, ffn: int, outputs: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.linear_fc1 = ColumnParallel(config, grid, inputs, ffn, bias=True)
        self.linear_fc2 = RowParallel(config, grid, ffn, outputs, bias=True)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(self.activation(self.linear_fc1(x)))  # type: ignore[no-any-return]


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class VisionLayer(nn.Module):
    def __init__(self, config: Config, grid: Grid, vision: VisionConfig, number: int) -> None:
        super().__init__()
        h = vision.hidden
        self.input_layernorm = LayerNorm(config, vision)
        self.self_attention = Attention(
            config, grid, h, vision.heads, vision.heads, causal=False, qkv_bias=True, bias=True
        )
        self.pre_mlp_layernorm = LayerNorm(config, vision)
        self.mlp = PlainMLP(config, grid, h, vision.ffn, h, quick_gelu)
        for w in weights_of(self):
            w.layer = number

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.pre_mlp_layernorm(x))  # type: ignore[no-any-return]


class Weighted(nn.Module):
    """A parameter called `weight` of a module that computes nothing."""

    def __init__(self, config: Config, *shape: int) -> None:
        super().__init__()
        self.weight = weight(config, shape)


class VisionDecoder(nn.Module):
    """Its layers look both ways; it is called a decoder because Megatron calls it that."""

    def __init__(self, config: Config, grid: Grid, vision: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config, grid, vision, number) for number in range(vision.layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class VisionModel(nn.Module):
    """Patches and a class token through the layers; what comes out of the last one, without the class token."""

    def __init__(self, config: Config, grid: Grid, vision: VisionConfig) -> None:
        super().__init__()
        h = vision.hidden
        self.class_token = weight(config, (1, 1, h))
        self.ln_pre = LayerNorm(config, vision)
        self.conv1 = Weighted(config, h, 3, vision.patch, vision.patch)
        self.position_embeddings = Weighted(config, vision.patches + 1, h)
        self.decoder = VisionDecoder(config, grid, vision)
        self.patch = vision.patch

    def forward(self, images: Tensor) -> Tensor:
        patches = F.conv2d(images, self.conv1.weight, stride=self.patch).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], 1)
        return self.decoder(self.ln_pre(x + self.position_embeddings.weight).transpose(0, 1))[1:]  # type: ignore[no-any-return]


class Projector(nn.Module):
    def __init__(self, config: Config, grid: Grid, vision: VisionConfig) -> None:
        super().__init__()
        h = config.model.hidden
        self.encoder = PlainMLP(config, grid, vision.hidden, h, h, F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)  # type: ignore[no-any-return]


class VisionLanguageStage(nn.Module):
    """A stage of the language model; the first one sees."""

    def __init__(self, config: Config, grid: Grid, vision: VisionConfig, number: int) -> None:
        super().__init__()
        self.language_model = Stage(config, grid, number)
        if number == 0:
            self.vision_model = VisionModel(config, grid, vision)
            self.vision_projection = Projector(config, grid, vision)

    def forward(self, x: Tensor | None, batch: Batch) -> Tensor:
        if x is None:
            text = self.language_model.embed(batch)
            x = torch.cat([self.vision_projection(self.vision_model(batch["images"].to(text.dtype))), text])
        return self.language_model(x, batch)  # type: ignore[no-any-return]
