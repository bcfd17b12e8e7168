"""I3, I4, I5: for every mapping file and many layouts, export then import gives the atoms back leaf for leaf, and the cuts tile."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest

from ckptconv.bind import bind
from ckptconv.canonicalize import canonicalize
from ckptconv.checkpoint import Checkpoint, Key, Origin, Stored, Target
from ckptconv.config import ModelConfig
from ckptconv.dialect import detect, fits, variants
from ckptconv.dtypes import BF16
from ckptconv.errors import CoverageError, MappingError, TopologyError
from ckptconv.leaves import contiguous
from ckptconv.localize import localize
from ckptconv.mapping_files import load_mapping, mapping_paths
from ckptconv.source import Source
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank, Topology, even, with_stages

DENSE = ModelConfig(
    family="hf-llama", layers=4, hidden=32, heads=8, kv_heads=4, head_dim=6, ffn=48, vocab_rows=64, vocab=61, max_positions=16
)  # fmt: skip
SHAPES = {
    "dense": DENSE,
    "tied": replace(DENSE, tied=True),
    "biases": replace(DENSE, qkv_bias=True, out_bias=True, mlp_bias=True),
    "qk_norm": replace(DENSE, qk_norm=True),
    "layernorm": replace(
        DENSE, norm="layernorm", glu=False, learned_positions=True, qkv_bias=True, out_bias=True, mlp_bias=True
    ),
    "moe": replace(DENSE, experts=4, moe_ffn=40, moe_layers=(0, 1, 2, 3)),
    "mixed": replace(DENSE, experts=4, moe_ffn=40, moe_layers=(1, 3)),
}
TOPOLOGIES = {
    "whole": even(4),
    "tp2": even(4, tp=2),
    "tp4pp2": even(4, tp=4, pp=2),
    "pp2vpp2": even(4, pp=2, vpp=2),
    "uneven": with_stages(Topology(tp=2, pp=3, etp=2), [[1, 2, 1]]),
    "empty stage": with_stages(Topology(pp=3), [[0, 4, 0]]),
    "ep2": even(4, tp=2, ep=2),
    "ep4etp1": even(4, tp=2, ep=4, etp=1),
    "ep2pp2etp1": even(4, tp=4, pp=2, ep=2, etp=1),
    "tp8": even(4, tp=8, etp=8),
}


def atoms(config: ModelConfig, mapping: str) -> Checkpoint:
    """A canonical checkpoint whose every atom is a file of its own."""
    tensors: dict[Key, Tensor] = {}
    for name, atom in load_mapping(mapping).vocabulary.expected(config):
        shape = atom.shape(config)
        tensors[Key(name)] = contiguous(Source(name, 0, math.prod(shape) * 2), shape, BF16)
    return Checkpoint(config, tensors, Origin("test", mapping, frozenset(), even(config.layers)))


def stored(checkpoint: Checkpoint, mapping: str, variant: frozenset[str], topology: Topology) -> Stored:
    return localize(checkpoint, Target(load_mapping(mapping), variant, topology, checkpoint.config.vocab_rows), "test")


def refused(mapping: str, shape: str, topology: str) -> bool:
    """What a dialect has no place for, or cannot cut."""
    if mapping in ("mcore-dist-stacked", "mcore-dist-vlm-stacked"):
        return shape == "mixed"
    if mapping in ("megatron-legacy", "nemo-legacy"):
        return shape in ("moe", "mixed", "qk_norm") or topology == "tp8"
    if mapping.startswith("hf-"):
        moe, norms, biases = mapping == "hf-mixtral", mapping == "hf-qwen3", mapping != "hf-internlm2"
        return (
            shape == "layernorm"
            or (shape == "biases" and not biases)
            or (shape in ("moe", "mixed") and not moe)
            or (shape == "qk_norm" and not norms)
        )
    return False


# the usual layouts are MappingContract's; these are the ones in which numbering and cutting go their own ways
UNUSUAL = ("uneven", "empty stage", "ep4etp1", "tp8")


def holds_text(mapping: str) -> bool:
    """Towers alone have shapes and layouts of their own, which MappingContract goes through."""
    return any(a.expr == "embed.weight" for rule in load_mapping(mapping).rules for a in rule.alternatives)


def cases() -> Iterator[object]:
    for mapping in filter(holds_text, mapping_paths()):
        for variant in variants(load_mapping(mapping)):
            for shape in SHAPES:
                for topology in UNUSUAL if load_mapping(mapping).cut else ("whole",):
                    name = "-".join([mapping, *sorted(variant), shape, topology])
                    yield pytest.param(mapping, variant, shape, topology, id=name)


@pytest.mark.parametrize(("mapping", "variant", "shape", "topology"), list(cases()))
def test_export_then_import_gives_the_same_leaves(
    mapping: str, variant: frozenset[str], shape: str, topology: str
) -> None:
    checkpoint = atoms(SHAPES[shape], mapping)
    if refused(mapping, shape, topology):
        with pytest.raises((CoverageError, TopologyError, MappingError)):
            stored(checkpoint, mapping, variant, TOPOLOGIES[topology])
        return
    there = stored(checkpoint, mapping, variant, TOPOLOGIES[topology])
    back = canonicalize(there)
    assert back.tensors == checkpoint.tensors
    assert not back.replicas, "copies of one source must be recognised as the same leaf"


@pytest.mark.parametrize(("topology", "told"), [("tp2", "embed"), ("tp8", "linear_qkv")])
def test_a_part_of_a_tensor_is_never_taken_for_the_whole(topology: str, told: str) -> None:
    """Whether parts are joined, or rows assembled first (tp8, beyond the key/value heads)."""
    there = stored(atoms(DENSE, "mcore"), "mcore", variants(load_mapping("mcore"))[0], TOPOLOGIES[topology])
    ranks = {rank: tensors for rank, tensors in there.ranks.items() if rank.tp == 0}
    with pytest.raises(CoverageError, match=told):
        canonicalize(replace(there, ranks=ranks))


@pytest.mark.parametrize("mapping", ["mcore", "mcore-local", "megatron-legacy"])
@pytest.mark.parametrize("shape", ["dense", "tied", "biases", "layernorm"])
@pytest.mark.parametrize("topology", ["whole", "tp2", "tp4pp2", "pp2vpp2", "uneven", "empty stage"])
def test_dense_models_fit_every_megatron_dialect(mapping: str, shape: str, topology: str) -> None:
    variant = variants(load_mapping(mapping))[0]
    assert stored(atoms(SHAPES[shape], mapping), mapping, variant, TOPOLOGIES[topology]).ranks


@pytest.mark.parametrize("mapping", ["mcore", "mcore-local"])
@pytest.mark.parametrize("shape", ["moe", "mixed"])
@pytest.mark.parametrize("topology", ["whole", "tp2", "tp4pp2", "ep2", "ep4etp1", "ep2pp2etp1"])
def test_dialect_and_expert_form_are_told_by_the_names(mapping: str, shape: str, topology: str) -> None:
    for variant in variants(load_mapping(mapping)):
        there = stored(atoms(SHAPES[shape], mapping), mapping, variant, TOPOLOGIES[topology])
        candidates = [load_mapping("mcore"), load_mapping("mcore-local")]
        found = detect(candidates, there.config, there.topology, there.ranks)
        assert found == (load_mapping(mapping), variant)


@pytest.mark.parametrize("shape", ["moe", "mixed"])
@pytest.mark.parametrize("form", range(3))
def test_a_form_that_cannot_be_bound_hides_no_other(shape: str, form: int) -> None:
    """Candidates are looked at in order: what is wrong with a later one is not for a checkpoint of an earlier one to say."""
    mapping = load_mapping("mcore")
    variant = variants(mapping)[form]
    there = stored(atoms(SHAPES[shape], "mcore"), "mcore", variant, TOPOLOGIES["tp2"])
    twice = next(rule for rule in mapping.rules if "linear_proj.weight" in rule.stored)
    wrong = replace(mapping, rules=(replace(twice, alternatives=twice.alternatives * 2), *mapping.rules))
    assert detect([mapping, wrong], there.config, there.topology, there.ranks) == (mapping, variant)
    with pytest.raises(MappingError, match="two alternatives"):
        detect([wrong, mapping], there.config, there.topology, there.ranks)


def test_of_two_forms_whose_samples_are_there_the_one_that_fits_is_taken() -> None:
    """A mapping that lacks a row has all its own names stored; the other accounts for the tensor that it does not know."""
    mapping = load_mapping("mcore")
    there = stored(atoms(SHAPES["moe"], "mcore"), "mcore", frozenset({"experts_te"}), TOPOLOGIES["whole"])
    lacking = replace(mapping, rules=tuple(r for r in mapping.rules if not r.stored.endswith("linear_proj.weight")))
    for candidates in ([lacking, mapping], [mapping, lacking]):
        found = detect(candidates, there.config, there.topology, there.ranks)
        assert found == (mapping, frozenset({"experts_te"}))


@pytest.mark.parametrize("missing", ["experts.linear_fc1.weight3", "experts.linear_fc1.weight0", "linear_proj.weight"])
def test_a_checkpoint_that_lacks_a_tensor_is_told_in_its_own_terms(missing: str) -> None:
    """Whether a sample of the names has it or not."""
    mapping = load_mapping("mcore")
    there = stored(atoms(SHAPES["moe"], "mcore"), "mcore", frozenset({"experts_te"}), TOPOLOGIES["whole"])
    kept = {rank: {k: t for k, t in ts.items() if not k.name.endswith(missing)} for rank, ts in there.ranks.items()}
    found = detect([mapping, load_mapping("mcore-local")], there.config, there.topology, kept)
    assert found == (mapping, frozenset({"experts_te"}))
    with pytest.raises(CoverageError, match=missing):
        canonicalize(replace(there, ranks=kept))


DISTRIBUTED = ("mcore-dist-stacked", "mcore-dist", "mcore-dist-singleton")


@pytest.mark.parametrize("mapping", DISTRIBUTED)
@pytest.mark.parametrize("shape", SHAPES)
def test_distributed_layouts_are_told_by_names_and_shapes(mapping: str, shape: str) -> None:
    """In any order of the candidates; without gates and experts, singleton is the same as separate."""
    config, whole = SHAPES[shape], even(4)
    for variant in variants(load_mapping(mapping)):
        if fits(load_mapping(mapping), variant, config, whole):
            assert (mapping, shape) == ("mcore-dist-stacked", "mixed")
            continue
        there = stored(atoms(config, mapping), mapping, variant, whole)
        for names in itertools.permutations(DISTRIBUTED):
            candidates = [m for n in names if not fits(m := load_mapping(n), variant, config, whole)]
            found, form = detect(candidates, config, whole, there.ranks)
            assert found.name == mapping or shape == "layernorm"
            assert stored(atoms(config, mapping), found.name, form, whole).ranks == there.ranks


@pytest.mark.parametrize("variant", ["norm_apart", "norm_in_fc1"])
def test_layers_of_two_kinds_cannot_share_a_tensor(variant: str) -> None:
    with pytest.raises(
        MappingError, match=r"one axis for all 4 layers, but only 2 of them are \w+: .*--saver.layers separate"
    ):
        stored(atoms(SHAPES["mixed"], "mcore-dist"), "mcore-dist-stacked", frozenset({variant}), even(4))


@pytest.mark.parametrize("mapping", [*DISTRIBUTED, "hf-llama"])
@pytest.mark.parametrize("topology", [t for t in TOPOLOGIES if t != "whole"])
def test_whole_tensors_are_not_laid_out_over_ranks(mapping: str, topology: str) -> None:
    with pytest.raises(TopologyError, match="holds whole tensors"):
        stored(atoms(SHAPES["dense"], mapping), mapping, frozenset(), TOPOLOGIES[topology])


def test_members_of_a_stack_are_the_atoms_in_order() -> None:
    """The layer is the outermost axis, then the expert, then gate before up."""
    config = SHAPES["moe"]
    table = bind(load_mapping("mcore-dist-stacked"), frozenset({"norm_apart"}), config, even(4), Rank())
    row = next(b for b in table if b.stored.endswith("experts.experts.linear_fc1.weight"))
    assert row.shape == (4, 4, 80, 32)
    halves = itertools.product(range(4), range(4), ("gate", "up"))
    assert row.atoms == [f"layers.{layer}.moe.{e}.{half}.weight" for layer, e, half in halves]


@pytest.mark.parametrize("topology", [t for t in TOPOLOGIES if t not in ("tp8",)])
@pytest.mark.parametrize("axis", ["vocab", "q", "ffn"])
def test_cuts_of_an_axis_tile_it_evenly_often(topology: str, axis: str) -> None:
    layout, size = TOPOLOGIES[topology], 64
    seen: dict[tuple[int, int], int] = {}
    for rank in layout.ranks():
        cut = layout.cut(axis, "tp", size, size, rank)
        seen[cut.lo, cut.hi] = seen.get((cut.lo, cut.hi), 0) + 1
    edges = sorted(seen)
    assert edges[0][0] == 0
    assert edges[-1][1] == size
    assert all(a[1] == b[0] for a, b in pairwise(edges))
    assert len(set(seen.values())) == 1


def test_more_ranks_than_kv_heads_cuts_the_assembled_rows() -> None:
    """Megatron-Core: rank r of 8 holds rows r/8 of the assembled qkv, which here is half a query group."""
    config = SHAPES["dense"]
    rank = next(r for r in even(4, tp=8).ranks() if r.tp == 3)
    row = next(
        b
        for b in bind(load_mapping("mcore"), frozenset(), config, even(4, tp=8), rank)
        if "linear_qkv.weight" in b.stored
    )
    rows = (8 + 2 * 4) * 6
    assert row.box == (3 * rows // 8, 4 * rows // 8)
    assert row.shape == (rows // 8, 32)


def test_legacy_refuses_more_ranks_than_kv_heads() -> None:
    with pytest.raises(TopologyError, match=r"query_key_value.*'kv' has 4 units"):
        stored(atoms(SHAPES["dense"], "megatron-legacy"), "megatron-legacy", frozenset({"qkv_v2"}), even(4, tp=8))


def test_model_with_experts_has_no_place_in_legacy() -> None:
    with pytest.raises(CoverageError, match=r"no place for: layers\.0\.moe\.router\.weight"):
        stored(atoms(SHAPES["moe"], "megatron-legacy"), "megatron-legacy", frozenset({"qkv_v2"}), even(4))
