"""What lies beside the weights when parts are joined, swapped or taken out: configs, vocabulary, tokenizers, notes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from ckptconv.combine import prepare_combine, prepare_extract, prepare_swap
from ckptconv.errors import ConfigError, UsageError
from ckptconv.executor.execute import execute
from ckptconv.layout import layout_from
from ckptconv.pipeline import Job, Prepared, convert, load
from ckptconv.testing.models import WHOLE, make_hf, make_tower, make_whole
from tests.vision.arrays import atoms, config_json, same

NVLM = Path(__file__).parents[1] / "golden" / "vlm" / "nvlm_d"
WEIGHTS = "model.safetensors"
NORMAL = "normal:0.02:7"
OF_LANGUAGE = ("tokenizer.model", "tokenizer_config.json", "generation_config.json")
OF_TOWER = ("preprocessor_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("parts")
    make_hf(place / "lm", "llama")
    text = {**WHOLE["Llava"]["text_config"], "num_hidden_layers": 5}
    make_whole(place / "deeper", "Llava", seed=5, text_config=text)
    make_tower(place / "clip", "CLIPVisionModel")
    make_whole(place / "llava", "Llava")
    for folder, names in (("lm", OF_LANGUAGE), ("clip", OF_TOWER)):
        for name in names:
            (place / folder / name).write_text(json.dumps({"of": folder}))
    return place


def write(prepared: Prepared, path: Path) -> Path:
    execute(prepared.plan, path)
    return path


def to(saver: str, source: Path, *, tp: int = 1, **said: Any) -> Job:
    return Job(source, saver=saver, layout=layout_from({"tp": tp} if tp > 1 else {}, None), **said)


def notes(prepared: Prepared) -> str:
    return "\n".join(prepared.stored.extras.notes)


def test_padding_of_a_megatron_language_model_does_not_become_vocabulary(parts: Path, tmp_path: Path) -> None:
    convert(parts / "lm", tmp_path / "lm", saver="mcore", tp=2)
    assert load(tmp_path / "lm").config.vocab_rows == 256
    made = prepare_combine(to("mcore", tmp_path / "lm", tp=2), Job(parts / "clip"), kind="llava", init_projector=NORMAL)
    vlm = write(made, tmp_path / "vlm")
    assert config_json(vlm / "hf")["text_config"]["vocab_size"] == 131
    lm = write(prepare_extract(to("hf", vlm), "lm"), tmp_path / "again")
    same(load_file(parts / "lm" / WEIGHTS), load_file(lm / WEIGHTS))
    assert config_json(lm)["vocab_size"] == 131


def test_tokenizer_is_the_language_models_and_the_processor_the_towers(parts: Path, tmp_path: Path) -> None:
    job = to("hf", parts / "lm", saver_options={"image-token": 130})
    joined = prepare_combine(job, Job(parts / "clip"), kind="llava", init_projector=NORMAL)
    assert "left behind in the vision tower's folder: merges.txt, special_tokens_map.json, vocab.json" in notes(joined)
    made = write(joined, tmp_path / "vlm")
    for name in (*OF_LANGUAGE, OF_TOWER[0]):
        assert json.loads((made / name).read_text())["of"] == ("clip" if name == OF_TOWER[0] else "lm")
    assert not [name for name in OF_TOWER[1:] if (made / name).exists()]
    for part, there, gone in (("lm", OF_LANGUAGE, OF_TOWER[:1]), ("vision", OF_TOWER[:1], OF_LANGUAGE)):
        prepared = prepare_extract(to("hf", made), part)
        assert f"left behind in the whole model's folder: {', '.join(sorted(gone))}" in notes(prepared)
        alone = write(prepared, tmp_path / part)
        assert all((alone / name).exists() for name in there)
        assert not any((alone / name).exists() for name in gone)


def test_config_of_the_tower_does_not_pass_for_that_of_the_model(parts: Path, tmp_path: Path) -> None:
    """A language model of unknown family, as official tools write it: no config.json of the whole can be made, and none is."""
    convert(parts / "lm", tmp_path / "lm", saver="mcore", tp=2)
    for path in sorted((tmp_path / "lm" / "hf").iterdir()):
        path.unlink()
    made = prepare_combine(to("mcore", tmp_path / "lm", tp=2), Job(parts / "clip"), kind="llava", init_projector=NORMAL)
    assert "no config.json travels along of hf-llava: which family the language model is of is not known" in notes(made)
    vlm = write(made, tmp_path / "vlm")
    assert not (vlm / "hf" / "config.json").exists()
    options = {"vision-heads": 4}
    convert(vlm, tmp_path / "one", tp=1, loader_options=options)
    same(atoms(vlm, loader_options=options), atoms(tmp_path / "one", loader_options=options))
    named = replace(to("mcore", tmp_path / "lm", tp=2), family="llama", vocab_size=131)
    told = write(prepare_combine(named, Job(parts / "clip"), kind="llava", init_projector=NORMAL), tmp_path / "told")
    assert config_json(told / "hf")["model_type"] == "llava"
    same(atoms(vlm, loader_options=options, vocab_size=131), atoms(told))


def test_parts_in_megatron_files_have_their_own_configs(parts: Path, tmp_path: Path) -> None:
    for part in ("lm", "vision"):
        direct = write(prepare_extract(to("hf", parts / "llava"), part), tmp_path / f"{part}-direct")
        ranks = write(prepare_extract(to("mcore", parts / "llava", tp=2), part), tmp_path / part)
        again = tmp_path / f"{part}-again"
        convert(ranks, again, saver="hf", saver_options={"template": direct} if part == "vision" else {})
        same(load_file(direct / WEIGHTS), load_file(again / WEIGHTS))
        assert config_json(again) == config_json(direct)


def test_swapped_language_model_leaves_the_model_what_it_was(tmp_path: Path) -> None:
    lm = write(prepare_extract(to("hf", NVLM), "lm"), tmp_path / "lm")
    convert(NVLM, tmp_path / "ranks", saver="mcore", tp=2)
    swapped = write(prepare_swap(to("mcore", tmp_path / "ranks", tp=2), Job(lm), "lm"), tmp_path / "swapped")
    assert config_json(swapped / "hf") == config_json(tmp_path / "ranks" / "hf")
    again = tmp_path / "hf"
    convert(swapped, again, saver="hf")
    same(load_file(NVLM / WEIGHTS), load_file(again / WEIGHTS))
    assert config_json(again) == config_json(NVLM)


def test_swapped_parts_of_other_sizes_are_in_the_config(parts: Path, tmp_path: Path) -> None:
    for saver, beside in (("hf", ""), ("mcore", "hf")):
        made = write(prepare_swap(to(saver, parts / "llava"), Job(parts / "deeper"), "lm"), tmp_path / saver)
        table = config_json(made / beside)
        assert (table["model_type"], table["text_config"]["num_hidden_layers"]) == ("llava", 5)
        assert load(made).config.layers == 5


def test_swap_says_what_it_needs_to_know(parts: Path) -> None:
    with pytest.raises(UsageError, match="--replace lm: the new one is of another family; --as says"):
        prepare_swap(to("hf", NVLM), Job(parts / "lm"), "lm")
    with pytest.raises(UsageError, match=r"--lm.dtype beside --replace vision: only the new part is cast"):
        prepare_swap(to("hf", parts / "llava"), Job(parts / "clip"), "vision", dtypes={"lm": "fp16", "vision": "keep"})
    with pytest.raises(ConfigError, match="only be swapped in a model with a vision tower: this one has lm"):
        prepare_swap(to("hf", parts / "lm"), Job(parts / "clip"), "vision")


def test_a_new_projector_is_finite(parts: Path) -> None:
    with pytest.raises(UsageError, match="expected zeros, or normal:STD:SEED"):
        prepare_combine(to("mcore", parts / "lm"), Job(parts / "clip"), kind="llava", init_projector="normal:1e300:1")


def test_manifest_tells_what_was_joined(parts: Path) -> None:
    made = prepare_combine(to("mcore", parts / "lm"), Job(parts / "clip"), kind="llava", init_projector=NORMAL)
    assert f"joined as llava: hf-llama (hf), hf-clip (hf), projector (new, {NORMAL})" in notes(made)


def test_args_of_a_model_joined_at_once_are_those_of_one_joined_in_a_folder(tmp_path: Path) -> None:
    """NVLM's tiles, tags and pixel shuffle, with a projector and (as the official flow has it) without one."""
    for part in ("lm", "vision"):
        write(prepare_extract(to("hf", NVLM), part), tmp_path / part)
    lm, tower = tmp_path / "lm", Job(tmp_path / "vision")
    folder = write(prepare_combine(to("hf", lm), tower, Job(NVLM), kind="nvlm"), tmp_path / "hf")
    convert(folder, tmp_path / "through", saver="mcore", tp=2)
    wanted = args_of(tmp_path / "through")
    assert (wanted.use_tiling, wanted.use_tile_tags, wanted.image_tag_type) == (True, True, "nvlm")
    for name, projector in (("whole", Job(NVLM)), ("bare", None)):
        made = write(prepare_combine(to("mcore", lm, tp=2), tower, projector, kind="nvlm"), tmp_path / name)
        said = args_of(made)
        assert {n for n, v in vars(wanted).items() if getattr(said, n) != v} == set()


def args_of(folder: Path) -> Any:
    (rank, *_) = sorted(folder.glob("iter_*/mp_rank_00*/model_optim_rng.pt"))
    return torch.load(rank, weights_only=False)["args"]


def test_a_projector_is_given_what_it_was_trained_with(parts: Path, tmp_path: Path) -> None:
    make_whole(tmp_path / "last", "Llava", vision_feature_layer=-1, vision_feature_select_strategy="full")
    for part in ("lm", "vision"):
        write(prepare_extract(to("hf", tmp_path / "last"), part), tmp_path / part)
    for saver, beside, options in (("hf", "", {"image-token": 130}), ("mcore", "hf", {})):
        job = to(saver, tmp_path / "lm", saver_options=options)
        made = prepare_combine(job, Job(tmp_path / "vision"), Job(tmp_path / "last"), kind="llava")
        table = config_json(write(made, tmp_path / saver) / beside)
        assert (table["vision_feature_layer"], table["vision_feature_select_strategy"]) == (-1, "full")


def test_a_new_projector_brings_what_it_was_trained_with(parts: Path, tmp_path: Path) -> None:
    make_whole(tmp_path / "last", "Llava", seed=9, vision_feature_layer=-1, vision_feature_select_strategy="full")
    swapped = prepare_swap(to("hf", parts / "llava"), Job(tmp_path / "last"), "projector")
    table = config_json(write(swapped, tmp_path / "out"))
    assert (table["vision_feature_layer"], table["vision_feature_select_strategy"]) == (-1, "full")
    assert "left behind" not in notes(swapped)


def test_a_config_that_is_no_longer_true_does_not_travel(parts: Path, tmp_path: Path) -> None:
    """Its class would build a projector of another width, and its layers are no longer those of the model."""
    wide = {"0.weight": (80, 64), "0.bias": (80,), "2.weight": (48, 80), "2.bias": (48,)}
    torch.save({f"model.mm_projector.{name}": torch.ones(shape) for name, shape in wide.items()}, tmp_path / "wide.bin")
    swapped = prepare_swap(to("mcore", parts / "llava"), Job(tmp_path / "wide.bin"), "projector")
    assert "no config.json travels along of hf-llava" in notes(swapped)
    assert not (write(swapped, tmp_path / "out") / "hf" / "config.json").exists()
    assert load(tmp_path / "out").config.towers["projector"].ffn == 80
