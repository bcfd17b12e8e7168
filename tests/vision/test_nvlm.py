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
        (448, 448, (1, 1), (1, 1)), (896, 448, (2, 1), (2, 1)), (448, 896, (1, 2), (1, 2)), (1344, 896, (3, 2), (3, 2)),
        (640, 480, (3, 2), (4, 3)), (480, 640, (2, 3), (3, 4)), (2000, 500, (4, 1), (4, 1)), (500, 2000, (1, 4), (1, 4)),
        (1920, 1080, (2, 1), (4, 2)), (1080, 1920, (1, 2), (2, 4)), (1000, 1000, (2, 2), (3, 3)), (300, 300, (1, 1), (1, 1)),
        (3000, 1000, (3, 1), (6, 2)), (700, 1000, (2, 3), (2, 3)),
    ],
)  # fmt: skip
def test_columns_and_rows_are_those_of_the_published_code(
    width: int, height: int, six: tuple[int, int], twelve: tuple[int, int]
) -> None:
    """Chosen by dynamic_preprocess of Megatron-LM 0.12 (examples/multimodal/image_processing.py), run on images of these sizes."""
    assert (nvlm.grid(width, height, 6), nvlm.grid(width, height, 12)) == (six, twelve)


@pytest.mark.parametrize(("columns", "rows"), [(2, 2), (4, 1), (1, 4), (3, 2), (2, 3)])
def test_tiles_lie_row_by_row_with_the_whole_image_last(columns: int, rows: int) -> None:
    """Each tile of the image has a colour of its own."""
    image = torch.zeros(3, 32 * rows, 32 * columns)
    for i in range(columns * rows):
        row, column = divmod(i, columns)
        image[:, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = i
    found = nvlm.tiles(image, tile=32)
    assert found.shape == (columns * rows + 1, 3, 32, 32)
    np.testing.assert_allclose(found[:-1, 0, 16, 16].numpy(), np.arange(columns * rows), atol=1e-5)
    np.testing.assert_allclose(found[-1].mean(), (columns * rows - 1) / 2, atol=0.01)
    assert found[-1, 0, 1, 1] < 0.1  # the thumbnail is the whole of it, the right way up
    assert found[-1, 0, -2, -2] > columns * rows - 1.1


def test_tags_number_the_tiles_and_name_the_thumbnail() -> None:
    """As _get_tile_tags of Megatron-LM's multimodal example (model.py) has them: for NVLM-D's Qwen2, and for Yi."""
    assert nvlm.tags(3) == ["<tile_1>", "<tile_2>", "<tile_global_thumbnail>"]
    assert nvlm.tags(1) == ["<tile_global_thumbnail>"]
    assert nvlm.tags(2, thumbnail=nvlm.GLOBAL_OF_YI) == ["<tile_1>", "<tile_global>"]
    twelve = [f"<tile_0{i}>" for i in range(1, 10)] + [
        "<tile_10>",
        "<tile_11>",
        "<tile_12>",
        "<tile_global_thumbnail0>",
    ]
    assert nvlm.tags(13, most=12) == twelve
    assert nvlm.tags(2, most=10, thumbnail=nvlm.GLOBAL_OF_YI) == ["<tile_01>", "<tile_global0>"]


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
