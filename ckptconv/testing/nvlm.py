"""NVLM-D as its published description has it, small and slow: how an image is cut into tiles and tagged, and what the model computes.

No library here can run NVLM-D. This is not for use: it is what tests hold converted files against.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TILE = 448  # pixels along a side
GLOBAL, GLOBAL_OF_YI = "tile_global_thumbnail", "tile_global"  # the whole image, last of its tiles
EPS = 1e-6


def grid(width: int, height: int, most: int = 6, tile: int = TILE) -> tuple[int, int]:
    """Columns and rows of tiles whose shape is nearest to the image's; of two as near the larger, if the image fills half of it."""
    wanted, best, nearest = width / height, (1, 1), float("inf")
    shapes = [(w, h) for w in range(1, most + 1) for h in range(1, most + 1) if w * h <= most]
    for w, h in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        far = abs(wanted - w / h)
        if far < nearest or (far == nearest and width * height > 0.5 * tile * tile * w * h):
            best, nearest = (w, h), min(far, nearest)
    return best


def tiles(image: Tensor, most: int = 6, tile: int = TILE) -> Tensor:
    """[tiles, 3, tile, tile] of an image [3, height, width]: row by row, then the whole of it unless it is one tile."""
    import torch
    from torch.nn.functional import interpolate

    def resized(height: int, width: int) -> Tensor:
        return interpolate(image[None], (height, width), mode="bicubic", antialias=True)

    columns, rows = grid(image.shape[2], image.shape[1], most, tile)
    whole = resized(rows * tile, columns * tile)
    cut = whole.reshape(3, rows, tile, columns, tile).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return cut if len(cut) == 1 else torch.cat([cut, resized(tile, tile)])


def tags(count: int, most: int = 6, thumbnail: str = GLOBAL) -> list[str]:
    """The words before each of an image's tiles, of which the last is the thumbnail; with ten tiles or more all are of one length."""
    if most < 10:
        return [f"<tile_{i}>" for i in range(1, count)] + [f"<{thumbnail}>"]
    return [f"<tile_{i:02d}>" for i in range(1, count)] + [f"<{thumbnail}0>"]


def shuffled(patches: Tensor) -> Tensor:
    """[tiles, side * side, entries] with every square of four patches as one of four times the entries."""
    count, number, entries = patches.shape
    half = int(number**0.5) // 2
    squares = patches.view(count, half, 2, half, 2, entries).permute(0, 1, 3, 2, 4, 5)
    return squares.reshape(count, half * half, 4 * entries)


def tower(weights: dict[str, Tensor], images: Tensor, heads: int) -> Tensor:
    """InternViT's last layer, class token first. `heads` are the true ones: what lies beyond them is zero, and no part of a mean."""
    import torch
    from torch.nn.functional import conv2d, gelu, scaled_dot_product_attention

    w = weights
    patch, bias = w["embeddings.patch_embedding.weight"], w["embeddings.patch_embedding.bias"]
    found = conv2d(images, patch, bias, stride=patch.shape[-1]).flatten(2).transpose(1, 2)
    first = w["embeddings.class_embedding"].expand(len(images), -1, -1)
    x = torch.cat([first, found], 1) + w["embeddings.position_embedding"]
    hidden, layers = x.shape[-1], len({name.split(".")[2] for name in w if name.startswith("encoder.layers.")})
    for i in range(layers):
        at = {
            name.removeprefix(f"encoder.layers.{i}."): t
            for name, t in w.items()
            if name.startswith(f"encoder.layers.{i}.")
        }
        q, k, v = (_rms(x, at["norm1.weight"], hidden) @ at["attn.qkv.weight"].T).chunk(3, -1)
        q, k = _rms(q, at["attn.q_norm.weight"], hidden), _rms(k, at["attn.k_norm.weight"], hidden)
        q, k, v = (t.reshape(*t.shape[:2], -1, hidden // heads).transpose(1, 2) for t in (q, k, v))
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + at["ls1"] * (mixed @ at["attn.proj.weight"].T + at["attn.proj.bias"])
        inner = gelu(_rms(x, at["norm2.weight"], hidden) @ at["mlp.fc1.weight"].T + at["mlp.fc1.bias"])
        x = x + at["ls2"] * (inner @ at["mlp.fc2.weight"].T + at["mlp.fc2.bias"])
    return x


def _rms(x: Tensor, weight: Tensor, true: int) -> Tensor:
    """The mean is over the true entries, which come first."""
    square = x[..., :true].pow(2).mean(-1, keepdim=True)
    return x * (square + EPS).rsqrt() * weight


def projected(weights: dict[str, Tensor], patches: Tensor) -> Tensor:
    """A LayerNorm and two layers without biases; the class token is dropped, and four patches are one."""
    from torch.nn.functional import gelu, layer_norm

    found = shuffled(patches[:, 1:])
    normed = layer_norm(found, found.shape[-1:], weights["0.weight"], weights["0.bias"])
    return gelu(normed @ weights["1.weight"].T) @ weights["3.weight"].T


def logits(folder: Path, ids: Tensor, images: Tensor, image_token: int) -> Tensor:
    """Of a folder in NVLM-D's layout, in fp32: the tiles' entries stand where `ids` has the image token, in order."""
    import torch
    from safetensors.torch import load_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= {name: tensor.float() for name, tensor in load_file(path).items()}
    inner = {key: value for key, value in config["llm_config"].items() if key != "model_type"}  # which says llama
    language = Qwen2ForCausalLM(Qwen2Config(**inner)).float().eval()
    language.load_state_dict(_below(stored, "language_model."), strict=True)
    with torch.no_grad():
        seen = tower(_below(stored, "vision_model."), images, config["vision_config"]["num_attention_heads"])
        embedded = language.get_input_embeddings()(ids)
        embedded[ids == image_token] = projected(_below(stored, "mlp1."), seen).flatten(0, 1)
        return language(inputs_embeds=embedded).logits  # type: ignore[no-any-return]


def _below(stored: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
