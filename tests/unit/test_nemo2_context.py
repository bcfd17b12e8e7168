"""NeMo 2's model.yaml and io.json as read and written, against files that NeMo 2.4.0 wrote."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptconv.config import ModelConfig, Rope
from ckptconv.dtypes import DTYPES
from ckptconv.errors import ConfigError, FormatError
from ckptconv.nemo import context, context_write, io_json, tokenizer_files, yaml_file
from ckptconv.source import whole
from tests.unit.helpers.nemo_configs import FOLDER as CONFIGS

GOLDEN = CONFIGS.parent / "nemo2"
TOKENIZER = CONFIGS.parent / "tokenizers" / "input.model"  # 384 pieces
MADE = {  # what tests/golden/nemo/nemo2/README.md says NeMo was given, and what its classes are for
    "layers": 4, "hidden": 64, "heads": 8, "kv_heads": 4, "head_dim": 8, "ffn": 176, "tied": False, "norm": "rmsnorm",
    "activation": "silu", "glu": True, "qkv_bias": False, "out_bias": False, "mlp_bias": False, "qk_norm": False,
}  # fmt: skip
LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SAYS: dict[str, dict[str, object]] = {
    "llama_spm": {"rope": Rope(10000.0), "max_positions": 512, "norm_eps": 1e-5, "experts": 0},
    "llama31_hf": {"rope": Rope(500000.0, 1.0, LLAMA31), "max_positions": 512, "norm_eps": 1e-5},
    "mixtral": {"rope": Rope(1e6), "max_positions": 4096, "experts": 4, "router_topk": 2, "moe_ffn": 176, "moe_layers": (0, 1, 2, 3)},
    "qwen2": {"rope": Rope(1e6), "max_positions": 512, "norm_eps": 1e-6, "qkv_bias": True},
    "mistral": {"rope": Rope(10000.0), "sliding_window": 4097},
}  # fmt: skip


def read_golden(case: str, home: Path, *, yaml: bool = True) -> context.Context:
    """A context as NeMo would have it in a folder."""
    folder = Path(shutil.copytree(GOLDEN / case, home / case / context.FOLDER))
    if (folder / "io.json.gz").exists():
        (folder / io_json.NAME).write_bytes(gzip.decompress((folder / "io.json.gz").read_bytes()))
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    if not yaml:
        (folder / context.YAML).unlink()
    found = context.read(home / case)
    assert found is not None
    return found


@pytest.mark.parametrize("case", SAYS)
def test_the_model_is_the_one_that_nemo_was_given(case: str, tmp_path: Path) -> None:
    said = context.statement(read_golden(case, tmp_path))
    wanted = MADE | SAYS[case]
    assert {name: said.fields[name] for name in wanted} == wanted
    assert said.layout.tp is None


@pytest.mark.parametrize(
    ("case", "family", "vocab"),
    [
        ("llama_spm", "hf-llama", 384),
        ("qwen2", "hf-qwen2", None),
        ("mixtral", "hf-mixtral", 384),
        ("llama31_hf", "hf-llama", None),
    ],
)
def test_family_vocabulary_and_precision(case: str, family: str, vocab: int | None, tmp_path: Path) -> None:
    """The vocabulary: the tokens of the tokenizer, else unknown (one that is not there): what is preset are rows."""
    found = read_golden(case, tmp_path)
    assert (found.family, found.vocabulary, found.dtype) == (family, vocab, DTYPES["bf16"])


def test_io_json_alone_says_the_same_where_it_holds_every_field(tmp_path: Path) -> None:
    alone, both = read_golden("llama31_hf", tmp_path / "a", yaml=False), read_golden("llama31_hf", tmp_path / "b")
    assert alone.where == "context/io.json"
    assert context.statement(alone).fields == context.statement(both).fields


def test_io_json_alone_that_leaves_fields_to_nemos_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"leaves to the defaults of .*LlamaConfig: normalization, .*--loader\.config"
    ):
        context.statement(read_golden("llama_spm", tmp_path, yaml=False))


@pytest.mark.parametrize("case", ["llama_spm", "llama31_hf"])
def test_the_graph_is_written_as_fiddle_writes_it(case: str, tmp_path: Path) -> None:
    """Key by key; only what fiddle shares between arguments (a dtype that is there several times) we write out."""
    read_golden(case, tmp_path)
    text = (tmp_path / case / context.FOLDER / io_json.NAME).read_bytes()
    theirs: dict[str, Any] = json.loads(text)
    ours: dict[str, Any] = json.loads(io_json.write(io_json.read(text, "io.json")))
    assert list(ours["objects"]) == list(theirs["objects"])
    different = {key for key in theirs["objects"] if ours["objects"][key] != theirs["objects"][key]}
    assert different <= {"optimizer_config_1", "llama31_config_1", "normal__1", "normal__2"}
    assert different <= ({"optimizer_config_1"} if case == "llama_spm" else different)
    assert {key: ours[key] for key in ("root", "refcounts", "version")} == {
        key: theirs[key] for key in ("root", "refcounts", "version")
    }


CONFIG = ModelConfig(
    family="hf-llama", layers=4, hidden=64, heads=8, kv_heads=4, head_dim=8, ffn=176, vocab_rows=384, vocab=384,
    max_positions=512, dtype=DTYPES["bf16"],
)  # fmt: skip


def written(config: ModelConfig, tokenizer: Path | None = TOKENIZER) -> dict[str, Any]:
    """The files of a context, parsed by other software."""
    files = {"tokenizer.model": whole(str(tokenizer))} if tokenizer else {}
    made = {file.path: file.segments[0].body for file in context_write.files(config, DTYPES["bf16"], 128, files)}
    text = made["context/model.yaml"]
    assert isinstance(text, bytes)
    return dict(yaml_file.read(text, "model.yaml"))


def test_what_is_written_agrees_with_what_nemo_writes_of_the_same_model() -> None:
    """Every field of ours that NeMo's file has too has its value, numbers aside that are whole in one of them."""
    ours, theirs = written(CONFIG), yaml_file.read((GOLDEN / "llama_spm" / context.YAML).read_bytes(), "golden")
    assert ours["_target_"] == theirs["_target_"]
    assert ours["tokenizer"].items() <= dict(theirs["tokenizer"]).items()  # type: ignore[call-overload]
    golden: Any = theirs["config"]
    assert {key: golden[key] for key in ours["config"]} == ours["config"] | {"kv_channels": None}


def test_the_rows_are_preset_where_no_tokenizer_tells_them() -> None:
    assert "vocab_size" not in written(CONFIG)["config"]
    alone = written(CONFIG, None)
    assert (alone["config"]["vocab_size"], alone["true_vocab_size"], alone["tokenizer"]) == (384, 384, None)
    assert "true_vocab_size" not in written(CONFIG)
    assert "true_vocab_size" not in written(replace(CONFIG, vocab=None), None)


def test_llama3_scaling_goes_into_the_class_that_applies_it() -> None:
    scaled = replace(CONFIG, rope=Rope(500000.0, 1.0, {**LLAMA31, "factor": 32.0}))
    made = written(scaled)["config"]
    assert made["_target_"].endswith("llama.Llama31Config")
    assert (made["scale_factor"], made["old_context_len"]) == (32.0, 8192)
    with pytest.raises(ConfigError, match="in its Llama classes alone, not for hf-qwen2"):
        context_write.refuse_inexpressible(replace(scaled, family="hf-qwen2"))


def test_a_window_counts_the_tokens_before_this_one(tmp_path: Path) -> None:
    """As Megatron-Core's attention takes it: (left, right). NeMo's importer forgets the token itself, which is told."""
    assert written(replace(CONFIG, sliding_window=4096))["config"]["window_size"] == [4095, 0]
    assert "the model may have had 4096" in read_golden("mistral", tmp_path).notes[0]
    assert read_golden("mixtral", tmp_path).notes == ()


def test_other_models_are_refused(tmp_path: Path) -> None:
    found = read_golden("llama_spm", tmp_path)
    for change, message in (
        ({"_target_": "nemo.collections.llm.gpt.model.gemma.GemmaConfig"}, "known are the classes of"),
        ({"layernorm_zero_centered_gamma": True}, "apply_layernorm_1p"),
        ({"multi_latent_attention": True}, "multi_latent_attention"),
        ({"activation_func": {"_target_": "torch.nn.functional.mish"}}, "activation_func is torch.nn.functional.mish"),
    ):
        with pytest.raises(ConfigError, match=message):
            context.statement(context.Context("x", found.raw | change))


def test_damaged_graphs_are_one_clear_error() -> None:
    loop = {"type": {"module": "builtins", "name": "list"}, "items": [["Index(index=0)", {"type": "ref", "key": "a"}]]}
    for graph, message in (
        ({}, "no graph of fiddle objects"),
        ({"objects": {"a": loop}, "root": {"type": "ref", "key": "a"}}, "nests more than 40 deep"),
        ({"objects": {}, "root": {"type": "ref", "key": "b"}}, "refers to nothing"),
        ({"objects": {}, "root": {"type": "leaf", "value": 1}}, "root is a int"),
    ):
        with pytest.raises(FormatError, match=message):
            io_json.read(json.dumps(graph).encode(), "io.json")


def test_tokens_are_counted_as_transformers_does(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    table = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None, "post_processor": None,
        "decoder": None, "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "[UNK]": 2}, "unk_token": "[UNK]"},
        "added_tokens": [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for i, text in ((2, "[UNK]"), (3, "<s>"))
        ],
    }  # fmt: skip
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(table))
    assert tokenizer_files.tokens({"tokenizer.json": whole(str(path))}) == len(
        PreTrainedTokenizerFast(tokenizer_file=str(path))
    )
