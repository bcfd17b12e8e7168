"""Hugging Face folders held against transformers and huggingface_hub: what they write is read, what we write they read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckptconv.canonicalize import canonicalize
from ckptconv.checkpoint import Extras, Stored
from ckptconv.dtypes import BF16, FP32
from ckptconv.errors import ConfigError, CoverageError, FormatError, TopologyError, UsageError
from ckptconv.formats import Request
from ckptconv.formats.hf import Hf, HfLoad, HfSave
from ckptconv.huggingface.folder_write import split, weight_files
from ckptconv.localize import localize
from ckptconv.nodes import Fill
from ckptconv.pipeline import Job, prepare
from ckptconv.plan import Late, Plan
from ckptconv.testing.checkpoints import write_hf
from ckptconv.topology import Rank, Topology, even

HF = Hf()
INDEX = "model.safetensors.index.json"
FAMILIES = ("Llama", "Llama-tied", "Mistral", "Qwen2", "Qwen3", "Mixtral")


def load(path: Path, request: Request = Request(), **options: Any) -> Stored:  # noqa: B008
    return HF.load(path, HfLoad(**options), request)


def resave(stored: Stored, options: HfSave = HfSave(), request: Request = Request()) -> tuple[Stored, Plan]:  # noqa: B008
    """Through the canonical graph and back."""
    checkpoint = canonicalize(stored)
    target = HF.target(checkpoint, even(checkpoint.config.layers), options, request)
    result = localize(checkpoint, target, "hf")
    return result, HF.save(result, options, request)


def write(plan: Plan, folder: Path) -> Path:
    """The plan's files by the simplest means there are."""
    folder.mkdir(parents=True)
    for file in plan.files:
        data = bytearray(file.size)
        for segment in file.segments:
            assert not isinstance(segment.body, Late)
            body = segment.body if isinstance(segment.body, bytes) else segment.body.numpy().tobytes()
            data[segment.offset : segment.offset + segment.nbytes] = body
        (folder / file.path).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_gives_the_files_of_transformers(name: str, hf_folders: dict[str, Path], tmp_path: Path) -> None:
    _stored, plan = resave(load(hf_folders[name]))
    out = write(plan, tmp_path / "out")
    wanted = {p.name: p.read_bytes() for p in hf_folders[name].iterdir()}
    assert {p.name: p.read_bytes() for p in out.iterdir()} == wanted
    assert plan.about["config_changes"] == []


def test_expert_packing_is_kept(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    apart, fused = load(hf_folders["Mixtral"]), load(hf_folders["fused"])
    assert (apart.variant, fused.variant) == (frozenset({"experts_apart"}), frozenset({"experts_fused"}))
    out = write(resave(fused)[1], tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (hf_folders["fused"] / "model.safetensors").read_bytes()
    a, b = canonicalize(apart).tensors, canonicalize(fused).tensors
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[key].numpy(), b[key].numpy()) for key in a)


def test_experts_are_written_apart_for_other_sources(hf_folders: dict[str, Path]) -> None:
    checkpoint = canonicalize(load(hf_folders["fused"]))
    other = replace(checkpoint, origin=checkpoint.origin._replace(format="mcore", variant=frozenset({"experts_te"})))
    assert HF.target(other, even(2), HfSave(), Request()).variant == {"experts_apart"}


@pytest.mark.parametrize("name", ["Llama", "Llama-tied", "Mixtral"])
def test_shards_are_read_by_transformers(name: str, hf_folders: dict[str, Path], tmp_path: Path) -> None:
    out = write(resave(load(hf_folders[name]), HfSave(max_shard_size="20KB"))[1], tmp_path / "out")
    index = json.loads((out / INDEX).read_text())
    kind = getattr(transformers, f"{name.partition('-')[0]}ForCausalLM")
    model, report = kind.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original = kind.from_pretrained(hf_folders[name]).state_dict()
    assert all(torch.equal(tensor, original[key]) for key, tensor in model.state_dict().items())
    held = {p.name: load_file(p) for p in out.glob("*.safetensors")}
    assert index["weight_map"] == {key: file for file, tensors in held.items() for key in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for ts in held.values() for t in ts.values())
    assert index["metadata"]["total_parameters"] == model.num_parameters()
    with safe_open(next(out.glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_index_is_spelled_as_transformers_does(hf_folders: dict[str, Path]) -> None:
    wanted = (hf_folders["sharded"] / INDEX).read_bytes()
    table = json.loads(wanted)
    tensors = {key.name: t for key, t in load(hf_folders["sharded"]).ranks[Rank()].items()}
    model = transformers.LlamaForCausalLM.from_pretrained(hf_folders["sharded"])
    ordered = {name: tensors[name] for name in model.state_dict()}
    files = {f.path: f for f in weight_files(ordered, 30_000)}
    assert files[INDEX].segments[0].body == wanted
    assert files.keys() - {INDEX} == set(table["weight_map"].values())
    assert [f.path for f in files.values() if f.final] == [INDEX]


@pytest.mark.parametrize("seed", range(20))
def test_split_equals_huggingface_hub(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [int(n) for n in rng.choice([1, 5, 40, 99, 100, 101, 250], size=rng.integers(1, 30))]
    ours = split({f"t{i}": Fill((n,), FP32) for i, n in enumerate(sizes)}, 400)
    state = {f"t{i}": torch.zeros(n) for i, n in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(state, max_shard_size=400).filename_to_tensors
    assert [list(shard) for shard in ours] == list(theirs.values())


def to_bin(folder: Path, shards: int) -> None:
    """The same checkpoint as transformers 4 wrote it: pickled, perhaps sharded."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = list(state)
    place = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(names)}
    for file in set(place.values()):
        torch.save({n: state[n] for n in names if place[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": place})
    )


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_is_read_as_safetensors_is(
    shards: int, hf_copy: Callable[[str], Path], hf_folders: dict[str, Path], tmp_path: Path
) -> None:
    to_bin(source := hf_copy("Llama"), shards)
    out = write(resave(load(source))[1], tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (hf_folders["Llama"] / "model.safetensors").read_bytes()


def test_tied_head_stored_all_the_same_is_a_copy(
    hf_copy: Callable[[str], Path], hf_folders: dict[str, Path], tmp_path: Path
) -> None:
    source = hf_copy("Llama-tied")
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, source / "model.safetensors", {"format": "pt"})
    assert [r.name for r in canonicalize(load(source)).replicas] == ["lm_head.weight"]
    out = write(resave(load(source))[1], tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (hf_folders["Llama-tied"] / "model.safetensors").read_bytes()


def test_only_the_set_that_counts_is_read(hf_copy: Callable[[str], Path]) -> None:
    source = hf_copy("sharded")
    others = [
        "consolidated.safetensors",
        "model.gguf",
        "tf_model.h5",
        "flax_model.msgpack",
        "adapter_model.safetensors",
    ]
    for name in [
        *others,
        "pytorch_model.bin",
        "model.safetensors",
        "tokenizer.json",
        "modeling_x.py",
        ".gitattributes",
    ]:
        (source / name).write_bytes(b"not what it says")
    (source / "original").mkdir()
    stored = load(source)
    assert len(stored.ranks[Rank()]) == 21
    assert set(stored.extras.files) == {"config.json", "generation_config.json", "tokenizer.json", "modeling_x.py"}
    (note,) = stored.extras.notes
    assert all(name in note for name in [*others, "pytorch_model.bin", "model.safetensors", "original/"])
    assert ".gitattributes" not in note
    assert "model-00001" not in note


def test_side_files_travel_along_and_the_rest_does_not(hf_copy: Callable[[str], Path], tmp_path: Path) -> None:
    source = hf_copy("Llama")
    for name in ("tokenizer.model", "chat_template.jinja", "LICENSE.txt", "merges.txt"):
        (source / name).write_bytes(name.encode())
    (source / "README.md").touch()
    (source / "training_args.bin").write_bytes(b"x")
    out = write(resave(load(source))[1], tmp_path / "out")
    assert {p.name for p in source.iterdir()} - {p.name for p in out.iterdir()} == {"training_args.bin"}
    assert (out / "tokenizer.model").read_bytes() == b"tokenizer.model"
    assert (out / "README.md").read_bytes() == b""


def cached(folder: Path, cache: Path, shared: bool) -> Path:
    """The folder as huggingface_hub keeps it: links to blobs, and those perhaps to blobs shared by repositories."""
    repository = cache / "models--some--llama"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"hash{i}"
        if shared:
            store = cache / "blobs" / "ab" / f"ab{i:062x}"
            store.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, store)
            blob.symlink_to(os.path.relpath(store, blob.parent))
        else:
            shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_cache_snapshot_is_a_source(shared: bool, hf_folders: dict[str, Path], tmp_path: Path) -> None:
    snapshot = cached(hf_folders["sharded"], tmp_path / "cache", shared)
    assert HF.sniff(snapshot)
    out = write(resave(load(snapshot))[1], tmp_path / "out")
    assert len(load_file(out / "model.safetensors")) == 21


def test_cache_snapshot_may_not_leave_its_repository(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    snapshot = cached(hf_folders["Llama"], tmp_path / "cache", False)
    other = tmp_path / "cache" / "models--other" / "blobs" / "x"
    other.parent.mkdir(parents=True)
    shutil.copy(hf_folders["Llama"] / "model.safetensors", other)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../models--other/blobs/x")
    with pytest.raises(FormatError, match="leaves the folder"):
        load(snapshot)


def test_config_may_come_from_elsewhere(hf_copy: Callable[[str], Path], hf_folders: dict[str, Path]) -> None:
    (source := hf_copy("Llama")).joinpath("config.json").unlink()
    assert HF.sniff(source)
    with pytest.raises(ConfigError, match=r"--loader.config"):
        load(source)
    for given in (hf_folders["Llama"], hf_folders["Llama"] / "config.json"):
        assert load(source, config=given).config == load(hf_folders["Llama"]).config
    with pytest.raises(UsageError, match=r"--loader.config"):
        load(source, config=source)


def test_family_may_be_said(hf_copy: Callable[[str], Path]) -> None:
    source = hf_copy("Llama")
    change(source, "config.json", model_type="Yi", architectures=["YiForCausalLM"])
    with pytest.raises(ConfigError, match="--family"):
        load(source)
    for name in ("llama", "hf-llama"):
        stored, plan = resave(load(source, Request(family=name)), request=Request(family=name))
        assert stored.config.family == "hf-llama"
        assert plan.about["config_changes"] == []
    with pytest.raises(UsageError, match="hf-mixtral"):
        load(source, Request(family="gpt9"))


def test_vocabulary_may_be_said(hf_copy: Callable[[str], Path], tmp_path: Path) -> None:
    source = hf_copy("Llama")
    change(source, "config.json", vocab_size=50)
    with pytest.raises(ConfigError, match=r"vocab_size is 50.*61 rows.*--vocab-size"):
        load(source)
    config = load(source, Request(vocab=50)).config
    assert (config.vocab, config.vocab_rows) == (50, 61)
    with pytest.raises(ConfigError, match="only 61 rows"):
        load(source, Request(vocab=62))


def change(folder: Path, name: str, **values: Any) -> None:
    table = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**table, **values}))


def elsewhere(stored: Stored, **objects: object) -> Stored:
    """As if it came from a format without a config.json."""
    return replace(stored, format="mcore", extras=Extras(objects=objects))


def test_config_of_the_result_comes_from_where_there_is_one(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    source, wanted = load(hf_folders["Llama"]), (hf_folders["Llama"] / "config.json").read_bytes()

    def config_of(stored: Stored, options: HfSave = HfSave(), request: Request = Request()) -> bytes:  # noqa: B008
        plan = resave(stored, options, request)[1]
        (file,) = [f for f in plan.files if f.path == "config.json"]
        body = file.segments[0].body
        assert file.final
        assert isinstance(body, bytes)
        return body

    assert config_of(elsewhere(source, hf_config=json.loads(wanted))) == wanted
    assert config_of(elsewhere(source), HfSave(template=hf_folders["Llama"])) == wanted
    with pytest.raises(ConfigError, match=r"--saver.template.*--saver.config-from-args.*rope_theta"):
        config_of(elsewhere(source))
    with pytest.raises(ConfigError, match="--family"):
        config_of(elsewhere(source), HfSave(config_from_args=True))
    fresh = config_of(elsewhere(source), HfSave(config_from_args=True), Request(family="llama"))
    (tmp_path / "config.json").write_bytes(fresh)
    made = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (made.head_dim, made.num_key_value_heads, made.rope_parameters["rope_theta"]) == (8, 2, 10000.0)


def test_untrusted_fields_are_named(hf_folders: dict[str, Path]) -> None:
    plan = resave(elsewhere(load(hf_folders["Llama"])), HfSave(config_from_args=True), Request(family="llama"))[1]
    untrusted = plan.about["config_untrusted"]
    assert isinstance(untrusted, list)
    assert any("rope_theta" in line for line in untrusted)


def test_template_of_another_family_is_refused(hf_folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"'mistral'.*hf-llama"):
        resave(load(hf_folders["Llama"]), HfSave(template=hf_folders["Mistral"]))


def test_changed_dtype_and_vocabulary_are_listed(hf_folders: dict[str, Path]) -> None:
    stored = load(hf_folders["Llama"])
    request = Request(vocab=55)
    checkpoint = canonicalize(stored)
    target = HF.target(checkpoint, even(2), HfSave(), request)
    assert target.vocab_rows == 55
    result = localize(checkpoint, target, "hf")
    plan = HF.save(replace(result, config=replace(result.config, vocab_rows=55, dtype=BF16)), HfSave(), request)
    assert plan.about["config_changes"] == ['dtype: "float32" -> "bfloat16"', "vocab_size: 61 -> 55"]


@pytest.mark.parametrize("topology", [Topology(tp=2), Topology(pp=2), Topology(ep=2), Topology(vpp=2)])
def test_layouts_do_not_apply(topology: Topology, hf_folders: dict[str, Path]) -> None:
    with pytest.raises(TopologyError, match="whole tensors"):
        HF.target(canonicalize(load(hf_folders["Llama"])), topology, HfSave(), Request())


def test_model_the_family_cannot_hold_is_refused(hf_folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="qk_norm"):
        HF.target(canonicalize(load(hf_folders["Qwen3"])), even(2), HfSave(), Request(family="llama"))


def test_unknown_vocabulary_is_asked_for(hf_folders: dict[str, Path]) -> None:
    checkpoint = canonicalize(load(hf_folders["Llama"]))
    with pytest.raises(ConfigError, match="--vocab-size"):
        HF.target(replace(checkpoint, config=replace(checkpoint.config, vocab=None)), even(2), HfSave(), Request())


def test_usage_says_how_to_load(hf_folders: dict[str, Path]) -> None:
    text = HF.usage(load(hf_folders["Llama"]), "out/folder", HF.Save())
    assert "AutoModelForCausalLM.from_pretrained('out/folder'" in text
    assert "AutoTokenizer" not in text


def test_sniff_knows_what_is_ours(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    assert all(HF.sniff(folder) for folder in hf_folders.values())
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    assert not HF.sniff(tmp_path)
    assert not HF.sniff(tmp_path / "absent")
    assert not HF.sniff(hf_folders["Llama"] / "config.json")
    (tmp_path / "config.json").write_text("{")
    assert not HF.sniff(tmp_path)


def test_loading_reads_no_tensor(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    """The payload is a hole in a sparse file, and the plan is made all the same."""
    source = Path(shutil.copytree(hf_folders["Llama"], tmp_path / "src"))
    data = (source / "model.safetensors").read_bytes()
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    with (source / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(data))
    assert resave(load(source))[1].nbytes > len(data)


def test_weights_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "llama")
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"].to(torch.int8)}, source / "model.safetensors")
    for saver in ("hf", "mcore"):
        with pytest.raises(CoverageError, match=r"(?s)quantised weights cannot be converted.*head.weight is int8"):
            prepare(Job(source, saver=saver))
