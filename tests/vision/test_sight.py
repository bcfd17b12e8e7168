"""How a model sees images (layer, class token, tiles, token) through changes of family and format; transformers judges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptconv.combine import prepare_combine, prepare_extract, prepare_swap
from ckptconv.errors import ConfigError, UsageError
from ckptconv.executor.execute import execute
from ckptconv.layout import layout_from
from ckptconv.pipeline import Job, Prepared, convert, load, prepare
from ckptconv.testing.models import make_hf, make_tower, make_whole, whole_logits
from tests.vision.arrays import config_json

NVLM = Path(__file__).parents[1] / "golden" / "vlm" / "nvlm_d"
NVLM_FAMILY = "nvlm(internvit,qwen2)"


def saying(source: Path, target: Path, **said: Any) -> Path:
    """The same folder with other things said of it; None takes a key away."""
    shutil.copytree(source, target)
    table = {key: value for key, value in {**config_json(source), **said}.items() if value is not None}
    (target / "config.json").write_text(json.dumps(table))
    return target


def to_hf(source: Path, **options: Any) -> Prepared:
    return prepare(Job(source, saver="hf", saver_options=options))


def written(prepared: Prepared, folder: Path) -> dict[str, Any]:
    execute(prepared.plan, folder)
    return config_json(folder)


def told(prepared: Prepared) -> str:
    return "\n".join([*prepared.plan.about.get("config_changes", []), *prepared.plan.about.get("format_notes", [])])  # type: ignore[misc]


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sight")
    make_whole(place / "internvl", "InternVL", vision_feature_layer=-3)
    make_whole(place / "llava", "Llava", vision_feature_layer=-1, vision_feature_select_strategy="full")
    make_tower(place / "siglip", "SiglipVisionModel")
    make_hf(place / "lm", "llama", hidden_size=48, head_dim=16)
    return place


def test_internvl_sees_the_same_layer_in_the_words_of_both(sources: Path, tmp_path: Path) -> None:
    chat = written(to_hf(sources / "internvl", family="internvl-chat"), tmp_path / "chat")
    assert (chat["select_layer"], chat["force_image_size"], chat["ps_version"]) == (-3, 24, "v2")
    back = written(to_hf(tmp_path / "chat", family="internvl", **{"image-token": 130}), tmp_path / "back")
    assert (back["vision_feature_layer"], back["vision_feature_select_strategy"]) == (-3, "default")
    assert back["image_seq_length"] == 9  # of 6 x 6 patches
    logits = whole_logits(sources / "internvl", "InternVL")
    assert np.array_equal(whole_logits(tmp_path / "back", "InternVL"), logits)
    last = saying(sources / "internvl", tmp_path / "last", vision_feature_layer=-1)
    assert not np.allclose(whole_logits(last, "InternVL"), logits)


def test_what_the_class_takes_is_not_what_is_usual(sources: Path, tmp_path: Path) -> None:
    """InternVLChatConfig without these keys: no tiles, at most 6, and patches that lie by columns."""
    convert(sources / "internvl", tmp_path / "chat", saver="hf", saver_options={"family": "internvl-chat"})
    silent = saying(
        tmp_path / "chat", tmp_path / "silent", dynamic_image_size=None, max_dynamic_patch=None, use_thumbnail=None
    )
    config = load(silent).config
    assert (config.tiling, config.min_tiles, config.max_tiles, config.thumbnail) == (False, 1, 6, False)
    with pytest.raises(ConfigError, match=r"(?s)hf-internvl.*shuffle is 'columns', this family has 'rows'"):
        to_hf(saying(tmp_path / "chat", tmp_path / "v1", ps_version=None), family="internvl")


def test_tiles_of_nvlm_are_internvls_and_its_own_words_are_told(tmp_path: Path) -> None:
    for part in ("lm", "vision"):
        execute(prepare_extract(Job(NVLM, saver="hf"), part).plan, tmp_path / part)
    chat = Job(tmp_path / "lm", saver="mcore")
    other = prepare_combine(chat, Job(tmp_path / "vision"), kind="internvl", init_projector="normal:0.02:1")
    execute(other.plan, tmp_path / "other")  # with a projector that InternVL's class builds
    job = Job(NVLM, saver="hf", saver_options={"family": "internvl-chat"})
    prepared = prepare_swap(job, Job(tmp_path / "other"), "projector")
    table = written(prepared, tmp_path / "chat")
    assert (table["max_dynamic_patch"], table["force_image_size"], table["use_thumbnail"]) == (6, 16, True)
    for line in ("template: 'chatml' -> 'internvl2_5'", "tile_tags is True", "image_tags is 'nvlm'"):
        assert line in told(prepared)
    assert told(to_hf(NVLM)) == ""


def test_tiles_that_a_family_has_no_word_for_are_told(sources: Path, tmp_path: Path) -> None:
    convert(sources / "internvl", tmp_path / "chat", saver="hf", saver_options={"family": "internvl-chat"})
    source = saying(tmp_path / "chat", tmp_path / "tiles", max_dynamic_patch=40, use_thumbnail=False)
    prepared = to_hf(source, family="internvl", **{"image-token": 130})
    for line in ("max_tiles is 40", "thumbnail is False", "tiling is True"):
        assert f"{line}, {prepared.stored.mapping.name} has no word for it" in told(prepared)


def test_a_model_with_another_tower_sees_as_before(sources: Path, tmp_path: Path) -> None:
    job = Job(sources / "llava", saver="hf")
    table = written(prepare_swap(job, Job(sources / "siglip"), "vision", kind="llava"), tmp_path / "swapped")
    assert (table["vision_feature_layer"], table["vision_feature_select_strategy"]) == (-1, "full")
    assert table["image_token_index"] == 130


def test_a_tower_without_class_token_loses_no_patch(sources: Path, tmp_path: Path) -> None:
    """transformers drops the first entry of SigLIP too, if told to."""
    import torch
    import transformers

    job = Job(sources / "lm", saver="hf", saver_options={"image-token": 130})
    made = prepare_combine(job, Job(sources / "siglip"), kind="llava", init_projector="normal:0.02:7")
    table = written(made, tmp_path / "vlm")
    assert (table["vision_feature_layer"], table["vision_feature_select_strategy"]) == (-2, "full")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "vlm", dtype=torch.float32)
    with torch.no_grad():
        ids = torch.tensor([[130] * table["image_seq_length"] + [1]])
        assert model(input_ids=ids, pixel_values=torch.zeros(1, 3, 20, 20)).logits.shape == (1, 26, 131)


def test_sizes_of_images_are_the_towers(tmp_path: Path) -> None:
    for part in ("lm", "vision"):
        execute(prepare_extract(Job(NVLM, saver="hf"), part).plan, tmp_path / part)
    made = prepare_combine(Job(tmp_path / "lm", saver="hf"), Job(tmp_path / "vision"), Job(NVLM), kind="nvlm")
    table = written(made, tmp_path / "nvlm")
    assert (table["force_image_size"], table["max_dynamic_patch"]) == (16, 6)


# Megatron's args


def without_hf(source: Path, folder: Path) -> Path:
    """Megatron's files alone, as its own runs leave them."""
    convert(source, folder, saver="mcore", tp=2, pp=2)
    shutil.rmtree(folder / "hf")
    return folder


def test_tiles_that_args_say_are_written(tmp_path: Path) -> None:
    source = saying(NVLM, tmp_path / "src", max_dynamic_patch=9, use_thumbnail=False)
    trained = without_hf(source, tmp_path / "mcore")
    table = written(to_hf(trained, family=NVLM_FAMILY), tmp_path / "back")
    seen = [table[k] for k in ("dynamic_image_size", "max_dynamic_patch", "use_thumbnail", "select_layer")]
    assert seen == [True, 9, False, -1]


def test_megatron_sees_the_last_layer_and_says_so(tmp_path: Path) -> None:
    source = make_whole(tmp_path / "llava", "Llava")
    note = "the projector takes layer -2 of the tower: Megatron-LM's multimodal example gives it the last"
    prepared = prepare(Job(source, saver="mcore", layout=layout_from({"tp": 2}, None)))
    assert note in told(prepared)
    assert f"note: {note}" in prepared.usage("/out")
    trained = without_hf(source, tmp_path / "mcore")
    table = written(to_hf(trained, template=source), tmp_path / "back")
    assert (table["vision_feature_layer"], table["vision_feature_select_strategy"]) == (-1, "default")
    convert(source, tmp_path / "kept", saver="mcore", tp=2)
    assert config_json(tmp_path / "kept" / "hf")["vision_feature_layer"] == -2


def test_a_templates_tiles_and_token_go_before_the_args(tmp_path: Path) -> None:
    source = saying(NVLM, tmp_path / "src", max_dynamic_patch=9)
    prepared = to_hf(without_hf(source, tmp_path / "mcore"), template=NVLM)
    assert written(prepared, tmp_path / "back") == config_json(NVLM)
    assert "max_tiles: 6 as in the template, the checkpoint says 9" in told(prepared)


def test_args_of_a_wrong_type_are_refused() -> None:
    from ckptconv.megatron.args_multimodal import stated_sight

    named = {"vision_model_type": "clip"}
    with pytest.raises(ConfigError, match=r"here: args.use_tiling is 1, expected a value of type bool"):
        stated_sight({**named, "use_tiling": 1}, "here")
    assert stated_sight({"use_tiling": 1}, "here") == {}


# the image token


@pytest.mark.parametrize(("token", "error"), [(-1, "0 or more"), (131, "only 131 rows")])
def test_an_image_token_is_a_row_of_the_embedding(sources: Path, token: int, error: str) -> None:
    with pytest.raises((UsageError, ConfigError), match=error):
        to_hf(sources / "llava", **{"image-token": token})
