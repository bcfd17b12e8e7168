"""Mapping files: what is refused, and what extending, using and replacing do."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptconv.errors import MappingError
from ckptconv.mapping import Apply, Expr, Mapping
from ckptconv.mapping_files import chosen, load_mapping, load_mapping_file, mapping_paths

EXTRA = """
extends = "hf-llama"
[vocabulary.tensors]
"layers.{l}.attn.scale" = { axes = ["head_dim"] }
[[block]]
[block.tensors]
"model.layers.{l}.self_attn.scale" = "layers.{l}.attn.scale"
"lm_head.weight" = false
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_every_shipped_mapping_is_valid_and_has_rules() -> None:
    assert {"hf-llama", "hf-mixtral", "mcore", "mcore-dist", "mcore-local", "megatron-legacy"} <= set(mapping_paths())
    for name in mapping_paths():
        assert load_mapping(name).rules


def test_own_file_adds_replaces_and_removes_rules(tmp_path: Path) -> None:
    mapping = load_mapping_file(write(tmp_path, EXTRA))
    names = [rule.stored for rule in mapping.rules]
    assert "model.layers.{l}.self_attn.scale" in names
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names
    assert "layers.{l}.attn.scale" in mapping.vocabulary.atoms
    assert "layers.{l}.attn.scale" not in load_mapping("hf-llama").vocabulary.atoms


def test_own_file_stands_for_what_it_extends(tmp_path: Path) -> None:
    mapping = load_mapping_file(write(tmp_path, EXTRA))
    assert chosen("hf-llama", [mapping]) is mapping
    assert chosen("hf-qwen2", [mapping]) is load_mapping("hf-qwen2")


def test_use_takes_another_mappings_rules_under_prefixes(tmp_path: Path) -> None:
    text = 'extends = "hf-llama"\n[[block]]\nuse = "mcore"\nstored = "model.inner."\n'
    names = [rule.stored for rule in load_mapping_file(write(tmp_path, text)).rules]
    assert "model.inner.decoder.layers.{l}.self_attention.linear_qkv.weight" in names


def rules(mapping: Mapping) -> dict[str, Expr]:
    return {rule.stored: rule.alternatives[0].expr for rule in mapping.rules}


def test_stack_makes_an_index_the_outermost_axis_of_every_row(tmp_path: Path) -> None:
    separate, stacked = rules(load_mapping("mcore-dist")), rules(load_mapping("mcore-dist-stacked"))
    assert [name.replace(".{l}", "") for name in separate] == list(stacked)
    for name, expr in separate.items():
        layered = Apply("stack", {}, (expr,), "l") if "{l}" in name else expr
        assert stacked[name.replace(".{l}", "")] == layered


def test_rows_of_a_stacked_mapping_are_replaced_by_either_name(tmp_path: Path) -> None:
    text = """
extends = "mcore-dist-stacked"
[[block]]
[block.tensors]
"decoder.layers.{l}.mlp.router.weight" = false
"decoder.layers.mlp.linear_fc2.bias" = false
"decoder.layers.{l}.mlp.linear_fc2.weight" = { permute = "layers.{l}.mlp.down.weight", order = [1, 0] }
"decoder.layers.{l}.mlp.gate" = { is = "layers.{l}.moe.router.weight", when = "moe" }
"""
    found = rules(load_mapping_file(write(tmp_path, text)))
    assert not {"decoder.layers.mlp.router.weight", "decoder.layers.mlp.linear_fc2.bias"} & set(found)
    turned = Apply("permute", {"order": [1, 0]}, ("layers.{l}.mlp.down.weight",))
    assert found["decoder.layers.mlp.linear_fc2.weight"] == Apply("stack", {}, (turned,), "l")
    assert found["decoder.layers.mlp.gate"] == Apply("stack", {}, ("layers.{l}.moe.router.weight",), "l")


def test_stacks_nest_in_the_order_of_the_list_whoever_adds_them(tmp_path: Path) -> None:
    once = 'extends = "mcore-dist-singleton"\nstack = ["l", "e"]\n'
    (tmp_path / "layers.toml").write_text('extends = "mcore-dist-singleton"\nstack = "l"\n')
    added = load_mapping_file(write(tmp_path, 'extends = "layers"\nstack = ["e"]\n'))
    assert added.stack == ("l", "e")
    inner = Apply("stack", {}, ("layers.{l}.moe.{e}.down.weight",), "e")
    for mapping in (added, load_mapping_file(write(tmp_path, once))):
        assert rules(mapping)["decoder.layers.mlp.experts.experts.linear_fc2.weight"] == Apply(
            "stack", {}, (inner,), "l"
        )


def test_false_takes_a_dimension_of_the_parent_away(tmp_path: Path) -> None:
    text = 'extends = "mcore"\n[cut]\ntp = ["positions"]\netp = false\n[deal]\npp = false\n'
    mapping = load_mapping_file(write(tmp_path, text))
    assert mapping.cut == {"vocab": "tp", "q": "tp", "kv": "tp", "ffn": "tp", "positions": "tp"}
    assert mapping.deal == {"e": "ep"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends = [", "cannot be read"),
        ('extends = "mcore-dist"\nstack = ["z"]', "stack names an unknown variable 'z'"),
        ('extends = "mcore-dist"\nstack = 1', "stack is 1, expected a name or a list of names"),
        ('extends = "mcore"\nstack = ["e"]', "linear_fc1.weight{e}' cannot be stacked over e"),
        (
            'extends = "mcore-dist-stacked"\n[[block]]\n[block.tensors]\n"x.{l}" = "layers.{l}.attn_norm.weight"\nx = "norm.weight"',
            "'x' is written twice",
        ),
        (
            'extends = "hf-llama"\nstack = ["l"]\n[[block]]\nuse = "hf-mistral"\n',
            "model.norm.weight: 2 rows have this name",
        ),
        ("", "must say which one it extends"),
        ('extends = "hf-nothing"', "extends 'hf-nothing', which is not known"),
        ('extends = "mine"', "circle|not known"),
        ('extends = "hf-llama"\nextend = 1', "unknown top-level keys"),
        ('extends = "hf-llama"\n[[block]]\n[block.tensor]\nx = "norm.weight"', "unknown keys"),
        ('extends = "hf-llama"\n[[block]]\n[block.tensors]\nx = "no.atom"', "no atom 'no.atom'"),
        ('extends = "hf-llama"\n[[block]]\n[block.tensors]\nx = "layers.{l}.attn.q.weight"', "nothing runs over"),
        (
            'extends = "hf-llama"\n[[block]]\n[block.tensors]\nx = { is = "norm.weight", when = "sometimes" }',
            "unknown tag 'sometimes'",
        ),
        (
            'extends = "hf-llama"\n[[block]]\n[block.tensors]\nx = { is = "norm.weight", on = "moon" }',
            "unknown role 'moon'",
        ),
        ('extends = "hf-llama"\n[[block]]\n[block.tensors]\nx = { glue = ["norm.weight"] }', "exactly one of"),
        (
            'extends = "hf-llama"\n[[block]]\n[block.tensors]\nx = { concat = ["norm.weight"], sideways = 1 }',
            "concat has no",
        ),
        ('extends = "hf-llama"\n[[block]]\n[block.tensors]\nx = { stack = "norm.weight" }', "needs `over`"),
        ('extends = "hf-llama"\n[[block]]\n[block.tensors]\nx = 3', "expected an atom's name or a table"),
        ('extends = "hf-llama"\n[cut]\ntp = ["girth"]', "unknown axis 'girth'"),
        ('extends = "hf-llama"\n[deal]\npp = "z"', "unknown variable 'z'"),
        ('extends = "hf-llama"\n[excess]\nkv = "maybe"', "not one of assembled, replicate"),
        ('extends = "hf-llama"\n[vocabulary.tensors]\nx = { axes = ["girth"] }', "unknown axes"),
        ('extends = "hf-llama"\n[vocabulary.tensors]\nx = ["hidden"]', "must be a table"),
    ],
)
def test_wrong_file_is_refused_with_its_fault(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(MappingError, match=message):
        load_mapping_file(write(tmp_path, text))
