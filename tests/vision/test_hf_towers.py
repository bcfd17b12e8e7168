"""Vision towers in Hugging Face folders: transformers judges CLIP and SigLIP; the others are held against their published layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ckptconv.errors import ConfigError, CoverageError, UsageError
from ckptconv.mapping_files import load_mapping
from ckptconv.pipeline import convert, load
from ckptconv.testing.models import hf_hidden, make_tower
from ckptconv.tower_passes import resize_heads
from tests.vision.arrays import Arrays, atoms, config_json, same

GOLDEN = Path(__file__).parents[1] / "golden" / "vlm"
WEIGHTS = "model.safetensors"


# made by transformers


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
@pytest.mark.parametrize("kind", ["CLIPVisionModel", "SiglipVisionModel"])
def test_both_spellings_of_names_compute_the_same(kind: str, prefix: str, tmp_path: Path) -> None:
    source = make_tower(tmp_path / "src", kind)
    convert(source, tmp_path / "there", saver="hf", saver_options={"prefix": prefix})
    assert f"{prefix}encoder.layers.2.mlp.fc1.weight" in load_file(tmp_path / "there" / WEIGHTS)
    assert np.array_equal(hf_hidden(source, kind), hf_hidden(tmp_path / "there", kind))
    convert(tmp_path / "there", tmp_path / "back", saver="hf", saver_options={"prefix": ""})
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()


def test_prefix_that_no_tower_has_is_refused(tmp_path: Path) -> None:
    source = make_tower(tmp_path / "src", "CLIPVisionModel")
    with pytest.raises(UsageError, match=r"'visual\.'.*'vision_model\.' or ''"):
        convert(source, tmp_path / "dst", saver="hf", saver_options={"prefix": "visual."})


@pytest.mark.parametrize(
    ("whole", "alone"), [("CLIPModel", "CLIPVisionModelWithProjection"), ("SiglipModel", "SiglipVisionModel")]
)
def test_tower_of_a_whole_model_becomes_one_of_its_own(whole: str, alone: str, tmp_path: Path) -> None:
    """What is left out is the text side, and all of it is told."""
    source = make_tower(tmp_path / "src", whole)
    convert(source, tmp_path / "dst", saver="hf")
    config = config_json(tmp_path / "dst")
    assert config["architectures"] == [alone]
    assert "vision_config" not in config
    assert np.array_equal(hf_hidden(source, whole), hf_hidden(tmp_path / "dst", alone))
    kept = load_file(tmp_path / "dst" / WEIGHTS)
    dropped = json.loads((tmp_path / "dst" / "ckptconv.json").read_text())["about"]["dropped"]
    assert sorted([*kept, *dropped]) == sorted(load_file(source / WEIGHTS))
    assert not [name for name in dropped if name.startswith("visi")]


def test_tower_with_the_prefix_of_a_larger_model_is_written_for_its_own_class(tmp_path: Path) -> None:
    convert(GOLDEN / "siglip/src", tmp_path / "dst", saver="hf")
    written = load_file(tmp_path / "dst" / WEIGHTS)
    assert all(name.startswith("vision_model.") for name in written)
    assert config_json(tmp_path / "dst")["vision_use_head"] is False
    same(atoms(GOLDEN / "siglip/src"), atoms(tmp_path / "dst"))


# the sources that Megatron's converters were given


@pytest.mark.parametrize("source", ["clip/src_hf", "siglip/src", "internvit/src", "radio_g/src"])
def test_every_tensor_comes_back_as_it_was(source: str, tmp_path: Path) -> None:
    family: dict[str, Any] = {"family": "radio-g"} if "radio" in source else {}
    convert(GOLDEN / source, tmp_path / "dst", saver="hf", **family)
    before, after = (load_file(folder / WEIGHTS) for folder in (GOLDEN / source, tmp_path / "dst"))
    named = {name.removeprefix("vision_tower."): value for name, value in before.items() if "conditioner" not in name}
    same(named, after)


def test_qkv_of_internvit_is_all_queries_then_all_keys_then_all_values() -> None:
    qkv = load_file(GOLDEN / "internvit/src" / WEIGHTS)["encoder.layers.1.attn.qkv.weight"]
    found = atoms(GOLDEN / "internvit/src")
    for i, name in enumerate("qkv"):
        assert np.array_equal(found[f"layers.1.attn.{name}.weight"], qkv[100 * i : 100 * (i + 1)])


def test_gate_of_radio_g_comes_before_up() -> None:
    rows = load_file(GOLDEN / "radio_g/src" / WEIGHTS)["model.inner.blocks.0.mlp.w12.weight"]
    found = atoms(GOLDEN / "radio_g/src", family="radio-g")
    assert np.array_equal(found["layers.0.mlp.gate.weight"], rows[:64])
    assert np.array_equal(found["layers.0.mlp.up.weight"], rows[64:])


def test_radio_needs_no_config_json_but_its_family(tmp_path: Path) -> None:
    shown = load_file(GOLDEN / "radio_g/src" / WEIGHTS)
    save_file(shown, tmp_path / WEIGHTS)
    config = load(tmp_path, family="radio-g").config
    assert (config.layers, config.hidden, config.heads, config.ffn, config.patch) == (2, 48, 24, 64, 4)
    assert (config.class_tokens, config.max_positions, config.mask_token) == (5, 36, True)
    with pytest.raises(ConfigError, match=r"--loader\.config"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"--loader\.config"):
        load(tmp_path, family="clip")


def test_radio_h_as_its_converter_names_it(tmp_path: Path) -> None:
    """Names and shapes that Megatron-LM's radio_converter.py takes; it fails at any other."""
    hidden, layers = 32, 2
    block = {
        "attn.qkv.weight": (3 * hidden, hidden), "attn.qkv.bias": (3 * hidden,), "attn.proj.weight": (hidden, hidden),
        "attn.proj.bias": (hidden,), "norm1.weight": (hidden,), "norm1.bias": (hidden,), "norm2.weight": (hidden,),
        "norm2.bias": (hidden,), "mlp.fc1.weight": (48, hidden), "mlp.fc1.bias": (48,), "mlp.fc2.weight": (hidden, 48),
        "mlp.fc2.bias": (hidden,),
    }  # fmt: skip
    shapes = {
        "model.patch_generator.embedder.weight": (hidden, 75),
        "model.patch_generator.cls_token.token": (8, hidden),
        "model.patch_generator.pos_embed": (1, 9, hidden),
        "input_conditioner.norm_mean": (3, 1, 1),
        "summary_idxs": (3,),
        **{f"model.blocks.{i}.{name}": shape for i in range(layers) for name, shape in block.items()},
    }
    save_file(random(shapes), tmp_path / WEIGHTS)
    config = load(tmp_path, family="radio-h").config
    assert (config.layers, config.heads, config.head_dim, config.patch, config.class_tokens) == (2, 16, 2, 5, 8)
    assert (config.patch_bias, config.final_norm, config.glu) == (False, False, False)


def random(shapes: dict[str, tuple[int, ...]]) -> Arrays:
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def internvit_300m(folder: Path) -> Path:
    """InternViT-300M's published layout: a LayerNorm, biases of qkv, no norm over heads."""
    folder.mkdir()
    config = config_json(GOLDEN / "internvit/src") | {
        "hidden_size": 48, "num_attention_heads": 4, "norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True,
        "torch_dtype": "float32",
    }  # fmt: skip
    layer = {
        "attn.qkv.weight": (144, 48), "attn.qkv.bias": (144,), "attn.proj.weight": (48, 48), "attn.proj.bias": (48,), "ls1": (48,),
        "ls2": (48,), "mlp.fc1.weight": (160, 48), "mlp.fc1.bias": (160,), "mlp.fc2.weight": (48, 160), "mlp.fc2.bias": (48,),
        "norm1.weight": (48,), "norm1.bias": (48,), "norm2.weight": (48,), "norm2.bias": (48,),
    }  # fmt: skip
    shapes = {
        "embeddings.class_embedding": (1, 1, 48),
        "embeddings.position_embedding": (1, 17, 48),
        "embeddings.patch_embedding.weight": (48, 3, 4, 4),
        "embeddings.patch_embedding.bias": (48,),
        **{f"encoder.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()},
    }
    save_file(random(shapes), folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_small_internvit_has_other_norms_and_biases(tmp_path: Path) -> None:
    source = internvit_300m(tmp_path / "src")
    config = load(source).config
    assert (config.norm, config.qkv_bias, config.qk_norm_full, config.heads) == ("layernorm", True, False, 4)
    convert(source, tmp_path / "dst", saver="hf")
    same(load_file(source / WEIGHTS), load_file(tmp_path / "dst" / WEIGHTS))
    assert (tmp_path / "dst/config.json").read_bytes() == (source / "config.json").read_bytes()


# dummy heads


def with_dummy_heads(folder: Path, heads: int) -> Path:
    """InternViT as NVLM-D stores it: zeros behind each of q, k and v, behind the norms over heads, and o's columns."""
    folder.mkdir()
    rows = heads * 4
    tensors = load_file(GOLDEN / "internvit/src" / WEIGHTS)
    for name, value in tensors.items():
        if name.endswith("attn.qkv.weight"):
            apart = np.zeros((3, rows, 100), value.dtype)
            apart[:, :100] = value.reshape(3, 100, 100)
            tensors[name] = apart.reshape(3 * rows, 100)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            tensors[name] = np.concatenate([value, np.zeros(rows - 100, value.dtype)])
        elif name.endswith("attn.proj.weight"):
            tensors[name] = np.concatenate([value, np.zeros((100, rows - 100), value.dtype)], 1)
    save_file(tensors, folder / WEIGHTS)
    (folder / "config.json").write_bytes((GOLDEN / "internvit/src/config.json").read_bytes())
    return folder


@pytest.mark.parametrize("heads", [26, 28, 32])
def test_dummy_heads_are_zeros_at_the_end_and_are_cut_away_again(heads: int, tmp_path: Path) -> None:
    mapping, plain = load_mapping("hf-internvit"), load(GOLDEN / "internvit/src")
    padded = load(with_dummy_heads(tmp_path / "padded", heads))
    assert (padded.config.heads, padded.config.kv_heads, padded.config.true_heads) == (heads, heads, 25)
    ours = resize_heads(plain, heads, mapping)
    same({k.name: t.numpy() for k, t in padded.tensors.items()}, {k.name: t.numpy() for k, t in ours.tensors.items()})
    assert (ours.config.heads, ours.config.kv_heads, ours.config.true_heads) == (heads, heads, 25)
    assert resize_heads(ours, 25, mapping).tensors == plain.tensors
    assert resize_heads(ours, 25, mapping).config == plain.config


def test_dummy_heads_of_a_file_stay_and_its_config_says_the_true_ones(tmp_path: Path) -> None:
    source = with_dummy_heads(tmp_path / "src", 32)
    convert(source, tmp_path / "dst", saver="hf")
    same(load_file(source / WEIGHTS), load_file(tmp_path / "dst" / WEIGHTS))
    assert config_json(tmp_path / "dst")["num_attention_heads"] == 25


def test_fewer_heads_than_the_true_ones_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"25 attention heads .* 24 of each"):
        resize_heads(load(GOLDEN / "internvit/src"), 24, load_mapping("hf-internvit"))


# what a dialect omits


@pytest.fixture
def without_norm(tmp_path: Path) -> Callable[..., Path]:
    """CLIP through Megatron, which has no place for its last norm and its projection, and back."""
    megatron = tmp_path / "megatron"
    convert(GOLDEN / "clip/src_hf", megatron, saver="mcore", tp=2)

    def back(**options: object) -> Path:
        loading = {"vision-heads": 16}
        convert(megatron, tmp_path / "back", saver="hf", saver_options=options, loader_options=loading, family="clip")
        return tmp_path / "back"

    return back


def test_template_puts_back_what_was_left_out(without_norm: Callable[..., Path]) -> None:
    back = without_norm(template=GOLDEN / "clip/src_hf")
    same(load_file(GOLDEN / "clip/src_hf" / WEIGHTS), load_file(back / WEIGHTS))
    (note,) = json.loads((back / "ckptconv.json").read_text())["about"]["notes"]
    assert "norm.weight, norm.bias, projection.weight" in note


def test_without_a_template_the_error_says_what_is_missing(without_norm: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CoverageError, match=r"(?s)missing: norm\.weight.*missing: norm\.bias.*--saver\.template"):
        without_norm(**{"config-from-args": True})
    (tmp_path / "config.json").write_bytes((GOLDEN / "clip/src_hf/config.json").read_bytes())
    with pytest.raises(CoverageError, match=r"(?s)missing: norm\.weight.*--saver\.template"):
        without_norm(template=tmp_path)


def test_template_of_another_size_is_refused(without_norm: Callable[..., Path], tmp_path: Path) -> None:
    other = make_tower(tmp_path / "other", "CLIPVisionModel", hidden_size=48)
    with pytest.raises(ConfigError, match=r"layers of its vision tower is 3, of the checkpoint's 2"):
        without_norm(template=other)
