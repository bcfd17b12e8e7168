"""Towers: atoms and rules of the parts of a larger model, on the first stage alone, and names whose prefix varies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ckptconv.bind import bind
from ckptconv.canonicalize import canonicalize
from ckptconv.checkpoint import Checkpoint, Key
from ckptconv.config import ModelConfig, projector_config
from ckptconv.dialect import detect
from ckptconv.errors import ConfigError, CoverageError, MappingError, TopologyError, UsageError
from ckptconv.mapping import Mapping
from ckptconv.mapping_files import load_mapping, load_mapping_file, with_parts
from ckptconv.parts import combine, extract, parts_of, swap
from ckptconv.testing.mapping_contract import DENSE, stored, whole
from ckptconv.topology import Rank, even

CLIP = ModelConfig(
    "hf-clip", 2, 64, 8, 8, 8, 96, 0, kind="vision", norm="layernorm", glu=False, learned_positions=True, max_positions=17,
    pre_norm=True, class_tokens=1, patch=4, image=16, qkv_bias=True, out_bias=True, mlp_bias=True, projection=24,
)  # fmt: skip
PROJECTOR = projector_config(64, 80, DENSE.hidden, mlp_bias=True)
VLM = replace(DENSE, towers={"vision": CLIP, "projector": PROJECTOR})
LAYOUTS = {"whole": even(4), "tp2": even(4, tp=2), "tp4-pp2": even(4, tp=4, pp=2), "pp2-vpp2": even(4, pp=2, vpp=2)}


@pytest.fixture(scope="module")
def mcore() -> Mapping:
    return load_mapping("mcore-vlm")


@pytest.fixture
def model(mcore: Mapping) -> Checkpoint:
    return whole(mcore, VLM)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["mcore-vlm", "mcore-vlm-local"])
def test_export_then_import_gives_the_same_leaves(name: str, layout: str) -> None:
    mapping = load_mapping(name)
    config = replace(VLM, towers={"vision": replace(CLIP, final_norm=False, projection=0), "projector": PROJECTOR})
    model = whole(mapping, config)
    back = canonicalize(stored(model, mapping, frozenset({"experts_te"}), LAYOUTS[layout]))
    assert back.tensors == model.tensors
    assert not back.replicas


def test_towers_stand_whole_on_the_first_stage_and_are_cut_like_the_rest(mcore: Mapping) -> None:
    topology = even(4, tp=2, pp=2)
    tables = {r: {b.stored: b.shape for b in bind(mcore, frozenset(), VLM, topology, r)} for r in topology.ranks()}
    first, other = tables[Rank(tp=1, etp=1)], tables[Rank(pp=1)]
    assert not [name for name in other if name.startswith("vision")]
    assert {int(name.split(".")[3]) for name in first if name.startswith("vision_model.decoder")} == {0, 1}
    assert first["vision_model.decoder.layers.1.self_attention.linear_qkv.weight"] == (3 * 64 // 2, 64)
    assert first["vision_projection.encoder.linear_fc1.weight"] == (40, 64)
    assert first["vision_model.class_token"] == (1, 1, 64)


def test_what_a_dialect_has_no_place_for_is_left_out_and_told(mcore: Mapping, model: Checkpoint) -> None:
    there = stored(model, mcore, frozenset({"experts_te"}), even(4))
    (note,) = there.extras.notes
    assert all(name in note for name in ("vision.norm.weight", "vision.norm.bias", "vision.projection.weight"))
    back = canonicalize(there)
    lost = {key.name for key in model.tensors} - {key.name for key in back.tensors}
    assert lost == {"vision.norm.weight", "vision.norm.bias", "vision.projection.weight"}


def test_what_no_mapping_omits_is_never_left_out(mcore: Mapping, model: Checkpoint) -> None:
    tensors = {**model.tensors, Key("vision.layers.7.attn_norm.weight"): model.tensors[Key("vision.pre_norm.weight")]}
    with pytest.raises(CoverageError, match=r"no place for: vision\.layers\.7"):
        stored(replace(model, tensors=tensors), mcore, frozenset({"experts_te"}), even(4))


def test_a_tower_that_cannot_be_cut_is_refused_by_axis(mcore: Mapping) -> None:
    with pytest.raises(TopologyError, match=r"vision_model.*'q' has 6 units"):
        list(
            bind(
                mcore,
                frozenset(),
                replace(VLM, towers={"vision": replace(CLIP, heads=6, kv_heads=6)}),
                even(4, tp=4),
                Rank(),
            )
        )


def test_parts_are_taken_out_and_joined_again(model: Checkpoint) -> None:
    parts = {part: extract(model, part) for part in parts_of(model)}
    assert parts_of(model) == ("lm", "vision", "projector")
    assert parts["vision"].config == CLIP
    assert Key("layers.0.attn.q.weight") in parts["vision"].tensors
    joined = combine(parts["lm"], parts["vision"], parts["projector"])
    assert joined.tensors == model.tensors
    assert joined.config == model.config
    assert swap(model, "vision", model).tensors == model.tensors


def test_parts_that_do_not_fit_are_refused_with_both_numbers(model: Checkpoint) -> None:
    parts = {part: extract(model, part) for part in parts_of(model)}
    narrow = replace(parts["projector"], config=replace(PROJECTOR, hidden=48))
    with pytest.raises(ConfigError, match=f"gives 48 entries.*{DENSE.hidden}"):
        combine(parts["lm"], parts["vision"], narrow)
    wide = replace(parts["projector"], config=replace(PROJECTOR, inputs=100))
    with pytest.raises(ConfigError, match=r"takes 100 entries.*64 \(256 with pixel shuffle\)"):
        combine(parts["lm"], parts["vision"], wide)
    with pytest.raises(ConfigError, match="what is given as vision is a language model"):
        combine(parts["lm"], parts["lm"], None)
    with pytest.raises(UsageError, match="lm, vision, projector"):
        extract(model, "tower")


MINE = """# A tower whose names may have a prefix.
prefixes = ["", "tower."]
extends = "mcore-vision"
"""


def test_a_prefix_is_told_from_the_names(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MINE)
    mapping = load_mapping_file(tmp_path / "mine.toml")
    for prefix in ("", "tower."):
        there = stored(whole(mapping, CLIP), mapping, frozenset({f"mine:{prefix}"}), even(2))
        assert all(key.name.startswith(prefix) for key in there.ranks[Rank()])
        assert detect([mapping], CLIP, there.topology, there.ranks)[1] == frozenset({f"mine:{prefix}"})


OPEN = """# A model whose language model config.json names.
extends = "mcore-vision"
[[block]]
use = "hf-*"
stored = "lm."
config = "text_config"
"""


def test_open_parts_are_chosen_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptconv import mapping_files

    path = tmp_path / "mine-open.toml"
    path.write_text(OPEN)
    known = mapping_files.mapping_paths()
    monkeypatch.setattr(mapping_files, "mapping_paths", lambda: {**known, "mine-open": ("test", path)})
    mapping = load_mapping("mine-open")
    assert [part.config for part in mapping.parts] == ["text_config"]
    chosen = with_parts(mapping, ["hf-qwen3"])
    assert chosen.name == "mine-open(hf-qwen3)"
    assert "lm.model.layers.{l}.self_attn.q_norm.weight" in {rule.stored for rule in chosen.rules}
    with pytest.raises(MappingError, match="cannot be mcore, only hf-"):
        with_parts(mapping, ["mcore"])
    with pytest.raises(MappingError, match="has 1 parts to choose, 2 are given"):
        with_parts(mapping, ["hf-qwen3", "hf-clip"])


def test_an_old_spelling_may_stand_at_the_beginning_only(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('# Old names.\nextends = "mcore-vision"\n[aliases]\n"^old." = "new.old."\n')
    mapping = load_mapping_file(tmp_path / "mine.toml")
    assert mapping.rename("old.a") == "new.old.a"
    assert mapping.rename("new.old.a") == "new.old.a"
