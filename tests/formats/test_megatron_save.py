"""Writing Megatron rank files: equal to those of Megatron's own converter tensor by tensor, and loadable without trusting them."""

from __future__ import annotations

import argparse
import io
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from ckptconv.errors import CkptconvError, ConfigError, TopologyError, UsageError  # noqa: E402
from ckptconv.layout import Layout  # noqa: E402
from ckptconv.leaves import full  # noqa: E402
from ckptconv.megatron.extra_state import ExtraState, saved_none  # noqa: E402
from ckptconv.megatron.saving import nested, vocab_rows  # noqa: E402
from ckptconv.megatron.versions import Core  # noqa: E402
from ckptconv.pipeline import Job, convert, load, prepare  # noqa: E402
from ckptconv.topology import even  # noqa: E402

GOLDEN = Path(__file__).parent.parent / "golden" / "mlm"
QWEN = GOLDEN / "d-qwen25-tied"
MIXTRAL = GOLDEN / "f-mixtral" / "out-v09-te-tp2pp1ep2"
VPP = GOLDEN / "b-llama3-gqa" / "src-vpp2-tp2pp2"


def flat(model: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in model.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class Inert:
    """Stands for Megatron's enum classes, which official files hold and importing which takes seconds."""

    def __init__(self, *args: object) -> None:
        self.args = args


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return Inert if module.startswith("megatron.") else super().find_class(module, name)


def open_rank(path: Path, *, safely: bool = True) -> dict[str, Any]:
    saved: dict[str, Any]
    if not safely:
        module = SimpleNamespace(Unpickler=Unpickler, load=pickle.load, __name__="inert")
        saved = torch.load(path / "model_optim_rng.pt", weights_only=False, pickle_module=module)
        return saved
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(path / "model_optim_rng.pt", weights_only=True)
    return saved


def models(saved: dict[str, Any]) -> list[tuple[str, Any]]:
    return [item for key in saved if key.startswith("model") for item in flat(saved[key], key + "/")]


# golden, where from, saver, options, layout
SAME: dict[str, tuple[Path, Path, str, dict[str, object], dict[str, Any]]] = {
    "TransformerEngine before 2": (
        QWEN / "hf", QWEN / "out-v012-te-tp2pp2", "mcore", {"mcore_version": "0.12", "te_version": "1.11"}, {"tp": 2, "pp": 2}
    ),
    "TransformerEngine 2": (
        GOLDEN / "a-llama2-mha-bf16" / "out-v012-local-tp2pp1", GOLDEN / "a-llama2-mha-bf16" / "out-v010-te2-tp2pp2", "mcore",
        {"mcore_version": "0.10", "te_version": "2.5", "transformer_impl": "transformer_engine"}, {"tp": 2, "pp": 2},
    ),
    "local": (
        GOLDEN / "a-llama2-mha-bf16" / "out-v010-te2-tp2pp2", GOLDEN / "a-llama2-mha-bf16" / "out-v012-local-tp2pp1", "mcore",
        {"mcore_version": "0.12", "transformer_impl": "local"}, {"tp": 2},
    ),
    "legacy": (QWEN / "hf", QWEN / "out-v012-legacy-tp2pp2", "legacy", {"mcore_version": "0.12"}, {"tp": 2, "pp": 2}),
    "experts": (MIXTRAL, MIXTRAL, "mcore", {"mcore_version": "0.9", "te_version": "1.11"}, {"tp": 2, "ep": 2}),
    "virtual stages": (VPP, VPP, "mcore", {"mcore_version": "0.10", "te_version": "1.11"}, {"tp": 2, "pp": 2, "vpp": 2}),
}  # fmt: skip


@pytest.mark.parametrize("what", SAME)
def test_files_are_those_of_megatrons_converter(tmp_path: Path, what: str) -> None:
    source, golden, saver, options, layout = SAME[what]
    convert(source, tmp_path / "out", saver=saver, saver_options=options, **layout)
    ours, theirs = tmp_path / "out" / "iter_0000001", golden / "iter_0000001"
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    for folder in theirs.iterdir():
        official = models(open_rank(folder, safely=False))
        written = models(
            open_rank(ours / folder.name, safely="te_version" not in options or str(options["te_version"]) > "2")
        )
        assert [name for name, _ in written] == [name for name, _ in official]  # the same names, in the same order
        for (name, a), (_, b) in zip(written, official, strict=True):
            assert type(a) is type(b), name
            if isinstance(a, torch.Tensor):
                assert (a.dtype, a.shape) == (b.dtype, b.shape), name
                assert torch.equal(a, b), name
    tracker = "latest_checkpointed_iteration.txt"
    assert (tmp_path / "out" / tracker).read_bytes() == (golden / tracker).read_bytes()


def test_default_files_open_without_trust_and_carry_the_hugging_face_side(tmp_path: Path) -> None:
    convert(QWEN / "hf", tmp_path / "out", saver="mcore", tp=2, saver_options={"iteration": "release"})
    saved = open_rank(tmp_path / "out" / "release" / "mp_rank_01")
    assert list(saved) == ["args", "checkpoint_version", "iteration", "model"]
    assert (saved["checkpoint_version"], saved["iteration"]) == (3.0, 0)
    assert saved["args"].params_dtype is torch.bfloat16
    assert saved["args"].tensor_model_parallel_size == 2
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "release"
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / "hf" / name).read_bytes() == (QWEN / "hf" / name).read_bytes()


@pytest.mark.parametrize("saver", ["mcore", "legacy"])
def test_there_and_back_gives_the_same_weights(tmp_path: Path, saver: str) -> None:
    convert(QWEN / "hf", tmp_path / "there", saver=saver, tp=2, pp=4)
    convert(tmp_path / "there", tmp_path / "back", saver="hf")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (
            QWEN / "hf" / name
        ).read_bytes() or name == "model.safetensors"
    safetensors = pytest.importorskip("safetensors.torch")
    was, now = (safetensors.load_file(folder / "model.safetensors") for folder in (QWEN / "hf", tmp_path / "back"))
    assert {k: v.tolist() for k, v in now.items()} == {k: v.tolist() for k, v in was.items() if k in now}
    assert set(was) - set(now) <= {"lm_head.weight"}


@pytest.mark.parametrize("experts", ["te-grouped", "sequential", "grouped"])
@pytest.mark.parametrize("etp", [1, 2])
def test_every_form_of_experts_goes_back_to_where_it_came_from(tmp_path: Path, experts: str, etp: int) -> None:
    convert(MIXTRAL, tmp_path / "a", saver="mcore", tp=2, ep=2, etp=etp, saver_options={"experts": experts})
    names = {name for name, _ in models(open_rank(tmp_path / "a" / "iter_0000001" / "mp_rank_00_000"))}
    wanted = {
        "te-grouped": "linear_fc1.weight1",
        "sequential": "local_experts.1.linear_fc1.weight",
        "grouped": "weight1",
    }[experts]
    assert f"model/decoder.layers.0.mlp.experts.{wanted}" in names
    convert(tmp_path / "a", tmp_path / "b", tp=1, ep=4)  # reshard: the form stays
    options: dict[str, object] = {"experts": "sequential", "mcore_version": "0.9", "te_version": "1.11"}
    convert(tmp_path / "b", tmp_path / "c", saver="mcore", tp=2, ep=2, saver_options=options)
    for folder in (MIXTRAL / "iter_0000001").iterdir():
        ours = dict(models(open_rank(tmp_path / "c" / "iter_0000001" / folder.name, safely=False)))
        for name, value in models(open_rank(folder, safely=False)):
            assert not isinstance(value, torch.Tensor) or torch.equal(ours[name], value), name


def plan(
    source: Path, saver: str, options: dict[str, object] | None = None, layout: Layout | None = None, **wishes: Any
) -> Any:
    return prepare(Job(source, saver=saver, layout=layout or Layout(), saver_options=options or {}, **wishes))


REFUSED: dict[str, tuple[Path, str, dict[str, object], dict[str, Any], type[CkptconvError], str]] = {
    "tp beyond the groups": (QWEN / "hf", "mcore", {"mcore_version": "0.15"}, {"tp": 4}, UsageError, "before 0.16 refuses"),
    "tp beyond the groups, legacy": (QWEN / "hf", "legacy", {}, {"tp": 4}, UsageError, "cannot be cut so"),
    "experts, legacy": (MIXTRAL, "legacy", {}, {}, ConfigError, "experts: save as mcore"),
    "grouped of TransformerEngine in local": (
        MIXTRAL, "mcore", {"experts": "te-grouped", "transformer_impl": "local"}, {}, UsageError, "needs --saver.transformer-impl"
    ),
    "grouped before its flag": (MIXTRAL, "mcore", {"experts": "grouped", "mcore_version": "0.10"}, {}, UsageError, "TEGroupedMLP"),
    "etp before its flag": (MIXTRAL, "mcore", {"mcore_version": "0.9"}, {"tp": 2, "etp": 1}, UsageError, "cuts experts as the rest"),
    "etp beyond tp": (MIXTRAL, "mcore", {}, {"tp": 1, "etp": 2}, TopologyError, "does not divide tensor parallel size"),
    "unknown experts": (MIXTRAL, "mcore", {"experts": "many"}, {}, UsageError, "choose te-grouped or sequential or grouped"),
    "unknown modules": (QWEN / "hf", "mcore", {"transformer_impl": "apex"}, {}, UsageError, "choose transformer_engine or local"),
    "unknown version": (QWEN / "hf", "mcore", {"mcore_version": "2.0"}, {}, UsageError, "known are 0.9 to 0.16"),
    "iteration is text": (QWEN / "hf", "mcore", {"iteration": "last"}, {}, UsageError, "give a number"),
    "virtual stages of one stage": (QWEN / "hf", "mcore", {}, {"vpp": 2}, TopologyError, "vpp 2 with pp 1"),
    "ep, legacy": (QWEN / "hf", "legacy", {}, {"ep": 2}, UsageError, "have no experts"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_megatron_cannot_load_is_refused(what: str) -> None:
    source, saver, options, layout, error, text = REFUSED[what]
    with pytest.raises(error, match=text):
        plan(source, saver, options, Layout(**layout))


def test_uneven_legacy_pipeline_is_refused() -> None:
    with pytest.raises(TopologyError, match="same number of layers"):
        plan(QWEN / "hf", "legacy", None, Layout(pp=2, pp_layers=(1, 3)))


@pytest.mark.parametrize(
    ("vocab", "tp", "div", "rows"), [(131, 1, 128, 256), (131, 4, 128, 512), (131, 8, 128, 1024), (131, 2, 1, 132)]
)
def test_vocabulary_is_padded_as_megatron_does(vocab: int, tp: int, div: int, rows: int) -> None:
    config = plan(QWEN / "hf", "mcore").checkpoint.config
    assert vocab_rows(replace(config, vocab=vocab), even(4, tp=tp), div) == rows
    unknown = replace(config, vocab=None, vocab_rows=132)
    assert vocab_rows(unknown, even(4, tp=2), div) == 132
    with pytest.raises(ConfigError, match="give --vocab-size"):
        vocab_rows(unknown, even(4, tp=8), div)


def test_usage_names_what_megatron_does_not_copy() -> None:
    text = plan(VPP, "mcore", None, Layout(tp=2, pp=2, vpp=2), loader_options={"config": VPP.parent / "hf"}).usage(
        "out"
    )
    for flag in (
        "--rotary-base 500000",
        "--norm-epsilon 1e-05",
        "--num-layers-per-virtual-pipeline-stage 2",
        "--load out",
        "--swiglu",
    ):
        assert flag in text
    assert "--use-legacy-models" in plan(QWEN / "hf", "legacy").usage("out")
    assert "--moe-grouped-gemm" in plan(MIXTRAL, "mcore", {"experts": "te-grouped"}).usage("out")


@pytest.mark.parametrize(
    ("te", "core", "kind", "names"),
    [
        ((1, 5), (0, 9), "bytes", ["linear_proj", "linear_fc1"]),
        ((1, 7), (0, 9), "bytes", ["core_attention.fused_attention", "linear_proj", "linear_fc1"]),
        ((1, 8), (0, 9), "bytes", ["core_attention", "linear_proj", "linear_fc1"]),
        ((1, 13), (0, 9), "bytes", ["core_attention", "linear_proj", "q_layernorm", "linear_fc1"]),
        ((2, 0), (0, 16), "pickle", ["core_attention", "linear_proj", "q_layernorm", "linear_fc1"]),
        ((2, 4), (0, 16), "empty", ["core_attention", "linear_proj", "q_layernorm", "linear_fc1"]),
        (None, (0, 16), "none", ["linear_proj", "linear_fc1"]),
    ],
)
def test_extra_state_follows_the_version(
    te: tuple[int, int] | None, core: tuple[int, int], kind: str, names: list[str]
) -> None:
    tensor = full((1,), plan(QWEN / "hf", "mcore").checkpoint.config.dtype, 0.0)
    stems = ("self_attention.linear_proj", "self_attention.q_layernorm", "mlp.linear_fc1")
    out = ExtraState(Core(core), te).beside({f"decoder.layers.0.{s}.weight": tensor for s in stems}, last=False)
    extra = {name.removesuffix("._extra_state"): value for name, value in out.items() if name.endswith("_extra_state")}
    assert [
        name.split(".", 4)[-1] if "core" not in name else name.partition("self_attention.")[2] for name in extra
    ] == names
    value = extra["decoder.layers.0.mlp.linear_fc1"]
    if kind == "pickle":
        assert getattr(value, "numpy")().tobytes() == b"\x80\x04N."  # noqa: B009
    elif kind == "empty":
        assert getattr(value, "shape", None) == (0,)
    else:
        assert (value is None) == (kind == "none")


def test_saved_none_is_what_torch_reads_as_none() -> None:
    assert torch.load(io.BytesIO(saved_none()), weights_only=True) is None
    assert saved_none() == saved_none()


def test_nested_names_keep_the_encoder_flat() -> None:
    names = {
        "language_model.encoder.layers.0.x.weight": 1,
        "language_model.embedding.word_embeddings.weight": 2,
        "word_embeddings_for_head.weight": 3,
    }
    assert nested(names) == {
        "language_model": {"encoder": {"layers.0.x.weight": 1}, "embedding": {"word_embeddings": {"weight": 2}}},
        "word_embeddings_for_head": {"weight": 3},
    }


def test_state_of_the_source_is_not_lost_silently(tmp_path: Path) -> None:
    saved = open_rank(GOLDEN / "a-llama2-mha-bf16/out-v012-local-tp2pp1/iter_0000001/mp_rank_00", safely=False)
    saved["args"] = argparse.Namespace(
        **{k: v for k, v in vars(saved["args"]).items() if isinstance(v, (int, str, float, type(None)))}
    )
    saved["rng_state"] = [{}]
    saved = {k: v for k, v in saved.items() if k in ("args", "checkpoint_version", "iteration", "model", "rng_state")}
    saved["args"].tensor_model_parallel_size = 2
    for rank in range(2):
        other = open_rank(
            GOLDEN / f"a-llama2-mha-bf16/out-v012-local-tp2pp1/iter_0000001/mp_rank_{rank:02d}", safely=False
        )
        folder = tmp_path / "iter_0000002" / f"mp_rank_{rank:02d}"
        folder.mkdir(parents=True)
        torch.save(saved | {"model": other["model"], "iteration": 2}, folder / "model_optim_rng.pt")
    with pytest.raises(CkptconvError, match="RNG state"):
        plan(tmp_path, "mcore")
    assert plan(tmp_path, "mcore", optimizer="drop").plan.about["iteration"] == 2


def test_plan_says_what_was_written_for(tmp_path: Path) -> None:
    about = plan(QWEN / "hf", "legacy").plan.about
    assert about["mcore_version"] == "0.16"
    notes = about["format_notes"]
    assert isinstance(notes, list)
    base = json.loads((QWEN / "hf" / "config.json").read_text())["rope_theta"]
    assert (base == 10000) == (not notes)


UNEVEN: dict[str, tuple[dict[str, Any], dict[str, object]]] = {
    "smaller first stage": ({"pp": 2, "pp_layers": "1,3"}, {"decoder_first_pipeline_num_layers": 1}),
    "smaller last stage": ({"pp": 3, "pp_layers": "2,1,1"}, {"decoder_first_pipeline_num_layers": 2}),
    "layout string": ({"pp": 4, "pp_layers": "0,2,1,1"}, {"pipeline_model_parallel_layout": "E|t*2|t|tL"}),
    "virtual stages": (
        {"pp": 2, "vpp": 2},
        {"virtual_pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    ),
    "virtual stages, uneven": (
        {"pp": 2, "vpp": 2, "pp_layers": "1,0,2,1"},
        {"pipeline_model_parallel_layout": "Et||t*2|tL"},
    ),
}


@pytest.mark.parametrize("what", UNEVEN)
def test_stages_are_said_in_args_and_read_back(tmp_path: Path, what: str) -> None:
    layout, said = UNEVEN[what]
    convert(QWEN / "hf", tmp_path / "a", saver="mcore", tp=2, **layout)
    args = vars(open_rank(tmp_path / "a" / "iter_0000001" / "mp_rank_01_000")["args"])
    assert {name: args[name] for name in said} == said
    convert(
        tmp_path / "a",
        tmp_path / "b",
        tp=2,
        pp=2,
        vpp=1,
        pp_layers="2,2",
        saver_options={"mcore_version": "0.12", "te_version": "1.11"},
    )
    for folder in (QWEN / "out-v012-te-tp2pp2" / "iter_0000001").iterdir():
        ours = dict(models(open_rank(tmp_path / "b" / "iter_0000001" / folder.name, safely=False)))
        for name, value in models(open_rank(folder, safely=False)):
            assert not isinstance(value, torch.Tensor) or torch.equal(ours[name], value), name


@pytest.mark.parametrize(
    ("asked", "kept"), [(None, "mcore-local"), ("transformer_engine", "mcore"), ("local", "mcore-local")]
)
def test_reshard_keeps_the_modules_unless_told_otherwise(tmp_path: Path, asked: str | None, kept: str) -> None:
    convert(QWEN / "hf", tmp_path / "local", saver="mcore", saver_options={"transformer_impl": "local"})
    options: dict[str, object] = {} if asked is None else {"transformer_impl": asked}
    convert(tmp_path / "local", tmp_path / "again", tp=2, saver_options=options)
    assert load(tmp_path / "again").origin.mapping == kept
