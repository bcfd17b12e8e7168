"""The mappings of distributed Megatron-Core checkpoints against manifests of real ones (tests/golden/mcore/manifests/README.md)."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from ckptconv.bind import bind
from ckptconv.canonicalize import canonicalize
from ckptconv.checkpoint import Checkpoint, Key, Stored, Target
from ckptconv.config import ModelConfig
from ckptconv.dialect import Dialect, detect, fits
from ckptconv.dtypes import DTYPES
from ckptconv.errors import CoverageError
from ckptconv.huggingface.family_config import family_of, read_config
from ckptconv.leaves import contiguous
from ckptconv.localize import localize
from ckptconv.mapping_files import families, load_mapping
from ckptconv.ops import Stack
from ckptconv.source import Source
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank, even

FOLDER = Path(__file__).parents[1] / "golden" / "mcore" / "manifests"
CASES = sorted(path.stem for path in FOLDER.glob("*.json") if path.stem != "architectures")
ARCHITECTURES = json.loads((FOLDER / "architectures.json").read_text())
LAYOUTS = {"stacked": "mcore-dist-stacked", "separate": "mcore-dist", "singleton": "mcore-dist-singleton"}
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")

Tensors = dict[Key, Tensor]


def layout_of(case: str) -> str:
    return "singleton" if "singleton" in case else "separate" if "perlayer" in case else "stacked"


def numbered(shapes: dict[str, list[int]], path: Path) -> Tensors:
    """Tensors laid end to end in a file whose elements are their numbers."""
    ends = [0, *itertools.accumulate(map(math.prod, shapes.values()))]
    path.write_bytes(np.arange(ends[-1], dtype=np.int32).tobytes())
    return {
        Key(name): contiguous(Source(str(path), 4 * at, 4 * math.prod(shape)), tuple(shape), DTYPES["int32"])
        for at, (name, shape) in zip(ends, shapes.items(), strict=False)
    }


def told(config: ModelConfig, tensors: Tensors, names: Sequence[str] = tuple(LAYOUTS.values())) -> Dialect:
    whole = even(config.layers)
    candidates = [m for m in map(load_mapping, names) if not fits(m, frozenset(), config, whole)]
    return detect(candidates, config, whole, {Rank(): tensors})


def whole(dialect: Dialect, config: ModelConfig, tensors: Tensors) -> Stored:
    return Stored("test", *dialect, even(config.layers), config, {Rank(): tensors})


def exported(checkpoint: Checkpoint, dialect: Dialect) -> Tensors:
    config = checkpoint.config
    target = Target(*dialect, even(config.layers), config.vocab_rows)
    return dict(localize(checkpoint, target, "test").ranks[Rank()])


class Case:
    """A manifest: its model with numbers for weights, and what Megatron-Core stored of it."""

    def __init__(self, name: str, folder: Path) -> None:
        manifest = json.loads((FOLDER / f"{name}.json").read_text())
        family = family_of(manifest["config.json"], families())
        self.config = read_config(manifest["config.json"], name, family)
        self.rows: dict[str, tuple[str, list[int], str]] = manifest["stored"]
        tensors = numbered(manifest["hf"], folder / "hf")
        self.model = canonicalize(whole(told(self.config, tensors, (family.name,)), self.config, tensors))

    @property
    def padded(self) -> ModelConfig:
        return replace(self.config, vocab_rows=self.rows[VOCABULARY[0]][1][0])

    def stored(self, folder: Path) -> Tensors:
        return numbered({key: shape for key, (_, shape, _) in self.rows.items()}, folder / "stored")


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def case(name: str, tmp_path: Path) -> Case:
    return Case(name, tmp_path)


def test_all_manifests_are_here_and_small() -> None:
    assert (len(CASES), len(ARCHITECTURES)) == (11, 16)
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 300_000


def test_layout_is_told_by_names_and_shapes(name: str, case: Case, tmp_path: Path) -> None:
    mapping, variant = told(case.padded, case.stored(tmp_path))
    assert mapping.name == LAYOUTS[layout_of(name)]
    assert variant == {"norm_apart"}


def test_every_element_goes_where_megatron_core_put_it(name: str, case: Case) -> None:
    dialect = load_mapping(LAYOUTS[layout_of(name)]), frozenset({"norm_apart"})
    ours = {
        key.name: xxhash.xxh64_hexdigest(tensor.numpy().tobytes())
        for key, tensor in exported(case.model, dialect).items()
    }
    assert ours == {key: digest for key, (_, _, digest) in case.rows.items()}


def test_what_was_stored_comes_apart_into_all_of_the_model(case: Case, tmp_path: Path) -> None:
    tensors = case.stored(tmp_path)
    back = canonicalize(whole(told(case.padded, tensors), case.padded, tensors))
    assert back.tensors.keys() == case.model.tensors.keys()
    again = exported(back, (load_mapping(back.origin.mapping), back.origin.variant))
    assert again == tensors


@pytest.mark.parametrize("title", ARCHITECTURES)
def test_names_and_shapes_of_an_architecture_are_bound(title: str, tmp_path: Path) -> None:
    said: dict[str, Any] = ARCHITECTURES[title]
    name, _, layout = title.rpartition("_")
    options: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in said["architecture"].items()}
    config = ModelConfig(family="hf-llama", **options)
    tensors = numbered(said["stored"], tmp_path / "stored")
    dialect = told(config, tensors)
    assert dialect[1] == {"norm_in_fc1" if name.endswith("local") else "norm_apart"}
    assert dialect[0].name == LAYOUTS[layout] or name == "layernorm"  # without a gate, singleton is separate
    back = canonicalize(whole(dialect, config, tensors))
    assert exported(back, dialect) == tensors


def test_copy_of_a_tied_embedding_is_compared_and_not_written(tmp_path: Path) -> None:
    case = Case("llama_tied_tp2pp2", tmp_path)
    tensors = case.stored(tmp_path)
    head = numbered({VOCABULARY[1]: list(tensors[Key(VOCABULARY[0])].shape)}, tmp_path / "head")
    dialect = told(case.padded, tensors | head)
    back = canonicalize(whole(dialect, case.padded, tensors | head))
    assert [replica.name for replica in back.replicas] == [VOCABULARY[1]]
    assert exported(back, dialect) == tensors


def test_stacks_of_many_members_are_bound_and_taken_apart_quickly() -> None:
    """15,360 experts in one tensor: none is written out when binding, and none is looked for among the others."""
    config = ModelConfig(
        family="hf-mixtral", layers=60, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab_rows=128,
        experts=256, moe_ffn=96, moe_layers=tuple(range(60)),
    )  # fmt: skip
    start = time.process_time()
    rows = list(bind(load_mapping("mcore-dist-stacked"), frozenset({"norm_apart"}), config, even(60), Rank()))
    assert max(row.shape for row in rows if len(row.shape) == 4) == (60, 256, 192, 64)
    assert time.process_time() - start < 0.2
    members = [contiguous(Source(str(i), 0, 8), (2,), DTYPES["int32"]) for i in range(20_000)]
    joined = Stack().forward(members)
    start = time.process_time()
    assert Stack().inverse(joined, [(2,)] * len(members)) == members
    assert time.process_time() - start < 2


def test_name_that_no_layout_has_is_listed(tmp_path: Path) -> None:
    case = Case("mixtral_seq_tp2pp2ep2", tmp_path)
    tensors = case.stored(tmp_path)
    tensors[Key("decoder.layers.mlp.shared_experts.linear_fc1.weight")] = tensors.pop(
        Key("decoder.layers.mlp.experts.experts.linear_fc1.weight")
    )
    with pytest.raises(CoverageError) as caught:
        canonicalize(whole(told(case.padded, tensors), case.padded, tensors))
    assert "unexpected: decoder.layers.mlp.shared_experts.linear_fc1.weight" in str(caught.value)
    assert "missing: decoder.layers.mlp.experts.experts.linear_fc1.weight" in str(caught.value)
