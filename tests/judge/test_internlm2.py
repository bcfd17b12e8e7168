"""InternLM2, alone and in InternVL: what the models' own code wrote goes everywhere and back, and Megatron-Core computes its logits."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ckptconv.combine import prepare_combine, prepare_extract
from ckptconv.errors import ConfigError
from ckptconv.executor.execute import execute
from ckptconv.huggingface.family_config import read_config
from ckptconv.layout import layout_from
from ckptconv.mapping_files import load_mapping
from ckptconv.pipeline import Job, Prepared, convert, prepare
from ckptconv.testing.models import hf_logits
from tests.judge.judge import judge_logits
from tests.judge.ranks import Layout

GOLDEN = Path(__file__).parents[1] / "golden" / "internlm2"
PLAIN, BIAS, CHAT = (GOLDEN / name for name in ("plain", "bias", "internvl_chat"))
WEIGHTS, TOLERANCE, DIVISOR = "model.safetensors", 1e-5, 16


def recorded(name: str) -> dict[str, Any]:
    """What the models' own code was asked, and its logits."""
    return dict(load_file(GOLDEN / f"{name}-logits.safetensors"))


def config_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def run(prepared: Prepared, folder: Path) -> Path:
    execute(prepared.plan, folder)
    return folder


def same_files(a: Path, b: Path, *names: str) -> None:
    for name in names or (WEIGHTS, "config.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def changed(folder: Path, **said: Any) -> Path:
    """The same weights with other things said of them."""
    source = folder / "changed"
    shutil.copytree(PLAIN, source)
    (source / "config.json").write_text(json.dumps({**config_json(PLAIN), **said}))
    return source


# Megatron's forms


@pytest.mark.ranks
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2, first=1), Layout(tp=4), Layout(pp=3)], ids=lambda at: at.name)
def test_megatron_core_computes_the_logits_of_the_models_own_code(layout: Layout, tmp_path: Path) -> None:
    """Two key/value heads: over four ranks the rows of each are cut."""
    convert(
        PLAIN, tmp_path / "mcore", saver="mcore", tp=layout.tp, pp=layout.pp, pp_layers="1,2" if layout.first else None,
        vocab_divisor=DIVISOR, saver_options={"transformer-impl": "local"},
    )  # fmt: skip
    told = recorded("plain")
    found = judge_logits(tmp_path / "mcore", PLAIN, torch.from_numpy(told["ids"]), layout, divisor=DIVISOR)
    np.testing.assert_allclose(found, told["logits"], rtol=0, atol=TOLERANCE)
    convert(tmp_path / "mcore", tmp_path / "back", saver="hf")
    same_files(PLAIN, tmp_path / "back")


@pytest.mark.parametrize("saver", ["legacy", "mcore-dist", "nemo", "nemo2"])
def test_other_forms_and_back(saver: str, tmp_path: Path) -> None:
    prepared = prepare(Job(PLAIN, saver=saver))
    assert "dynamic rope scaling" in prepared.usage("DST")
    run(prepared, tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "back", saver="hf", saver_options={"template": PLAIN})
    same_files(PLAIN, tmp_path / "back")


def test_biases_of_the_attention_alone_are_more_than_megatron_has(tmp_path: Path) -> None:
    convert(BIAS, tmp_path / "again", saver="hf")
    same_files(BIAS, tmp_path / "again")
    with pytest.raises(ConfigError, match="biases q/k/v yes, attention output yes, mlp no"):
        convert(BIAS, tmp_path / "mcore", saver="mcore")


# the same model as a Llama


def llama_config(folder: Path, name: str) -> Path:
    """The config.json that convert2llama.py made of `plain`, for either model."""
    own = config_json(GOLDEN / name)
    more = {"attention_bias": own["bias"], **{key: own[key] for key in ("num_hidden_layers", "rope_scaling")}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config_json(GOLDEN / "llama"), **more}, indent=2) + "\n")
    return folder


@pytest.mark.parametrize("name", ["plain", "bias"])
def test_as_a_llama_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    """Biases too, which no converter of InternLM's takes."""
    template = llama_config(tmp_path / "llama", name)
    convert(GOLDEN / name, tmp_path / "out", saver="hf", saver_options={"family": "llama", "template": template})
    told = recorded(name)
    np.testing.assert_allclose(hf_logits(tmp_path / "out", told["ids"]), told["logits"], rtol=0, atol=TOLERANCE)
    back = {"family": "internlm2", "template": GOLDEN / name}
    convert(tmp_path / "out", tmp_path / "back", saver="hf", saver_options=back)
    same_files(GOLDEN / name, tmp_path / "back")


def test_as_a_llama_it_is_what_the_official_converter_makes(tmp_path: Path) -> None:
    template = GOLDEN / "llama"
    convert(PLAIN, tmp_path / "out", saver="hf", saver_options={"family": "llama", "template": template})
    made = {name: hashlib.sha256(t.tobytes()).hexdigest() for name, t in load_file(tmp_path / "out" / WEIGHTS).items()}
    assert made == json.loads((template / "sha256.json").read_text())
    same_files(template, tmp_path / "out", "config.json")


# config.json and the files beside it


def test_the_models_code_travels_and_is_named(tmp_path: Path) -> None:
    source = changed(tmp_path)
    code = ("modeling_internlm2.py", "configuration_internlm2.py", "tokenization_internlm2.py", "tokenizer.model")
    for name in code:
        (source / name).write_text(f"# stands for {name}\n")
    convert(source, tmp_path / "mcore", saver="mcore", tp=2)
    convert(tmp_path / "mcore", tmp_path / "back", saver="hf")
    same_files(source, tmp_path / "back", *code, WEIGHTS, "config.json")


def test_config_made_from_arguments_names_the_published_code(tmp_path: Path) -> None:
    """InternLM2Config refuses a rope_scaling with other keys than `type` and `factor`, and a factor that is whole."""
    source = changed(tmp_path, rope_scaling={"rope_type": "linear", "factor": 2})
    convert(source, tmp_path / "mcore", saver="mcore", tp=2)
    shutil.rmtree(tmp_path / "mcore/hf")
    options = {"config-from-args": True}
    convert(tmp_path / "mcore", tmp_path / "out", saver="hf", family="internlm2", vocab_size=61, saver_options=options)
    same_files(PLAIN, tmp_path / "out", WEIGHTS)
    table, own = config_json(tmp_path / "out"), config_json(PLAIN)
    assert {key.rpartition("--")[2] for key in table["auto_map"].values()} == set(own["auto_map"].values())
    assert json.dumps(table["rope_scaling"]) == '{"type": "linear", "factor": 2.0}'
    ours = ("architectures", "model_type", "bias", "hidden_size", "num_key_value_heads", "rms_norm_eps", "rope_theta")
    assert {key: table[key] for key in ours} == {key: own[key] for key in ours}


def test_what_the_models_code_would_refuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rope scaling 'yarn': this family has only linear and dynamic"):
        convert(changed(tmp_path, rope_scaling={"type": "yarn", "factor": 2.0}), tmp_path / "out", saver="hf")


def test_what_a_config_leaves_out_is_what_the_class_takes() -> None:
    family, table = load_mapping("hf-internlm2"), json.loads((GOLDEN / "defaults.json").read_text())
    sizes = family.config["sizes"]
    assert isinstance(sizes, dict)
    silent, full = (read_config(said, "config.json", family) for said in ({"model_type": "internlm2", **sizes}, table))
    assert replace(silent, raw={}) == replace(full, raw={})
    assert full.qkv_bias, "where nothing is said there are biases"
    assert {key: table[key] for key in sizes} == sizes


# InternVL with InternLM2


@pytest.mark.parametrize(
    ("saver", "degrees"), [("mcore", {"tp": 2, "pp": 2}), ("mcore", {"tp": 4}), ("mcore-dist", {})]
)
def test_internvl_goes_to_megatron_and_back(saver: str, degrees: dict[str, int], tmp_path: Path) -> None:
    convert(CHAT, tmp_path / "there", saver=saver, **degrees)  # type: ignore[arg-type]
    convert(tmp_path / "there", tmp_path / "back", saver="hf")
    same_files(CHAT, tmp_path / "back")


def test_transformers_own_internvl_with_a_llama_computes_the_same(tmp_path: Path) -> None:
    import transformers

    told, options = recorded("internvl_chat"), {"family": "internvl(llama,internvl-vision)", "image-token": 60}
    convert(CHAT, tmp_path / "out", saver="hf", saver_options=options)
    model, info = transformers.InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    with torch.no_grad():
        found = model.eval()(input_ids=torch.from_numpy(told["ids"]), pixel_values=torch.from_numpy(told["pixels"]))
    np.testing.assert_allclose(found.logits.numpy(), told["logits"], rtol=0, atol=TOLERANCE)


def test_transformers_own_internvl_has_no_internlm2(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"code of hf-internlm2.*'internvl\(llama,internvl-vision\)'"):
        convert(CHAT, tmp_path / "out", saver="hf", saver_options={"family": "internvl", "image-token": 60})


@pytest.mark.parametrize("saver", ["hf", "mcore"])
def test_internvl_taken_apart_and_combined_again(saver: str, tmp_path: Path) -> None:
    """`--as internvl` with an InternLM2 is the model of OpenGVLab's own code."""
    parts = {part: run(prepare_extract(Job(CHAT, saver="hf"), part), tmp_path / part) for part in ("lm", "vision")}
    assert config_json(parts["lm"])["auto_map"] == config_json(CHAT)["llm_config"]["auto_map"]
    job = Job(parts["lm"], saver=saver, layout=layout_from({"tp": 2, "pp": 2} if saver == "mcore" else {}, None))
    whole = run(prepare_combine(job, Job(parts["vision"]), Job(CHAT), kind="internvl"), tmp_path / "whole")
    if saver == "mcore":
        convert(whole, tmp_path / "hf", saver="hf")
        whole = tmp_path / "hf"
    same_files(CHAT, whole, WEIGHTS)
    made, own = config_json(whole), config_json(CHAT)
    assert (made["model_type"], made["architectures"]) == ("internvl_chat", ["InternVLChatModel"])
    assert made["llm_config"] == {**own["llm_config"], "torch_dtype": "bfloat16"}
