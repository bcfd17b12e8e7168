"""docs/mapping-files.md says all that the code knows, and what it says is true."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from ckptconv import mapping_files
from ckptconv.canonicalize import canonicalize
from ckptconv.config import AXES, TAGS, ModelConfig, units
from ckptconv.dialect import variants
from ckptconv.dtypes import DTYPES
from ckptconv.errors import CoverageError, MappingError, TopologyError
from ckptconv.huggingface.config_table import CODECS
from ckptconv.leaves import contiguous
from ckptconv.mapping import BLOCK_KEYS, CONDITIONS, PARAMETERS
from ckptconv.mapping_files import TOP_LEVEL, load_mapping, load_mapping_file
from ckptconv.ops import OPS
from ckptconv.source import Source
from ckptconv.tensor import Tensor
from ckptconv.testing.mapping_contract import LAYOUTS, SHAPES, stored, whole
from ckptconv.topology import ROLES

TEXT = (Path(__file__).parents[2] / "docs" / "mapping-files.md").read_text()
OPS_SECTION = TEXT.partition("\n## Ops\n")[2].partition("\n## ")[0]
EXAMPLES = re.findall(r"^```toml\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
ROW = re.compile(r"^\| (\w+) \| ([^|`]*) \| (\[\[.*\]) \| (\[.*\]) \|$", re.MULTILINE)
KNOWN = {
    "top-level keys": set(TOP_LEVEL),
    "keys of blocks": set(BLOCK_KEYS),
    "conditions": set(CONDITIONS),
    "ops": {"is", *OPS},
    "parameters of ops": {p for row in PARAMETERS.values() for p in row},
    "roles": set(ROLES),
    "tags": set(TAGS),
    "axes": set(AXES),
    "codecs": set(CODECS),
    "fields": {f.name for f in fields(ModelConfig)},
    "keys of an atom": {"axes", "when", "dtype"},
    "tables": {"vars", "tensors", "[config.default]", "[config.const]", "[vocabulary.tensors]", "[vocabulary.vars]"},
    "values": {"false", '"assembled"', '"replicate"', "<axis>_rows", "{l}", "{e}", "copy = true"},
}


@pytest.mark.parametrize("kind", KNOWN)
def test_everything_the_code_knows_is_told(kind: str) -> None:
    quoted = set(re.findall(r"`([^`\n]+)`", TEXT))
    assert not KNOWN[kind] - quoted


def test_parameters_stand_with_their_op() -> None:
    for op, parameters in PARAMETERS.items():
        row = re.findall(rf"^\| `{op}` \|.*$", OPS_SECTION, re.MULTILINE)[0]
        assert all(f"`{p}`" in row for p in parameters), row


def lazy(values: object, path: Path) -> Tensor:
    array = np.array(values, np.int32)
    path.write_bytes(array.tobytes())
    return contiguous(Source(str(path), 0, array.nbytes), array.shape, DTYPES["int32"])


def test_op_examples_are_true(tmp_path: Path) -> None:
    rows = ROW.findall(TEXT)
    assert {op for op, *_ in rows} == set(OPS)
    for op, parameters, operands, result in rows:
        params = tomllib.loads(parameters.replace("] ", "]\n"))
        made = OPS[op](**{k: tuple(v) if isinstance(v, list) else v for k, v in params.items()})
        tensors = [lazy(v, tmp_path / f"{op}{i}") for i, v in enumerate(json.loads(operands))]
        assert made.forward(tensors).numpy().tolist() == json.loads(result), (op, parameters)


def test_units_are_as_told() -> None:
    config = SHAPES["moe"]
    table = TEXT.partition("| axis | entries | units |\n")[2].partition("\n\n")[0]
    told = {a: row.split("|")[3].strip() for row in table.splitlines() for a in re.findall(r"`(\w+)`", row)}
    assert set(told) == AXES
    for axis, words in told.items():
        expected = {"each": config.size(axis), "heads": config.heads, "key/value heads": config.kv_heads}
        assert units(config, axis) == expected[words], axis


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_is_a_valid_mapping_that_keeps_every_leaf(number: int, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(EXAMPLES[number])
    mapping = mapping_files._build("mine", path, ())
    kept = 0
    for layout in ("whole", "tp2"):
        for shape in ("dense", "moe", "qk-norm"):
            for variant in variants(mapping) if mapping.rules else ():
                checkpoint = whole(mapping, SHAPES[shape])
                try:
                    there = stored(checkpoint, mapping, variant, LAYOUTS[layout])
                except (CoverageError, TopologyError):
                    continue
                assert canonicalize(there).tensors == checkpoint.tensors
                kept += 1
    assert kept or not mapping.rules


def test_wrapper_example_prefixes_every_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(next(e for e in EXAMPLES if "use =" in e))
    local = load_mapping("mcore-local")
    mapping = mapping_files._build("mine", path, ())
    assert [r.stored for r in mapping.rules] == ["module." + r.stored for r in local.rules]
    assert (mapping.cut, mapping.deal, mapping.excess) == (local.cut, local.deal, local.excess)


def test_cut_example_is_that_of_megatron_core() -> None:
    raw = tomllib.loads(next(e for e in EXAMPLES if e.startswith("[cut]")))
    mcore = load_mapping("mcore")
    assert {axis: d for d, axes in raw["cut"].items() for axis in axes} == mcore.cut
    assert {v: d for d, v in raw["deal"].items()} == mcore.deal


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{ concat = [{ is = "norm.weight", when = "glu" }] }', "when stands on an operand"),
        ('{ is = "norm.weight", when = true }', "expected a name or a list of names"),
        ('{ is = "norm.weight", on = [1] }', "expected a name or a list of names"),
        ('{ is = "norm.weight", axis = 1 }', "exactly one of"),
        ('{ stack = "norm.weight", over = "z" }', "unknown variable"),
    ],
)
def test_condition_that_would_be_lost_is_refused(row: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "hf-llama"\n[[block]]\n[block.tensors]\n"x" = {row}\n')
    with pytest.raises(MappingError, match=message):
        load_mapping_file(path)


@pytest.mark.parametrize("key", ['on = "embed"', 'tensors = { x = "norm.weight" }'])
def test_block_that_uses_a_mapping_has_nothing_else(key: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "hf-llama"\n[[block]]\nuse = "mcore"\n{key}\n')
    with pytest.raises(MappingError, match="cannot have"):
        load_mapping_file(path)
