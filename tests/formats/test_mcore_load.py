"""Reading Megatron-Core rank files: written here by torch from plain slices, and by Megatron's own converter (goldens)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckptconv.canonicalize import canonicalize
from ckptconv.checkpoint import Checkpoint, Key
from ckptconv.errors import ConfigError, FormatError, UsageError
from ckptconv.formats import Request
from ckptconv.formats.mcore import Mcore, McoreLoad
from ckptconv.megatron.folders import RankFile
from ckptconv.megatron.rank_file import read_rank
from ckptconv.pipeline import Job, prepare
from tests.formats.helpers.megatron import EXPERTS, HEADS, VOCAB, hf_config, make, weights

GOLDEN = Path(__file__).parent.parent / "golden" / "mlm"
MCORE = Mcore()


def load(folder: Path, config: Path | None = None, **request: Any) -> Checkpoint:
    return canonicalize(MCORE.load(folder, McoreLoad(config=config), Request(**request)))


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


def test_vocabulary_cut_on_purpose_is_not_that_of_the_config_beside(tmp_path: Path) -> None:
    base = make(tmp_path, tp=1, pp=1)
    hf_config(base / "hf", vocab_size=1000)
    checkpoint = load(base)
    assert checkpoint.config.vocab == VOCAB
    assert any(note.startswith("vocabulary: hf/config.json says 1000") for note in checkpoint.extras.notes)


@pytest.mark.parametrize(
    "said",
    [
        {"moe_router_score_function": "sigmoid"},
        {"moe_router_topk_scaling_factor": 2.5},
        {"window_attn_skip_freq": 2},
        {"apply_residual_connection_post_layernorm": True},
        {"softmax_type": "learnable"},
    ],
    ids=lambda said: next(iter(said)),
)
def test_args_of_a_forward_pass_no_config_can_say_are_refused(tmp_path: Path, said: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(said))):
        load(make(tmp_path, tp=1, pp=1, experts=EXPERTS, args=said))


def test_router_that_softmaxes_first_is_kept_and_no_mixtral(tmp_path: Path) -> None:
    source = make(
        tmp_path / "src", tp=1, pp=1, experts=EXPERTS, args={"moe_router_pre_softmax": True, "moe_router_topk": 2}
    )
    again = prepare(Job(source, saver="mcore"))
    assert again.checkpoint.config.router_pre_softmax
    assert "--moe-router-pre-softmax" in again.usage("dst")
    template = hf_config(tmp_path / "hf", experts=EXPERTS)
    with pytest.raises(ConfigError, match="router_pre_softmax is True"):
        prepare(Job(source, saver="hf", saver_options={"template": template}))
    hf_config(source / "hf", experts=EXPERTS)
    with pytest.raises(ConfigError, match="contradict each other:\n  router_pre_softmax"):
        load(source)


def test_size_of_an_expert_is_never_guessed(tmp_path: Path) -> None:
    source = make(tmp_path, pp=1, etp=1, experts=EXPERTS, args={"ffn_hidden_size": None, "moe_router_topk": 2})
    with pytest.raises(ConfigError, match="neither the size of an expert nor its tensor parallel size is stated"):
        load(source)


def test_unknown_entries_of_a_rank_file_are_told(tmp_path: Path) -> None:
    def add(ranks: dict[tuple[int, ...], dict[str, Any]]) -> None:
        for saved in ranks.values():
            saved |= {"ema_model": {}, "num_floating_point_operations_so_far": 0}

    (note,) = load(make(tmp_path, edit=add)).extras.notes
    assert note == "left behind in the rank files: ema_model, num_floating_point_operations_so_far"


def test_settings_of_a_template_hold_against_args(tmp_path: Path) -> None:
    """Official converters save a rotary base of 10000 for every model."""
    template = hf_config(tmp_path / "hf")
    plan = prepare(Job(make(tmp_path / "src"), saver="hf", saver_options={"template": str(template)})).plan
    (config,) = [f.segments[0].body for f in plan.files if f.path == "config.json"]
    assert config == (template / "config.json").read_bytes()
    changes = plan.about["config_changes"]
    assert isinstance(changes, list)
    assert [line.partition(":")[0] for line in changes] == ["rope", "norm_eps", "max_positions"]
    assert str(tmp_path) not in json.dumps(plan.about)


def test_iteration_that_is_not_the_folders_is_refused(tmp_path: Path) -> None:
    shutil.copytree(make(tmp_path / "src") / "iter_0000007", tmp_path / "bare")
    assert prepare(Job(tmp_path / "bare", saver="mcore", iteration=7)).stored.extras.step == 7
    with pytest.raises(UsageError, match="iteration 7 alone"):
        prepare(Job(tmp_path / "bare", saver="mcore", iteration=99))


def test_usage_says_the_padding_that_gives_these_rows(tmp_path: Path) -> None:
    source = make(tmp_path)
    assert "divisible-by" not in prepare(Job(source, saver="mcore")).usage("dst")
    usage = prepare(Job(source, saver="mcore", vocab_divisor=2)).usage("dst")
    assert "--make-vocab-size-divisible-by 38" in usage


@pytest.mark.parametrize(("nbytes", "told"), [(0, False), (8, True), (4096, True)])
def test_contents_of_extra_state_are_not_left_behind_silently(tmp_path: Path, nbytes: int, told: bool) -> None:
    """fp8 training keeps scaling factors there; that is told however few bytes it takes."""
    path = tmp_path / "model_optim_rng.pt"
    state = {"decoder.layers.0.mlp.linear_fc1._extra_state": torch.zeros(nbytes, dtype=torch.uint8)}
    torch.save({"model": {"w": torch.zeros(2), **state}}, path)
    content = read_rank(RankFile((0,), path), False, lambda name: name)
    assert list(content.chunks[0]) == ["w"]
    assert any("_extra_state" in stray for stray in content.strays) == told
