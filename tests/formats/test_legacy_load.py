"""Reading legacy Megatron-LM rank files: every order of QKV rows and every spelling, against plain slices and a golden."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ckptconv.canonicalize import canonicalize  # noqa: E402
from ckptconv.checkpoint import Checkpoint, Key  # noqa: E402
from ckptconv.errors import CkptconvError, ConfigError, FormatError, UsageError  # noqa: E402
from ckptconv.formats import Request  # noqa: E402
from ckptconv.formats.legacy import Legacy, LegacyLoad  # noqa: E402
from ckptconv.formats.mcore import Mcore  # noqa: E402
from ckptconv.pipeline import Job  # noqa: E402
from ckptconv.registry import make_options  # noqa: E402
from ckptconv.upgrade import prepare_upgrade  # noqa: E402

GOLDEN = Path(__file__).parent.parent / "golden" / "mlm"
LEGACY = Legacy()
LAYERS, HIDDEN, HEADS, DIM, FFN, ROWS = 2, 16, 4, 4, 24, 40
Saved = dict[str, Any]


def weights() -> dict[str, Any]:
    """A GPT-2-like model: learned positions, layer norms and biases everywhere, tied."""
    g = torch.Generator().manual_seed(2)

    def new(*shape: int) -> Any:
        return torch.randn(*shape, generator=g)

    out = {"embed.weight": new(ROWS, HIDDEN), "positions.weight": new(32, HIDDEN)}
    out |= {"norm.weight": new(HIDDEN), "norm.bias": new(HIDDEN)}
    for layer in range(LAYERS):
        p = f"layers.{layer}."
        out |= {p + f"{n}.{x}": new(HIDDEN) for n in ("attn_norm", "mlp_norm") for x in ("weight", "bias")}
        for x in ("q", "k", "v"):
            out |= {p + f"attn.{x}.weight": new(HEADS * DIM, HIDDEN), p + f"attn.{x}.bias": new(HEADS * DIM)}
        out |= {p + "attn.o.weight": new(HIDDEN, HEADS * DIM), p + "attn.o.bias": new(HIDDEN)}
        out |= {p + "mlp.up.weight": new(FFN, HIDDEN), p + "mlp.up.bias": new(FFN)}
        out |= {p + "mlp.down.weight": new(HIDDEN, FFN), p + "mlp.down.bias": new(HIDDEN)}
    return out


def order(version: float, q: Any, k: Any, v: Any, heads: int) -> Any:
    """One rank's query, key and value rows in the order of a checkpoint_version."""
    parts = torch.stack([x.reshape(heads, DIM, *x.shape[1:]) for x in (q, k, v)])  # [3, heads, d, …]
    if version >= 2:
        parts = parts.transpose(0, 1)  # [heads, 3, d]
    elif version >= 1:
        parts = parts.permute(1, 2, 0, *range(3, parts.dim()))  # [heads, d, 3]
    return parts.reshape(3 * heads * DIM, *q.shape[1:]).clone()


def rank_model(w: dict[str, Any], version: float, t: int, tp: int, spelling: dict[str, str]) -> Saved:
    def part(name: str, axis: int = 0) -> Any:
        return w[name].chunk(tp, axis)[t].clone()

    encoder: Saved = {}
    for layer in range(LAYERS):
        p, s = f"layers.{layer}.", f"layers.{layer}."
        for ours, theirs in (("attn_norm", spelling["input_norm"]), ("mlp_norm", spelling["post_norm"])):
            encoder |= {f"{s}{theirs}.{x}": w[p + f"{ours}.{x}"] for x in ("weight", "bias")}
        a = s + spelling["attention"]
        for x in ("weight", "bias"):
            q, k, v = (part(p + f"attn.{y}.{x}") for y in "qkv")
            encoder[f"{a}.query_key_value.{x}"] = order(version, q, k, v, HEADS // tp)
        encoder |= {f"{a}.dense.weight": part(p + "attn.o.weight", 1), f"{a}.dense.bias": w[p + "attn.o.bias"]}
        encoder |= {
            f"{s}mlp.dense_h_to_4h.weight": part(p + "mlp.up.weight"),
            f"{s}mlp.dense_h_to_4h.bias": part(p + "mlp.up.bias"),
        }
        encoder |= {
            f"{s}mlp.dense_4h_to_h.weight": part(p + "mlp.down.weight", 1),
            f"{s}mlp.dense_4h_to_h.bias": w[p + "mlp.down.bias"],
        }
    encoder |= {f"{spelling['final_norm']}.{x}": w[f"norm.{x}"] for x in ("weight", "bias")}
    embedding = {
        "word_embeddings": {"weight": part("embed.weight")},
        "position_embeddings": {"weight": w["positions.weight"]},
    }
    return {"language_model": {"embedding": embedding, spelling["encoder"]: encoder}}


NEW = {"encoder": "encoder", "attention": "self_attention", "input_norm": "input_norm", "post_norm": "post_attention_norm",
       "final_norm": "final_norm"}  # fmt: skip
OLD = {"encoder": "transformer", "attention": "attention", "input_norm": "input_layernorm", "post_norm": "post_attention_layernorm",
       "final_norm": "final_layernorm"}  # fmt: skip


def flat(model: Saved) -> Saved:
    out: Saved = {}
    for key, value in model.items():
        out |= {f"{key}.{k}": v for k, v in flat(value).items()} if isinstance(value, dict) else {key: value}
    return out


def make(
    folder: Path, version: float | None, *, spelling: dict[str, str] = NEW, flattened: bool = False, old_zip: bool = True,
    edit: Callable[[Saved], object] | None = None, **args: Any,
) -> Path:  # fmt: skip
    w = weights()
    values = {
        "num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "max_position_embeddings": 32,
        "ffn_hidden_size": FFN, "layernorm_epsilon": 1e-5, "padded_vocab_size": ROWS, "num_query_groups": 1,
        "group_query_attention": False, "kv_channels": DIM, "untie_embeddings_and_output_weights": False,
        "position_embedding_type": "learned_absolute", "swiglu": False, "disable_bias_linear": False,
    }  # fmt: skip
    sizes = {"model_parallel_size": 2} if version is None or version < 3 else {"tensor_model_parallel_size": 2}
    for t in range(2):
        model = rank_model(w, version or 0.0, t, 2, spelling)
        saved: Saved = {
            "args": argparse.Namespace(**(values | sizes | args)),
            "model": flat(model) if flattened else model,
        }
        saved |= {} if version is None else {"checkpoint_version": version, "iteration": 3}
        if edit is not None:
            edit(saved)
        path = folder / "release" / f"mp_rank_{t:02d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save(saved, path, _use_new_zipfile_serialization=old_zip)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    return folder


def load(folder: Path, options: LegacyLoad | None = None) -> Checkpoint:
    return canonicalize(LEGACY.load(folder, options or LegacyLoad(), Request()))


def check(checkpoint: Checkpoint) -> None:
    wanted = weights()
    assert {key.name for key in checkpoint.tensors} == set(wanted)
    for atom, value in wanted.items():
        assert np.array_equal(checkpoint.tensors[Key(atom)].numpy(), value.numpy()), atom


@pytest.mark.parametrize("version", [None, 0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("spelling", [NEW, OLD])
@pytest.mark.parametrize("flattened", [False, True])
def test_every_version_and_spelling_gives_the_same_model(
    tmp_path: Path, version: float | None, spelling: dict[str, str], flattened: bool
) -> None:
    checkpoint = load(make(tmp_path, version, spelling=spelling, flattened=flattened))
    check(checkpoint)
    assert checkpoint.config.learned_positions
    assert checkpoint.config.max_positions == 32
    assert checkpoint.config.tied
    assert checkpoint.extras.step == "release"


def test_files_older_than_torch_1_6_are_read(tmp_path: Path) -> None:
    check(load(make(tmp_path, 0, spelling=OLD, old_zip=False)))


def test_bare_weights_need_a_version(tmp_path: Path) -> None:
    def strip(saved: Saved) -> None:
        for key in ("args", "checkpoint_version"):
            saved.pop(key)

    with pytest.raises(ConfigError):
        load(make(tmp_path, 1.0, edit=strip))


def test_version_can_be_stated(tmp_path: Path) -> None:
    base = make(tmp_path, 1.0, edit=lambda saved: saved.update(checkpoint_version=3.0, args=_with_tp(saved["args"])))
    check(load(base, LegacyLoad(checkpoint_version=1)))
    with pytest.raises(UsageError, match=r"--loader\.checkpoint-version 5: choose 0 or 1 or 2 or 3"):
        make_options(LegacyLoad, {"checkpoint-version": "5"}, "loader", "legacy")


@pytest.mark.parametrize(
    ("version", "rows"), [(0.0, "values apart -> grouped"), (1.0, "in turn -> grouped"), (2.0, None), (3.0, None)]
)
def test_upgrade_says_which_rows_move(tmp_path: Path, version: float, rows: str | None) -> None:
    _, changes = prepare_upgrade(Job(make(tmp_path, version), vocab_size=ROWS))
    moved = [line for line in changes if line.startswith("attention rows")]
    assert len(moved) == (rows is not None)
    assert all(str(rows) in line for line in moved)


def _with_tp(args: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**vars(args), tensor_model_parallel_size=2)


REFUSED: dict[str, tuple[Callable[[Saved], object], type[CkptconvError], str]] = {
    "stored in both spellings": (
        lambda s: s["model"]["language_model"].update(transformer=s["model"]["language_model"]["encoder"]), FormatError, "stored twice"
    ),
    "nested without end": (lambda s: s["model"].update(deep=_deep(40)), FormatError, "nested"),
    "key is a number": (lambda s: s["model"].update({3: {}}), FormatError, "a key is 3"),
    "no embedding": (lambda s: s["model"]["language_model"].pop("embedding"), FormatError, "has no language_model.embedding"),
}  # fmt: skip


def _deep(n: int) -> Saved:
    return {"x": _deep(n - 1)} if n else {}


@pytest.mark.parametrize("what", REFUSED)
def test_damage_is_refused_and_named(tmp_path: Path, what: str) -> None:
    edit, error, text = REFUSED[what]
    with pytest.raises(error, match=text):
        load(make(tmp_path, 3.0, edit=edit))


@pytest.mark.parametrize("from_args", [True, False])
def test_golden_tied_model_of_the_official_saver_is_read(from_args: bool) -> None:
    path = GOLDEN / "d-qwen25-tied" / "out-v012-legacy-tp2pp2"
    assert LEGACY.sniff(path)
    assert not Mcore().sniff(path)
    checkpoint = load(path, LegacyLoad(config=None if from_args else path.parent / "hf"))
    assert checkpoint.config.tied
    assert checkpoint.config.qkv_bias
    assert checkpoint.config.family == ("megatron" if from_args else "hf-qwen2")
    assert any("word_embeddings_for_head" in replica.name for replica in checkpoint.replicas)
