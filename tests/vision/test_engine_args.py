"""What Megatron's args say of models with a vision tower: written, read back, and what stands on its command line."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.combine import prepare_combine
from ckptconv.config import ModelConfig
from ckptconv.dtypes import FP32
from ckptconv.executor.execute import execute
from ckptconv.huggingface.sight import read_sight
from ckptconv.layout import layout_from
from ckptconv.mapping_files import load_mapping
from ckptconv.megatron.args_multimodal import MULTIMODAL, TYPES, stated_tower, vision_type
from ckptconv.megatron.args_table import Subject
from ckptconv.megatron.args_write import write_args
from ckptconv.megatron.versions import NEWEST, Core
from ckptconv.pipeline import prepare
from ckptconv.testing.models import make_hf, make_tower
from ckptconv.topology import even
from tests.judge.judge import iteration_folder, read_rank

GOLDEN = Path(__file__).parents[1] / "golden" / "vlm"
DOCS = Path(__file__).parents[2] / "docs" / "formats" / "megatron-per-rank.md"
QUICK = ckptconv.ExecuteOptions(durable=False)


def subject(vision: dict[str, Any], language: dict[str, Any] | None = None, **more: Any) -> Subject:
    tower = ModelConfig(
        "hf-internvit",
        45,
        3200,
        32,
        32,
        128,
        12800,
        0,
        kind="vision",
        true_heads=25,
        image=448,
        patch=14,
        qk_norm_full=True,
    )
    inner = {"vision": ModelConfig(**{**{f: getattr(tower, f) for f in tower.__slots__}, **vision})}
    projector = ModelConfig("projector", 0, 8192, 0, 0, 0, 29568, 0, kind="projector", inputs=12800)
    config = ModelConfig(
        **{"family": "hf-qwen2", "layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "head_dim": 128, "ffn": 29568,
           "vocab_rows": 152064, "max_positions": 32768, "towers": {**inner, "projector": projector}, **(language or {})}
    )  # fmt: skip
    return Subject(config, even(config.layers), Core(NEWEST), FP32, 128, **more)


def args(*given: Any, **more: Any) -> dict[str, Any]:
    return dict(vars(write_args(subject(*given, **more))))


# what the NVLM recipe gives on its command line (examples/multimodal/nvlm/pretrain_qwen20_72b_internvit_6b.sh)
NVLM = {
    "language_model_type": "qwen2.0_72B",
    "vision_model_type": "internvit",
    "img_h": 448,
    "img_w": 448,
    "patch_dim": 14,
    "pixel_shuffle": True,
    "disable_vision_class_token": True,
    "image_tag_type": "nvlm",
    # and sft_qwen20_72b_internvit_6b.sh
    "use_tiling": True,
    "max_num_tiles": 6,
    "use_thumbnail": True,
    "use_tile_tags": True,
}


def test_args_of_nvlm_are_what_its_recipe_says() -> None:
    raw = {"model_type": "NVLM_D", "dynamic_image_size": True, "max_dynamic_patch": 6, "use_thumbnail": True}
    found = args({"class_tokens": 1}, read_sight(raw, "config.json", load_mapping("hf-nvlm")))
    assert {name: found[name] for name in NVLM} == NVLM


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"layers": 32, "hidden": 4096, "ffn": 14336, "vocab_rows": 32768}, "mistral_7b"),
        ({"layers": 32, "hidden": 4096, "ffn": 14336, "vocab_rows": 128256}, "llama3_8b"),
        ({"layers": 60, "hidden": 7168, "ffn": 20480, "vocab_rows": 64000}, "yi-34b"),
        ({"layers": 28, "hidden": 3584, "ffn": 18944, "vocab_rows": 152064}, "qwen2.5_7B"),
        ({"layers": 4, "hidden": 64, "ffn": 96, "vocab_rows": 131}, None),
    ],
)
def test_language_models_of_the_example_are_known_by_their_sizes(sizes: dict[str, Any], expected: str | None) -> None:
    assert args({}, sizes)["language_model_type"] == expected


def test_a_language_models_own_image_size_is_not_taken_for_the_towers() -> None:
    """All of Megatron's args have img_h and patch_dim; only those that name a vision model mean them."""
    carried = {"img_h": 224, "pixel_shuffle": False, "max_num_tiles": 12}
    found = args({}, carried=carried)
    assert (found["img_h"], found["pixel_shuffle"], found["max_num_tiles"]) == (448, True, 1)
    found = args({}, carried={**carried, "vision_model_type": "internvit", "language_model_type": "qwen2.5_72B"})
    assert (found["img_h"], found["language_model_type"], found["max_num_tiles"]) == (448, "qwen2.5_72B", 12)


def test_language_models_alone_have_none_of_these() -> None:
    assert not {field.name for field in MULTIMODAL} & vars(write_args(subject({}, {"towers": {}}))).keys()


def tower_of(name: str, **other: Any) -> ModelConfig:
    """The tower that Megatron's example builds by a name, but for what is other."""
    known = asdict(TYPES[name])
    heads = known["heads"]
    raw = {"hidden_act": known["activation"]}
    return ModelConfig(
        **{**known, "kv_heads": heads, "head_dim": 4, "vocab_rows": 0, "kind": "vision", "raw": raw, **other}
    )


@pytest.mark.parametrize("name", TYPES)
def test_types_are_read_as_they_are_written(name: str) -> None:
    tower = tower_of(name)
    assert vision_type(tower) == name
    assert stated_tower({"vision_model_type": name}) == (tower.family, tower.heads)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("clip", {"layers": 32, "hidden": 1280, "ffn": 5120, "activation": "gelu"}),  # ViT-H
        ("clip", {"activation": "gelu"}),
        ("siglip", {"layers": 24, "hidden": 1024, "ffn": 4096}),
        ("siglip", {"heads": 12}),
        ("internvit", {"layers": 48}),
        ("radio-g", {"ffn": 6144}),
    ],
)
def test_a_tower_that_the_example_would_build_otherwise_has_no_type(name: str, other: dict[str, Any]) -> None:
    assert vision_type(tower_of(name, **other)) is None
    vision = asdict(tower_of(name, **other)) | {"towers": {}, "true_heads": None}
    written = args(vision, carried={"vision_model_type": name})
    assert written["vision_model_type"] is None
    assert stated_tower(written) == (vision["family"], vision["heads"])
    assert args(vision, carried={"vision_model_type": "hf://mine"})["vision_model_type"] == "hf://mine"


def test_files_of_megatron_do_not_tell_the_activation() -> None:
    assert vision_type(tower_of("clip", activation="gelu", raw={})) == "clip"


def test_heads_that_megatron_does_not_mean_have_no_type() -> None:
    assert vision_type(tower_of("clip", heads=4)) is None
    assert stated_tower({"vision_model_type": "pixtral-vit"}) is None
    assert stated_tower({}) is None


def test_every_field_is_documented() -> None:
    text = DOCS.read_text()
    assert [f.name for f in MULTIMODAL if f"| `{f.name}` | {f.since[0]}.{f.since[1]} | {f.origin} |" not in text] == []


def test_what_args_say_is_enough_to_read_a_model_of_ours_again(tmp_path: Path) -> None:
    """InternViT with its 25 heads, which are 26 at tp 2: known from args alone."""
    language = make_hf(tmp_path / "lm", "qwen2")
    job = ckptconv.Job(language, saver="mcore", layout=layout_from({"tp": 2}, None))
    execute(prepare_combine(job, ckptconv.Job(GOLDEN / "internvit/src")).plan, tmp_path / "out", QUICK)
    written = read_rank(iteration_folder(tmp_path / "out") / "mp_rank_00" / "model_optim_rng.pt")["args"]
    assert isinstance(written, argparse.Namespace)
    assert (written.vision_model_type, written.img_h, written.patch_dim) == (None, 16, 4)  # which is 3200 wide
    assert (written.vision_family, written.vision_attention_heads) == ("hf-internvit", 25)
    tower = ckptconv.load(tmp_path / "out").config.towers["vision"]
    assert (tower.family, tower.heads, tower.true_heads) == ("hf-internvit", 26, 25)


def usage(job: ckptconv.Job, dst: str = "/out dir") -> list[str]:
    return prepare(job).usage(dst).splitlines()


def test_usage_of_a_tower_names_the_next_step() -> None:
    job = ckptconv.Job(GOLDEN / "internvit/src", saver="mcore", layout=layout_from({"tp": 8}, None))
    said = " ".join(usage(job))
    assert "A vision tower (none that Megatron-LM's example has a --vision-model-type for)" in said
    assert "ckptconv combine LM '/out dir' DST --saver mcore --tp 8" in said
    assert "pretrain_gpt" not in said


def test_usage_of_a_multimodal_model_is_for_its_script(tmp_path: Path) -> None:
    language, tower = make_hf(tmp_path / "lm", "mistral"), make_tower(tmp_path / "vision", "CLIPVisionModel")
    prepared = prepare_combine(ckptconv.Job(language, saver="mcore"), ckptconv.Job(tower))
    head, *lines = prepared.usage("/out").splitlines()
    flags = [line for line in lines if not line.startswith("note:")]
    assert any("no --vision-model-type for this tower (hf-clip: 3 layers, width 64, 4 heads" in line for line in lines)
    assert "examples/multimodal/train.py" in head
    words = shlex.split(" ".join(flags))
    value = {flag: words[i + 1] for i, flag in enumerate(words[:-1]) if flag.startswith("--")}
    assert (value["--img-h"], value["--patch-dim"], value["--num-layers"]) == ("20", "4", "4")
    assert (value["--vision-model-type"], value["--language-model-type"]) == (
        "TYPE",
        "TYPE",
    )  # no such sizes in the example
    assert {"--disable-vision-class-token", "--use-te", "--allow-missing-vision-projection-checkpoint"} <= set(words)
    assert "--pixel-shuffle" not in words
