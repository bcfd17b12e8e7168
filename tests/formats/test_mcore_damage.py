"""Megatron-Core checkpoints that are damaged, mixed up or contradict themselves: each is refused, and the culprit named."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptconv.canonicalize import canonicalize
from ckptconv.checkpoint import Checkpoint
from ckptconv.errors import CkptconvError, ConfigError, CoverageError, FormatError, TopologyError, UsageError
from ckptconv.formats import Request
from ckptconv.formats.mcore import Mcore, McoreLoad
from tests.formats.helpers.megatron import Edit, hf_config, make

GOLDEN = Path(__file__).parent.parent / "golden" / "mlm"
MCORE = Mcore()


def load(folder: Path, config: Path | None = None, **request: Any) -> Checkpoint:
    return canonicalize(MCORE.load(folder, McoreLoad(config=config), Request(**request)))


def drop_rank(*rank: int) -> Edit:
    return lambda ranks: ranks.__delitem__(rank)


def in_model(change: Callable[[dict[str, Any]], object], *rank: int) -> Edit:
    return lambda ranks: [change(s["model"]) for r, s in ranks.items() if not rank or r == rank]


def in_saved(change: Callable[[dict[str, Any]], object], *rank: int) -> Edit:
    return lambda ranks: [change(s) for r, s in ranks.items() if not rank or r == rank]


def new_args(saved: dict[str, Any], **changes: Any) -> None:
    saved["args"] = argparse.Namespace(**(vars(saved["args"]) | changes))


def rename_layer(model: dict[str, Any]) -> None:
    for name in [n for n in model if ".layers.1." in n]:
        model[name.replace(".layers.1.", ".layers.5.")] = model.pop(name)


QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
REFUSED: dict[str, tuple[Edit, type[CkptconvError], str]] = {
    "last tensor rank missing": (
        lambda ranks: [drop_rank(1, p, 0)(ranks) for p in (0, 1)], FormatError, "tp: args say 2, the folders are those of 1"
    ),
    "one rank missing": (drop_rank(1, 1, 0), FormatError, "missing: pp 1 tp 1"),
    "first stage missing": (
        lambda ranks: [drop_rank(t, 0, 0)(ranks) for t in (0, 1)], FormatError, "no rank of pipeline stage 0"
    ),
    "args say another tp": (in_saved(lambda s: new_args(s, tensor_model_parallel_size=4)), FormatError, "args say 4"),
    "args say another pp": (in_saved(lambda s: new_args(s, pipeline_model_parallel_size=4)), FormatError, "args say 4"),
    "args say both pp and ep": (in_saved(lambda s: new_args(s, expert_model_parallel_size=2)), FormatError, "two numbers"),
    "args say vpp": (in_saved(lambda s: new_args(s, virtual_pipeline_model_parallel_size=2)), FormatError, "model chunks"),
    "args differ over ranks": (in_saved(lambda s: new_args(s, hidden_size=32), 1, 0, 0), FormatError, "args.hidden_size"),
    "versions differ over ranks": (in_saved(lambda s: s.update(checkpoint_version=2.0), 0, 1, 0), FormatError, "checkpoint_version"),
    "iterations differ over ranks": (in_saved(lambda s: s.update(iteration=8), 0, 1, 0), FormatError, "iteration"),
    "args on some ranks only": (in_saved(lambda s: s.pop("args"), 0, 1, 0), FormatError, "have no args"),
    "args are a dict": (in_saved(lambda s: s.update(args={})), FormatError, "expected an argparse.Namespace"),
    "no model": (in_saved(lambda s: s.update(weights=s.pop("model"))), FormatError, "expected the key model"),
    "model1 without model0": (in_saved(lambda s: s.update(model1=s.pop("model"))), FormatError, "expected the key model"),
    "model is a list": (in_saved(lambda s: s.update(model=[1])), FormatError, "expected a dictionary"),
    "model is empty": (in_saved(lambda s: s.update(model={})), CkptconvError, "layers"),
    "unknown version": (in_saved(lambda s: s.update(checkpoint_version=4.0)), FormatError, "checkpoint_version is 4.0"),
    "version is text": (in_saved(lambda s: s.update(checkpoint_version="3")), FormatError, "checkpoint_version is '3'"),
    "iteration is negative": (in_saved(lambda s: s.update(iteration=-1)), FormatError, "iteration is -1"),
    "layers have a gap": (in_model(rename_layer, 0, 0, 0), FormatError, "there is no layer"),
    "a layer fewer on one rank": (
        in_model(lambda m: [m.pop(n) for n in list(m) if ".layers.1." in n], 1, 0, 0), FormatError, "other ranks of this stage 2"
    ),
    "fewer layers than args say": (
        in_model(lambda m: [m.pop(n) for n in list(m) if ".layers.1." in n]), ConfigError, r"args put \[\[2, 2\]\] layers"
    ),
    "no embedding": (in_model(lambda m: m.pop("embedding.word_embeddings.weight", None)), FormatError, "has no embedding"),
    "a tensor is missing": (in_model(lambda m: m.pop(QKV), 1, 0, 0), CoverageError, "missing: decoder.layers.0.self_attention"),
    "a tensor too many": (in_model(lambda m: m.update(extra=torch.zeros(1)), 0, 1, 0), CoverageError, "unexpected: extra"),
    "a tensor of another shape": (in_model(lambda m: m.update({QKV: torch.zeros(3, 16)}), 1, 0, 0), CoverageError, "has shape"),
    "a tensor of another dtype": (in_model(lambda m: m.update({QKV: m[QKV].bfloat16()}), 1, 0, 0), CoverageError, "fp32"),
    "a norm of another shape": (
        in_model(lambda m: m.update({"decoder.layers.0.mlp.linear_fc1.layer_norm_weight": torch.zeros(3)}), 0, 0, 0), CoverageError, "shape"
    ),
    "not a tensor": (in_model(lambda m: m.update(thing="text"), 0, 0, 0), FormatError, r"thing \(str\)"),
    "wrong hidden size": (in_saved(lambda s: new_args(s, hidden_size=32)), ConfigError, "hidden: .* says 32, the tensors say 16"),
    "wrong ffn": (in_saved(lambda s: new_args(s, ffn_hidden_size=48)), ConfigError, "ffn: .* says 48, the tensors say 24"),
    "wrong heads": (in_saved(lambda s: new_args(s, num_attention_heads=8)), ConfigError, "heads x head_dim"),
    "wrong groups": (in_saved(lambda s: new_args(s, num_query_groups=4)), ConfigError, r"\(heads \+ 2 x kv_heads\)"),
    "wrong padded vocabulary": (in_saved(lambda s: new_args(s, padded_vocab_size=64)), ConfigError, "embedding has 40 rows"),
    "bias that is not there": (in_saved(lambda s: new_args(s, add_qkv_bias=True)), ConfigError, "qkv_bias"),
    "norm that is not there": (in_saved(lambda s: new_args(s, normalization="LayerNorm")), ConfigError, "norm: "),
    "experts that are not there": (in_saved(lambda s: new_args(s, num_experts=4)), ConfigError, "experts"),
    "not gated": (in_saved(lambda s: new_args(s, swiglu=False)), ConfigError, "glu"),
    "unknown norm": (in_saved(lambda s: new_args(s, normalization="Other")), ConfigError, "args.normalization"),
    "layers as text": (in_saved(lambda s: new_args(s, num_layers="4")), ConfigError, "args.num_layers is '4'"),
    "layers negative": (in_saved(lambda s: new_args(s, num_layers=-4)), ConfigError, "args.num_layers is -4"),
    "layers beyond reason": (in_saved(lambda s: new_args(s, num_layers=10**12)), ConfigError, "args.num_layers"),
    "rotary base infinite": (in_saved(lambda s: new_args(s, rotary_base=float("inf"))), ConfigError, "args.rotary_base"),
    "heads not said": (in_saved(lambda s: new_args(s, num_attention_heads=None)), ConfigError, "heads.*--loader.config"),
    "groups not said": (in_saved(lambda s: new_args(s, num_query_groups=None)), ConfigError, "kv_heads.*--loader.config"),
    "latent attention": (in_saved(lambda s: new_args(s, multi_latent_attention=True)), ConfigError, "not supported yet"),
    "multi-token prediction": (in_saved(lambda s: new_args(s, mtp_num_layers=1)), ConfigError, "not supported yet"),
    "zero-centred norms": (in_saved(lambda s: new_args(s, apply_layernorm_1p=True)), ConfigError, "not supported yet"),
    "relative positions": (in_saved(lambda s: new_args(s, position_embedding_type="relative")), ConfigError, "not supported yet"),
    "layout string is a bomb": (
        in_saved(lambda s: new_args(s, pipeline_model_parallel_layout="((E*9999)*9999)*9999")), ConfigError, "layout string"
    ),
    "uneven args for even files": (in_saved(lambda s: new_args(s, decoder_first_pipeline_num_layers=1)), ConfigError, "args put"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_damage_is_refused_and_named(tmp_path: Path, what: str) -> None:
    edit, error, text = REFUSED[what]
    base = make(tmp_path, edit=edit)
    with pytest.raises(error, match=text):
        load(base)


def stray(name: str, content: bytes | None = None) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / "iter_0000007" / name
        path.mkdir(parents=True)
        if content is not None:
            (path / "model_optim_rng.pt").write_bytes(content)

    return act


def copy_rank(to: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copytree(folder / "iter_0000007/mp_rank_00_000", folder / "iter_0000007" / to)


def swap(path: Path, make_one: Callable[[Path], object]) -> None:
    path.unlink()
    make_one(path)


def swap_tracker(folder: Path, make_one: Callable[[Path], object]) -> None:
    swap(folder / "latest_checkpointed_iteration.txt", make_one)


def link_out(folder: Path) -> None:
    hf_config(folder / "elsewhere")
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").symlink_to(folder / "elsewhere" / "config.json")


def truncate(folder: Path) -> None:
    path = folder / "iter_0000007/mp_rank_01_001/model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-500])


FOLDERS: dict[str, tuple[Callable[[Path], object], type[CkptconvError], str]] = {
    "rank folder without file": (stray("mp_rank_02_000"), FormatError, "mp_rank_02_000 has no model_optim_rng.pt"),
    "rank folder with another layout": (copy_rank("mp_rank_02"), FormatError, "different layouts are mixed"),
    "the same rank twice": (copy_rank("mp_rank_000_000"), FormatError, "are the same rank"),
    "rank folder with a name that is none": (copy_rank("mp_rank_00_000.bak"), FormatError, "is not a rank folder"),
    "one rank too many": (copy_rank("mp_rank_02_000"), FormatError, "the folders are those of 3"),
    "empty file": (stray("mp_rank_00_002", b""), FormatError, "mp_rank_00_002"),
    "truncated file": (truncate, FormatError, "mp_rank_01_001"),
    "tracker is text": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("latest"),
        FormatError,
        "'latest'",
    ),
    "tracker names nothing": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("9"),
        FormatError,
        "iteration 9",
    ),
    "tracker leads out": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("../../etc"),
        FormatError,
        "etc",
    ),
    "tracker is a folder": (lambda f: swap_tracker(f, Path.mkdir), FormatError, "not a regular file"),
    "tracker is a pipe": (lambda f: swap_tracker(f, os.mkfifo), FormatError, "not a regular file"),
    "rank file is a pipe": (
        lambda f: swap(f / "iter_0000007/mp_rank_01_001/model_optim_rng.pt", os.mkfifo),
        FormatError,
        "has no",
    ),
    "config of hf leads out": (link_out, FormatError, "leaves the folder"),
    "the same iteration twice": (lambda f: shutil.copytree(f / "iter_0000007", f / "iter_7"), FormatError, "twice"),
    "distributed checkpoint": (
        lambda f: (f / "iter_0000007/metadata.json").write_text("{}"),
        FormatError,
        "--loader mcore-dist",
    ),
    "torch distributed checkpoint": (
        lambda f: (f / "iter_0000007/.metadata").write_bytes(b""),
        FormatError,
        "--loader mcore-dist",
    ),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_folders_that_are_not_those_of_a_checkpoint_are_refused(tmp_path: Path, what: str) -> None:
    act, error, text = FOLDERS[what]
    base = make(tmp_path)
    act(base)
    with pytest.raises(error, match=text):
        load(base)


def test_second_number_that_cannot_be_told_is_refused(tmp_path: Path) -> None:
    """Without args, a pipeline has the embedding on its first stage only and expert ranks all have it."""

    def no_embedding(ranks: dict[tuple[int, ...], dict[str, Any]]) -> None:
        for saved in ranks.values():
            saved["model"].pop("embedding.word_embeddings.weight", None)

    base = make(tmp_path, args={"absent": True}, edit=no_embedding)
    with pytest.raises(FormatError, match="cannot be told"):
        load(base, hf_config(tmp_path / "config"))


def test_without_args_or_config_the_heads_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no args.*heads.*--loader\.config"):
        load(make(tmp_path, args={"absent": True}))


@pytest.mark.parametrize("iteration", ["seven", "-1", "1e3", "8"])
def test_iteration_that_is_not_there_is_refused(tmp_path: Path, iteration: str) -> None:
    with pytest.raises((UsageError, FormatError), match="iteration"):
        load(make(tmp_path, tp=1, pp=1), iteration=iteration)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 32}, {"num_hidden_layers": 3}, {"intermediate_size": 25}, {"num_attention_heads": 2},
        {"num_key_value_heads": 4}, {"head_dim": 4}, {"vocab_size": 41}, {"model_type": "unheard-of"}, {"attention_bias": True},
    ],
)  # fmt: skip
def test_config_that_contradicts_the_tensors_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, TopologyError)):
        load(make(tmp_path / "src"), hf_config(tmp_path / "config", **change))
