"""NeMo's model_config.yaml as it is read: what real ones say, what is refused, and the true vocabulary."""

from __future__ import annotations

import pytest

from ckptconv.config import Rope
from ckptconv.dtypes import DTYPES
from ckptconv.errors import ConfigError, FormatError
from ckptconv.megatron.args_read import llama3_scaling
from ckptconv.nemo import model_config, sentencepiece
from tests.unit.helpers.nemo_configs import CASES, FOLDER, PIECES, nemo_of, small, source_of


def fields(**changes: object) -> dict[str, object]:
    return dict(model_config.statement(small(**changes), None).fields)


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_the_one_that_nemo_was_given(case: str) -> None:
    """All that is stated agrees with the Hugging Face config; but for the rope scaling that NeMo's converter made up."""
    nemo, source = nemo_of(case), source_of(case)
    stated = dict(model_config.statement(nemo, None).fields)
    invented = case.startswith("mcore")
    if invented:
        assert stated.pop("rope") == Rope(10000.0, 1.0, llama3_scaling(8.0))
        assert "very likely this model has none" in nemo.notes[0]
        plain = model_config.read((FOLDER / f"{case}.yaml").read_bytes(), case, plain_rope=True)
        assert model_config.statement(plain, None).fields["rope"] == source.rope
    assert {name: getattr(source, name) for name in stated} == stated
    assert stated.keys() >= {
        "layers",
        "hidden",
        "heads",
        "kv_heads",
        "head_dim",
        "ffn",
        "norm_eps",
        "tied",
        "activation",
        "norm",
    }


@pytest.mark.parametrize(
    ("case", "tp", "pp", "dtype", "mcore", "o2"),
    [
        ("legacy_mha_tp2pp2", 2, 2, "fp32", False, False),
        ("legacy_mha_v392_tp4", 4, 1, "fp32", False, False),
        ("legacy_mha_fp16_o2", 1, 1, "fp16", False, True),
        ("mcore_mha_fp16_torchdist", 1, 1, "fp16", True, False),
        ("neva_fin", 1, 1, "fp32", True, False),
    ],
)
def test_layout_and_form_are_read(case: str, tp: int, pp: int, dtype: str, mcore: bool, o2: bool) -> None:
    nemo = nemo_of(case)
    layout = model_config.statement(nemo, None).layout
    assert (layout.tp, layout.pp, layout.vpp) == (tp, pp, None)
    assert (nemo.dtype, nemo.mcore, nemo.transformer_engine, nemo.o2) == (DTYPES[dtype], mcore, mcore, o2)
    assert nemo.multimodal == case.startswith("neva")
    assert nemo.args["make_vocab_size_divisible_by"] == (8 if "v392" in case else 128)


@pytest.mark.parametrize("first", ["first_pipeline_num_layers", "num_layers_in_first_pipeline_stage"])
def test_stages_of_other_sizes_are_read(first: str) -> None:
    uneven = small(num_layers=8, pipeline_model_parallel_size=3, **{first: 2})
    assert model_config.statement(uneven, None).layout.counts == [[2, 3, 3]]


def test_what_a_file_does_not_say_is_not_made_up() -> None:
    """But for what NeMo itself takes where the file is silent: shared embeddings, base 10000, as many groups as heads."""
    stated = fields()
    assert stated == {
        "layers": 2, "hidden": 64, "heads": 8, "kv_heads": 8, "head_dim": 8, "tied": True,
        "rope": Rope(10000.0), "learned_positions": False, "experts": 0, "moe_layers": (),
    }  # fmt: skip
    nemo = model_config.read(b"num_layers: 2", "x")
    assert (nemo.mcore, nemo.transformer_engine, nemo.dtype) == (None, None, None)
    assert model_config.statement(nemo, None).fields.keys() == {"layers", "tied", "experts", "moe_layers"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kv_channels": 16}, {"head_dim": 16}),
        ({"num_query_groups": 2}, {"kv_heads": 2}),
        ({"bias": False, "qkv_bias": True}, {"qkv_bias": True, "out_bias": False, "mlp_bias": False}),
        ({"bias": True}, {"qkv_bias": True, "out_bias": True, "mlp_bias": True}),
        ({"activation": "swiglu"}, {"glu": True, "activation": "silu"}),
        ({"activation": "fast-geglu"}, {"glu": True, "activation": "gelu"}),
        ({"activation": "fast-geglu", "openai_gelu": True}, {"glu": True, "activation": "gelu_new"}),
        ({"activation": "reglu"}, {"glu": True, "activation": "relu"}),
        ({"activation": "gelu"}, {"glu": False, "activation": "gelu"}),
        ({"activation": "gelu", "openai_gelu": True}, {"glu": False, "activation": "gelu_new"}),
        ({"activation": "squared-relu"}, {"glu": False, "activation": "relu2"}),
        ({"normalization": "layernorm", "layernorm_epsilon": 1e-6}, {"norm": "layernorm", "norm_eps": 1e-6}),
        ({"position_embedding_type": "learned_absolute"}, {"learned_positions": True, "rope": None}),
        ({"rotary_base": 500000, "rotary_percentage": 0.5}, {"rope": Rope(500000.0, 0.5)}),
        ({"seq_len_interpolation_factor": 4}, {"rope": Rope(scaling={"rope_type": "linear", "factor": 4.0})}),
        ({"share_embeddings_and_output_weights": False}, {"tied": False}),
        ({"encoder_seq_length": 512}, {"max_positions": 512}),
        ({"window_size": [4095, 0]}, {"sliding_window": 4096}),
        ({"num_moe_experts": 4, "moe_router_topk": 2}, {"experts": 4, "router_topk": 2, "moe_layers": (0, 1)}),
        ({"qk_layernorm": True}, {"qk_norm": True}),
    ],
)  # fmt: skip
def test_a_field_says_what_nemo_makes_of_it(changes: dict[str, object], expected: dict[str, object]) -> None:
    stated = fields(**changes)
    assert {name: stated.get(name) for name in expected} == expected


def test_llama_31_scaling_is_told_from_what_the_converter_leaves_beside_it() -> None:
    real = small(scale_positional_embedding=True, seq_len_interpolation_factor=32.0, rotary_base=500000.0)
    rope = model_config.statement(real, None).fields["rope"]
    assert rope == Rope(500000.0, 1.0, llama3_scaling(32.0))
    assert "both set" in real.notes[0]
    assert "perhaps this model has none" in small(scale_positional_embedding=True, rotary_base=500000.0).notes[0]
    legacy = small(scale_positional_embedding=True, mcore_gpt=False)
    assert model_config.statement(legacy, None).fields["rope"] == Rope(10000.0)
    assert "does nothing in a legacy model" in legacy.notes[0]


def test_forms_of_legacy_tensors_are_stated() -> None:
    legacy = {"mcore_gpt": False}
    assert small(**legacy, activation="fast-swiglu").variant == {"qkv_v2", "gate_joined"}
    assert small(**legacy, activation="swiglu", megatron_legacy=True).variant == {"qkv_v0", "gate_apart"}
    assert small(activation="swiglu").variant == {"qkv_v2", "gate_joined"}


@pytest.mark.parametrize(
    "changes",
    [
        {"position_embedding_type": "alibi"}, {"headscale": True}, {"transformer_block_type": "post_ln"},
        {"transformer_block_type": "normformer"}, {"normalization": "layernorm1p"}, {"layernorm_zero_centered_gamma": True},
        {"name": "te_gpt_hyena"}, {"name": "megatron_falcon_gpt"}, {"name": "megatron_gemma2"}, {"apply_embedding_scaling": True},
        {"mcore_customization_config": {"new_decoder_architecture": True}}, {"activation": "quick-gelu"},
        {"normalize_attention_scores": False}, {"multi_latent_attention": True}, {"rotary_interleaved": True},
        {"mcore_gpt": False, "transformer_engine": True}, {"mcore_gpt": False, "num_moe_experts": 4},
    ],
)  # fmt: skip
def test_models_that_no_config_describes_are_refused_by_name(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"model that is not supported yet: .*{list(changes)[-1]}"):
        small(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": "no"},
        {"num_layers": "2"},
        {"precision": 8},
        {"override_vocab_size": -1},
        {"mcore_gpt": 1},
    ],
)
def test_values_of_another_kind_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"model_config.yaml: .*{next(iter(changes))} is "):
        fields(**changes)


@pytest.mark.parametrize(("name", "size"), [("input.model", 384), ("output.model", 392)])
def test_pieces_are_those_that_sentencepiece_finds(name: str, size: int) -> None:
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(PIECES / name))
    found = sentencepiece.pieces((PIECES / name).read_bytes(), name)
    assert len(found) == size == processor.get_piece_size()
    assert list(found) == [processor.id_to_piece(i) for i in range(size)]


@pytest.mark.parametrize("keep", [0, 1, 7, 100, 2000])
def test_torn_sentencepiece_models_are_refused(keep: int) -> None:
    with pytest.raises(FormatError, match=r"tok.model: (byte \d+: .*(truncated|damaged)|has no )"):
        sentencepiece.pieces((PIECES / "input.model").read_bytes()[:keep], "tok.model")


@pytest.mark.parametrize("data", [b"\x0b\x00", b"\xff" * 12, b"\x0a\x02\x12\x00", b"PK\x03\x04" + bytes(30)])
def test_other_files_are_no_sentencepiece_models(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"tok.model: "):
        sentencepiece.pieces(data, "tok.model")


def test_the_tokens_that_nemo_finds_in_a_sentencepiece_model() -> None:
    data = (PIECES / "input.model").read_bytes()
    assert model_config.tokens(nemo_of("legacy_mha_tp2"), data) == 384
    assert model_config.tokens(nemo_of("neva_fin"), (PIECES / "output.model").read_bytes()) == 392
    more = {"library": "sentencepiece", "additional_special_tokens": ["<extra_0>", "<extra_1>", "<s>"]}
    assert model_config.tokens(small(tokenizer=more), data) == 384
    assert model_config.tokens(small(tokenizer={**more, "sentencepiece_legacy": True}), data) == 386


@pytest.mark.parametrize(
    ("said", "tokens", "given", "true"),
    [
        ({}, None, False, None),
        ({}, 384, False, 384),
        ({"override_vocab_size": 512}, None, False, None),  # the rows that NeMo builds: some may be padding
        ({"override_vocab_size": 512}, 384, False, None),
        ({"override_vocab_size": 512}, 384, True, 384),
        ({"override_vocab_size": 384}, 384, False, 384),  # no row is left to doubt
        ({"override_vocab_size": 384}, 392, True, 384),
        ({"override_vocab_size": 512, "true_vocab_size": 391}, 384, True, 391),
        ({"true_vocab_size": 391}, None, False, 391),
    ],
    ids=str,
)
def test_rows_are_never_taken_for_the_true_vocabulary(
    said: dict[str, object], tokens: int | None, given: bool, true: int | None
) -> None:
    assert model_config.true_vocabulary(small(**said), tokens, given=given) == true
