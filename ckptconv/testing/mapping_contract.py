"""MappingContract: what every mapping file promises, as tests that its author inherits. No file is read but the mapping itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest

from ckptconv.bind import bind
from ckptconv.canonicalize import canonicalize
from ckptconv.checkpoint import Checkpoint, Key, Origin, Stored, Target
from ckptconv.config import SIGHT, ModelConfig, part_of, projector_config, units
from ckptconv.dialect import detect, variants
from ckptconv.dtypes import BF16
from ckptconv.errors import ConfigError, CoverageError, MappingError, TopologyError
from ckptconv.huggingface.config_table import CODECS, entries
from ckptconv.huggingface.family_config import check_fits, family_of, read_config, write_config
from ckptconv.leaves import contiguous
from ckptconv.localize import localize
from ckptconv.mapping import Mapping
from ckptconv.mapping_files import families, load_mapping, load_mapping_file
from ckptconv.source import Source
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank, Topology, even, with_stages

DENSE = ModelConfig(
    family="hf-llama", layers=4, hidden=32, heads=8, kv_heads=4, head_dim=6, ffn=48, vocab_rows=64, vocab=61,
    max_positions=16, norm_eps=1e-6,
)  # fmt: skip
EVEN = replace(DENSE, head_dim=4)  # heads that share the width between them
CLIP = ModelConfig(
    family="hf-clip", kind="vision", layers=4, hidden=48, heads=8, kv_heads=8, head_dim=6, ffn=80, vocab_rows=0, image=16,
    patch=4, class_tokens=1, max_positions=17, norm="layernorm", norm_eps=1e-5, activation="quick_gelu", glu=False,
    qkv_bias=True, out_bias=True, mlp_bias=True, learned_positions=True, pre_norm=True, rope=None,
)  # fmt: skip
SIGLIP = replace(
    CLIP, family="hf-siglip", class_tokens=0, max_positions=16, norm_eps=1e-6, activation="gelu_pytorch_tanh", pre_norm=False,
    patch_bias=True, pooling=True,
)  # fmt: skip
INTERNVIT = replace(
    CLIP, family="hf-internvit", norm="rmsnorm", norm_eps=1e-6, activation="gelu", qkv_bias=False, qk_norm_full=True, pre_norm=False,
    final_norm=False, layer_scale=True, patch_bias=True,
)  # fmt: skip
RADIO = replace(
    CLIP, family="hf-radio-h", hidden=32, heads=16, kv_heads=16, head_dim=2, image=0, class_tokens=3, max_positions=36, norm_eps=1e-6,
    activation="gelu", pre_norm=False, final_norm=False, patch_linear=True,
)  # fmt: skip
CLIP_64 = replace(CLIP, hidden=512, head_dim=64, image=336, patch=84)  # heads as wide as OpenAI's


def _joined(language: ModelConfig, vision: ModelConfig, projector: ModelConfig) -> ModelConfig:
    return replace(language, dtype=BF16, towers={"vision": vision, "projector": projector})


LLAVA = _joined(
    replace(DENSE, feature_layer=-1, feature_select="full"), CLIP_64, projector_config(512, 32, 32, mlp_bias=True)
)
INTERNVL = _joined(
    replace(DENSE, family="hf-qwen2", qkv_bias=True, feature_layer=-3), INTERNVIT,
    projector_config(192, 32, 32, pre_norm=True, mlp_bias=True)
)  # fmt: skip
SHAPES: dict[str, ModelConfig] = {
    "dense": DENSE,
    "tied": replace(DENSE, tied=True),
    "qkv-bias": replace(DENSE, qkv_bias=True),
    "biases": replace(DENSE, qkv_bias=True, out_bias=True, mlp_bias=True),
    "even-heads": EVEN,
    "even-heads-bias": replace(EVEN, qkv_bias=True, out_bias=True, tied=True),
    "qk-norm": replace(DENSE, qk_norm=True),
    "layernorm": replace(
        DENSE, norm="layernorm", activation="gelu", glu=False, learned_positions=True, rope=None, qkv_bias=True,
        out_bias=True, mlp_bias=True,
    ),
    "moe": replace(DENSE, experts=4, moe_ffn=40, router_topk=2, moe_layers=(0, 1, 2, 3)),
    "moe-some-layers": replace(DENSE, experts=4, moe_ffn=40, router_topk=2, moe_layers=(1, 3)),
    "clip": CLIP,
    "clip-projected": replace(CLIP, projection=20),
    "clip-64": CLIP_64,
    "siglip": SIGLIP,
    "siglip-no-head": replace(SIGLIP, pooling=False),
    "internvit": INTERNVIT,
    "internvit-mask": replace(INTERNVIT, mask_token=True),
    "internvit-300m": replace(INTERNVIT, norm="layernorm", qkv_bias=True, qk_norm_full=False),
    "radio-h": RADIO,
    "radio-g": replace(
        RADIO, family="hf-radio-g", hidden=48, heads=24, kv_heads=24, final_norm=True, layer_scale=True, glu=True, activation="silu",
        mask_token=True, patch_bias=True,
    ),
    "projector": projector_config(48, 40, 32, mlp_bias=True),
    "projector-linear": replace(projector_config(48, 0, 32, mlp_bias=True), linear=True),
    "projector-vision": replace(projector_config(48, 40, 32, mlp_bias=True), towers={"vision": CLIP}),
    "llava": LLAVA,
    "llava-next": _joined(DENSE, CLIP_64, replace(LLAVA.towers["projector"], newline=True)),
    "llava-moe": replace(LLAVA, experts=4, moe_ffn=40, router_topk=2, moe_layers=(0, 1, 2, 3)),
    "internvl": INTERNVL,
    "internvl-internlm2": replace(INTERNVL, family="hf-internlm2", head_dim=4, qkv_bias=False),
    "nvlm": _joined(INTERNVL, replace(INTERNVIT, heads=15, kv_heads=15, true_heads=8), projector_config(192, 48, 32, pre_norm=True)),
}  # fmt: skip
LAYOUTS: dict[str, Topology] = {
    "whole": even(4),
    "tp2": even(4, tp=2),
    "tp4-pp2": even(4, tp=4, pp=2),
    "pp2-vpp2": even(4, pp=2, vpp=2),
    "uneven": with_stages(Topology(tp=2, pp=3, etp=2), [[1, 2, 1]]),
    "empty-stage": with_stages(Topology(pp=3), [[0, 4, 0]]),
    "tp2-ep2": even(4, tp=2, ep=2),
    "tp4-ep2-etp1": even(4, tp=4, pp=2, ep=2, etp=1),
    "tp8": even(4, tp=8),
}


class MappingContract:
    """Subclass it as `class TestMine(MappingContract): mapping = "hf-mine"`; a Path is a file that is not installed.

    mapping         of several parts: with the families of all, `hf-mine(hf-llama,hf-clip)`
    shapes          names of SHAPES that the mapping must hold; None: a family those that its [config] can say, a dialect all
                    language models
    layouts         names of LAYOUTS it must be cut in; None: a family only whole, a dialect all
    refuses         layouts among these that some shape does not divide into
    told_by_names   whether the variants can be told from the names and shapes that are stored
    own_config      whether a family has a config.json of its own; no: it is a part that the whole model's file says nothing of
    """

    mapping: ClassVar[str | Path]
    shapes: ClassVar[tuple[str, ...] | None] = None
    layouts: ClassVar[tuple[str, ...] | None] = None
    refuses: ClassVar[tuple[str, ...]] = ()
    told_by_names: ClassVar[bool] = True
    own_config: ClassVar[bool] = True

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        mapping = self._mapping()
        wanted = metafunc.fixturenames
        if "variant" in wanted:
            metafunc.parametrize(("shape", "variant"), list(self._forms(mapping)))
        elif "shape" in wanted:
            metafunc.parametrize("shape", list(self._shapes(mapping)))
        if "layout" in wanted:
            metafunc.parametrize("layout", list(self._layouts(mapping)))

    def _mapping(self) -> Mapping:
        return load_mapping_file(self.mapping) if isinstance(self.mapping, Path) else load_mapping(self.mapping)

    def _shapes(self, mapping: Mapping) -> Iterator[str]:
        for name in self.shapes or SHAPES:
            config = SHAPES[name]
            if self.shapes is not None or (_says(mapping, config) if mapping.config else is_language_model(config)):
                yield name

    def _forms(self, mapping: Mapping) -> Iterator[object]:
        """Shapes with each variant that stores them in another way than those before it."""
        for shape in self._shapes(mapping):
            seen = set()
            for variant in variants(mapping):
                table = repr(list(bind(mapping, variant, SHAPES[shape], even(4), Rank())))
                if table not in seen:
                    yield pytest.param(shape, variant, id="-".join([shape, *sorted(variant)]))
                seen.add(table)

    def _layouts(self, mapping: Mapping) -> Iterator[str]:
        yield from self.layouts or (["whole"] if mapping.config else LAYOUTS)

    @pytest.fixture
    def loaded(self) -> Mapping:
        return self._mapping()

    # the file

    def test_it_has_rules_and_says_what_it_is(self, loaded: Mapping) -> None:
        assert loaded.rules
        assert all(part.family for part in loaded.parts), "name the family of each part: hf-mine(hf-llama,hf-clip)"
        path = self.mapping if isinstance(self.mapping, Path) else None
        if path is not None:
            assert path.read_text().lstrip().startswith("#"), "the file opens with a sentence that says what it is"

    def test_it_holds_some_shape(self, loaded: Mapping) -> None:
        shapes = [SHAPES[name] for name in self._shapes(loaded)]
        assert shapes
        parts = {"", *(tower for config in shapes for tower in config.towers)}
        assert {rule.scope for rule in loaded.rules} <= parts, "no shape has these parts, so nothing holds their rules"

    def test_variants_are_used_and_apart(self, loaded: Mapping) -> None:
        tags = [tag for group in loaded.variants for tag in group]
        assert len(set(tags)) == len(tags), "a tag stands in two groups"
        asked = {t.lstrip("!") for rule in loaded.rules for a in rule.alternatives for t in a.when}
        assert set(tags) <= asked, f"no rule asks for {sorted(set(tags) - asked)}"

    def test_ignored_names_are_not_bound_as_well(self, loaded: Mapping) -> None:
        bound = [r.stored for r in loaded.rules if loaded.ignores(r.stored.format(l=0, e=0, m=0, n=0))]
        assert not bound

    def test_current_names_have_no_older_spelling_in_them(self, loaded: Mapping) -> None:
        assert not [r.stored for r in loaded.rules if loaded.rename(r.stored) != r.stored]

    # names, cuts and assembly

    def test_export_then_import_gives_the_same_leaves(
        self, loaded: Mapping, shape: str, layout: str, variant: frozenset[str]
    ) -> None:
        """I3 and I4: every atom finds a place, and comes back as the very tensor it was."""
        checkpoint = whole(loaded, SHAPES[shape])
        try:
            there = stored(checkpoint, loaded, variant, LAYOUTS[layout])
        except TopologyError:
            assert layout in self.refuses, f"layout {layout} should be possible for {shape}"
            return
        assert layout not in self.refuses, "it was said to be refused"
        back = canonicalize(there)
        left_out = {key for key in checkpoint.tensors if key not in back.tensors and loaded.omits(key.name)}
        assert back.tensors == {k: t for k, t in checkpoint.tensors.items() if k not in left_out}
        assert not back.replicas, "copies of one source must be recognised as the same leaf"

    def test_no_two_rules_give_one_name(self, loaded: Mapping, shape: str, variant: frozenset[str]) -> None:
        rows = bind(loaded, variant, SHAPES[shape], even(4), Rank())
        twice = [name for name, n in Counter(row.stored for row in rows).items() if n > 1]
        assert not twice

    def test_every_atom_is_bound(self, loaded: Mapping, shape: str, variant: frozenset[str]) -> None:
        """I4 at one rank: what a model has, the mapping stores."""
        config = SHAPES[shape]
        bound = {a for row in bind(loaded, variant, config, even(4), Rank()) for a in row.atoms}
        assert {name for name, _ in loaded.vocabulary.expected(config) if not loaded.omits(name)} <= bound

    def test_no_atom_is_bound_that_the_model_lacks(self, loaded: Mapping, shape: str, variant: frozenset[str]) -> None:
        config = SHAPES[shape]
        bound = {a for row in bind(loaded, variant, config, even(4), Rank()) for a in row.atoms}
        assert bound <= {name for name, _ in loaded.vocabulary.expected(config)}

    def test_cuts_tile_every_axis(self, loaded: Mapping, layout: str) -> None:
        """I5: over all ranks an axis is covered a whole number of times, by parts that meet."""
        for scoped, dimension in loaded.cut.items():
            axis = scoped.rpartition(".")[2]
            size, topology = SHAPES["moe"].size(axis), LAYOUTS[layout]
            count, seen = units(SHAPES["moe"], axis), Counter[tuple[int, int]]()
            if count % topology.degree(dimension):
                continue
            for rank in topology.ranks():
                cut = topology.cut(axis, dimension, size, count, rank)
                seen[cut.lo, cut.hi] += 1
            edges = sorted(seen)
            assert (edges[0][0], edges[-1][1]) == (0, size), axis
            assert all(a[1] == b[0] for a, b in pairwise(edges)), axis
            assert len(set(seen.values())) == 1, axis

    def test_variants_are_told_by_names_and_shapes(self, loaded: Mapping, shape: str, variant: frozenset[str]) -> None:
        if not self.told_by_names:
            return
        there = stored(whole(loaded, SHAPES[shape]), loaded, variant, even(4))
        found = detect([loaded], there.config, there.topology, there.ranks)[1]
        again = stored(whole(loaded, SHAPES[shape]), loaded, found, even(4))
        assert again.ranks == there.ranks

    def test_what_does_not_fit_is_listed(self, loaded: Mapping, shape: str) -> None:
        there = stored(whole(loaded, SHAPES[shape]), loaded, variants(loaded)[0], even(4))
        tensors = dict(there.ranks[Rank()])
        gone = list(tensors)[-1]
        tensors[Key("no.such.tensor")] = tensors.pop(gone)
        with pytest.raises(CoverageError) as caught:
            canonicalize(replace(there, ranks={Rank(): tensors}))
        assert gone.name in str(caught.value)
        assert "no.such.tensor" in str(caught.value)

    # the configuration of a family

    def test_config_table_is_valid(self, loaded: Mapping) -> None:
        if not loaded.config:
            with pytest.raises(MappingError, match="dialect"):
                entries(loaded)
            return
        assert {e.codec for e in entries(loaded)} <= set(CODECS)
        assert bool(loaded.match) == self.own_config, "a family says by `match` which config.json is its own"
        assert self.own_config or "const" not in loaded.config, "it would stand in the whole model's config.json"

    def test_config_json_made_from_nothing_is_its_own(self, loaded: Mapping, shape: str) -> None:
        if not (loaded.config and self.own_config):
            return  # a dialect has no config.json
        table, _ = write_config(SHAPES[shape], None, loaded)
        known = [loaded, *(m for m in families() if m.name != loaded.name)]
        assert family_of(table, known).name == loaded.name
        assert family_of(table, known[::-1]).name == loaded.name, "another family claims it too"

    def test_config_json_says_the_same_architecture_again(self, loaded: Mapping, shape: str) -> None:
        if not loaded.config:
            return  # a dialect has no config.json
        config = SHAPES[shape]
        if config.kind == "text":
            config = replace(config, vocab=64, vocab_rows=64)
        table, _ = write_config(config, None, loaded)
        (tensors,) = stored(whole(loaded, config), loaded, variants(loaded)[0], even(4)).ranks.values()
        back = read_config(table, "config.json", loaded, {key.name: tensor.shape for key, tensor in tensors.items()})
        assert _bare(back) == _bare(_as_said(config, back))
        assert write_config(back, table, loaded) == (table, []), "nothing is to be changed in it"


def _says(mapping: Mapping, config: ModelConfig) -> bool:
    """Whether the family's config.json has words for this architecture."""
    try:
        check_fits(config, mapping)
        write_config(config, None, mapping)
    except (ConfigError, MappingError):
        return False
    return True


def _as_said(config: ModelConfig, back: ModelConfig) -> ModelConfig:
    """The sizes of dense layers are not told by a family that has none; how images are seen, where nothing says it, is as usual."""
    usual = {name: getattr(back, name) for name in SIGHT if getattr(config, name) is None}
    return replace(config, ffn=back.ffn if len(config.moe_layers) == config.layers else config.ffn, **usual)


def _bare(config: ModelConfig) -> ModelConfig:
    """The architecture alone, of all parts: a dtype may never have been stated."""
    towers = {name: _bare(tower) for name, tower in config.towers.items()}
    return replace(config, family="", raw={}, dtype=None, vocab=None, towers=towers)


def is_language_model(config: ModelConfig) -> bool:
    return config.kind == "text" and not config.towers


def whole(mapping: Mapping, config: ModelConfig) -> Checkpoint:
    """A canonical checkpoint whose every atom is a file of its own, none of which exists."""
    tensors: dict[Key, Tensor] = {}
    for name, atom in mapping.vocabulary.expected(config):
        shape = atom.shape(part_of(config, name))
        tensors[Key(name)] = contiguous(Source(name, 0, math.prod(shape) * 2), shape, BF16)
    return Checkpoint(config, tensors, Origin("contract", mapping.name, frozenset(), even(config.layers)))


def stored(checkpoint: Checkpoint, mapping: Mapping, variant: frozenset[str], topology: Topology) -> Stored:
    return localize(checkpoint, Target(mapping, variant, topology, checkpoint.config.vocab_rows), "contract")
