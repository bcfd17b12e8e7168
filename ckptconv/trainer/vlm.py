"""Vision: a CLIP-style tower and a projector whose outputs stand before the text, as in LLaVA; named as Megatron's multimodal models.

LLaVA's two stages are two runs: the first with everything but the projector frozen, the second with the tower frozen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ckptconv.trainer.config import VisionConfig
from ckptconv.trainer.model import MLP, Batch, Decoder, Norm, Stage
from ckptconv.trainer.parallel import Grid, weight


class VisionModel(nn.Module):
    """Patches and a class token through the layers; what comes out of the last one, without the class token."""

    def __init__(self, grid: Grid, v: VisionConfig) -> None:
        super().__init__()
        self.class_token = weight(grid, (1, 1, v.hidden))
        self.ln_pre = Norm(grid, v)
        self.conv1 = nn.ParameterDict({"weight": weight(grid, (v.hidden, 3, v.patch, v.patch))})
        self.position_embeddings = nn.ParameterDict({"weight": weight(grid, (v.patches + 1, v.hidden))})
        self.decoder = Decoder(grid, v, range(v.layers), norm=False)

    def forward(self, images: Tensor) -> Tensor:
        kernel = self.conv1["weight"]
        patches = F.conv2d(images, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], 1)
        x = self.ln_pre(x + self.position_embeddings["weight"])
        return self.decoder(x.transpose(0, 1))[1:]  # type: ignore[no-any-return]


class VisionLanguageStage(nn.Module):
    """A stage of the language model; the first one sees."""

    def __init__(self, grid: Grid, number: int) -> None:
        super().__init__()
        v, h = grid.config.vision, grid.config.model.hidden
        assert v is not None
        self.language_model = Stage(grid, number)
        if number == 0:
            self.vision_model = VisionModel(grid, v)
            self.vision_projection = nn.ModuleDict({"encoder": MLP(grid, v.hidden, h, h, F.gelu)})

    def forward(self, x: Tensor | None, batch: Batch) -> Tensor:
        if x is None:
            text = self.language_model.embed(batch)
            seen = self.vision_model(batch["images"].to(text.dtype))
            x = torch.cat([self.vision_projection["encoder"](seen), text])
        return self.language_model(x, batch)  # type: ignore[no-any-return]
