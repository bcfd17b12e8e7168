"""Joining parts into a Hugging Face folder or Megatron's files, new projectors, and taking parts out again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ckptconv.combine import prepare_combine, prepare_extract, prepare_swap
from ckptconv.errors import ConfigError, UsageError
from ckptconv.executor.execute import execute
from ckptconv.layout import layout_from
from ckptconv.pipeline import Job, Prepared, load
from ckptconv.testing.models import hf_hidden, hf_logits, make_hf, make_tower, make_whole, token_ids, whole_logits
from tests.vision.arrays import atoms, config_json, same

NVLM = Path(__file__).parents[1] / "golden" / "vlm" / "nvlm_d"
WEIGHTS = "model.safetensors"
NORMAL = "normal:0.02:7"


def write(prepared: Prepared, path: Path) -> Path:
    execute(prepared.plan, path)
    return path


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("parts")
    make_hf(place / "lm", "llama")
    make_hf(place / "qwen", "qwen2", dtype="bfloat16")
    make_tower(place / "clip", "CLIPVisionModel")
    make_tower(place / "wide", "CLIPVisionModel", hidden_size=96)
    make_whole(place / "llava", "Llava")
    return place


def to_hf(lm: Path, **options: Any) -> Job:
    return Job(lm, saver="hf", saver_options=options)


def to_mcore(lm: Path, **degrees: int | str | None) -> Job:
    return Job(lm, saver="mcore", layout=layout_from(degrees, None))


# a Hugging Face folder


def test_llava_of_two_folders_has_their_tensors_and_their_configs(parts: Path, tmp_path: Path) -> None:
    job = to_hf(parts / "lm", **{"image-token": 131})
    made = write(
        prepare_combine(job, Job(parts / "clip"), kind="llava", init_projector=NORMAL, vocab_rows=140), tmp_path / "vlm"
    )
    whole, lm, clip = (load_file(folder / WEIGHTS) for folder in (made, parts / "lm", parts / "clip"))
    for name, value in lm.items():
        assert np.array_equal(whole[f"language_model.{name}"][: len(value)], value), name
    for name, value in clip.items():
        assert np.array_equal(whole[f"vision_tower.vision_model.{name.removeprefix('vision_model.')}"], value), name
    table = config_json(made)
    assert (table["model_type"], table["image_token_index"], table["text_config"]["vocab_size"]) == ("llava", 131, 140)
    assert table["text_config"]["eos_token_id"] == config_json(parts / "lm")["eos_token_id"]
    assert table["vision_config"]["num_attention_heads"] == 4


def test_transformers_computes_with_the_joined_model(parts: Path, tmp_path: Path) -> None:
    """Text alone gives the language model's own logits; its parts are those of a LLaVA that was taken apart."""
    import transformers

    out = {part: write(prepare_extract(to_hf(parts / "llava"), part), tmp_path / part) for part in ("lm", "vision")}
    job = to_hf(out["lm"], **{"image-token": 130})
    made = write(prepare_combine(job, Job(out["vision"]), Job(parts / "llava"), kind="llava"), tmp_path / "vlm")
    assert np.array_equal(whole_logits(made, "Llava"), whole_logits(parts / "llava", "Llava"))
    ids = token_ids(vocab=130)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(made, dtype=torch.float32)
    with torch.no_grad():
        assert np.array_equal(model(torch.from_numpy(ids)).logits.numpy(), hf_logits(out["lm"], ids))


def test_parts_of_a_model_are_models(parts: Path, tmp_path: Path) -> None:
    whole = load_file(parts / "llava" / WEIGHTS)
    lm = write(prepare_extract(to_hf(parts / "llava"), "lm"), tmp_path / "lm")
    tower = write(prepare_extract(to_hf(parts / "llava"), "vision"), tmp_path / "vision")
    table = config_json(lm)
    assert (table["model_type"], table["architectures"], "vision_config" in table) == (
        "llama",
        ["LlamaForCausalLM"],
        False,
    )
    beginning = "language_model."
    same({n.removeprefix(beginning): v for n, v in whole.items() if n.startswith(beginning)}, load_file(lm / WEIGHTS))
    assert hf_logits(lm, token_ids()).shape == (2, 17, 131)
    assert hf_hidden(tower, "CLIPVisionModel").shape == (2, 26, 64)


def test_nvlm_taken_apart_and_joined_is_nvlm_again(tmp_path: Path) -> None:
    """Each part by another way: a Hugging Face folder, a tower of 25 heads, a projector out of Megatron's files."""
    lm = write(prepare_extract(to_hf(NVLM), "lm"), tmp_path / "lm")
    assert config_json(lm)["architectures"] == ["Qwen2ForCausalLM"]
    assert config_json(lm)["model_type"] == "qwen2"
    tower = write(prepare_extract(to_mcore(NVLM, tp=2), "vision"), tmp_path / "vision")
    whole = write(prepare_extract(to_mcore(NVLM, tp=4, pp=2), "lm"), tmp_path / "none")
    assert (whole / "latest_checkpointed_iteration.txt").exists()
    vision = Job(tower, loader_options={"vision-heads": 25}, family="internvit")
    made = write(prepare_combine(to_hf(lm), vision, Job(NVLM), kind="nvlm"), tmp_path / "vlm")
    same(load_file(NVLM / WEIGHTS), load_file(made / WEIGHTS))
    table = config_json(made)
    assert (table["architectures"], table["downsample_ratio"], table["ps_version"]) == (["NVLM_D"], 0.5, "v2")
    assert table["vision_config"]["num_attention_heads"] == 25


# projectors


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llava", {"fc1.weight": (64, 64), "fc1.bias": (64,), "fc2.weight": (64, 64), "fc2.bias": (64,)}),
        (
            "nvlm",
            {"input_norm.weight": (256,), "input_norm.bias": (256,), "fc1.weight": (96, 256), "fc2.weight": (64, 96)},
        ),
        (
            "internvl",
            {
                "input_norm.weight": (256,), "input_norm.bias": (256,), "fc1.weight": (64, 256), "fc1.bias": (64,),
                "fc2.weight": (64, 64), "fc2.bias": (64,),
            },
        ),
    ],
)  # fmt: skip
def test_new_projector_is_as_large_as_its_kind_and_the_same_in_every_layout(
    kind: str, sizes: dict[str, tuple[int, ...]], parts: Path, tmp_path: Path
) -> None:
    wishes: dict[str, Any] = {"kind": kind, "init_projector": NORMAL}
    found = []
    for name, degrees in (("one", {}), ("many", {"tp": 4, "pp": 2})):
        made = prepare_combine(to_mcore(parts / "lm", **degrees), Job(parts / "clip"), **wishes)
        write(made, tmp_path / name)
        found.append(atoms(tmp_path / name, loader_options={"vision-heads": 4}))
    own = [{n.removeprefix("projector."): v for n, v in f.items() if n.startswith("projector.")} for f in found]
    same(*own)
    assert {name: value.shape for name, value in own[0].items()} == sizes
    matrices = np.concatenate([own[0]["fc1.weight"].ravel(), own[0]["fc2.weight"].ravel()])
    assert matrices.std() == pytest.approx(0.02, rel=0.03)
    assert abs(matrices.mean()) < 0.001
    assert not np.array_equal(own[0]["fc1.weight"].ravel()[:64], own[0]["fc2.weight"].ravel()[:64])
    assert all((value == name.endswith("norm.weight")).all() for name, value in own[0].items() if value.ndim == 1)


def test_new_projector_has_the_dtype_of_the_language_model_or_its_own(parts: Path, tmp_path: Path) -> None:
    for name, dtypes in (("as-lm", {}), ("own", {"projector": "fp32"})):
        wishes: dict[str, Any] = {"kind": "llava", "init_projector": NORMAL, "dtypes": dtypes}
        write(prepare_combine(to_mcore(parts / "qwen"), Job(parts / "clip"), **wishes), tmp_path / name)
    found = {n: atoms(tmp_path / n) for n in ("as-lm", "own")}
    narrow, wide = (found[n]["projector.fc1.weight"] for n in ("as-lm", "own"))
    assert (str(narrow.dtype), str(wide.dtype)) == ("bfloat16", "float32")
    assert np.array_equal(wide.astype(narrow.dtype), narrow)
    assert str(found["own"]["vision.patch.weight"].dtype) == "float32"


def test_zeros_and_another_seed(parts: Path) -> None:
    made = {}
    for how in ("zeros", NORMAL, "normal:0.02:8"):
        prepared = prepare_combine(to_mcore(parts / "lm"), Job(parts / "clip"), kind="llava", init_projector=how)
        tensors = {key.name: tensor for key, tensor in prepared.checkpoint.tensors.items()}
        made[how] = tensors["projector.fc1.weight"].numpy()
    assert not made["zeros"].any()
    assert not np.array_equal(made[NORMAL], made["normal:0.02:8"])


@pytest.mark.parametrize("beginning", ["model.mm_projector.", "mm_projector.", ""])
def test_projector_trained_alone(beginning: str, parts: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    shapes = {"0.weight": (64, 64), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    state = {beginning + name: torch.from_numpy(rng.normal(size=shape)).half() for name, shape in shapes.items()}
    torch.save(state, tmp_path / "mm_projector.bin")
    job = to_hf(parts / "lm", **{"image-token": 130})
    made = write(
        prepare_combine(job, Job(parts / "clip"), Job(tmp_path / "mm_projector.bin"), kind="llava"), tmp_path / "vlm"
    )
    whole = load_file(made / WEIGHTS)
    for ours, theirs in (("linear_1.weight", "0.weight"), ("linear_2.bias", "2.bias")):
        assert np.array_equal(whole[f"multi_modal_projector.{ours}"], state[beginning + theirs].numpy())


# layouts


def test_combine_to_many_ranks_is_combine_to_one_and_reshard(parts: Path, tmp_path: Path) -> None:
    from ckptconv.pipeline import convert

    wishes: dict[str, Any] = {"kind": "llava", "init_projector": NORMAL}
    at_once = write(
        prepare_combine(to_mcore(parts / "lm", tp=2, pp=4), Job(parts / "clip"), **wishes), tmp_path / "once"
    )
    one = write(prepare_combine(to_mcore(parts / "lm"), Job(parts / "clip"), **wishes), tmp_path / "one")
    convert(one, tmp_path / "many", tp=2, pp=4)
    files = sorted(p.relative_to(at_once) for p in at_once.glob("iter_*/*/*.pt"))
    assert len(files) == 8
    for file in files:
        a, b = (torch.load(folder / file, weights_only=False)["model"] for folder in (at_once, tmp_path / "many"))
        assert list(a) == list(b)
        for name, value in a.items():
            assert value is None or (value.dtype == b[name].dtype and torch.equal(value, b[name])), name


def test_files_of_a_joined_model_say_what_it_is(parts: Path, tmp_path: Path) -> None:
    """Its config.json stands in hf/: no option is needed to read it, or to make a Hugging Face folder of it."""
    from ckptconv.pipeline import convert

    job = to_hf(parts / "lm", **{"image-token": 130})
    folder = write(prepare_combine(job, Job(parts / "clip"), kind="llava", init_projector=NORMAL), tmp_path / "hf")
    made = prepare_combine(to_mcore(parts / "lm", tp=2), Job(parts / "clip"), kind="llava", init_projector=NORMAL)
    ranks = write(made, tmp_path / "ranks")
    said = load(ranks).config
    assert (said.family, said.towers["vision"].heads) == ("hf-llava(hf-llama,hf-clip)", 4)
    convert(ranks, tmp_path / "back", saver="hf", saver_options={"template": folder})
    same(load_file(folder / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS))
    assert json.loads((ranks / "hf/config.json").read_text())["text_config"] == config_json(folder)["text_config"]


def test_any_slice_of_generated_and_literal_bytes_is_the_same(tmp_path: Path) -> None:
    from ckptconv import coding
    from ckptconv.dtypes import FP32, UINT8
    from ckptconv.leaves import contiguous

    numbers = contiguous(coding.normal(3 * 70_000, 0.5, 3, "a"), (70_000, 3), FP32)
    whole = numbers.numpy()
    blocks = whole.ravel()[: 3 * (coding.BLOCK // 4)].reshape(3, -1)
    assert len({block.tobytes() for block in blocks}) == 3
    assert whole.std() == pytest.approx(0.5, rel=0.01)
    for lo, hi in ((0, 1), (21_845, 21_846), (21_000, 44_000), (69_999, 70_000)):
        assert np.array_equal(numbers.narrow(0, lo, hi).numpy(), whole[lo:hi])
    assert np.array_equal(numbers.narrow(1, 1, 2).numpy(), whole[:, 1:2])
    text = contiguous(coding.literal(b'{"a": 1}'), (8,), UINT8)
    assert bytes(text.narrow(0, 2, 6).numpy()) == b'a": '


# what does not fit


@pytest.mark.parametrize(
    ("lm", "vision", "projector", "kind", "message"),
    [
        ("lm", "qwen", None, "llava", "given as vision is a language model"),
        ("clip", "lm", None, "llava", "given as lm is a vision tower"),
        ("lm", "wide", "llava", "llava", "gives 48 entries.*hidden size is 64"),
        ("lm", "clip", "llava", "nvlm", "gives 48 entries.*hidden size is 64"),
        ("llava-lm", "wide", "llava", "llava", "takes 64 entries.*hidden size is 96"),
        ("llava-lm", "clip", "llava", "nvlm", "takes 4 x 64 entries of the vision tower, but this one takes 64"),
        ("lm", "clip", "lm", "llava", "there is no projector in this model: it has lm"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_what_disagrees(
    lm: str, vision: str, projector: str | None, kind: str, message: str, parts: Path, tmp_path: Path
) -> None:
    if lm == "llava-lm":
        write(prepare_extract(to_hf(parts / "llava"), "lm"), tmp_path / "llava-lm")
    first = tmp_path / lm if lm == "llava-lm" else parts / lm
    with pytest.raises(ConfigError, match=message):
        prepare_combine(to_hf(first), Job(parts / vision), Job(parts / projector) if projector else None, kind=kind)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"kind": "llava", "init_projector": "uniform:1:2"}, "expected zeros, or normal:STD:SEED"),
        ({"kind": "llava", "init_projector": "normal:0:2"}, "expected zeros, or normal:STD:SEED"),
        ({"init_projector": NORMAL}, "--as says which projector"),
        ({"kind": "blip", "init_projector": NORMAL}, "expected one of llava, neva, nvlm, internvl"),
        ({"kind": "neva", "init_projector": NORMAL}, "Hugging Face has no such family"),
        ({"kind": "llava", "init_projector": NORMAL, "vocab_rows": 140, "init": "ones"}, "expected last, zero, mean"),
    ],
)
def test_wishes_that_make_no_sense(wishes: dict[str, Any], message: str, parts: Path) -> None:
    with pytest.raises(UsageError, match=message):
        prepare_combine(to_hf(parts / "lm"), Job(parts / "clip"), **wishes)


def test_image_token_beyond_the_embedding_is_refused(parts: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"image_token_index is 32000, but the embedding has only 131 rows: --vocab-rows 32001"
    ):
        prepare_combine(to_hf(parts / "lm"), Job(parts / "clip"), kind="llava", init_projector=NORMAL)


def test_a_model_without_a_projector_is_no_llava(parts: Path) -> None:
    with pytest.raises(ConfigError, match="projector and vision, this model has vision"):
        prepare_combine(to_hf(parts / "lm"), Job(parts / "clip"), kind="llava")


def test_tower_is_swapped_in_a_folder(parts: Path, tmp_path: Path) -> None:
    make_tower(tmp_path / "tuned", "CLIPVisionModel", seed=9)
    made = write(prepare_swap(to_hf(parts / "llava"), Job(tmp_path / "tuned"), "vision"), tmp_path / "vlm")
    before, after, tuned = (load_file(p / WEIGHTS) for p in (parts / "llava", made, tmp_path / "tuned"))
    for name, value in before.items():
        new = tuned[name.replace("vision_tower.", "", 1)] if name.startswith("vision_tower.") else value
        assert np.array_equal(after[name], new), name
    assert config_json(made) == config_json(parts / "llava")


def test_tower_that_a_llava_of_its_authors_lacks_is_put_in(parts: Path, tmp_path: Path) -> None:
    from tests.vision.test_families import authors

    source = authors({"Llava": parts / "llava"}, tmp_path / "src", tower=False)
    tower = write(prepare_extract(to_hf(parts / "llava"), "vision"), tmp_path / "tower")
    job = to_hf(source, **{"image-token": 130, "prefix": ""})
    made = write(prepare_swap(job, Job(tower), "vision", kind="llava"), tmp_path / "vlm")
    same(load_file(parts / "llava" / WEIGHTS), load_file(made / WEIGHTS))
    assert np.array_equal(whole_logits(made, "Llava"), whole_logits(parts / "llava", "Llava"))


def test_a_model_that_states_no_dtype_states_none_when_joined(parts: Path, tmp_path: Path) -> None:
    source = tmp_path / "lm"
    shutil.copytree(parts / "lm", source)
    table = config_json(source)
    (source / "config.json").write_text(
        json.dumps({k: v for k, v in table.items() if k not in ("dtype", "torch_dtype")})
    )
    made = prepare_combine(to_mcore(source), Job(parts / "clip"), kind="llava", init_projector=NORMAL)
    assert "torch_dtype" not in config_json(write(made, tmp_path / "vlm") / "hf")
