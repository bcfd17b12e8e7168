"""Hostile and damaged Hugging Face folders: each is refused with the right class, naming the file and what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptconv.canonicalize import canonicalize
from ckptconv.checkpoint import Stored
from ckptconv.errors import CkptconvError, ConfigError, CoverageError, FormatError
from ckptconv.formats import Request
from ckptconv.formats.hf import Hf, HfLoad

INDEX = "model.safetensors.index.json"


def load(path: Path) -> Stored:
    return Hf().load(path, HfLoad(), Request())


def change(folder: Path, name: str, **values: Any) -> None:
    table = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**table, **values}))


def repoint(folder: Path, target: object) -> None:
    index = folder / INDEX
    table = json.loads(index.read_text())
    table["weight_map"]["lm_head.weight"] = target
    index.write_text(json.dumps(table))


def edit_index(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        index = folder / INDEX
        table = json.loads(index.read_text())
        edit(table)
        index.write_text(json.dumps(table))

    return act


def edit_shard(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        state = load_file(folder / SHARD)
        edit(state)
        save_file(state, folder / SHARD, {"format": "pt"})

    return act


SHARD = "model-00001-of-00003.safetensors"
OUTSIDE = "outside.safetensors"


def instead(folder: Path, name: str, put: Callable[[Path], object]) -> None:
    (folder / name).unlink()
    put(folder / name)


def link_out(folder: Path, name: str = SHARD, absolute: bool = True) -> None:
    target = folder.parent / OUTSIDE
    (folder / name).replace(target)
    (folder / name).symlink_to(target.resolve() if absolute else f"../{OUTSIDE}")


def truncate(folder: Path, keep: float) -> None:
    os.truncate(folder / SHARD, int((folder / SHARD).stat().st_size * keep))


def double_entry(folder: Path) -> None:
    """One tensor, two shards: JSON readers that do not look take the last."""
    index = folder / INDEX
    index.write_text(index.read_text().replace('"weight_map": {', '"weight_map": {"lm_head.weight": "x.safetensors",'))


Damage = tuple[Callable[[Path], object], type[CkptconvError], str]
HOSTILE: dict[str, Damage] = {
    "name escapes upward": (lambda f: repoint(f, "../x.safetensors"), FormatError, "lm_head.weight"),
    "name escapes far upward": (lambda f: repoint(f, "../../../../etc/passwd"), FormatError, "plain file name"),
    "name is absolute": (lambda f: repoint(f, "/etc/passwd"), FormatError, "plain file name"),
    "name is a folder up": (lambda f: repoint(f, ".."), FormatError, "plain file name"),
    "name is the folder": (lambda f: repoint(f, "."), FormatError, "plain file name"),
    "name is empty": (lambda f: repoint(f, ""), FormatError, "plain file name"),
    "name in a folder below": (lambda f: repoint(f, "sub/x.safetensors"), FormatError, "plain file name"),
    "name with a backslash": (lambda f: repoint(f, "..\\x.safetensors"), FormatError, "plain file name"),
    "name with a zero byte": (lambda f: repoint(f, "x\0.safetensors"), FormatError, "plain file name"),
    "name is half a surrogate": (lambda f: repoint(f, "\ud800.safetensors"), FormatError, "plain file name"),
    "name is far too long": (lambda f: repoint(f, "x" * 9999 + ".safetensors"), FormatError, "plain file name"),
    "name is a number": (lambda f: repoint(f, 5), FormatError, "plain file name"),
    "name is null": (lambda f: repoint(f, None), FormatError, "plain file name"),
    "name is a pickle": (lambda f: repoint(f, "model.bin"), FormatError, ".safetensors"),
    "name is the config": (lambda f: repoint(f, "config.json"), FormatError, ".safetensors"),
    "shard links outside": (link_out, FormatError, "leaves the folder"),
    "shard links outside relatively": (lambda f: link_out(f, absolute=False), FormatError, "leaves the folder"),
    "index links outside": (lambda f: link_out(f, INDEX), FormatError, "leaves the folder"),
    "config links outside": (lambda f: link_out(f, "config.json"), FormatError, "leaves the folder"),
    "side file links outside": (lambda f: (f / "tokenizer.json").symlink_to("/etc/passwd"), FormatError, "tokenizer.json"),
    "shard links to itself": (lambda f: instead(f, SHARD, lambda p: p.symlink_to(SHARD)), FormatError, SHARD),
    "shard links to nothing": (lambda f: instead(f, SHARD, lambda p: p.symlink_to("gone")), FormatError, SHARD),
    "shard is a folder": (lambda f: instead(f, SHARD, Path.mkdir), FormatError, SHARD),
    "shard is a pipe": (lambda f: instead(f, SHARD, os.mkfifo), FormatError, SHARD),
    "side file is a pipe": (lambda f: os.mkfifo(f / "tokenizer.json"), FormatError, "tokenizer.json"),
    "config is a pipe": (lambda f: instead(f, "config.json", os.mkfifo), FormatError, "config.json"),
    "shard is missing": (lambda f: (f / SHARD).unlink(), CoverageError, SHARD),
    "shard is empty": (lambda f: truncate(f, 0), FormatError, SHARD),
    "shard has half a header": (lambda f: truncate(f, 0.01), FormatError, SHARD),
    "shard is cut": (lambda f: truncate(f, 0.9), FormatError, SHARD),
    "shard is another's": (lambda f: shutil.copy(f / SHARD.replace("1", "2", 1), f / SHARD), CoverageError, SHARD),
    "tensor in two shards": (
        lambda f: edit_shard(lambda s: s.update({"lm_head.weight": torch.zeros(61, 32)}))(f), CoverageError, "lm_head.weight is in"
    ),
    "tensor not in the index": (
        edit_index(lambda t: t["weight_map"].pop("lm_head.weight")), CoverageError, "does not list it"
    ),
    "index lists what is nowhere": (
        edit_index(lambda t: t["weight_map"].update({"x.weight": SHARD})), CoverageError, f"x.weight is not in {SHARD}"
    ),
    "index has no map": (edit_index(lambda t: t.pop("weight_map")), FormatError, "weight_map"),
    "index has an empty map": (edit_index(lambda t: t.update(weight_map={})), FormatError, "weight_map"),
    "index map is a list": (edit_index(lambda t: t.update(weight_map=[1])), FormatError, "weight_map"),
    "index is not JSON": (lambda f: (f / INDEX).write_text("{"), FormatError, "index.json"),
    "index names a tensor twice": (lambda f: double_entry(f), FormatError, "twice"),
    "index is gone": (lambda f: (f / INDEX).unlink(), FormatError, SHARD),
    "index links to nothing": (
        lambda f: instead(f, INDEX, lambda p: p.symlink_to("gone")),
        FormatError, "index.json"
    ),
    "no weights": (lambda f: list(map(Path.unlink, f.glob("model*"))), FormatError, "no weights"),
    "tensor of another shape": (
        edit_shard(lambda s: s.update({"model.embed_tokens.weight": torch.zeros(61, 31)})), CoverageError, "(61, 31)"
    ),
    "embedding of another length": (
        edit_shard(lambda s: s.update({"model.embed_tokens.weight": torch.zeros(60, 32)})), ConfigError, "60 rows"
    ),
    "embedding without shape": (
        edit_shard(lambda s: s.update({"model.embed_tokens.weight": torch.zeros(())})), CoverageError, "embed_tokens"
    ),
    "config says more layers": (lambda f: change(f, "config.json", num_hidden_layers=3), CoverageError, "layers.2."),
    "config says fewer layers": (lambda f: change(f, "config.json", num_hidden_layers=1), CoverageError, "layers.1."),
    "config says 8000 layers": (lambda f: change(f, "config.json", num_hidden_layers=8000), ConfigError, "21 tensors"),
    "config says other heads": (lambda f: change(f, "config.json", num_key_value_heads=4), CoverageError, "k_proj"),
    "config says tied": (lambda f: change(f, "config.json", tie_word_embeddings=True), CkptconvError, ""),
    "config says biased": (lambda f: change(f, "config.json", attention_bias=True), CoverageError, "q_proj.bias"),
    "config is of another family": (lambda f: change(f, "config.json", model_type="qwen3"), CoverageError, "q_norm"),
    "config is quantised": (lambda f: change(f, "config.json", quantization_config={}), ConfigError, "quantis"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("nope"), FormatError, "config.json"),
    "config is huge": (lambda f: os.truncate(f / "config.json", 10**11), FormatError, "config.json"),
}  # fmt: skip
TIED = "config says tied"  # the head is compared with the embedding while it streams: not an error of loading


@pytest.mark.parametrize("damage", [name for name in HOSTILE if name != TIED])
def test_damage_is_refused_by_name(damage: str, hf_copy: Callable[[str], Path]) -> None:
    act, kind, named = HOSTILE[damage]
    source = hf_copy("sharded")
    act(source)
    with pytest.raises(CkptconvError) as info:
        canonicalize(load(source))
    assert isinstance(info.value, kind)
    assert named in str(info.value)


def test_tied_by_mistake_leaves_two_tensors_to_compare(hf_copy: Callable[[str], Path]) -> None:
    HOSTILE[TIED][0](source := hf_copy("sharded"))
    (replica,) = canonicalize(load(source)).replicas
    assert not np.array_equal(replica.kept.numpy(), replica.copy.numpy())


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("canary",)


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ([1], "list"),
        ({"state_dict": {"x": torch.zeros(2)}}, "state_dict"),
        ({"step": 5, "x": torch.zeros(2)}, "step"),
        ({0: torch.zeros(2)}, "0"),
        ({"x": Canary()}, ""),
    ],
    ids=["list", "nested", "number", "numbered", "canary"],
)
def test_bin_of_anything_but_tensors_is_refused(
    state: object, named: str, hf_copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = hf_copy("Llama")
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match=r"pytorch_model.bin") as info:
        load(source)
    assert named in str(info.value)
    assert not (tmp_path / "canary").exists()
