"""NVLM-D's reference: its tiles against numbers of the published code, its parts against Megatron-Core and transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv.testing import nvlm
from tests.judge.patches import prepare
from tests.judge.vlm_reference import hf_internvit

GOLDEN = Path(__file__).parents[1] / "golden" / "vlm"
IMAGE_TOKEN = 95


@pytest.mark.parametrize(
    ("width", "height", "six", "twelve"),
    [
        (448, 448, 1, 1), (896, 448, 3, 3), (1344, 896, 7, 7), (640, 480, 7, 13), (480, 640, 7, 13), (2000, 500, 5, 5),
        (1920, 1080, 3, 9), (1000, 1000, 5, 10), (300, 300, 1, 1),
    ],
)  # fmt: skip
def test_tiles_are_as_many_as_the_published_code_makes(width: int, height: int, six: int, twelve: int) -> None:
    """Counted with Megatron's own function, thumbnail included."""
    for most, count in ((6, six), (12, twelve)):
        columns, rows = nvlm.grid(width, height, most)
        assert columns * rows + (columns * rows > 1) == count


def test_tiles_lie_row_by_row_with_the_whole_image_last() -> None:
    """Each quarter of the image has a colour of its own."""
    image = torch.zeros(3, 64, 64)
    for i in range(4):
        image[:, 32 * (i // 2) : 32 * (i // 2) + 32, 32 * (i % 2) : 32 * (i % 2) + 32] = i
    found = nvlm.tiles(image, most=4, tile=32)
    assert found.shape == (5, 3, 32, 32)
    middle = found[:4, 0, 16, 16]
    np.testing.assert_allclose(middle.numpy(), [0, 1, 2, 3], atol=1e-5)
    np.testing.assert_allclose(found[4].mean(), 1.5, atol=0.01)


def test_tags_number_the_tiles_and_name_the_thumbnail() -> None:
    assert nvlm.tags(3) == ["<tile_1>", "<tile_2>", "<tile_global_thumbnail>"]
    assert nvlm.tags(1) == ["<tile_global_thumbnail>"]


def test_pixel_shuffle_is_megatron_cores() -> None:
    prepare()
    from megatron.core.models.multimodal.llava_model import pixel_shuffle

    patches = torch.arange(3 * 64 * 4, dtype=torch.float32).view(3, 64, 4)
    assert torch.equal(nvlm.shuffled(patches), pixel_shuffle(patches))
    assert not torch.equal(nvlm.shuffled(patches), pixel_shuffle(patches, version=1))


@pytest.mark.parametrize("heads", [25, 32])
def test_tower_computes_what_transformers_does_with_dummy_heads_or_without(heads: int) -> None:
    """transformers' InternVL tower, filled from the published names; NVLM-D has seven dummy heads more."""
    source = GOLDEN / "internvit/src"
    images = torch.from_numpy(np.random.default_rng(7).normal(size=(2, 3, 16, 16)).astype(np.float32))
    weights = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    for name, tensor in weights.items() if heads > 25 else ():
        more = 4 * (heads - 25)
        if name.endswith("attn.qkv.weight"):
            weights[name] = torch.cat([torch.cat([part, torch.ones(more, 100)]) for part in tensor.chunk(3)])
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[name] = torch.cat([tensor, torch.ones(more)])
        elif name.endswith("attn.proj.weight"):
            weights[name] = torch.cat([tensor, torch.zeros(100, more)], 1)
    with torch.no_grad():
        found = nvlm.tower(weights, images, 25)
    np.testing.assert_allclose(found.numpy(), hf_internvit(source, images), rtol=1e-5, atol=1e-5)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Two tiles of 16 pixels are 4 entries each."""
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, IMAGE_TOKEN, (1, 14)))
    ids[0, 2:10] = IMAGE_TOKEN
    return ids, torch.from_numpy(np.random.default_rng(4).normal(size=(2, 3, 16, 16)).astype(np.float32))


def test_nvlm_through_megatron_files_computes_the_same(tmp_path: Path) -> None:
    """hf (32 heads, of which 25 are real) -> Megatron at tp 4 (28 heads) -> at tp 2 and pp 2 (26 heads) -> hf."""
    source = GOLDEN / "nvlm_d"
    before = nvlm.logits(source, *inputs(), IMAGE_TOKEN)
    ckptconv.convert(source, tmp_path / "tp4", saver="mcore", tp=4, vocab_divisor=1)
    ckptconv.convert(tmp_path / "tp4", tmp_path / "pp2", saver="mcore", tp=2, pp=2, vocab_divisor=1)
    ckptconv.convert(tmp_path / "pp2", tmp_path / "back", saver="hf", saver_options={"template": source})
    assert torch.equal(nvlm.logits(tmp_path / "back", *inputs(), IMAGE_TOKEN), before)


def test_an_exchanged_norm_moves_the_logits(tmp_path: Path) -> None:
    source = GOLDEN / "nvlm_d"
    tensors = load_file(source / "model.safetensors")
    one, two = ("vision_model.encoder.layers.0." + name for name in ("norm1.weight", "norm2.weight"))
    tensors[one], tensors[two] = tensors[two], tensors[one]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    found, before = (nvlm.logits(folder, *inputs(), IMAGE_TOKEN) for folder in (tmp_path, source))
    assert (found - before).abs().max() > 1e-3
