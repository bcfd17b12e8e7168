"""config.json to ModelConfig and back, held against transformers' own configuration classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from ckptconv.config import ModelConfig, Rope
from ckptconv.dtypes import BF16, BY_TORCH, FP16
from ckptconv.errors import ConfigError, MappingError, UsageError
from ckptconv.huggingface.config_codecs import plain
from ckptconv.huggingface.config_table import entries
from ckptconv.huggingface.family_config import (
    check_fits,
    config_text,
    family_named,
    family_of,
    read_config,
    write_config,
)
from ckptconv.huggingface.told import told_fields
from ckptconv.mapping_files import families, load_mapping

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "configs").glob("*.json"))
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 131, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CLASSES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "mixtral": "MixtralConfig",
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    ("llama", {"num_key_value_heads": None, "rms_norm_eps": 1e-5}),
    ("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "dtype": "bfloat16"}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("llama", {"rope_theta": 10000, "rope_scaling": YARN, "hidden_act": "gelu"}),
    ("mistral", {"rope_theta": 1000000.0, "sliding_window": None, "head_dim": 32}),
    ("mistral", {"sliding_window": 128, "tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": True, "dtype": "bfloat16"}),
    ("qwen2", {"rope_theta": 1000000.0, "rope_scaling": YARN}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 4}),
    ("qwen3", {"head_dim": 32}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True, "dtype": "float16"}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1}),
    ("mixtral", {"sliding_window": 128, "rope_theta": 5000.0}),
]  # fmt: skip
IDS = [f"{family}-{'-'.join(extra) or 'plain'}" for family, extra in CASES]


def made(family: str, extra: dict[str, Any]) -> dict[str, Any]:
    """The config.json that transformers writes."""
    config = getattr(transformers, CLASSES[family])(**json.loads(json.dumps({**SMALL, **extra})))
    table: dict[str, Any] = json.loads(config.to_json_string())
    return table


def understood(table: dict[str, Any], folder: Path) -> Any:
    """What transformers makes of a config.json."""
    (folder / "config.json").write_bytes(config_text(table))
    return transformers.AutoConfig.from_pretrained(folder)


def read(table: dict[str, Any]) -> ModelConfig:
    return read_config(table, "config.json", family_of(table, families()))


def expected(config: Any) -> dict[str, Any]:
    """Fields of ModelConfig from attributes of transformers' configuration, written without ours."""
    family, rope = config.model_type, dict(config.rope_parameters)
    base, scaling = rope.pop("rope_theta"), rope if rope["rope_type"] != "default" else None
    attention_bias = bool(getattr(config, "attention_bias", False))
    window = getattr(config, "sliding_window", None)
    if family.startswith("qwen") and set(config.layer_types) == {"full_attention"}:
        window = None
    experts = config.num_local_experts if family == "mixtral" else 0
    return {
        "family": f"hf-{family}",
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "ffn": config.intermediate_size,
        "vocab": config.vocab_size,
        "vocab_rows": config.vocab_size,
        "max_positions": config.max_position_embeddings,
        "norm_eps": config.rms_norm_eps,
        "activation": config.hidden_act,
        "tied": config.tie_word_embeddings,
        "qkv_bias": family == "qwen2" or attention_bias,
        "out_bias": attention_bias,
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "qk_norm": family == "qwen3",
        "sliding_window": window,
        "dtype": BY_TORCH[str(config.dtype).removeprefix("torch.")] if config.dtype is not None else None,
        "experts": experts,
        "moe_ffn": config.intermediate_size if experts else 0,
        "router_topk": config.num_experts_per_tok if experts else 0,
        "moe_layers": tuple(range(config.num_hidden_layers)) if experts else (),
        "rope": (base, scaling),
    }


def stated(config: ModelConfig, names: dict[str, Any]) -> dict[str, Any]:
    assert config.rope is not None
    values = {name: getattr(config, name) for name in names}
    scaling = config.rope.scaling
    return {**values, "rope": (config.rope.base, plain(scaling))}


def without_older_name(wanted: dict[str, Any]) -> dict[str, Any]:
    return {**wanted, "rope": (wanted["rope"][0], plain(wanted["rope"][1]))}


@pytest.mark.parametrize(("family", "extra"), CASES, ids=IDS)
def test_read_config_of_transformers(family: str, extra: dict[str, Any], tmp_path: Path) -> None:
    table = made(family, extra)
    wanted = without_older_name(expected(understood(table, tmp_path)))
    assert stated(read(table), wanted) == wanted


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_read_config_of_published_form(path: Path, tmp_path: Path) -> None:
    table = json.loads(path.read_text())
    wanted = without_older_name(expected(understood(table, tmp_path)))
    if "dtype" not in table and "torch_dtype" not in table:
        wanted["dtype"] = None
    assert stated(read(table), wanted) == wanted


@pytest.mark.parametrize("family", CLASSES)
def test_defaults_are_those_of_the_class(family: str, tmp_path: Path) -> None:
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    table = {"model_type": family, **{k: SMALL[k] for k in sizes}, "num_attention_heads": 32, "hidden_size": 256}
    wanted = expected(understood(table, tmp_path))
    assert stated(read(table), wanted) == wanted


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llama", "num_key_value_heads"),
        ("qwen2", "num_key_value_heads"),
        ("llama", "head_dim"),
        ("mistral", "head_dim"),
    ],
)
def test_null_means_what_the_class_makes_of_it(family: str, key: str, tmp_path: Path) -> None:
    table = {**made(family, {}), key: None}
    wanted = expected(understood(table, tmp_path))
    assert stated(read(table), wanted) == wanted


@pytest.mark.parametrize(("family", "extra"), CASES, ids=IDS)
def test_written_from_nothing_is_read_alike_by_transformers(family: str, extra: dict[str, Any], tmp_path: Path) -> None:
    original = made(family, extra)
    config = read(original)
    table, changes = write_config(config, None, load_mapping(config.family))
    assert changes == []
    assert "rope_parameters" not in table
    assert {"rope_theta", "rope_scaling", "tie_word_embeddings"} <= set(table)
    assert expected(understood(table, tmp_path)) == expected(understood(original, tmp_path))
    assert replace(read(table), raw={}) == replace(config, raw={})


@pytest.mark.parametrize(("family", "extra"), CASES, ids=IDS)
def test_unchanged_config_gives_the_same_bytes(family: str, extra: dict[str, Any]) -> None:
    table = made(family, extra)
    config = read(table)
    out, changes = write_config(config, table, load_mapping(config.family))
    assert (out, changes) == (table, [])
    assert config_text(out) == (json.dumps(table, indent=2) + "\n").encode()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_config_goes_round_byte_for_byte(path: Path) -> None:
    table = json.loads(path.read_text())
    config = read(table)
    out, changes = write_config(config, table, load_mapping(config.family))
    assert changes == []
    assert config_text(out) == path.read_bytes()


def rewrite(config: ModelConfig, base: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    out, changes = write_config(config, base, load_mapping(config.family))
    assert replace(read(out), raw={}) == replace(config, raw={})
    return out, changes


def test_only_what_changed_is_rewritten() -> None:
    base = made("llama", {"dtype": "bfloat16"})
    config = replace(read(base), vocab=192, vocab_rows=192, dtype=FP16, tied=True)
    out, changes = rewrite(config, base)
    assert changes == ['dtype: "bfloat16" -> "float16"', "tie_word_embeddings: false -> true", "vocab_size: 131 -> 192"]
    assert {k: v for k, v in out.items() if base[k] != v} == {
        "dtype": "float16",
        "tie_word_embeddings": True,
        "vocab_size": 192,
    }
    assert list(out) == list(base)


def test_older_spelling_is_kept() -> None:
    base = {**SMALL, "model_type": "llama", "rope_theta": 10000, "torch_dtype": "float16", "_x": 1}
    config = replace(read(base), dtype=BF16, rope=Rope(500000.0, 1.0, LLAMA3))
    out, changes = rewrite(config, base)
    assert out == {**base, "torch_dtype": "bfloat16", "rope_theta": 500000.0, "rope_scaling": LLAMA3}
    assert [c.partition(":")[0] for c in changes] == ["rope_theta", "torch_dtype", "rope_scaling"]


def test_newer_spelling_is_kept() -> None:
    base = made("llama", {"dtype": "float16"})
    out, changes = rewrite(replace(read(base), rope=Rope(500000.0, 1.0, LLAMA3)), base)
    assert out == {**base, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}
    assert len(changes) == 1
    back, _ = rewrite(read(base), out)
    assert back == base


def test_dtype_is_not_added_where_it_was_not_said() -> None:
    base = {**SMALL, "model_type": "llama"}
    out, changes = write_config(replace(read(base), dtype=BF16), base, load_mapping("hf-llama"))
    assert (out, changes) == (base, [])


def test_number_of_heads_changes_under_defaults() -> None:
    base = {**SMALL, "model_type": "llama"}
    del base["num_key_value_heads"]
    config = replace(read(base), heads=8, kv_heads=4, head_dim=16)
    out, _ = rewrite(config, base)
    assert (out["num_attention_heads"], out["num_key_value_heads"], out["head_dim"]) == (8, 4, 16)


def test_layer_kinds_follow_the_number_of_layers() -> None:
    base = made("qwen3", {})
    out, _ = rewrite(replace(read(base), layers=2), base)
    assert out["layer_types"] == ["full_attention"] * 2


def test_rope_type_spelled_the_old_way_is_no_change() -> None:
    base = {**SMALL, "model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2}}
    config = replace(read(base), rope=Rope(10000.0, 1.0, {"rope_type": "linear", "factor": 2.0}))
    assert write_config(config, base, load_mapping("hf-llama")) == (base, [])


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("hf-llama", {"qk_norm": True}, "qk_norm"),
        ("hf-llama", {"qkv_bias": True}, "attention_bias"),
        ("hf-llama", {"sliding_window": 5}, "sliding_window"),
        ("hf-llama", {"norm": "layernorm"}, "norm"),
        ("hf-llama", {"glu": False}, "glu"),
        ("hf-llama", {"rope": None}, "rope"),
        ("hf-llama", {"rope": Rope(1e4, 0.5)}, "rope"),
        ("hf-llama", {"moe_layers": (1,)}, "moe_layers"),
        ("hf-qwen2", {"qkv_bias": False}, "qkv_bias"),
        ("hf-mistral", {"mlp_bias": True}, "mlp_bias"),
    ],
)  # fmt: skip
def test_family_that_cannot_hold_a_model_says_why(family: str, change: dict[str, Any], named: str) -> None:
    config = read(made(family.removeprefix("hf-"), {}))
    check_fits(config, load_mapping(family))
    with pytest.raises(ConfigError, match=named) as info:
        write_config(replace(config, **change), None, load_mapping(family))
    assert "--family" in str(info.value)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": "4"}, "num_hidden_layers"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"num_hidden_layers": 4.0}, "num_hidden_layers"),
    ({"num_hidden_layers": 0}, "layers"),
    ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": 10**30}, "hidden_size"),
    ({"hidden_size": 65, "head_dim": None}, "head_dim"),
    ({"num_key_value_heads": 3}, "share 3"),
    ({"num_key_value_heads": "two"}, "num_key_value_heads"),
    ({"vocab_size": [131]}, "vocab_size"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ({"hidden_act": 5}, "hidden_act"),
    ({"dtype": "bf17"}, "dtype"),
    ({"dtype": "bfloat16", "torch_dtype": "float16"}, "torch_dtype"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_parameters": {"factor": 2.0}}, "rope_type"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "rope_theta": 6.0}, "rope_theta"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "kinds of layers"),
    ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "rope_type"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "yarn"}}, "contradict"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "named"), BAD, ids=[f"{i}-{n}" for i, (_, n) in enumerate(BAD)])
def test_wrong_value_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as info:
        read_config({**made("llama", {}), **change}, "some/config.json", load_mapping("hf-llama"))
    assert "some/config.json" in str(info.value)


def test_everything_missing_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as info:
        read_config({"model_type": "llama"}, "c", load_mapping("hf-llama"))
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    assert all(f"c: {key} is missing" in str(info.value) for key in keys)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_window_layers": 2}, "2 of 4 layers"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types"),
    ],
)
def test_window_in_some_layers_only_is_refused(change: dict[str, Any], named: str) -> None:
    table = {**SMALL, "model_type": "qwen2", "use_sliding_window": True, **change}
    with pytest.raises(ConfigError, match=named):
        read(table)


@pytest.mark.parametrize("table", [{}, {"model_type": "gpt2"}, {"model_type": None}, {"model_type": ["llama"]}])
def test_unknown_family_lists_those_known(table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--family") as info:
        family_of(table, families())
    assert all(name in str(info.value) for name in CLASSES)


@pytest.mark.parametrize("mapping", families(), ids=lambda m: m.name)
def test_every_family_describes_its_config(mapping: Any) -> None:
    assert mapping.match
    said = {e.field for e in entries(mapping)}
    if mapping.parts:
        assert {part.scope for part in mapping.parts} == {"", "vision"}
    elif mapping.config["default"].get("kind", "text") == "text":
        assert {"layers", "hidden", "heads", "vocab_rows", "rope", "dtype"} <= said
    else:
        assert {"layers", "hidden", "max_positions", "patch"} <= said | told_fields(mapping)
    for key, matched in mapping.match.items():
        assert mapping.config["const"][key] == (matched[0] if isinstance(matched, list) else matched)


@pytest.mark.parametrize(
    "row",
    [
        {"no_field": "x"},
        {"layers": {"key": "x", "codec": "magic"}},
        {"layers": 5},
        {"layers": {"codec": "rename"}},
        {"default": {"no": 1}},
    ],
)
def test_wrong_config_table_is_a_mapping_error(row: dict[str, Any]) -> None:
    mapping = load_mapping("hf-llama")
    with pytest.raises(MappingError, match="hf-llama"):
        read_config(made("llama", {}), "c", replace(mapping, config={**mapping.config, **row}))


def test_dialect_is_no_family() -> None:
    with pytest.raises(MappingError, match="dialect"):
        entries(load_mapping("mcore"))


def test_family_is_named_with_or_without_prefix() -> None:
    own = replace(load_mapping("hf-llama"), name="mine", extends="hf-llama")
    assert family_named(None, [own]) is None
    assert family_named("qwen2", [own]) == family_named("hf-qwen2", []) == load_mapping("hf-qwen2")
    assert family_named("mine", [own]) is own
    with pytest.raises(UsageError, match=r"hf-mixtral.*mine"):
        family_named("gpt9", [own])
