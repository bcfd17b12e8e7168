"""The mappings of NeMo's checkpoints against names and shapes that NeMo itself wrote (tests/golden/nemo/configs/README.md)."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ckptconv.canonicalize import canonicalize
from ckptconv.checkpoint import Checkpoint, Extras, Key, Origin, Stored, Target
from ckptconv.dialect import detect
from ckptconv.dtypes import DTYPES
from ckptconv.errors import CoverageError, FormatError
from ckptconv.leaves import contiguous
from ckptconv.localize import localize
from ckptconv.mapping_files import load_mapping
from ckptconv.megatron.architecture import Evidence, resolve
from ckptconv.megatron.measure import LAYER, Measured, Names, measure
from ckptconv.nemo import model_config, names
from ckptconv.source import Source
from ckptconv.tensor import Shape, Tensor
from ckptconv.topology import Rank, Topology, even
from ckptconv.torch_bridge import to_torch
from tests.unit.helpers.nemo_configs import FOLDER, nemo_of, source_of

KEYS = json.loads((FOLDER / "keys.json").read_text())
LEGACY = [case for case in KEYS if case.startswith("legacy")]
DISTRIBUTED = [case for case in KEYS if case.startswith("mcore")]
JOINED, APART = frozenset({"qkv_v2", "gate_joined"}), frozenset({"qkv_v2", "gate_apart"})
SHAPES = dict[str, Shape]
TWO = even(4, tp=2, etp=1)


def stored_shapes(case: str) -> dict[tuple[int, int], SHAPES]:
    """(pp, tp) -> names, the module's prefix taken off, and shapes."""
    out = {}
    for table in KEYS[case]:
        prefix = names.prefix_of([*table["tensors"], *table["others"]], case)
        for file in table["files"]:
            found = re.search(r"(?:mp|tp)_rank_(\d+)(?:_pp_rank_(\d+))?", file)
            place = (int(found[2] or 0), int(found[1])) if found else (0, 0)
            out[place] = {k.removeprefix(prefix): tuple(shape) for k, (shape, _) in table["tensors"].items()}
    return out


def tensors(shapes: SHAPES) -> dict[Key, Tensor]:
    return {
        Key(name): contiguous(Source(f"/nowhere/{i}", 0, 4 * math.prod(shape)), shape, DTYPES["fp32"])
        for i, (name, shape) in enumerate(shapes.items())
    }


def measured_legacy(ranks: dict[tuple[int, int], SHAPES], called: Names = names.LEGACY) -> Measured:
    """Sizes from the first rank of every stage, as a loader takes them."""
    stages = [names.joined_gates(ranks[place]) for place in sorted(ranks) if place[1] == 0]
    layers: list[SHAPES] = []
    for stage in stages:
        held: dict[int, SHAPES] = {}
        for name, shape in stage.items():
            if found := LAYER.search(name):
                held.setdefault(int(found[1]), {})[name[found.end() :]] = shape
        layers += [held[i] for i in sorted(held)]
    return measure(stages[0], stages[-1], layers, called, max(tp for _, tp in ranks) + 1, 1)


def load_legacy(ranks: dict[tuple[int, int], SHAPES], nemo: model_config.NemoConfig) -> Stored:
    said = model_config.statement(nemo, None)
    config, _ = resolve(Evidence(measured_legacy(ranks), said))
    layout = said.layout
    topology = even(config.layers, tp=layout.tp or 1, pp=layout.pp or 1, etp=1)
    held = {Rank(pp=pp, tp=tp): tensors(shapes) for (pp, tp), shapes in ranks.items()}
    dialect = detect([load_mapping("nemo-legacy")], config, topology, held, nemo.variant)
    return Stored("nemo", *dialect, topology, config, held, {})


@pytest.mark.parametrize("case", LEGACY)
def test_legacy_files_of_nemo_are_bound_name_for_name(case: str) -> None:
    """Every stored tensor has its place and shape on every rank; the architecture is that of the Hugging Face model."""
    stored = load_legacy(stored_shapes(case), nemo_of(case))
    checkpoint = canonicalize(stored)
    assert checkpoint.dropped == ("language_model.rotary_pos_emb.inv_freq",)
    ours = replace(checkpoint.config, vocab_rows=0, vocab=None, family="", raw={}, dtype=None)
    assert ours == replace(source_of(case), vocab_rows=0, vocab=None, family="", raw={}, dtype=None)
    assert len(checkpoint.tensors) == 39  # as many as the Hugging Face file has


@pytest.mark.parametrize("case", DISTRIBUTED)
def test_distributed_files_of_nemo_are_megatron_cores_behind_a_prefix(case: str) -> None:
    (shapes,) = stored_shapes(case).values()
    config = source_of(case)
    dialect = detect([load_mapping("mcore-dist-stacked")], config, even(4), {Rank(): tensors(shapes)})
    checkpoint = canonicalize(Stored("nemo", *dialect, even(4), config, {Rank(): tensors(shapes)}, {}))
    assert len(checkpoint.tensors) == 39


def test_a_llava_is_the_language_model_and_its_projector() -> None:
    (shapes,) = stored_shapes("neva_fin").values()
    config = replace(source_of("neva_fin"), vocab_rows=512)
    held = {Rank(): tensors(shapes)}
    stored = Stored("nemo", load_mapping("mcore-dist-stacked"), frozenset({"norm_apart"}), even(4), config, held, {})
    with pytest.raises(CoverageError) as caught:
        canonicalize(stored)
    projector = "embedding.word_embeddings.adapter_layer.mm_projector_adapter.mm_projector"
    wanted = {f"{projector}.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(re.findall(rf"{re.escape(projector)}[\w.]+", str(caught.value))) == wanted
    assert len(canonicalize(stored, drop=["*adapter_layer*"]).tensors) == 39


class Numbers:
    """A model whose weights are numbers, as Hugging Face names and lays them out: what NeMo holds is worked out from them by hand."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.config = replace(source_of("legacy_mha_fp32_tp1"), vocab_rows=384, **changes)  # type: ignore[arg-type]
        vocabulary = load_mapping("nemo-legacy").vocabulary
        shapes = {name: atom.shape(self.config) for name, atom in vocabulary.expected(self.config)}
        ends = [0, *itertools.accumulate(map(math.prod, shapes.values()))]
        path = folder / "atoms"
        path.write_bytes(np.arange(ends[-1], dtype=np.int32).tobytes())
        self.atoms = {
            Key(name): contiguous(Source(str(path), 4 * at, 4 * math.prod(shape)), shape, DTYPES["int32"])
            for at, (name, shape) in zip(ends, shapes.items(), strict=False)
        }

    def value(self, name: str) -> np.ndarray:
        return to_torch(self.atoms[Key(name)]).numpy()

    def stored(self, mapping: str, variant: frozenset[str], topology: Topology) -> dict[Rank, dict[str, np.ndarray]]:
        origin = Origin("hf", "hf-llama", frozenset(), even(self.config.layers))
        checkpoint = Checkpoint(self.config, self.atoms, origin, Extras())
        target = Target(load_mapping(mapping), variant, topology, self.config.vocab_rows)
        ranks = localize(checkpoint, target, "nemo").ranks
        return {rank: {k.name: to_torch(t).numpy() for k, t in held.items()} for rank, held in ranks.items()}


LAYER2, ATOM2 = "language_model.encoder.layers.2.", "layers.2."


def test_rows_of_queries_keys_and_values_go_head_by_head(tmp_path: Path) -> None:
    """8 heads of 8 rows: rank 1 of 2 holds heads 4 to 7, each as its query, key and value rows."""
    model = Numbers(tmp_path)
    found = model.stored("nemo-legacy", JOINED, TWO)[Rank(tp=1)][LAYER2 + "self_attention.query_key_value.weight"]
    q, k, v = (model.value(f"{ATOM2}attn.{a}.weight") for a in "qkv")
    heads = [part[8 * h : 8 * h + 8] for h in range(4, 8) for part in (q, k, v)]
    assert np.array_equal(found, np.concatenate(heads))


def test_megatron_legacy_keeps_queries_keys_and_values_apart_on_each_rank(tmp_path: Path) -> None:
    model = Numbers(tmp_path)
    variant = frozenset({"qkv_v0", "gate_joined"})
    found = model.stored("nemo-legacy", variant, TWO)[Rank(tp=1)][LAYER2 + "self_attention.query_key_value.weight"]
    parts = [model.value(f"{ATOM2}attn.{a}.weight")[32:] for a in "qkv"]
    assert np.array_equal(found, np.concatenate(parts))


def test_gate_and_up_are_one_tensor_or_two(tmp_path: Path) -> None:
    """fast-swiglu: gate rows of the rank, then its up rows; swiglu: the gate is the tensor that the activation is applied to."""
    model = Numbers(tmp_path)
    gate, up = (model.value(f"{ATOM2}mlp.{a}.weight") for a in ("gate", "up"))
    joined = model.stored("nemo-legacy", JOINED, TWO)[Rank(tp=1)]
    assert np.array_equal(joined[LAYER2 + "mlp.dense_h_to_4h.weight"], np.concatenate([gate[88:], up[88:]]))
    apart = model.stored("nemo-legacy", APART, TWO)[Rank(tp=1)]
    assert np.array_equal(apart[LAYER2 + "mlp.dense_h_to_4h.weight"], gate[88:])
    assert np.array_equal(apart[LAYER2 + "mlp.dense_h_to_4h_2.weight"], up[88:])
    assert apart.keys() - joined.keys() == {
        f"language_model.encoder.layers.{i}.mlp.dense_h_to_4h_2.weight" for i in range(4)
    }


def test_apart_and_joined_are_told_by_names_and_measured_alike(tmp_path: Path) -> None:
    model = Numbers(tmp_path)
    for variant in (JOINED, APART):
        ranks = model.stored("nemo-legacy", variant, even(4))
        shapes = {name: value.shape for name, value in ranks[Rank()].items()}
        assert measured_legacy({(0, 0): shapes}).facts["glu"] is True
        held = {Rank(): tensors(shapes)}
        assert detect([load_mapping("nemo-legacy")], model.config, even(4), held)[1] == variant


def test_a_tied_model_has_its_head_on_the_last_stage_alone(tmp_path: Path) -> None:
    ranks = Numbers(tmp_path, tied=True).stored("nemo-legacy", JOINED, even(4, pp=2))
    heads = {rank.pp: [n for n in held if n.endswith("word_embeddings.weight")] for rank, held in ranks.items()}
    assert heads == {0: ["language_model.embedding.word_embeddings.weight"], 1: ["word_embeddings.weight"]}
    assert not any("output_layer" in name for held in ranks.values() for name in held)


@pytest.mark.parametrize("mapping", ["nemo-mcore", "nemo-mcore-local"])
def test_megatron_core_models_in_rank_files_are_megatrons(mapping: str, tmp_path: Path) -> None:
    """The same names and rows; what NeMo may have left beside them is known."""
    model, variant = Numbers(tmp_path), frozenset({"experts_te"})
    theirs = model.stored(mapping.removeprefix("nemo-"), variant, even(4, tp=2, pp=2))
    ours = model.stored(mapping, variant, even(4, tp=2, pp=2))
    assert {r: {k: v.tolist() for k, v in t.items()} for r, t in ours.items()} == {
        r: {k: v.tolist() for k, v in t.items()} for r, t in theirs.items()
    }
    assert load_mapping(mapping).ignores("rotary_pos_emb.inv_freq")
    assert load_mapping(mapping).rename("decoder._orig_mod.layers.0.x") == "decoder.layers.0.x"


@pytest.mark.parametrize("prefix", ["model.", "model.module.", "module.", ""])
def test_a_models_names_have_one_prefix(prefix: str) -> None:
    held = [f"{prefix}decoder.final_layernorm.weight", f"{prefix}output_layer.weight"]
    assert names.prefix_of([*held, "optimizer.state.exp_avg.x"], "file") == prefix


def test_names_that_begin_differently_are_refused() -> None:
    with pytest.raises(FormatError, match=r"a.ckpt: names begin differently: model.x and decoder.y"):
        names.prefix_of(["model.x", "decoder.y"], "a.ckpt")
