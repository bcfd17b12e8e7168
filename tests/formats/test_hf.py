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

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from huggingface_hub import split_torch_state_dict_into_shards  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from ckptconv.canonicalize import canonicalize  # noqa: E402
from ckptconv.checkpoint import Extras, Stored  # noqa: E402
from ckptconv.dtypes import BF16, FP32  # noqa: E402
from ckptconv.errors import CkptconvError, ConfigError, CoverageError, FormatError, TopologyError, UsageError  # noqa: E402
from ckptconv.formats import Request  # noqa: E402
from ckptconv.formats.hf import Hf, HfLoad, HfSave, parse_size, split, weight_files  # noqa: E402
from ckptconv.localize import localize  # noqa: E402
from ckptconv.plan import Late, Plan  # noqa: E402
from ckptconv.tensor import Fill  # noqa: E402
from ckptconv.topology import Rank, Topology, even  # noqa: E402

HF = Hf()
INDEX = "model.safetensors.index.json"
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 61, "max_position_embeddings": 64, "dtype": "float32",
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama-tied": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "Mistral": {"head_dim": 16},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16},
    "Mixtral": {"num_local_experts": 4},
}


def make(name: str, folder: Path, **saving: Any) -> Any:
    """A tiny model of transformers, saved by it."""
    kind = name.partition("-")[0]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **FAMILIES[name])
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # biases and norms start as constants, which would hide a mix-up
        for parameter in model.parameters():
            parameter.uniform_(-0.3, 0.3)
    model.save_pretrained(folder, **saving)
    return model


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family as one file, and one of them in shards."""
    root = tmp_path_factory.mktemp("hf")
    for name in FAMILIES:
        make(name, root / name)
    make("Llama", root / "sharded", max_shard_size="30KB")
    make("Mixtral", root / "fused", save_original_format=False)
    return {p.name: p for p in root.iterdir()}


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def one(name: str) -> Path:
        return Path(shutil.copytree(folders[name], tmp_path / "src" / name))

    return one


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
def test_round_trip_gives_the_files_of_transformers(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    _stored, plan = resave(load(folders[name]))
    out = write(plan, tmp_path / "out")
    wanted = {p.name: p.read_bytes() for p in folders[name].iterdir()}
    assert {p.name: p.read_bytes() for p in out.iterdir()} == wanted
    assert plan.about["config_changes"] == []


def test_expert_packing_is_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    apart, fused = load(folders["Mixtral"]), load(folders["fused"])
    assert (apart.variant, fused.variant) == (frozenset({"experts_apart"}), frozenset({"experts_fused"}))
    out = write(resave(fused)[1], tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (folders["fused"] / "model.safetensors").read_bytes()
    a, b = canonicalize(apart).tensors, canonicalize(fused).tensors
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[key].numpy(), b[key].numpy()) for key in a)


def test_experts_are_written_apart_for_other_sources(folders: dict[str, Path]) -> None:
    checkpoint = canonicalize(load(folders["fused"]))
    other = replace(checkpoint, origin=checkpoint.origin._replace(format="mcore", variant=frozenset({"experts_te"})))
    assert HF.target(other, even(2), HfSave(), Request()).variant == {"experts_apart"}


@pytest.mark.parametrize("name", ["Llama", "Llama-tied", "Mixtral"])
def test_shards_are_read_by_transformers(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    out = write(resave(load(folders[name]), HfSave(max_shard_size="20KB"))[1], tmp_path / "out")
    index = json.loads((out / INDEX).read_text())
    kind = getattr(transformers, f"{name.partition('-')[0]}ForCausalLM")
    model, report = kind.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original = kind.from_pretrained(folders[name]).state_dict()
    assert all(torch.equal(tensor, original[key]) for key, tensor in model.state_dict().items())
    held = {p.name: load_file(p) for p in out.glob("*.safetensors")}
    assert index["weight_map"] == {key: file for file, tensors in held.items() for key in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for ts in held.values() for t in ts.values())
    assert index["metadata"]["total_parameters"] == model.num_parameters()
    with safe_open(next(out.glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_index_is_spelled_as_transformers_does(folders: dict[str, Path]) -> None:
    wanted = (folders["sharded"] / INDEX).read_bytes()
    table = json.loads(wanted)
    tensors = {key.name: t for key, t in load(folders["sharded"]).ranks[Rank()].items()}
    model = transformers.LlamaForCausalLM.from_pretrained(folders["sharded"])
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


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("0.5 MB", 500_000), ("1kb", 1000), ("2TB", 2 * 10**12)]
)
def test_shard_size_is_read_as_huggingface_does(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "", "GB", "5GiB", "-1GB", "0GB", "nanGB", "infGB", "xMB"])
def test_wrong_shard_size_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="max-shard-size"):
        parse_size(text)


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
    shards: int, copy: Callable[[str], Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    to_bin(source := copy("Llama"), shards)
    out = write(resave(load(source))[1], tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (folders["Llama"] / "model.safetensors").read_bytes()


def test_tied_head_stored_all_the_same_is_a_copy(
    copy: Callable[[str], Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    source = copy("Llama-tied")
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, source / "model.safetensors", {"format": "pt"})
    assert [r.name for r in canonicalize(load(source)).replicas] == ["lm_head.weight"]
    out = write(resave(load(source))[1], tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (folders["Llama-tied"] / "model.safetensors").read_bytes()


def test_only_the_set_that_counts_is_read(copy: Callable[[str], Path]) -> None:
    source = copy("sharded")
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


def test_side_files_travel_along_and_the_rest_does_not(copy: Callable[[str], Path], tmp_path: Path) -> None:
    source = copy("Llama")
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
def test_cache_snapshot_is_a_source(shared: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    snapshot = cached(folders["sharded"], tmp_path / "cache", shared)
    assert HF.sniff(snapshot)
    out = write(resave(load(snapshot))[1], tmp_path / "out")
    assert len(load_file(out / "model.safetensors")) == 21


def test_cache_snapshot_may_not_leave_its_repository(folders: dict[str, Path], tmp_path: Path) -> None:
    snapshot = cached(folders["Llama"], tmp_path / "cache", False)
    other = tmp_path / "cache" / "models--other" / "blobs" / "x"
    other.parent.mkdir(parents=True)
    shutil.copy(folders["Llama"] / "model.safetensors", other)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../models--other/blobs/x")
    with pytest.raises(FormatError, match="leaves the folder"):
        load(snapshot)


def test_config_may_come_from_elsewhere(copy: Callable[[str], Path], folders: dict[str, Path]) -> None:
    (source := copy("Llama")).joinpath("config.json").unlink()
    assert HF.sniff(source)
    with pytest.raises(ConfigError, match=r"--loader.config"):
        load(source)
    for given in (folders["Llama"], folders["Llama"] / "config.json"):
        assert load(source, config=given).config == load(folders["Llama"]).config
    with pytest.raises(UsageError, match=r"--loader.config"):
        load(source, config=source)


def test_family_may_be_said(copy: Callable[[str], Path]) -> None:
    source = copy("Llama")
    change(source, "config.json", model_type="Yi", architectures=["YiForCausalLM"])
    with pytest.raises(ConfigError, match="--family"):
        load(source)
    for name in ("llama", "hf-llama"):
        stored, plan = resave(load(source, Request(family=name)), request=Request(family=name))
        assert stored.config.family == "hf-llama"
        assert plan.about["config_changes"] == []
    with pytest.raises(UsageError, match="hf-mixtral"):
        load(source, Request(family="gpt9"))


def test_vocabulary_may_be_said(copy: Callable[[str], Path], tmp_path: Path) -> None:
    source = copy("Llama")
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


def test_config_of_the_result_comes_from_where_there_is_one(folders: dict[str, Path], tmp_path: Path) -> None:
    source, wanted = load(folders["Llama"]), (folders["Llama"] / "config.json").read_bytes()

    def config_of(stored: Stored, options: HfSave = HfSave(), request: Request = Request()) -> bytes:  # noqa: B008
        plan = resave(stored, options, request)[1]
        (file,) = [f for f in plan.files if f.path == "config.json"]
        body = file.segments[0].body
        assert file.final
        assert isinstance(body, bytes)
        return body

    assert config_of(elsewhere(source, hf_config=json.loads(wanted))) == wanted
    assert config_of(elsewhere(source), HfSave(template=folders["Llama"])) == wanted
    with pytest.raises(ConfigError, match=r"--saver.template.*--saver.config-from-args.*rope_theta"):
        config_of(elsewhere(source))
    with pytest.raises(ConfigError, match="--family"):
        config_of(elsewhere(source), HfSave(config_from_args=True))
    fresh = config_of(elsewhere(source), HfSave(config_from_args=True), Request(family="llama"))
    (tmp_path / "config.json").write_bytes(fresh)
    made = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (made.head_dim, made.num_key_value_heads, made.rope_parameters["rope_theta"]) == (8, 2, 10000.0)


def test_untrusted_fields_are_named(folders: dict[str, Path]) -> None:
    plan = resave(elsewhere(load(folders["Llama"])), HfSave(config_from_args=True), Request(family="llama"))[1]
    untrusted = plan.about["config_untrusted"]
    assert isinstance(untrusted, list)
    assert any("rope_theta" in line for line in untrusted)


def test_template_of_another_family_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"'mistral'.*hf-llama"):
        resave(load(folders["Llama"]), HfSave(template=folders["Mistral"]))


def test_changed_dtype_and_vocabulary_are_listed(folders: dict[str, Path]) -> None:
    stored = load(folders["Llama"])
    request = Request(vocab=55)
    checkpoint = canonicalize(stored)
    target = HF.target(checkpoint, even(2), HfSave(), request)
    assert target.vocab_rows == 55
    result = localize(checkpoint, target, "hf")
    plan = HF.save(replace(result, config=replace(result.config, vocab_rows=55, dtype=BF16)), HfSave(), request)
    assert plan.about["config_changes"] == ['dtype: "float32" -> "bfloat16"', "vocab_size: 61 -> 55"]


@pytest.mark.parametrize("topology", [Topology(tp=2), Topology(pp=2), Topology(ep=2), Topology(vpp=2)])
def test_layouts_do_not_apply(topology: Topology, folders: dict[str, Path]) -> None:
    with pytest.raises(TopologyError, match="whole tensors"):
        HF.target(canonicalize(load(folders["Llama"])), topology, HfSave(), Request())


def test_model_the_family_cannot_hold_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="qk_norm"):
        HF.target(canonicalize(load(folders["Qwen3"])), even(2), HfSave(), Request(family="llama"))


def test_unknown_vocabulary_is_asked_for(folders: dict[str, Path]) -> None:
    checkpoint = canonicalize(load(folders["Llama"]))
    with pytest.raises(ConfigError, match="--vocab-size"):
        HF.target(replace(checkpoint, config=replace(checkpoint.config, vocab=None)), even(2), HfSave(), Request())


def test_usage_says_how_to_load(folders: dict[str, Path]) -> None:
    text = HF.usage(load(folders["Llama"]), "out/folder")
    assert "AutoModelForCausalLM.from_pretrained('out/folder'" in text
    assert "AutoTokenizer" not in text


def test_sniff_knows_what_is_ours(folders: dict[str, Path], tmp_path: Path) -> None:
    assert all(HF.sniff(folder) for folder in folders.values())
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    assert not HF.sniff(tmp_path)
    assert not HF.sniff(tmp_path / "absent")
    assert not HF.sniff(folders["Llama"] / "config.json")
    (tmp_path / "config.json").write_text("{")
    assert not HF.sniff(tmp_path)


def test_loading_reads_no_tensor(folders: dict[str, Path], tmp_path: Path) -> None:
    """The payload is a hole in a sparse file, and the plan is made all the same."""
    source = Path(shutil.copytree(folders["Llama"], tmp_path / "src"))
    data = (source / "model.safetensors").read_bytes()
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    with (source / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(data))
    assert resave(load(source))[1].nbytes > len(data)


# --- hostile and damaged folders: (what is done to it, error class, what the message names) -------------------------


def repoint(folder: Path, target: object) -> None:
    index = folder / INDEX
    table = json.loads(index.read_text())
    table["weight_map"]["lm_head.weight"] = target
    index.write_text(json.dumps(table))


def edit_index(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        index = folder / INDEX
        table = json.loads(index.read_text())
        edit(table)
        index.write_text(json.dumps(table))

    return act


def edit_shard(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        state = load_file(folder / SHARD)
        edit(state)
        save_file(state, folder / SHARD, {"format": "pt"})

    return act


SHARD = "model-00001-of-00003.safetensors"
OUTSIDE = "outside.safetensors"


def instead(folder: Path, name: str, put: Callable[[Path], object]) -> None:
    (folder / name).unlink()
    put(folder / name)


def link_out(folder: Path, name: str = SHARD, absolute: bool = True) -> None:
    target = folder.parent / OUTSIDE
    (folder / name).replace(target)
    (folder / name).symlink_to(target.resolve() if absolute else f"../{OUTSIDE}")


def truncate(folder: Path, keep: float) -> None:
    os.truncate(folder / SHARD, int((folder / SHARD).stat().st_size * keep))


def double_entry(folder: Path) -> None:
    """One tensor, two shards: JSON readers that do not look take the last."""
    index = folder / INDEX
    index.write_text(index.read_text().replace('"weight_map": {', '"weight_map": {"lm_head.weight": "x.safetensors",'))


Damage = tuple[Callable[[Path], object], type[CkptconvError], str]
HOSTILE: dict[str, Damage] = {
    "name escapes upward": (lambda f: repoint(f, "../x.safetensors"), FormatError, "lm_head.weight"),
    "name escapes far upward": (lambda f: repoint(f, "../../../../etc/passwd"), FormatError, "plain file name"),
    "name is absolute": (lambda f: repoint(f, "/etc/passwd"), FormatError, "plain file name"),
    "name is a folder up": (lambda f: repoint(f, ".."), FormatError, "plain file name"),
    "name is the folder": (lambda f: repoint(f, "."), FormatError, "plain file name"),
    "name is empty": (lambda f: repoint(f, ""), FormatError, "plain file name"),
    "name in a folder below": (lambda f: repoint(f, "sub/x.safetensors"), FormatError, "plain file name"),
    "name with a backslash": (lambda f: repoint(f, "..\\x.safetensors"), FormatError, "plain file name"),
    "name with a zero byte": (lambda f: repoint(f, "x\0.safetensors"), FormatError, "plain file name"),
    "name is half a surrogate": (lambda f: repoint(f, "\ud800.safetensors"), FormatError, "plain file name"),
    "name is far too long": (lambda f: repoint(f, "x" * 9999 + ".safetensors"), FormatError, "plain file name"),
    "name is a number": (lambda f: repoint(f, 5), FormatError, "plain file name"),
    "name is null": (lambda f: repoint(f, None), FormatError, "plain file name"),
    "name is a pickle": (lambda f: repoint(f, "model.bin"), FormatError, ".safetensors"),
    "name is the config": (lambda f: repoint(f, "config.json"), FormatError, ".safetensors"),
    "shard links outside": (link_out, FormatError, "leaves the folder"),
    "shard links outside relatively": (lambda f: link_out(f, absolute=False), FormatError, "leaves the folder"),
    "index links outside": (lambda f: link_out(f, INDEX), FormatError, "leaves the folder"),
    "config links outside": (lambda f: link_out(f, "config.json"), FormatError, "leaves the folder"),
    "side file links outside": (lambda f: (f / "tokenizer.json").symlink_to("/etc/passwd"), FormatError, "tokenizer.json"),
    "shard links to itself": (lambda f: instead(f, SHARD, lambda p: p.symlink_to(SHARD)), FormatError, SHARD),
    "shard links to nothing": (lambda f: instead(f, SHARD, lambda p: p.symlink_to("gone")), FormatError, SHARD),
    "shard is a folder": (lambda f: instead(f, SHARD, Path.mkdir), FormatError, SHARD),
    "shard is a pipe": (lambda f: instead(f, SHARD, os.mkfifo), FormatError, SHARD),
    "side file is a pipe": (lambda f: os.mkfifo(f / "tokenizer.json"), FormatError, "tokenizer.json"),
    "config is a pipe": (lambda f: instead(f, "config.json", os.mkfifo), FormatError, "config.json"),
    "shard is missing": (lambda f: (f / SHARD).unlink(), CoverageError, SHARD),
    "shard is empty": (lambda f: truncate(f, 0), FormatError, SHARD),
    "shard has half a header": (lambda f: truncate(f, 0.01), FormatError, SHARD),
    "shard is cut": (lambda f: truncate(f, 0.9), FormatError, SHARD),
    "shard is another's": (lambda f: shutil.copy(f / SHARD.replace("1", "2", 1), f / SHARD), CoverageError, SHARD),
    "tensor in two shards": (
        lambda f: edit_shard(lambda s: s.update({"lm_head.weight": torch.zeros(61, 32)}))(f), CoverageError, "lm_head.weight is in"
    ),
    "tensor not in the index": (
        edit_index(lambda t: t["weight_map"].pop("lm_head.weight")), CoverageError, "does not list it"
    ),
    "index lists what is nowhere": (
        edit_index(lambda t: t["weight_map"].update({"x.weight": SHARD})), CoverageError, f"x.weight is not in {SHARD}"
    ),
    "index has no map": (edit_index(lambda t: t.pop("weight_map")), FormatError, "weight_map"),
    "index has an empty map": (edit_index(lambda t: t.update(weight_map={})), FormatError, "weight_map"),
    "index map is a list": (edit_index(lambda t: t.update(weight_map=[1])), FormatError, "weight_map"),
    "index is not JSON": (lambda f: (f / INDEX).write_text("{"), FormatError, "index.json"),
    "index names a tensor twice": (lambda f: double_entry(f), FormatError, "twice"),
    "index is gone": (lambda f: (f / INDEX).unlink(), FormatError, SHARD),
    "index links to nothing": (
        lambda f: instead(f, INDEX, lambda p: p.symlink_to("gone")),
        FormatError, "index.json"
    ),
    "no weights": (lambda f: list(map(Path.unlink, f.glob("model*"))), FormatError, "no weights"),
    "tensor of another shape": (
        edit_shard(lambda s: s.update({"model.embed_tokens.weight": torch.zeros(61, 31)})), CoverageError, "(61, 31)"
    ),
    "embedding of another length": (
        edit_shard(lambda s: s.update({"model.embed_tokens.weight": torch.zeros(60, 32)})), ConfigError, "60 rows"
    ),
    "embedding without shape": (
        edit_shard(lambda s: s.update({"model.embed_tokens.weight": torch.zeros(())})), CoverageError, "embed_tokens"
    ),
    "config says more layers": (lambda f: change(f, "config.json", num_hidden_layers=3), CoverageError, "layers.2."),
    "config says fewer layers": (lambda f: change(f, "config.json", num_hidden_layers=1), CoverageError, "layers.1."),
    "config says 8000 layers": (lambda f: change(f, "config.json", num_hidden_layers=8000), ConfigError, "21 tensors"),
    "config says other heads": (lambda f: change(f, "config.json", num_key_value_heads=4), CoverageError, "k_proj"),
    "config says tied": (lambda f: change(f, "config.json", tie_word_embeddings=True), CkptconvError, ""),
    "config says biased": (lambda f: change(f, "config.json", attention_bias=True), CoverageError, "q_proj.bias"),
    "config is of another family": (lambda f: change(f, "config.json", model_type="qwen3"), CoverageError, "q_norm"),
    "config is quantised": (lambda f: change(f, "config.json", quantization_config={}), ConfigError, "quantis"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("nope"), FormatError, "config.json"),
    "config is huge": (lambda f: os.truncate(f / "config.json", 10**11), FormatError, "config.json"),
}  # fmt: skip
TIED = "config says tied"  # the head is compared with the embedding while it streams: not an error of loading


@pytest.mark.parametrize("damage", [name for name in HOSTILE if name != TIED])
def test_damage_is_refused_by_name(damage: str, copy: Callable[[str], Path]) -> None:
    act, kind, named = HOSTILE[damage]
    source = copy("sharded")
    act(source)
    with pytest.raises(CkptconvError) as info:
        canonicalize(load(source))
    assert isinstance(info.value, kind)
    assert named in str(info.value)


def test_tied_by_mistake_leaves_two_tensors_to_compare(copy: Callable[[str], Path]) -> None:
    HOSTILE[TIED][0](source := copy("sharded"))
    (replica,) = canonicalize(load(source)).replicas
    assert not np.array_equal(replica.kept.numpy(), replica.copy.numpy())


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("canary",)


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ([1], "list"),
        ({"state_dict": {"x": torch.zeros(2)}}, "state_dict"),
        ({"step": 5, "x": torch.zeros(2)}, "step"),
        ({0: torch.zeros(2)}, "0"),
        ({"x": Canary()}, ""),
    ],
    ids=["list", "nested", "number", "numbered", "canary"],
)
def test_bin_of_anything_but_tensors_is_refused(
    state: object, named: str, copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = copy("Llama")
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match=r"pytorch_model.bin") as info:
        load(source)
    assert named in str(info.value)
    assert not (tmp_path / "canary").exists()
