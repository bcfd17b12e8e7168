"""NeMo's model_config.yaml as we write it, against NeMo's own for the same models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import yaml

from ckptconv.config import ModelConfig, Rope, projector_config
from ckptconv.dtypes import DTYPES
from ckptconv.errors import ConfigError
from ckptconv.megatron.args_read import llama3_scaling
from ckptconv.nemo import model_config, yaml_file
from ckptconv.nemo.model_config_write import Form, Tokenizer, write
from ckptconv.nemo.rope_buffer import inverse_frequencies
from ckptconv.topology import Topology, even, even_counts, with_stages
from tests.unit.helpers.nemo_configs import CASES, golden, nemo_of, source_of

LLAMAS = [case for case in CASES if not case.startswith("neva")]
# every key in which a file of ours differs from NeMo's own for the same model, and why
REASONS = {
    "scale_positional_embedding": "NeMo's converter sets it for every llama; these have no rope scaling",
    "megatron_amp_O2": "how a run trains, not what the files hold: taken from a NeMo source, off in a new file",
    "dist_ckpt_format": "how NeMo saves next: loading goes by metadata.json",
}


def written(case: str, carried: dict[str, object]) -> dict[str, object]:
    """What we write for the model, layout and tokenizer of an archive of NeMo's."""
    nemo = nemo_of(case)
    layout = model_config.statement(nemo, None).layout
    tokens = 392 if "v392" in case or "neva" in case else 384
    rows = {"legacy_mha_v392_tp4": 416, "legacy_mha_tp2": 512, "legacy_mha_tp2pp2": 512}.get(
        case, 512 if tokens == 392 else 384
    )
    config = parts_of(case, replace(source_of(case), vocab_rows=rows, vocab=tokens))
    topology = even(config.layers, tp=layout.tp or 1, pp=layout.pp or 1)
    form, dtype = Form(bool(nemo.mcore), bool(nemo.transformer_engine)), nemo.dtype or DTYPES["fp32"]
    text = write(config, topology, form, dtype, Tokenizer(nemo.tokenizer, tokens), carried=carried)
    table: dict[str, object] = yaml.safe_load(text)
    return table


def parts_of(case: str, language: ModelConfig) -> ModelConfig:
    """What of a model an archive holds: of NeVA the projector too, or alone."""
    projector = projector_config(32, 64, 64, mlp_bias=True)
    if case == "neva_pre":
        return projector
    return replace(language, towers={"projector": projector} if case.startswith("neva") else {})


def differing(ours: dict[str, object], theirs: dict[str, object]) -> set[str]:
    absent = object()
    return {key for key in ours.keys() | theirs.keys() if ours.get(key, absent) != theirs.get(key, absent)}


@pytest.mark.parametrize("case", LLAMAS)
def test_a_new_file_says_what_nemos_own_says(case: str) -> None:
    """From a Hugging Face model alone: the same keys and values, but for those listed with their reasons."""
    theirs = golden(case)
    expected = {"scale_positional_embedding"}
    expected |= {"megatron_amp_O2"} if theirs["megatron_amp_O2"] else set()
    expected |= {"dist_ckpt_format"} & theirs.keys()
    assert differing(written(case, {}), theirs) == expected <= REASONS.keys()
    assert written(case, {})["scale_positional_embedding"] is False


@pytest.mark.parametrize("case", CASES)
def test_a_nemo_sources_own_settings_are_kept(case: str) -> None:
    """All of them, known or not; what NeMo takes for granted where it is silent may be said."""
    theirs = golden(case)
    ours = written(case, {**nemo_of(case).raw, "something_new": {"a": [1]}, "first_pipeline_num_layers": 1})
    assert ours.pop("first_pipeline_num_layers") is None  # of the source's stages, which are equal now
    assert ours.pop("something_new") == {"a": [1]}
    changed = differing(ours, theirs)
    assert changed <= {"scale_positional_embedding", "rotary_base"}
    said = case != "neva_pre"  # which says nothing new of a language model that is not there
    assert ours.get("rotary_base", None if said else 10000.0) == theirs.get("rotary_base", 10000.0)
    assert ours.get("scale_positional_embedding", None if said else False) is False
    assert [key for key in ours if key in theirs] == list(theirs)


def model(**changes: object) -> ModelConfig:
    return replace(source_of("mcore_gqa"), vocab=384, vocab_rows=384, **changes)  # type: ignore[arg-type]


def table_of(
    config: ModelConfig,
    form: Form | None = None,
    tokens: int | None = 384,
    topology: Topology | None = None,
    **options: int,
) -> dict[str, object]:
    topology = topology or even(config.layers)
    text = write(config, topology, form or Form(), DTYPES["bf16"], Tokenizer({}, tokens), **options)  # type: ignore[arg-type]
    table: dict[str, object] = yaml.safe_load(text)
    return table


@pytest.mark.parametrize(
    "changes",
    [
        {"tied": True},
        {"qkv_bias": True},
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "norm": "layernorm", "glu": False, "activation": "gelu"},
        {"glu": False, "activation": "relu2"},
        {"glu": False, "activation": "gelu_new"},
        {"activation": "gelu"},
        {"head_dim": 16},
        {"qk_norm": True},
        {"sliding_window": 100},
        {"rope": Rope(1e6, 0.5)},
        {"rope": Rope(5e5, 1.0, llama3_scaling(8.0))},
        {"rope": Rope(1e4, 1.0, {"rope_type": "linear", "factor": 2.0})},
        {"rope": None, "learned_positions": True},
        {"experts": 4, "moe_ffn": 176, "router_topk": 2, "router_pre_softmax": True, "moe_layers": (0, 1, 2, 3)},
        {"experts": 4, "moe_ffn": 96, "router_topk": 1, "moe_layers": (1, 3)},
    ],
    ids=str,
)
def test_each_kind_of_model_is_described_so_that_it_reads_alike(changes: dict[str, object]) -> None:
    config = model(**changes)
    nemo = model_config.read(yaml_file.dump(table_of(config)), "x")
    stated = dict(model_config.statement(nemo, 384).fields)
    assert stated == {name: getattr(config, name) for name in stated}
    assert nemo.dtype == DTYPES["bf16"]
    assert set(changes) - {"glu"} <= set(stated)


@pytest.mark.parametrize(
    ("vocab", "rows", "tokens", "tp", "divisor", "override"),
    [
        (384, 384, 384, 1, 128, None),
        (392, 416, 392, 4, 8, None),
        (392, 512, 392, 2, 128, None),
        (391, 391, 384, 1, 128, 391),  # the model has rows that the tokenizer knows nothing of
        (384, 384, None, 1, 128, 384),  # a tokenizer that is not in the archive
        (None, 448, 384, 1, 128, 448),
    ],
)
def test_nemo_will_build_exactly_the_rows_that_are_stored(
    vocab: int | None, rows: int, tokens: int | None, tp: int, divisor: int, override: int | None
) -> None:
    """NeMo pads the tokenizer's size to a multiple of divisor x tp, unless override_vocab_size is there."""
    table = table_of(replace(model(), vocab=vocab, vocab_rows=rows), tokens=tokens, topology=even(4, tp=tp))
    assert table.get("override_vocab_size") == override
    assert ("override_vocab_size" in table) == (override is not None)
    assert table.get("true_vocab_size") == (vocab if override else None)
    multiple = int(str(table["make_vocab_size_divisible_by"])) * tp
    assert override == rows or -(-int(str(tokens)) // multiple) * multiple == rows
    assert override or table["make_vocab_size_divisible_by"] in (divisor, 128)


LEGACY = Form(mcore=False, transformer_engine=False)


@pytest.mark.parametrize(
    ("changes", "form", "topology", "problem"),
    [
        ({}, LEGACY, even(4), "4 key/value heads for 8 heads"),
        ({"kv_heads": 8, "qk_norm": True}, LEGACY, even(4), "norms of queries and keys"),
        ({"kv_heads": 8, "rope": Rope(5e5, 1.0, llama3_scaling(8.0))}, LEGACY, even(4), "llama3 rope scaling: save for"),
        ({"rope": Rope(5e5, 1.0, llama3_scaling(32.0))}, Form(), even(4), "factor 32.0 (fixed at 8.0)"),
        ({"rope": Rope(1e4, 1.0, {"rope_type": "yarn", "factor": 4.0})}, Form(), even(4), "rope scaling 'yarn'"),
        ({"mlp_bias": True}, Form(), even(4), "biases q/k/v no, attention output no, mlp yes"),
        ({"activation": "quick_gelu"}, Form(), even(4), "activation 'quick_gelu' with a gate"),
        ({"kv_heads": 8}, LEGACY, with_stages(Topology(pp=2), [[3, 1]]), "as [3, 1]: stages of such models are all equal"),
        ({"layers": 8}, Form(), with_stages(Topology(pp=4), [[2, 1, 3, 2]]), "only its first and last stage may"),
        ({}, Form(), even(4, pp=2, vpp=2), "an interleaved pipeline"),
    ],
)  # fmt: skip
def test_what_nemo_cannot_say_is_refused(
    changes: dict[str, object], form: Form, topology: Topology, problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        table_of(model(**changes), form, topology=topology)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("held", "first", "last"), [([3, 1], 3, None), ([1, 2, 2], 1, None), ([1, 3, 3, 1], 1, 1), ([2, 2, 1], None, 1), ([2, 2], None, None)]
)  # fmt: skip
def test_stages_of_other_sizes_at_the_ends_are_said_and_read_alike(
    held: list[int], first: int | None, last: int | None
) -> None:
    topology = with_stages(Topology(pp=len(held)), [held])
    table = table_of(model(layers=sum(held)), topology=topology)
    names = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
    assert tuple(table.get(name) for name in names) == (first, last)
    layout = model_config.statement(model_config.read(yaml_file.dump(table), "x"), None).layout
    assert (layout.counts or even_counts(sum(held), len(held), 1)) == [held]


def test_a_dtype_without_a_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="no precision for tensors of fp64"):
        write(model(), even(4), Form(), DTYPES["fp64"], Tokenizer())


def test_legacy_forms_are_said() -> None:
    table = table_of(model(kv_heads=8), replace(LEGACY, megatron_legacy=True, gate_apart=True))
    assert (table["activation"], table["megatron_legacy"], table["mcore_gpt"]) == ("swiglu", True, False)
    local = table_of(model(), Form(transformer_engine=False, gate_apart=True))
    assert (local["activation"], local["transformer_engine"], local["mcore_gpt"]) == ("fast-swiglu", False, True)


@pytest.mark.parametrize(
    ("base", "saved"), [(1e4, "0000803fcdcccc3d0ad7233c6f12833a"), (5e5, "0000803fc8081a3d215db93ac4105f38")]
)
def test_rope_frequencies_are_those_in_nemos_files(base: float, saved: str) -> None:
    """The buffer of the legacy archives (4 numbers), bit for bit; and torch's own for a usual head but for the last bit of a few."""
    torch = pytest.importorskip("torch")
    found = inverse_frequencies(model(rope=Rope(base)))
    assert found is not None
    assert found.tobytes().hex() == saved
    large = inverse_frequencies(model(rope=Rope(base), head_dim=128))
    assert large is not None
    theirs = (1.0 / (base ** (torch.arange(0, 128, 2).float() / 128))).numpy()
    assert np.all(np.abs(large.view(np.int32) - theirs.view(np.int32)) <= 1)
    assert inverse_frequencies(model(rope=None)) is None
