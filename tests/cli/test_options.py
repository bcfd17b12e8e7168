"""What every option of convert, reshard and plan does, seen in what is on disk afterwards."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckptconv
from ckptconv.testing.checkpoints import write_hf
from tests.cli.helpers.console import Console, Ran, bump, edit_hf, edit_rank, rank_file, tree

Copy = Callable[..., Path]
Convert = Callable[..., Ran]
OWN = """extends = "hf-llama"

[[block]]
[block.tensors]
"model.norm.weight" = false
"model.final.weight" = "norm.weight"
"""
RANKS = ("00_000", "00_001", "01_000", "01_001")


@pytest.fixture
def convert(console: Console, models: Path, tmp_path: Path) -> Convert:
    """`convert("llama", "out", "--saver", "hf")`: sources are models or folders of this test, results are in its folder."""

    def run(src: str, dst: str, *args: str | Path, code: int = 0, verb: str = "convert") -> Ran:
        own = tmp_path / src
        return console(*verb.split(), own if own.exists() else models / src, tmp_path / dst, *args, code=code)

    return run


def ranks(folder: Path) -> list[str]:
    return sorted(p.parent.name.removeprefix("mp_rank_") for p in folder.glob("*/mp_rank_*/*.pt"))


def manifest(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / "ckptconv.json").read_text())["about"]
    return about


def args_of(folder: Path, rank: str = "00") -> Any:
    return torch.load(rank_file(folder, rank), weights_only=False)["args"]


# layout ----------------------------------------------------------------------------------------------------------


def test_every_degree(convert: Convert, console: Console, models: Path, tmp_path: Path) -> None:
    convert("mixtral", "out", "--saver", "mcore", *"--tp 2 --pp 2 --vpp 2 --ep 2 --etp 1".split())
    layout = json.loads(console("inspect", tmp_path / "out", "--json").out)["layout"]
    assert layout == {"tp": 2, "pp": 2, "vpp": 2, "ep": 2, "etp": 1}
    assert ranks(tmp_path / "out") == ["00_000_000", "00_001_000", "01_000_001", "01_001_001"]
    console("verify", models / "mixtral", tmp_path / "out")


def test_reshard_keeps_what_is_not_said(convert: Convert, models: Path, tmp_path: Path) -> None:
    convert("m22", "wider", "--tp", "4", verb="reshard")
    assert manifest(tmp_path / "wider")["result"]["pp"] == 2
    convert("m22", "same", verb="reshard")
    assert ranks(tmp_path / "same") == list(RANKS)
    one, two = (tree(folder) for folder in (models / "m22", tmp_path / "same"))
    assert {k: v for k, v in one.items() if k != "ckptconv.json"} == {k: v for k, v in two.items() if k != "ckptconv.json"}  # fmt: skip


def test_degrees_of_the_source_are_checked(convert: Convert, tmp_path: Path) -> None:
    ran = convert("m22", "out", "--tp", "4:2", "--pp", "1:1", verb="reshard", code=1)
    assert "tp 4 (it has 2), pp 1 (it has 2)" in ran.err
    assert not (tmp_path / "out").exists()
    convert("m22", "out", "--tp", "2:1", "--pp", "2:4", verb="reshard")


def test_uneven_stages(convert: Convert, console: Console, models: Path, tmp_path: Path) -> None:
    convert("llama", "out", "--saver", "mcore", *"--pp 2 --pp-layers 1,3".split())
    rows = json.loads(console("inspect", tmp_path / "out", "--json").out)["ranks"]
    assert [r["layers"] for r in rows] == [[0], [1, 2, 3]]
    console("verify", models / "llama", tmp_path / "out")
    convert("llama", "other", "--saver", "mcore", *"--pp 2 --pp-layers 1,2".split(), code=1)
    convert("llama", "other", "--saver", "mcore", *"--pp 2 --pp-layers 4".split(), code=1)
    ran = convert(
        "llama", "other", "--saver", "mcore", *"--pp 4 --pp-layers 1,2,0,1 --mcore-version 0.12".split(), code=1
    )
    assert "0.12 cannot be told to put 1,2,0,1 layers on its stages" in ran.err


def test_hf_takes_no_layout(convert: Convert) -> None:
    assert "Hugging Face files hold whole tensors" in convert("m22", "out", "--saver", "hf", "--tp", "2", code=1).err


# formats, aliases, versions --------------------------------------------------------------------------------------


def test_names_of_the_official_converters_are_understood(convert: Convert, tmp_path: Path) -> None:
    convert("llama", "new", "--saver", "core", "--loader", "llama_mistral")
    convert("new", "old", "--saver", "megatron", "--loader", "auto")
    convert("old", "back", "--saver", "huggingface", "--loader", "megatron")
    assert manifest(tmp_path / "old")["result"]["format"] == "legacy"
    assert manifest(tmp_path / "back")["source"]["format"] == "legacy"


def test_mcore_version(convert: Convert, tmp_path: Path) -> None:
    convert("llama", "old", "--saver", "mcore", "--mcore-version", "0.9")
    convert("llama", "new", "--saver", "mcore", "--saver.mcore-version", "core_v0.16.1")
    assert manifest(tmp_path / "old")["mcore_version"] == "0.9"
    assert not hasattr(args_of(tmp_path / "old"), "pipeline_model_parallel_layout")
    assert hasattr(args_of(tmp_path / "new"), "pipeline_model_parallel_layout")
    assert (
        "before 0.16 refuses"
        in convert("llama", "x", "--saver", "mcore", "--tp", "8", "--mcore-version=0.15", code=2).err
    )


def test_saver_options_take_their_value_either_way(convert: Convert, tmp_path: Path) -> None:
    convert("mixtral", "a", "--saver", "mcore", "--saver.experts", "sequential")
    convert("mixtral", "b", "--saver", "mcore", "--saver.experts=sequential", "--saver.te-version=2.5")
    for folder in ("a", "b"):
        names = torch.load(rank_file(tmp_path / folder, "00"), weights_only=False)["model"]
        assert "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight" in names


def test_iteration_of_the_source_and_of_the_result(convert: Convert, copy: Copy, tmp_path: Path) -> None:
    base = copy("m22")
    shutil.copytree(base / "iter_0000001", base / "iter_0000030")
    for name in RANKS:
        path = base / "iter_0000030" / f"mp_rank_{name}" / "model_optim_rng.pt"
        saved = torch.load(path, weights_only=False)
        torch.save({**saved, "iteration": 30}, path)
    convert("m22", "latest", verb="reshard")
    convert("m22", "asked", "--iteration", "30", verb="reshard")
    convert("m22", "release", "--iteration", "30", "--saver.iteration", "release", verb="reshard")
    convert("m22", "renamed", "--saver.iteration", "500", verb="reshard")
    for folder, step in {"latest": "1", "asked": "30", "release": "release", "renamed": "500"}.items():
        assert (tmp_path / folder / "latest_checkpointed_iteration.txt").read_text() == step
    assert {p.name for p in (tmp_path / "release").iterdir()} >= {"release", "hf"}
    assert (tmp_path / "renamed" / "iter_0000500").is_dir()


# where the architecture comes from -------------------------------------------------------------------------------


def strip(folder: Path, *, args: bool = True, hf: bool = True) -> None:
    if hf:
        shutil.rmtree(folder / "hf")
    for name in RANKS if args else ():
        edit_rank(folder, name, lambda saved: saved.pop("args"))


def test_loader_config_states_what_stripped_files_lack(
    convert: Convert, console: Console, copy: Copy, models: Path, tmp_path: Path
) -> None:
    strip(copy("m22"))
    assert "--loader.config" in convert("m22", "out", "--saver", "hf", code=1).err
    convert("m22", "out", "--saver", "hf", "--loader.config", models / "llama")
    convert("m22", "again", "--saver", "hf", f"--loader.config={models / 'llama' / 'config.json'}")
    console("verify", tmp_path / "out", models / "llama")
    assert (tmp_path / "out" / "config.json").read_bytes() == (models / "llama" / "config.json").read_bytes()
    assert (tmp_path / "again" / "config.json").read_bytes() == (models / "llama" / "config.json").read_bytes()


def test_a_config_of_another_model_is_refused(convert: Convert, copy: Copy, tmp_path: Path) -> None:
    strip(copy("m22"))
    other = write_hf(tmp_path / "other", "llama", num_hidden_layers=5, intermediate_size=64)
    ran = convert("m22", "out", "--saver", "hf", "--loader.config", other, code=1)
    assert "contradicts the tensors" in ran.err
    assert "layers" in ran.err


def test_back_to_hf_needs_a_config_from_somewhere(
    convert: Convert, console: Console, copy: Copy, models: Path, tmp_path: Path
) -> None:
    strip(copy("m22"), args=False)
    ran = convert("m22", "out", "--saver", "hf", code=1)
    assert "--saver.template" in ran.err
    convert("m22", "template", "--saver", "hf", "--saver.template", models / "llama")
    assert (tmp_path / "template" / "config.json").read_bytes() == (models / "llama" / "config.json").read_bytes()
    assert "--family" in convert("m22", "out", "--saver", "hf", "--saver.config-from-args", code=1).err
    ran = convert("m22", "args", "--saver", "hf", "--saver.config-from-args", "--family", "llama")
    assert "not to be trusted: rope_theta" in ran.err
    assert any("rope_theta" in line for line in manifest(tmp_path / "args")["config_untrusted"])
    console("verify", models / "llama", tmp_path / "args")


# what is changed on the way --------------------------------------------------------------------------------------


def test_dtype_and_what_a_cast_loses(convert: Convert, copy: Copy, tmp_path: Path) -> None:
    convert("llama", "fp32", "--saver", "hf", "--dtype", "fp32")
    assert {t.dtype for t in load_file(tmp_path / "fp32" / "model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "fp32" / "config.json").read_text())["torch_dtype"] == "float32"
    edit_hf(copy("llama"), lambda t: t["model.norm.weight"].__setitem__(0, 1e6))
    ran = convert("llama", "fp16", "--saver", "hf", "--dtype", "fp16", code=1)
    assert "would become infinite" in ran.err
    assert "model.norm.weight: 1" in ran.err
    assert not (tmp_path / "fp16").exists()
    ran = convert("llama", "fp16", "--saver", "hf", "--dtype", "fp16", "--allow-overflow")
    assert "model.norm.weight: 1 values became infinite, 0 became zero" in ran.err


def test_changes_of_config_json_are_told(convert: Convert) -> None:
    ran = convert("llama", "fp32", "--saver", "hf", "--dtype", "fp32")
    (line,) = [line for line in ran.err.splitlines() if line.startswith("config.json: ")]
    assert "torch_dtype" in line


def rows(folder: Path) -> int:
    (path,) = sorted(folder.glob("*/mp_rank_00*/*.pt"))[:1]
    return int(torch.load(path, weights_only=False)["model"]["embedding.word_embeddings.weight"].shape[0])


def test_vocabulary(convert: Convert, console: Console, copy: Copy, models: Path, tmp_path: Path) -> None:
    convert("llama", "usual", "--saver", "mcore", "--tp", "2")
    convert("llama", "tight", "--saver", "mcore", "--tp", "2", "--make-vocab-size-divisible-by", "1")
    assert (rows(tmp_path / "usual"), rows(tmp_path / "tight")) == (128, 31)
    strip(copy("m22"), args=False)
    for name in RANKS:
        edit_rank(tmp_path / "m22", name, lambda saved: saved["args"].__dict__.update(vocab_size=None))
    refused = convert("m22", "out", "--saver", "hf", "--saver.template", models / "llama", code=1)
    assert "give --vocab-size" in refused.err
    convert("m22", "out", "--saver", "hf", "--saver.template", models / "llama", "--vocab-size", "61")
    console("verify", models / "llama", tmp_path / "out")
    assert "the embedding's 256 rows" in convert("m22", "x", "--saver", "hf", "--vocab-size", "999", code=1).err


def test_unknown_tensors_are_listed_and_dropped_on_purpose_only(convert: Convert, copy: Copy, tmp_path: Path) -> None:
    up, misspelt = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_projection.weight"

    def extra(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.lora"] = torch.zeros(2)
        tensors[misspelt] = tensors.pop(up)

    edit_hf(copy("llama"), extra)
    ran = convert("llama", "out", "--saver", "mcore", code=1)
    assert "unexpected: model.layers.0.self_attn.q_proj.lora" in ran.err
    assert f"did you mean {up}?" in ran.err
    edit_hf(tmp_path / "llama", lambda t: t.update({up: t.pop(misspelt)}))
    ran = convert("llama", "out", "--saver", "mcore", "--drop", "*.lora")
    assert "left out: model.layers.0.self_attn.q_proj.lora" in ran.err
    assert manifest(tmp_path / "out")["dropped"] == ["model.layers.0.self_attn.q_proj.lora"]


def test_a_mapping_file_of_ones_own(convert: Convert, console: Console, copy: Copy, tmp_path: Path) -> None:
    """The llama family with another name for its last norm."""
    edit_hf(copy("llama"), lambda t: t.update({"model.final.weight": t.pop("model.norm.weight")}))
    own = tmp_path / "hf-mine.toml"
    own.write_text(OWN)
    convert("llama", "out", "--saver", "mcore", code=1)
    convert("llama", "out", "--saver", "mcore", "--mapping", own)
    console("verify", tmp_path / "llama", tmp_path / "out", "--mapping", own)


def test_training_state_is_given_up_on_purpose_only(convert: Convert, copy: Copy, tmp_path: Path) -> None:
    edit_rank(copy("m22"), "00_000", lambda saved: saved.update({"optimizer": {"state": {}}, "rng_state": [{}]}))
    ran = convert("m22", "out", "--saver", "hf", code=1)
    assert "cannot carry over:\n  optimizer\n  RNG state" in ran.err
    assert "--optimizer drop" in ran.err
    convert("m22", "out", "--saver", "hf", "--optimizer", "drop")
    assert manifest(tmp_path / "out")["options"]["optimizer"] == "drop"


def test_replicas(convert: Convert, console: Console, copy: Copy, models: Path, tmp_path: Path) -> None:
    name = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    edit_rank(copy("m22"), "01_001", lambda saved: bump(saved["model"], name, 3))
    ran = convert("m22", "out", "--saver", "hf", code=1)
    assert name in ran.err
    assert "mp_rank_01_001" in ran.err
    assert "[3]" in ran.err
    assert not (tmp_path / "out").exists()
    convert("m22", "out", "--saver", "hf", "--replicas", "first")
    assert any(name in line for line in manifest(tmp_path / "out")["unchecked_replicas"])
    console("verify", models / "llama", tmp_path / "out")


def test_shards(convert: Convert, tmp_path: Path) -> None:
    convert("llama", "out", "--saver", "hf", "--saver.max-shard-size", "0.03MB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}


def test_side_files_travel_and_what_stays_is_listed(convert: Convert, copy: Copy, tmp_path: Path) -> None:
    source = copy("llama")
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text("{}")
    (source / "optimizer.bin.old").write_text("")
    ran = convert("llama", "out", "--saver", "mcore")
    assert "left behind in the source: optimizer.bin.old" in ran.err
    assert (tmp_path / "out" / "hf" / "tokenizer.json").read_text() == "{}"
    assert f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tmp_path / 'out'}/hf" in ran.out
    ran = convert("out", "back", "--saver", "hf")
    assert (tmp_path / "back" / "tokenizer.json").exists()
    assert "AutoTokenizer.from_pretrained" in ran.out


# how it is carried out -------------------------------------------------------------------------------------------


def test_plan_is_a_dry_run_and_writes_nothing(convert: Convert, tmp_path: Path) -> None:
    options = ("--saver", "mcore", "--tp", "2", "--pp", "2")
    for more in ((), ("--json",)):
        planned = convert("llama", "out", *options, *more, verb="plan convert")
        assert planned == convert("llama", "out", *options, *more, "--dry-run")
        assert planned.out
    planned = convert("m22", "out", "--tp", "4", verb="plan reshard")
    assert planned == convert("m22", "out", "--tp", "4", "--dry-run", verb="reshard")
    assert list(tmp_path.iterdir()) == []


def test_plan_says_files_recipes_memory_and_disk(convert: Convert, tmp_path: Path) -> None:
    options = ("--saver", "mcore", "--tp", "2", "--pp", "2")
    text = convert("llama", "out", *options, verb="plan convert").out
    assert "iter_0000001/mp_rank_01_001/model_optim_rng.pt" in text
    assert "model/decoder.layers.0.mlp.linear_fc2.weight  bf16[32, 24] = model.safetensors@" in text
    assert "6 files; 0 replicas to compare" in text
    assert re.search(r"^needs 146.47 kB of disk, and at least 42\.\d\d MB of memory$", text, re.MULTILINE)
    facts = json.loads(convert("llama", "out", *options, "--json", verb="plan convert").out)
    assert {"files", "bytes", "disk_needed", "memory_needed", "replicas_to_compare", "source", "result"} <= set(facts)
    convert("llama", "out", *options)
    written = {name: len(data) for name, data in tree(tmp_path / "out").items() if name != "ckptconv.json"}
    assert {f["path"]: f["bytes"] for f in facts["files"]} == written
    assert facts["disk_needed"] == facts["bytes"] == sum(written.values())


def test_plan_tells_a_memory_bound_that_is_too_small(convert: Convert) -> None:
    ran = convert("llama", "out", "--saver", "mcore", "--memory", "10MB", verb="plan convert")
    assert "--memory 10MB is too small" in ran.err
    convert("llama", "out", "--saver", "mcore", "--memory", "10MB", code=1)


def test_force_replaces_a_result(convert: Convert, console: Console, models: Path, tmp_path: Path) -> None:
    convert("llama", "out", "--saver", "mcore")
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert "--force" in convert("llama", "out", "--saver", "mcore", "--tp", "2", code=1).err
    assert (tmp_path / "out" / "mine.txt").exists()
    convert("llama", "out", "--saver", "mcore", "--tp", "2", "--force")
    assert not (tmp_path / "out" / "mine.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    console("verify", models / "llama", tmp_path / "out", "--check")


def test_an_interrupted_run_is_continued(convert: Convert, models: Path, tmp_path: Path) -> None:
    class Pull:
        """A Progress that pulls the plug in the middle."""

        def start(self, total_bytes: int) -> None:
            self.left = total_bytes // 2

        def advance(self, nbytes: int) -> None:
            self.left -= nbytes
            if self.left < 0:
                raise KeyboardInterrupt

        def done(self) -> None:
            pass

    options = ckptconv.ExecuteOptions(workers=1)
    with pytest.raises(KeyboardInterrupt):
        ckptconv.convert(models / "llama", tmp_path / "out", saver="hf", execute_options=options, progress=Pull())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.journal", "out.partial"]
    ran = convert("llama", "out", "--saver", "hf", "--dtype", "fp32", code=1)
    assert 'options.dtype was "keep", is now "fp32"' in ran.err
    ran = convert("llama", "out", "--saver", "hf")
    assert "kB were there already)" in ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        models / "llama" / "model.safetensors"
    ).read_bytes()
