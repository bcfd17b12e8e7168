"""Import and export refuse what does not fit, listing all of it; dropping, casting and resizing do what they say and no more."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ckptconv import passes
from ckptconv.canonicalize import canonicalize
from ckptconv.checkpoint import Checkpoint, Key, Origin, Stored, Target
from ckptconv.config import ModelConfig
from ckptconv.dtypes import BF16, FP32
from ckptconv.errors import ConfigError, CoverageError, FormatError, UsageError
from ckptconv.leaves import contiguous
from ckptconv.localize import localize
from ckptconv.mapping_files import load_mapping
from ckptconv.nodes import Concat, Fill, Map, View
from ckptconv.source import Source
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank, Topology, even

CONFIG = ModelConfig(
    family="hf-llama", layers=2, hidden=8, heads=4, kv_heads=2, head_dim=2, ffn=12, vocab_rows=16, vocab=13
)
MCORE = load_mapping("mcore")
TE = frozenset({"experts_te"})


def leaf(name: str, shape: tuple[int, ...]) -> Tensor:
    return contiguous(Source(name, 0, math.prod(shape) * 2), shape, BF16)


def model(config: ModelConfig = CONFIG) -> Checkpoint:
    tensors = {Key(name): leaf(name, atom.shape(config)) for name, atom in MCORE.vocabulary.expected(config)}
    return Checkpoint(config, tensors, Origin("test", "mcore", TE, even(config.layers)))


def on_disk(topology: Topology, config: ModelConfig = CONFIG) -> Stored:
    """What ranks would hold, each rank's tensors in files of their own, so that copies are not the same leaf."""
    there = localize(model(config), Target(MCORE, TE, topology, config.vocab_rows), "test")
    ranks = {r: {k: leaf(f"{r}/{k.name}", t.shape) for k, t in tensors.items()} for r, tensors in there.ranks.items()}
    return replace(there, ranks=ranks, places={r: f"file {r}" for r in ranks})


def changed(stored: Stored, rank: Rank, change: dict[Key, Tensor | None]) -> Stored:
    tensors = {**stored.ranks[rank], **change}
    return replace(stored, ranks={**stored.ranks, rank: {k: t for k, t in tensors.items() if t is not None}})


def test_replicas_of_different_files_are_kept_for_comparison() -> None:
    checkpoint = canonicalize(on_disk(even(2, tp=2)))
    names = {r.name for r in checkpoint.replicas}
    assert "decoder.final_layernorm.weight" in names
    assert "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in names
    assert "decoder.layers.0.mlp.linear_fc1.weight" not in names
    assert all(r.kept.shape == r.copy.shape for r in checkpoint.replicas)


def test_tied_copy_on_the_last_stage_is_compared_with_the_embedding() -> None:
    checkpoint = canonicalize(on_disk(even(2, pp=2), replace(CONFIG, tied=True)))
    assert [r.name for r in checkpoint.replicas] == ["output_layer.weight"]
    assert Key("head.weight") not in checkpoint.tensors


def test_everything_wrong_is_listed_at_once() -> None:
    stored = on_disk(even(2, tp=2))
    rank = Rank(tp=1, etp=1)
    fc2 = Key("decoder.layers.0.mlp.linear_fc2.weight")
    stored = changed(
        stored,
        rank,
        {
            Key("decoder.final_layernorm.weight"): None,
            Key("decoder.final_layernorm.weigth"): leaf("x", (8,)),
            fc2: leaf("y", (8, 12)),
            Key("decoder.layers.1.mlp.linear_fc2.weight"): None,
        },
    )
    with pytest.raises(CoverageError) as caught:
        canonicalize(stored)
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "missing: decoder.final_layernorm.weight (file tp=1 etp=1)" in text
    assert "unexpected: decoder.final_layernorm.weigth" in text
    assert "did you mean decoder.final_layernorm.weight?" in text
    assert f"{fc2} has shape (8, 12), expected (8, 6)" in text
    assert "missing: decoder.layers.1.mlp.linear_fc2.weight" in text
    assert "--drop" in text


def test_mixed_dtypes_over_ranks_are_refused() -> None:
    name = Key("decoder.layers.0.mlp.linear_fc2.weight")
    other = contiguous(Source("z", 0, 8 * 6 * 4), (8, 6), FP32)
    with pytest.raises(CoverageError, match=r"stored as bf16 and fp32"):
        canonicalize(changed(on_disk(even(2, tp=2)), Rank(tp=1, etp=1), {name: other}))


def test_replica_of_another_dtype_is_refused() -> None:
    other = contiguous(Source("z", 0, 32), (8,), FP32)
    with pytest.raises(CoverageError, match=r"is fp32 \(8,\), but bf16"):
        canonicalize(changed(on_disk(even(2, tp=2)), Rank(tp=1, etp=1), {Key("decoder.final_layernorm.weight"): other}))


def test_two_spellings_of_one_tensor_are_refused() -> None:
    legacy = load_mapping("megatron-legacy")
    there = localize(model(), Target(legacy, frozenset({"qkv_v2"}), even(2), 16), "test")
    old = Key("language_model.encoder.layers.0.input_layernorm.weight")
    with pytest.raises(FormatError, match="stored twice"):
        canonicalize(changed(there, Rank(), {old: leaf("q", (8,))}))


def test_old_spellings_are_understood() -> None:
    legacy = load_mapping("megatron-legacy")
    there = localize(model(), Target(legacy, frozenset({"qkv_v2"}), even(2), 16), "test")
    old = {
        Key(
            k.name.replace("encoder", "transformer")
            .replace("self_attention", "attention")
            .replace("input_norm", "input_layernorm")
            .replace("post_attention_norm", "post_attention_layernorm")
            .replace("final_norm", "final_layernorm")
        ): t
        for k, t in there.ranks[Rank()].items()
    }
    assert canonicalize(replace(there, ranks={Rank(): old})).tensors == model().tensors


def test_unknown_tensor_can_be_dropped_and_is_recorded() -> None:
    stored = changed(on_disk(even(2)), Rank(), {Key("decoder.extra.weight"): leaf("e", (3,))})
    with pytest.raises(CoverageError, match=r"unexpected: decoder\.extra\.weight"):
        canonicalize(stored)
    checkpoint = canonicalize(stored, ["decoder.extra.*"])
    assert checkpoint.dropped == ("decoder.extra.weight",)
    assert checkpoint.tensors.keys() == model().tensors.keys()


def test_dropping_a_needed_tensor_fails_at_export() -> None:
    checkpoint = canonicalize(on_disk(even(2)), ["decoder.final_layernorm.weight"])
    with pytest.raises(CoverageError, match=r"missing: norm\.weight, needed for decoder\.final_layernorm\.weight"):
        localize(checkpoint, Target(MCORE, TE, even(2), 16), "test")


def test_drop_that_matches_nothing_is_told() -> None:
    notes = canonicalize(on_disk(even(2)), ["*.q_norm.*", "layers.0.attn.q.weight"]).extras.notes
    assert notes == ("--drop *.q_norm.*: no tensor is called so",)


def test_atom_without_a_place_is_refused() -> None:
    checkpoint = model(replace(CONFIG, qk_norm=True))
    target = Target(load_mapping("hf-llama"), frozenset(), even(2), 16)
    with pytest.raises(CoverageError, match=r"no place for: layers\.0\.attn\.q_norm\.weight") as caught:
        localize(checkpoint, target, "hf")
    assert len(caught.value.problems) == 4


def test_mapping_that_forgets_an_atom_is_caught_on_import() -> None:
    llama = load_mapping("hf-llama")
    forgetful = replace(llama, rules=tuple(r for r in llama.rules if r.stored != "model.norm.weight"))
    there = localize(model(), Target(llama, frozenset(), even(2), 16), "hf")
    tensors = {k: t for k, t in there.ranks[Rank()].items() if k.name != "model.norm.weight"}
    with pytest.raises(CoverageError, match=r"missing: norm\.weight"):
        canonicalize(replace(there, mapping=forgetful, ranks={Rank(): tensors}))


def test_vocabulary_padding_repeats_the_last_true_row() -> None:
    bigger = passes.resize_vocabulary(model(), 20, MCORE)
    embed, original = bigger.tensors[Key("embed.weight")], model().tensors[Key("embed.weight")]
    assert isinstance(embed, Concat)
    assert embed.parts[0] == original.narrow(0, 0, 13)
    padding = embed.parts[1]
    assert isinstance(padding, View)
    assert padding.shape == (7, 8)
    assert padding.strides[0] == 0
    assert padding.narrow(0, 0, 1) == original.narrow(0, 12, 13)
    assert bigger.config.vocab_rows == 20
    assert passes.resize_vocabulary(bigger, 13, MCORE).tensors[Key("embed.weight")] == original.narrow(0, 0, 13)


def test_moments_are_padded_with_zeros() -> None:
    checkpoint = model()
    tensors = {**checkpoint.tensors, Key("embed.weight", "exp_avg"): leaf("m", (16, 8))}
    bigger = passes.resize_vocabulary(replace(checkpoint, tensors=tensors), 20, MCORE)
    moment = bigger.tensors[Key("embed.weight", "exp_avg")]
    assert isinstance(moment, Concat)
    assert moment.parts[1] == Fill((7, 8), BF16)


def test_same_number_of_rows_keeps_the_padding_as_it_is() -> None:
    assert passes.resize_vocabulary(model(), 16, MCORE).tensors == model().tensors


def test_padding_needs_the_true_size() -> None:
    unknown = replace(model(), config=replace(CONFIG, vocab=None))
    with pytest.raises(ConfigError, match="--vocab-size"):
        passes.resize_vocabulary(unknown, 20, MCORE)
    with pytest.raises(ConfigError, match="does not fit"):
        passes.resize_vocabulary(model(), 12, MCORE)


@pytest.mark.parametrize("size", [0, -1, 17])
def test_stated_vocabulary_must_fit(size: int) -> None:
    with pytest.raises(ConfigError, match="--vocab-size"):
        passes.with_vocabulary(model(), size)


def test_cast_changes_float_parameters_only_and_only_in_map_nodes() -> None:
    checkpoint = model()
    tensors = {**checkpoint.tensors, Key("norm.weight", "exp_avg"): leaf("m", (8,))}
    cast = passes.cast(replace(checkpoint, tensors=tensors), "fp32", MCORE)
    for key, tensor in cast.tensors.items():
        assert isinstance(tensor, Map) == (key.slot == "param")
        assert tensor.dtype == (FP32 if key.slot == "param" else BF16)
    assert passes.cast(checkpoint, "bf16", MCORE).tensors == checkpoint.tensors
    assert passes.cast(checkpoint, "keep", MCORE) is checkpoint


@pytest.mark.parametrize("dtype", ["float32", "int8", "", "FP32"])
def test_unknown_dtype_is_a_usage_error(dtype: str) -> None:
    with pytest.raises(UsageError):
        passes.cast(model(), dtype, MCORE)
