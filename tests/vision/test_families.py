"""Vision-language models in Hugging Face folders: transformers judges LLaVA and InternVL; NVLM-D is held against its published layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ckptconv.combine import prepare_extract
from ckptconv.errors import ConfigError, CoverageError
from ckptconv.executor.execute import execute
from ckptconv.pipeline import Job, convert, load
from ckptconv.testing.models import WHOLE, make_whole, whole_logits
from tests.vision.arrays import config_json, same

NVLM = Path(__file__).parents[1] / "golden" / "vlm" / "nvlm_d"  # made by hand after the published layout: no tool can
WEIGHTS = "model.safetensors"
Rename = Callable[[str], str]


def changed(source: Path, target: Path, *, rename: Rename = str, **config: Any) -> Path:
    """The same folder with other names, or other things said."""
    target.mkdir()
    save_file({rename(name): value for name, value in load_file(source / WEIGHTS).items()}, target / WEIGHTS)
    said = {k: v for k, v in {**config_json(source), **config}.items() if v is not None}
    (target / "config.json").write_text(json.dumps(said, indent=2) + "\n")
    return target


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("whole")
    return {"NVLM_D": NVLM, **{kind: make_whole(place / kind, kind) for kind in WHOLE}}


@pytest.mark.parametrize("kind", ["NVLM_D", *WHOLE])
def test_through_megatron_and_back(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source, megatron, back = sources[kind], tmp_path / "megatron", tmp_path / "back"
    convert(source, megatron, saver="mcore", tp=2, pp=2)
    convert(megatron, back, saver="hf", saver_options={"template": source})
    same(load_file(source / WEIGHTS), load_file(back / WEIGHTS))
    assert (source / "config.json").read_bytes() == (back / "config.json").read_bytes()
    if kind != "NVLM_D":
        assert np.array_equal(whole_logits(source, kind), whole_logits(back, kind))


@pytest.mark.parametrize("kind", ["NVLM_D", *WHOLE])
def test_written_again_it_is_the_same_folder(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    convert(sources[kind], tmp_path / "again", saver="hf")
    for name in ("config.json", WEIGHTS):
        assert (sources[kind] / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_names_of_older_and_newer_transformers(sources: dict[str, Path], tmp_path: Path) -> None:
    """As 4.51 and before name them on disk, and as modules are called in memory, which some versions saved."""
    inside = {"language_model.lm_head": "lm_head", "language_model.model": "model.language_model"}

    def memory(name: str) -> str:
        for old, new in inside.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return f"model.{name}"

    plain = load_file(sources["Llava"] / WEIGHTS)
    older = changed(
        sources["Llava"], tmp_path / "older", rename=lambda n: n.replace("vision_tower.", "vision_tower.vision_model.")
    )
    named = changed(sources["Llava"], tmp_path / "memory", rename=memory)
    for source in (older, named):
        convert(source, tmp_path / f"{source.name}-new", saver="hf", saver_options={"prefix": ""})
        same(plain, load_file(tmp_path / f"{source.name}-new" / WEIGHTS))
    convert(sources["Llava"], tmp_path / "to-older", saver="hf", saver_options={"prefix": "vision_model."})
    same(load_file(older / WEIGHTS), load_file(tmp_path / "to-older" / WEIGHTS))
    assert np.array_equal(whole_logits(sources["Llava"], "Llava"), whole_logits(tmp_path / "to-older", "Llava"))


def test_a_section_may_leave_out_what_its_class_takes_anyway(sources: dict[str, Path], tmp_path: Path) -> None:
    """llava-1.5-7b-hf says four things of its language model; the rest is LlamaConfig's."""
    from transformers import LlavaConfig

    said = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    (tmp_path / "short").mkdir()
    (tmp_path / "short/config.json").write_text(json.dumps({"model_type": "llava", "text_config": said}))
    expected = LlavaConfig.from_pretrained(tmp_path / "short")
    from ckptconv.huggingface.family_config import family_of, read_config
    from ckptconv.mapping_files import families

    raw = config_json(tmp_path / "short")
    config = read_config(raw, "config.json", family_of(raw, families()))
    text, vision = expected.text_config, expected.vision_config
    ours = (config.layers, config.hidden, config.heads, config.ffn, config.vocab_rows, config.norm_eps)
    sizes = (
        text.num_hidden_layers,
        text.hidden_size,
        text.num_attention_heads,
        text.intermediate_size,
        text.vocab_size,
    )
    assert ours == (*sizes, text.rms_norm_eps)
    tower = config.towers["vision"]
    theirs = (vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads, vision.intermediate_size)
    assert (tower.layers, tower.hidden, tower.heads, tower.ffn) == theirs
    assert (tower.image, tower.patch) == (vision.image_size, vision.patch_size)


def test_tied_embeddings_said_of_the_whole_model_alone(tmp_path: Path) -> None:
    source = make_whole(tmp_path / "src", "InternVL", tie_word_embeddings=True)
    assert config_json(source)["text_config"]["tie_word_embeddings"] is False
    assert load(source).config.tied
    convert(source, tmp_path / "mcore", saver="mcore", tp=2, pp=2)
    convert(tmp_path / "mcore", tmp_path / "back", saver="hf", saver_options={"template": source})
    same(load_file(source / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS))


def test_without_a_template_the_end_of_rows_is_missed(sources: dict[str, Path], tmp_path: Path) -> None:
    convert(sources["LlavaNext"], tmp_path / "mcore", saver="mcore")
    with pytest.raises(CoverageError, match=r"(?s)vision\.norm\.weight.*--saver\.template"):
        convert(tmp_path / "mcore", tmp_path / "back", saver="hf")


# NVLM-D and InternVL's own code


def test_language_model_of_nvlm_is_what_its_class_says() -> None:
    config = load(NVLM).config
    assert (config.family, config.qkv_bias) == ("hf-nvlm(hf-internvit,hf-qwen2)", True)
    tower, projector = config.towers["vision"], config.towers["projector"]
    assert (tower.heads, tower.true_heads) == (32, 25)
    assert (projector.inputs, projector.ffn, projector.mlp_bias, projector.pre_norm) == (4 * 100, 96, False, True)


@pytest.mark.parametrize("family", ["internvl-chat", "internvl"])
def test_nvlms_projector_is_not_internvls(family: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"the projector's ffn is 96, its class builds one with 64 \(the language model's hidden\)"
    ):
        convert(NVLM, tmp_path / "out", saver="hf", saver_options={"family": family, "image-token": 1})


def test_nvlm_gets_its_dummy_heads_and_internvit_none(tmp_path: Path) -> None:
    convert(NVLM, tmp_path / "mcore", saver="mcore", tp=4)
    assert load(tmp_path / "mcore").config.towers["vision"].heads == 28
    convert(tmp_path / "mcore", tmp_path / "nvlm", saver="hf")
    same(load_file(NVLM / WEIGHTS), load_file(tmp_path / "nvlm" / WEIGHTS))
    execute(prepare_extract(Job(NVLM, saver="hf"), "vision").plan, tmp_path / "tower")
    qkv = "encoder.layers.0.attn.qkv.weight"
    before, after = load_file(NVLM / WEIGHTS)[f"vision_model.{qkv}"], load_file(tmp_path / "tower" / WEIGHTS)[qkv]
    assert np.array_equal(before.reshape(3, 32 * 4, 100)[:, :100].reshape(300, 100), after)


def test_settings_of_tiles_and_tags_travel(tmp_path: Path) -> None:
    said: dict[str, Any] = {"max_dynamic_patch": 9, "use_thumbnail": False, "template": "mine", "downsample_ratio": 0.5}
    source = changed(NVLM, tmp_path / "src", **said)
    convert(source, tmp_path / "mcore", saver="mcore", tp=2, pp=4)
    convert(tmp_path / "mcore", tmp_path / "back", saver="hf")
    back = config_json(tmp_path / "back")
    assert {key: back[key] for key in said} == said


def test_mixed_dtypes_stay_and_a_cast_is_said(tmp_path: Path) -> None:
    convert(NVLM, tmp_path / "kept", saver="hf")
    assert config_json(tmp_path / "kept")["torch_dtype"] == "bfloat16"
    convert(NVLM, tmp_path / "cast", saver="hf", dtype="fp32")
    table = config_json(tmp_path / "cast")
    assert {table["torch_dtype"], table["llm_config"]["torch_dtype"], table["vision_config"]["torch_dtype"]} == {
        "float32"
    }


def test_internvl_of_its_authors_and_of_transformers(sources: dict[str, Path], tmp_path: Path) -> None:
    """One model in the names of both: OpenGVLab's qkv is one tensor, transformers' are three."""
    convert(sources["InternVL"], tmp_path / "chat", saver="hf", saver_options={"family": "internvl-chat"})
    chat, native = load_file(tmp_path / "chat" / WEIGHTS), load_file(sources["InternVL"] / WEIGHTS)
    parts = [native[f"vision_tower.encoder.layer.1.attention.{p}_proj.weight"] for p in "qkv"]
    assert np.array_equal(chat["vision_model.encoder.layers.1.attn.qkv.weight"], np.concatenate(parts))
    assert np.array_equal(chat["mlp1.1.weight"], native["multi_modal_projector.linear_1.weight"])
    with pytest.raises(ConfigError, match=r"image_token_id is 151667, but the embedding has only 131 rows"):
        convert(tmp_path / "chat", tmp_path / "native", saver="hf", saver_options={"family": "internvl"})
    convert(
        tmp_path / "chat", tmp_path / "native", saver="hf", saver_options={"family": "internvl", "image-token": 130}
    )
    same(native, load_file(tmp_path / "native" / WEIGHTS))
    assert np.array_equal(whole_logits(sources["InternVL"], "InternVL"), whole_logits(tmp_path / "native", "InternVL"))


# LLaVA of its authors


def authors(sources: dict[str, Path], folder: Path, *, tower: bool) -> Path:
    """The published layout: Llama's names and a projector; the tower, if it was trained, under the names of its wrapper."""
    beginnings = {
        "language_model.": "",
        "multi_modal_projector.linear_1": "model.mm_projector.0",
        "multi_modal_projector.linear_2": "model.mm_projector.2",
        "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    }
    table = config_json(sources["Llava"])
    folder.mkdir()
    weights = {}
    for name, value in load_file(sources["Llava"] / WEIGHTS).items():
        old = next(b for b in beginnings if name.startswith(b))
        if tower or old != "vision_tower.":
            weights[beginnings[old] + name.removeprefix(old)] = value
    save_file(weights, folder / WEIGHTS)
    said = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    }
    (folder / "config.json").write_text(json.dumps({**table["text_config"], **said}))
    return folder


def test_llava_of_its_authors_without_the_tower(sources: dict[str, Path], tmp_path: Path) -> None:
    source = authors(sources, tmp_path / "src", tower=False)
    config = load(source).config
    assert (config.family, list(config.towers)) == ("hf-llava-liuhaotian(hf-llama,clip-in-llava)", ["projector"])
    convert(source, tmp_path / "again", saver="hf")
    same(load_file(source / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS))
    assert config_json(source) == config_json(tmp_path / "again")
    with pytest.raises(ConfigError, match=r"projector and vision, this model has projector"):
        convert(source, tmp_path / "hf", saver="hf", saver_options={"family": "llava(llama,clip)"})


def test_llava_of_its_authors_with_the_tower_becomes_that_of_transformers(tmp_path: Path) -> None:
    """Nothing but tensors tells how large the tower is."""
    tower = {"model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3}
    tower |= {"num_attention_heads": 2, "image_size": 336, "patch_size": 84}
    whole = make_whole(tmp_path / "whole", "Llava", vision_config=tower)
    source = authors({"Llava": whole}, tmp_path / "src", tower=True)
    found = load(source).config.towers["vision"]
    assert (found.layers, found.hidden, found.heads, found.ffn, found.patch, found.max_positions) == (
        3,
        128,
        2,
        96,
        84,
        17,
    )
    convert(
        source,
        tmp_path / "hf",
        saver="hf",
        saver_options={"family": "llava(llama,clip)", "image-token": 130, "prefix": ""},
    )
    same(load_file(whole / WEIGHTS), load_file(tmp_path / "hf" / WEIGHTS))
    made, wanted = (config_json(folder)["vision_config"] for folder in (tmp_path / "hf", whole))
    assert {key: made[key] for key in tower} == {key: wanted[key] for key in tower}
    convert(source, tmp_path / "mcore", saver="mcore", tp=2)
    convert(
        tmp_path / "mcore",
        tmp_path / "back",
        saver="hf",
        saver_options={"template": source},
        loader_options={"vision-heads": 2},
    )
    same(load_file(source / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS))


def test_llava_of_its_authors_and_of_transformers_see_the_same(tmp_path: Path) -> None:
    tower = {"model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3}
    tower |= {"num_attention_heads": 2, "image_size": 336, "patch_size": 84}
    seen: dict[str, Any] = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    whole = make_whole(tmp_path / "whole", "Llava", vision_config=tower, **seen)
    said: dict[str, Any] = {"mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"}
    source = changed(authors({"Llava": whole}, tmp_path / "src", tower=True), tmp_path / "saying", **said)
    options = {"family": "llava(llama,clip)", "image-token": 130}
    convert(source, tmp_path / "hf", saver="hf", saver_options=options)
    made = config_json(tmp_path / "hf")
    assert {key: made[key] for key in seen} == seen
    assert made["image_seq_length"] == 17  # 4 x 4 patches and the class token
    convert(
        tmp_path / "hf",
        tmp_path / "back",
        saver="hf",
        saver_options={"family": "llava-liuhaotian(llama,clip-in-llava)"},
    )
    assert {key: config_json(tmp_path / "back")[key] for key in said} == said
