"""Reading Megatron-Core rank files: written here by torch from plain slices, by Megatron's own converter (goldens), and damaged."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ckptconv.canonicalize import canonicalize  # noqa: E402
from ckptconv.checkpoint import Checkpoint, Key  # noqa: E402
from ckptconv.errors import CkptconvError, ConfigError, CoverageError, FormatError, TopologyError, UsageError  # noqa: E402
from ckptconv.formats import Request  # noqa: E402
from ckptconv.formats.mcore import Mcore, McoreLoad  # noqa: E402

GOLDEN = Path(__file__).parent.parent / "golden" / "mlm"
MCORE = Mcore()
LAYERS, HIDDEN, HEADS, GROUPS, DIM, FFN, ROWS, VOCAB, EXPERTS = 4, 16, 4, 2, 8, 24, 40, 37, 4
Edit = Callable[[dict[tuple[int, ...], dict[str, Any]]], object]


def weights(experts: int = 0) -> dict[str, Any]:
    """A whole model in the project's canonical names, with values that are all different."""
    g = torch.Generator().manual_seed(1)

    def new(*shape: int) -> Any:
        return torch.randn(*shape, generator=g)

    out = {"embed.weight": new(ROWS, HIDDEN), "head.weight": new(ROWS, HIDDEN), "norm.weight": new(HIDDEN)}
    for layer in range(LAYERS):
        p = f"layers.{layer}."
        out |= {p + "attn_norm.weight": new(HIDDEN), p + "mlp_norm.weight": new(HIDDEN)}
        out |= {p + "attn.q.weight": new(HEADS * DIM, HIDDEN), p + "attn.o.weight": new(HIDDEN, HEADS * DIM)}
        out |= {p + f"attn.{x}.weight": new(GROUPS * DIM, HIDDEN) for x in "kv"}
        for where in [f"moe.{e}." for e in range(experts)] or ["mlp."]:
            out |= {p + where + "gate.weight": new(FFN, HIDDEN), p + where + "up.weight": new(FFN, HIDDEN)}
            out |= {p + where + "down.weight": new(HIDDEN, FFN)}
        if experts:
            out[p + "moe.router.weight"] = new(experts, HIDDEN)
    return out


def fused_qkv(w: dict[str, Any], p: str) -> Any:
    """Group by group: its query heads, its key head, its value head."""
    rows = []
    per = HEADS // GROUPS * DIM
    for group in range(GROUPS):
        rows.append(w[p + "attn.q.weight"][group * per : (group + 1) * per])
        rows += [w[p + f"attn.{x}.weight"][group * DIM : (group + 1) * DIM] for x in "kv"]
    return torch.cat(rows)


def mlp(w: dict[str, Any], p: str, rank: int, n: int) -> tuple[Any, Any]:
    """A rank's fc1 (its part of gate, then of up) and fc2."""
    fc1 = torch.cat([w[p + f"{x}.weight"].chunk(n)[rank] for x in ("gate", "up")])
    return fc1, w[p + "down.weight"].chunk(n, 1)[rank].clone()


def layer_names(
    w: dict[str, Any], layer: int, local: int, tp: int, n: int, ep: int, eps: int, etp: int, impl: str
) -> dict[str, Any]:
    p, out = f"layers.{layer}.", dict[str, Any]()
    s = f"decoder.layers.{local}."
    te = impl == "te"
    out[s + ("self_attention.linear_qkv.layer_norm_weight" if te else "input_layernorm.weight")] = w[
        p + "attn_norm.weight"
    ]
    out[s + "self_attention.linear_qkv.weight"] = fused_qkv(w, p).chunk(n)[tp].clone()
    out[s + "self_attention.linear_proj.weight"] = w[p + "attn.o.weight"].chunk(n, 1)[tp].clone()
    out[s + "self_attention.linear_proj._extra_state"] = None
    if p + "moe.router.weight" not in w:
        out[s + ("mlp.linear_fc1.layer_norm_weight" if te else "pre_mlp_layernorm.weight")] = w[p + "mlp_norm.weight"]
        out[s + "mlp.linear_fc1.weight"], out[s + "mlp.linear_fc2.weight"] = mlp(w, p + "mlp.", tp, n)
        return out
    out |= {
        s + "pre_mlp_layernorm.weight": w[p + "mlp_norm.weight"],
        s + "mlp.router.weight": w[p + "moe.router.weight"],
    }
    for i in range(EXPERTS // eps):
        fc1, fc2 = mlp(w, p + f"moe.{ep * (EXPERTS // eps) + i}.", tp % etp, etp)
        out |= {s + f"mlp.experts.linear_fc1.weight{i}": fc1, s + f"mlp.experts.linear_fc2.weight{i}": fc2}
    return out


def make_args(**changes: Any) -> argparse.Namespace:
    values: dict[str, Any] = {
        "num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS, "num_query_groups": GROUPS,
        "group_query_attention": True, "kv_channels": DIM, "max_position_embeddings": 64, "position_embedding_type": "rope",
        "rotary_base": 10000, "rotary_percent": 1.0, "normalization": "RMSNorm", "norm_epsilon": 1e-6, "swiglu": True,
        "add_bias_linear": False, "add_qkv_bias": False, "untie_embeddings_and_output_weights": True, "num_experts": None,
        "vocab_size": VOCAB, "padded_vocab_size": ROWS, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
    }  # fmt: skip
    return argparse.Namespace(**(values | changes))


def make(
    folder: Path, *, tp: int = 2, pp: int = 2, vpp: int = 1, ep: int = 1, etp: int | None = None, experts: int = 0, impl: str = "te",
    counts: list[list[int]] | None = None, args: dict[str, Any] | None = None, edit: Edit | None = None, names: str = "{}",
) -> Path:  # fmt: skip
    """Rank files of a small model as Megatron saves them; `edit` may damage {(tp, pp, ep): saved} before it is written."""
    w, etp = weights(experts), etp or tp
    counts = counts or [[LAYERS // pp // vpp] * pp for _ in range(vpp)]
    starts, at = {}, 0
    for v, p in ((v, p) for v in range(vpp) for p in range(pp)):
        starts[v, p] = at
        at += counts[v][p]
    said: dict[str, Any] = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
    }
    said |= {"virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None, "num_experts": experts or None}
    namespace = make_args(**(said | (args or {}))) if args is None or "absent" not in args else None
    places = sorted({(r % tp, r // etp % ep) for r in range(int(np.lcm(tp, ep * etp)))})
    ranks: dict[tuple[int, ...], dict[str, Any]] = {}
    for p in range(pp):
        for t, e in places:
            saved: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 7} | (
                {"args": namespace} if namespace else {}
            )
            for v in range(vpp):
                model: dict[str, Any] = {}
                if (v, p) == (0, 0):
                    model["embedding.word_embeddings.weight"] = w["embed.weight"].chunk(tp)[t].clone()
                for local in range(counts[v][p]):
                    model |= layer_names(w, starts[v, p] + local, local, t, tp, e, ep, etp, impl)
                if (v, p) == (vpp - 1, pp - 1):
                    model |= {"decoder.final_layernorm.weight": w["norm.weight"], "output_layer._extra_state": None}
                    model["output_layer.weight"] = w["head.weight"].chunk(tp)[t].clone()
                saved["model" if vpp == 1 else f"model{v}"] = model
            ranks[t, p, e] = saved
    if edit is not None:
        edit(ranks)
    for (t, p, e), saved in ranks.items():
        name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") + (f"_{e:03d}" if ep > 1 else "")
        path = folder / "iter_0000007" / name / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save(saved, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


def load(folder: Path, config: Path | None = None, **request: Any) -> Checkpoint:
    return canonicalize(MCORE.load(folder, McoreLoad(config=config), Request(**request)))


def hf_config(folder: Path, **changes: Any) -> Path:
    """A Hugging Face config.json of the model made here."""
    experts = changes.pop("experts", 0)
    table = {
        "model_type": "mixtral" if experts else "llama", "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": DIM, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128, "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    table |= {"num_local_experts": experts, "num_experts_per_tok": 2} if experts else {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(table | changes))
    return folder


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {"tp": 1, "pp": 1},
    "tp2": {"tp": 2, "pp": 1},
    "tp4 beyond the groups": {"tp": 4, "pp": 1},
    "pp4": {"tp": 1, "pp": 4},
    "tp2 pp2 local": {"impl": "local"},
    "vpp2": {"vpp": 2},
    "first stage smaller": {"tp": 1, "counts": [[1, 3]], "args": {"decoder_first_pipeline_num_layers": 1}},
    "last stage smaller": {"tp": 1, "counts": [[3, 1]], "args": {"decoder_last_pipeline_num_layers": 1}},
    "layout string": {"tp": 1, "pp": 4, "counts": [[0, 1, 1, 2]], "args": {"pipeline_model_parallel_layout": "E|t|t|t*2L"}},
    "ends counted": {
        "tp": 1, "pp": 3, "counts": [[1, 2, 1]],
        "args": {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
    },
    "ep2": {"pp": 1, "ep": 2, "experts": EXPERTS},
    "ep2 pp2": {"ep": 2, "experts": EXPERTS},
    "ep4 tp1": {"tp": 1, "pp": 1, "ep": 4, "experts": EXPERTS},
    "etp1 tp2 ep2": {"pp": 1, "ep": 2, "etp": 1, "experts": EXPERTS, "args": {"expert_tensor_parallel_size": 1}},
    "ep2 etp wrong in args": {"pp": 1, "ep": 2, "experts": EXPERTS, "args": {"expert_tensor_parallel_size": 1}},
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("stripped", [False, True])
def test_every_atom_of_every_layout_is_read(tmp_path: Path, name: str, stripped: bool) -> None:
    options = dict(LAYOUTS[name])
    config = None
    if stripped:  # the layout is then told by folders and names, the architecture by a config
        options["args"] = {"absent": True}
        config = hf_config(tmp_path / "config", experts=options.get("experts", 0))
    checkpoint = load(make(tmp_path / "src", **options), config)
    wanted = weights(options.get("experts", 0))
    assert {key.name for key in checkpoint.tensors} == set(wanted)
    for atom, value in wanted.items():
        assert np.array_equal(checkpoint.tensors[Key(atom)].numpy(), value.numpy()), atom
    topology = checkpoint.origin.topology
    tp = options.get("tp", 2)
    assert (topology.tp, topology.pp, topology.vpp) == (tp, options.get("pp", 2), options.get("vpp", 1))
    assert (topology.ep, topology.etp) == (options.get("ep", 1), options.get("etp", tp))
    assert checkpoint.config.vocab == VOCAB
    assert checkpoint.extras.step == 7


def test_iteration_folder_and_base_folder_say_the_same(tmp_path: Path) -> None:
    base = make(tmp_path)
    assert load(base / "iter_0000007").tensors == load(base).tensors


def test_iteration_can_be_chosen_and_release_is_known(tmp_path: Path) -> None:
    base = make(tmp_path, tp=1, pp=1)
    shutil.copytree(base / "iter_0000007", base / "release")
    assert load(base, iteration="release").extras.step == "release"
    (base / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert load(base).extras.step == "release"
    assert load(base, iteration=7).extras.step == 7
    (base / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(FormatError, match="choose one with --iteration"):
        load(base)


def test_hf_beside_wins_over_what_official_converters_get_wrong(tmp_path: Path) -> None:
    base = make(tmp_path)
    hf_config(base / "hf")
    checkpoint = load(base)
    assert checkpoint.config.rope is not None
    assert checkpoint.config.rope.base == 500000
    assert checkpoint.config.family == "hf-llama"
    assert any(
        "rope: iter_0000007 args says base 10000, hf/config.json says base 500000" in n for n in checkpoint.extras.notes
    )
    assert not any(str(tmp_path) in n for n in checkpoint.extras.notes)
    assert "config.json" in checkpoint.extras.files


def test_heads_that_args_and_hf_give_differently_are_refused_unless_given_on_purpose(tmp_path: Path) -> None:
    base = make(tmp_path, args={"num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 4})
    hf_config(base / "hf")
    with pytest.raises(ConfigError, match="contradict each other"):
        load(base)
    checkpoint = load(base, hf_config(tmp_path / "given"))
    assert checkpoint.config.heads == HEADS
    assert any("heads: iter_0000007 args says 8" in note for note in checkpoint.extras.notes)


def test_true_vocabulary_is_never_guessed(tmp_path: Path) -> None:
    base = make(tmp_path, tp=1, pp=1, args={"vocab_size": None})
    assert load(base).config.vocab is None
    assert load(base, vocab=33).config.vocab == 33
    with pytest.raises(ConfigError, match="does not fit the embedding's 40 rows"):
        load(base, vocab=41)
    assert load(make(tmp_path / "b", tp=1, pp=1, args={"vocab_size": 50000})).config.vocab is None


def test_training_state_is_named(tmp_path: Path) -> None:
    def edit(ranks: dict[tuple[int, ...], dict[str, Any]]) -> None:
        for saved in ranks.values():
            saved["optimizer"] = {"optimizer": {"state": {}, "param_groups": [{}, {}]}}
            saved["rng_state"] = [{}]
            saved["opt_param_scheduler"] = {"max_lr": 1.0}

    base = make(tmp_path, edit=edit)
    (base / "iter_0000007" / "mp_rank_00_000" / "distrib_optim.pt").write_bytes(b"")
    state = load(base).extras.objects["state"]
    assert state == [
        "optimizer (2 param groups)",
        "learning rate scheduler",
        "RNG state",
        "distributed optimizer (distrib_optim.pt)",
    ]


# -- goldens: files of Megatron's own converter ------------------------------------------------------------------------

OUTPUTS = [
    "a-llama2-mha-bf16/out-v010-te2-tp2pp2", "a-llama2-mha-bf16/out-v012-local-tp2pp1", "b-llama3-gqa/src-vpp2-tp2pp2",
    "d-qwen25-tied/out-v010-te-tp2pp2", "d-qwen25-tied/out-v012-te-tp2pp2", "f-mixtral/out-v09-te-tp2pp1ep2",
]  # fmt: skip


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("from_args", [True, False])
def test_golden_is_read_with_and_without_a_config(output: str, from_args: bool) -> None:
    path = GOLDEN / output
    assert MCORE.sniff(path)
    checkpoint = load(path, None if from_args else path.parent / "hf")
    raw = json.loads((path.parent / "hf" / "config.json").read_text())
    assert checkpoint.config.vocab == raw["vocab_size"]
    assert {t.dtype.name for t in checkpoint.tensors.values()} == {"bf16"}  # whatever args.bf16 says
    assert checkpoint.config.layers == raw["num_hidden_layers"]
    if not from_args:
        assert checkpoint.config.rope is not None
        assert checkpoint.config.rope.base == raw["rope_theta"]  # args say 10000 for every model


def test_golden_tied_model_saved_as_untied_is_read_as_hf_says() -> None:
    """Megatron-LM 0.10 saves a tied model as an untied one with a copy of the embedding as its head."""
    path = GOLDEN / "d-qwen25-tied" / "out-v010-te-tp2pp2"
    assert not load(path).config.tied
    checkpoint = load(path, path.parent / "hf")
    assert checkpoint.config.tied
    assert Key("head.weight") not in checkpoint.tensors
    assert any("output_layer" in r.name for r in checkpoint.replicas)


# -- what is refused -----------------------------------------------------------------------------------------------------


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
    "the same iteration twice": (lambda f: shutil.copytree(f / "iter_0000007", f / "iter_7"), FormatError, "twice"),
    "distributed checkpoint": (
        lambda f: (f / "iter_0000007/metadata.json").write_text("{}"),
        FormatError,
        "not supported yet",
    ),
    "torch distributed checkpoint": (
        lambda f: (f / "iter_0000007/.metadata").write_bytes(b""),
        FormatError,
        "not supported yet",
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
