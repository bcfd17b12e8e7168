"""args as we write them, held against those of Megatron's own converter field by field, and against what a version can say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptconv.config import ModelConfig, Rope
from ckptconv.dtypes import BF16
from ckptconv.errors import CkptconvError, ConfigError, TopologyError, UsageError
from ckptconv.formats import Request
from ckptconv.formats.legacy import Legacy, LegacyLoad
from ckptconv.formats.mcore import EXPERTS, Mcore, McoreLoad
from ckptconv.megatron.args_read import llama3_scaling, model_fields
from ckptconv.megatron.args_table import FIELDS, Subject
from ckptconv.megatron.args_write import notes, refuse_inexpressible, write_args
from ckptconv.megatron.stages import counts_of, layout_text, pipeline_args
from ckptconv.megatron.versions import Core, core_version, te_version
from ckptconv.topology import Topology, even, parse_layout, with_stages

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden" / "mlm"
DOCS = ROOT / "docs" / "formats" / "megatron-per-rank.md"

# What load_args_from_checkpoint copies, read off Megatron-LM core_v0.9.0 … core_v0.16.1 (union), and what check_checkpoint_args compares.
COPIED = """
num_layers hidden_size ffn_hidden_size seq_length num_attention_heads num_query_groups group_query_attention kv_channels
max_position_embeddings position_embedding_type add_position_embedding use_rotary_position_embeddings rotary_base rotary_percent
rotary_interleaved add_bias_linear add_qkv_bias squared_relu swiglu untie_embeddings_and_output_weights apply_layernorm_1p
normalization apply_query_key_layer_scaling attention_dropout hidden_dropout hybrid_override_pattern spec hybrid_attention_ratio
hybrid_mlp_ratio num_experts moe_layer_freq moe_ffn_hidden_size moe_router_topk moe_token_dispatcher_type moe_router_pre_softmax
moe_grouped_gemm moe_shared_expert_intermediate_size moe_router_score_function moe_router_enable_expert_bias
moe_router_topk_scaling_factor mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads is_hybrid_model
heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json moe_latent_size tokenizer_model tokenizer_type
tiktoken_pattern padded_vocab_size ckpt_format tensor_model_parallel_size pipeline_model_parallel_size
virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage expert_model_parallel_size
make_vocab_size_divisible_by data_parallel_random_init
""".split()

# field -> what the official converter wrote in these goldens, beside ours, and why. Anything else must be equal.
DIFFERENT: dict[str, dict[str, tuple[object, object]]] = {
    "a-llama2-mha-bf16/out-v010-te2-tp2pp2": {"bf16": (False, True), "params_dtype": ("float32", "bfloat16")},
    "a-llama2-mha-bf16/out-v012-local-tp2pp1": {"bf16": (False, True), "params_dtype": ("float32", "bfloat16")},
    "b-llama3-gqa/src-vpp2-tp2pp2": {
        "bf16": (False, True), "params_dtype": ("float32", "bfloat16"), "rotary_base": (10000, 500000),
        "seq_length": (4096, 8192), "encoder_seq_length": (4096, 8192),
    },
    "d-qwen25-tied/out-v010-te-tp2pp2": {
        "bf16": (False, True), "params_dtype": ("float32", "bfloat16"), "untie_embeddings_and_output_weights": (True, False),
    },
    "d-qwen25-tied/out-v012-te-tp2pp2": {"bf16": (False, True), "params_dtype": ("float32", "bfloat16")},
    "d-qwen25-tied/out-v012-legacy-tp2pp2": {},
    "f-mixtral/out-v09-te-tp2pp1ep2": {
        "rotary_base": (10000, 1000000), "add_position_embedding": (False, True), "use_rotary_position_embeddings": (True, False),
    },
}  # fmt: skip
# wrong in every official file: no dropout in these models, the tokenizer that travels is Hugging Face's, etp is tp unless said
EVERYWHERE: dict[str, tuple[object, object]] = {
    "attention_dropout": (0.1, 0.0),
    "hidden_dropout": (0.1, 0.0),
    "tokenizer_type": ("Llama2Tokenizer", "HuggingFaceTokenizer"),
    "expert_tensor_parallel_size": (1, 2),
}
CONFIG = ModelConfig("hf-llama", 8, 64, 8, 2, 8, 176, 256, vocab=131, max_positions=8192, rope=Rope(500000.0))
NEWEST = Core((0, 16))
MIXTRAL = replace(CONFIG, experts=4, moe_ffn=176, router_topk=2, moe_layers=tuple(range(8)))


def subject(
    config: ModelConfig = CONFIG, topology: Topology | None = None, core: Core = NEWEST, **more: Any
) -> Subject:
    return Subject(config, topology or even(config.layers, tp=2, pp=2), core, BF16, 128, **more)


def plain(value: object) -> object:
    return getattr(value, "name", value)


@pytest.mark.parametrize("output", DIFFERENT)
def test_every_field_is_the_official_one_or_known_to_be_wrong_there(output: str) -> None:
    path = GOLDEN / output
    legacy = "legacy" in output
    if legacy:
        stored = Legacy().load(path, LegacyLoad(config=path.parent / "hf"), Request())
    else:
        stored = Mcore().load(path, McoreLoad(config=path.parent / "hf"), Request())
    experts = (
        next((name for name, tag in EXPERTS.items() if tag in stored.variant), "") if stored.config.experts else ""
    )
    version = next(v for text, v in (("v012", (0, 12)), ("v09", (0, 9)), ("", (0, 10))) if text in output)
    official = stored.extras.objects["args"]
    assert isinstance(official, dict)
    about = subject(
        stored.config,
        stored.topology,
        Core(version),
        local=stored.mapping.name == "mcore-local",
        legacy=legacy,
        experts=experts,
    )
    ours = write_args(about).__dict__
    differ = {
        name: (plain(official.get(name, "absent")), plain(value))
        for name, value in ours.items()
        if name not in official or plain(official[name]) != plain(value) or type(official[name]) is not type(value)
    }
    expected = {name: pair for name, pair in EVERYWHERE.items() if name in differ}
    assert differ == expected | DIFFERENT[output]


@pytest.mark.parametrize("version", [(0, v) for v in range(9, 17)])
def test_every_field_that_megatron_copies_is_written_and_nothing_newer(version: tuple[int, int]) -> None:
    ours = set(write_args(subject(core=Core(version))).__dict__)
    newer = {f.name for f in FIELDS if f.since > version}
    assert set(COPIED) - ours <= newer
    assert not ours & newer


def test_fields_are_plain_so_that_weights_only_opens_them() -> None:
    for value in write_args(subject(carried={"seq_length": 512, "tokenizer_type": object()})).__dict__.values():
        assert isinstance(plain(value), (int, float, str, bool, list, tuple, type(None)))


def test_settings_no_config_states_come_from_the_source() -> None:
    carried = {
        "seq_length": 512,
        "hidden_dropout": 0.1,
        "consumed_train_samples": 99,
        "tokenizer_type": "GPT2BPETokenizer",
        "num_layers": 3,
    }
    ours = write_args(subject(carried=carried)).__dict__
    assert (ours["seq_length"], ours["hidden_dropout"], ours["consumed_train_samples"]) == (512, 0.1, 99)
    assert ours["tokenizer_type"] == "GPT2BPETokenizer"
    assert ours["num_layers"] == 8


@pytest.mark.parametrize(
    "config",
    [
        CONFIG, MIXTRAL, replace(MIXTRAL, moe_layers=(1, 3, 4)), replace(CONFIG, rope=Rope(1e6, 0.5, llama3_scaling(32.0))),
        replace(CONFIG, rope=Rope(scaling={"rope_type": "linear", "factor": 4.0})), replace(CONFIG, qkv_bias=True, tied=True, qk_norm=True),
        replace(CONFIG, qkv_bias=True, out_bias=True, mlp_bias=True, norm="layernorm", glu=False, activation="gelu"),
        replace(CONFIG, rope=None, learned_positions=True), replace(CONFIG, glu=False, activation="relu2"),
        replace(CONFIG, sliding_window=4096),
    ],
)  # fmt: skip
def test_what_is_written_reads_back_as_it_was(config: ModelConfig) -> None:
    refuse_inexpressible(config, Core((0, 16)), legacy=False)
    fields = model_fields(write_args(subject(config)).__dict__, "args")
    assert {name: getattr(config, name) for name in fields} == fields
    for name in ("heads", "kv_heads", "rope", "moe_layers", "qkv_bias", "tied", "activation"):
        assert name in fields


@pytest.mark.parametrize(
    ("config", "version", "legacy", "text"),
    [
        (
            replace(CONFIG, qkv_bias=True, out_bias=True),
            (0, 16),
            False,
            "biases q/k/v yes, attention output yes, mlp no",
        ),
        (replace(CONFIG, mlp_bias=True), (0, 16), False, "biases"),
        (replace(CONFIG, activation="gelu"), (0, 16), False, "activation 'gelu' with a gate"),
        (
            replace(CONFIG, rope=Rope(scaling={"rope_type": "yarn", "factor": 4.0})),
            (0, 16),
            False,
            "rope scaling 'yarn'",
        ),
        (
            replace(CONFIG, rope=Rope(scaling={"type": "longrope", "factor": 4.0})),
            (0, 16),
            False,
            "rope scaling 'longrope'",
        ),
        (replace(CONFIG, rope=Rope(scaling={"rope_type": "linear", "factor": 1.5})), (0, 16), False, "whole numbers"),
        (replace(CONFIG, rope=Rope(10000.5)), (0, 16), False, "rotary base"),
        (replace(CONFIG, rope=Rope(scaling=llama3_scaling(8.0))), (0, 9), False, "llama3"),
        (replace(CONFIG, rope=Rope(scaling=llama3_scaling(32.0))), (0, 10), False, "always by 8"),
        (
            replace(CONFIG, rope=Rope(scaling=llama3_scaling(8.0) | {"low_freq_factor": 2.0})),
            (0, 16),
            False,
            "low_freq_factor 2.0",
        ),
        (replace(CONFIG, rope=Rope(scaling=llama3_scaling(8.0))), (0, 16), True, "llama3"),
        (replace(MIXTRAL, moe_layers=(1,)), (0, 9), False, "dense layers among those with experts"),
        (MIXTRAL, (0, 16), True, "experts: save as mcore"),
        (replace(CONFIG, qk_norm=True), (0, 16), True, "norms of queries"),
        (replace(CONFIG, rope=None), (0, 16), False, "no position embedding"),
        *(
            (
                replace(CONFIG, rope=Rope(scaling=llama3_scaling(8.0) | {"factor": factor})),
                (0, 16),
                False,
                "factor must be",
            )
            for factor in (None, "8", True, -3)
        ),
    ],
)
def test_what_no_flag_can_say_is_refused(
    config: ModelConfig, version: tuple[int, int], legacy: bool, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        refuse_inexpressible(config, Core(version), legacy=legacy)


def test_what_megatrons_scripts_drop_is_told() -> None:
    scaled = replace(CONFIG, rope=Rope(scaling=llama3_scaling(32.0)), sliding_window=4096)
    assert "never passes it" in notes(scaled, Core((0, 16)), legacy=False)[0]
    assert "see the flags" in notes(scaled, Core((0, 16)), legacy=False)[1]
    assert "0.15 has --window-size" in notes(scaled, Core((0, 12)), legacy=False)[1]
    assert "10000 in their code" in notes(CONFIG, Core((0, 16)), legacy=True)[0]
    dynamic = replace(CONFIG, rope=Rope(scaling={"type": "dynamic", "factor": 3.0}))
    refuse_inexpressible(dynamic, Core((0, 16)), legacy=False)
    assert f"up to {CONFIG.max_positions} tokens" in notes(dynamic, Core((0, 16)), legacy=False)[0]
    assert notes(CONFIG, Core((0, 16)), legacy=False) == ()


@pytest.mark.parametrize(
    ("counts", "version", "wanted"),
    [
        ([[4, 4]], (0, 9), {"num_layers_per_virtual_pipeline_stage": None}),
        ([[2, 2], [2, 2]], (0, 9), {"num_layers_per_virtual_pipeline_stage": 2}),
        ([[2, 3, 3]], (0, 9), {"decoder_first_pipeline_num_layers": 2, "decoder_last_pipeline_num_layers": None}),
        ([[3, 3, 2]], (0, 9), {"decoder_first_pipeline_num_layers": None, "decoder_last_pipeline_num_layers": 2}),
        ([[1, 3, 3, 2]], (0, 9), {"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 2}),
        ([[1, 2], [1, 2]], (0, 11), {"decoder_first_pipeline_num_layers": 2, "num_virtual_stages_per_pipeline_rank": 2}),
        ([[1, 2], [2, 1]], (0, 11), {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True,
                                     "num_layers_per_virtual_pipeline_stage": 2}),
        ([[1, 2, 3, 2]], (0, 13), {"pipeline_model_parallel_layout": "Et|t*2|t*3|t*2L"}),
        ([[0, 4], [4, 0]], (0, 13), {"pipeline_model_parallel_layout": "E|t*4|t*4|L"}),
    ],
)  # fmt: skip
def test_stages_are_said_in_words_of_the_version(
    counts: list[list[int]], version: tuple[int, int], wanted: dict[str, object]
) -> None:
    topology = with_stages(Topology(pp=len(counts[0]), vpp=len(counts)), counts)
    said = pipeline_args(topology, Core(version))
    assert {name: said.get(name) for name in wanted} == wanted
    assert counts_of(topology) == counts
    text = said.get("pipeline_model_parallel_layout")
    if isinstance(text, str):
        assert parse_layout(text, topology.pp, sum(map(sum, counts))) == counts


@pytest.mark.parametrize(
    ("counts", "version"),
    [([[1, 2, 3, 2]], (0, 12)), ([[1, 2], [1, 2]], (0, 10)), ([[2], [2]], (0, 16))],
)
def test_stages_without_words_are_refused(counts: list[list[int]], version: tuple[int, int]) -> None:
    with pytest.raises(TopologyError):
        pipeline_args(with_stages(Topology(pp=len(counts[0]), vpp=len(counts)), counts), Core(version))


def test_megatron_itself_reads_our_layout_strings() -> None:
    layout = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout", exc_type=ImportError)
    counts = [[0, 4, 1], [3, 1, 0]]
    parsed = layout.PipelineParallelLayerLayout.from_str(layout_text(counts), 3)
    found = [[[kind.name for kind in parsed.layout[p][v]].count("decoder") for p in range(3)] for v in range(2)]
    assert found == counts


@pytest.mark.parametrize("text", ["0.8", "0.17", "1.0", "new", "", "0.9.", "core"])
def test_unknown_versions_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"known are 0\.9 to 0\.16"):
        core_version(text)


@pytest.mark.parametrize("text", ["0.16", "v0.16.1", "core_v0.16.0", "core_r0.16.0"])
def test_spellings_of_versions(text: str) -> None:
    assert core_version(text) == (0, 16)
    assert te_version("1.13") == (1, 13)
    with pytest.raises(CkptconvError):
        te_version("0.5")


def test_documentation_lists_every_field() -> None:
    text = DOCS.read_text()
    assert [f.name for f in FIELDS if f"| `{f.name}` |" not in text] == []
