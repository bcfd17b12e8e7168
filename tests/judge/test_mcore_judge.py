"""Our Megatron-Core files before the judge: loaded strictly, every rank bit for bit what Megatron-Core's sharding gives, logits equal."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptconv
from tests.judge.fill import RankTensors, filled_states, same_bits
from tests.judge.judge import iteration_folder, judge_logits, read_rank
from tests.judge.ranks import Layout
from tests.judge.spec import layout_from_args

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
DIVISOR = 16
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A model, the layout Megatron-Core is started with, and the layers of each stage where our command must be told."""

    kind: str
    layout: Layout
    layers: int = 4
    pp_layers: str | None = None
    experts: str = "sequential"

    @property
    def name(self) -> str:
        return "-".join(
            [self.kind, self.layout.name.replace("|", "_"), *([self.experts] if self.kind == "mixtral" else [])]
        )


CASES = [
    # column- and row-parallel weights, their biases, fc1 as [gate; up] per rank, query groups per rank, odd vocabulary
    Case("llama", Layout(tp=2, pp=2)),
    Case("llama", Layout(pp=4)),
    Case("llama-bias", Layout(tp=2, pp=2)),
    Case("llama-mha", Layout(tp=4)),
    Case("llama-head-dim", Layout(tp=2)),
    Case("llama3", Layout(tp=2)),
    Case("mistral", Layout(tp=2, pp=2)),
    Case("qwen2", Layout(tp=2, pp=2)),
    Case("qwen3", Layout(tp=2, pp=2)),
    # more ranks than key/value heads: the assembled rows are cut
    Case("llama", Layout(tp=4)),
    Case("qwen2", Layout(tp=4)),
    Case("qwen3", Layout(tp=4, pp=2)),
    # the head of a tied model: a copy of the embedding on the last of several stages, nothing with one stage
    Case("llama-tied", Layout(tp=2, pp=2)),
    Case("llama-tied", Layout(tp=2)),
    Case("qwen2-tied", Layout(pp=4)),
    # experts dealt over ep, their width cut by etp, which need not be tp
    Case("mixtral", Layout(ep=2)),
    Case("mixtral", Layout(tp=2, pp=2)),
    Case("mixtral", Layout(tp=2, ep=2, etp=1)),
    Case("mixtral", Layout(tp=2, pp=2, ep=2)),
    Case("mixtral", Layout(tp=4, ep=2, etp=2)),
    Case("mixtral", Layout(ep=4, pp=2)),
    Case("mixtral", Layout(tp=2, ep=2, pp=2), experts="grouped"),
    Case("mixtral", Layout(tp=2, ep=2, etp=1), experts="grouped"),
    # stages of unlike size, virtual stages, and both
    Case("llama", Layout(pp=2, first=1), pp_layers="1,3"),
    Case("llama", Layout(pp=4, first=1, last=3), 8, "1,2,2,3"),
    Case("llama", Layout(tp=2, pp=2, vpp=2), 8),
    Case("llama-tied", Layout(pp=2, vpp=4), 8),
    Case("llama", Layout(pp=2, vpp=2, first=2), 8, "1,3,1,3"),
    Case("llama", Layout(pp=2, count_embedding=True, count_loss=True), 6, "3,3"),
    Case("llama", Layout(pp=4, count_embedding=True, count_loss=True), 6, "1,2,2,1"),
    Case("llama", Layout(pp=2, vpp=2, stages="Ettt|tt|t|ttL"), 8, "3,2,1,2"),
    Case("mixtral", Layout(pp=4, ep=2, stages="E|tt|tt|L"), 4, "0,2,2,0"),
]
Hf = Callable[..., Path]


@pytest.fixture(scope="module")
def converted(hf: Hf, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], tuple[Path, Path]]:
    """(source, our files) of a case; each is made once."""
    made: dict[Case, Path] = {}

    def get(case: Case) -> tuple[Path, Path]:
        source = hf(case.kind, num_hidden_layers=case.layers)
        if case not in made:
            made[case] = tmp_path_factory.mktemp("ours") / "out"
            at = case.layout
            ckptconv.convert(
                source,
                made[case],
                saver="mcore",
                **{k: v for k, v in vars(at).items() if k in ("tp", "pp", "ep", "etp", "vpp") and v},
                pp_layers=case.pp_layers,
                vocab_divisor=DIVISOR,
                saver_options={"transformer_impl": "local", "experts": case.experts},
            )
        return source, made[case]

    return get


Converted = Callable[[Case], tuple[Path, Path]]
PLAIN = [
    c
    for c in CASES
    if c.pp_layers is None and c.layout.vpp is None and c.kind in {"llama", "llama-tied", "qwen2", "qwen3", "mixtral"}
]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_logits_of_our_files_equal_those_of_transformers(
    case: Case, converted: Converted, ids: torch.Tensor, expected: Callable[[Path], Any]
) -> None:
    source, ours = converted(case)
    grouped = case.experts == "grouped"
    found = judge_logits(ours, source, ids, case.layout, divisor=DIVISOR, grouped_experts=grouped)
    np.testing.assert_allclose(found, expected(source), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_models_built_from_our_args_compute_the_same(
    case: Case, converted: Converted, ids: torch.Tensor, expected: Callable[[Path], Any]
) -> None:
    """Loaded strictly, NaN where nothing is loaded; nothing is taken from the source's config."""
    source, ours = converted(case)
    layouts = {layout_from_args(args) for args in all_args(ours)}
    assert len(layouts) == 1
    layout = layouts.pop()
    assert (layout.tp, layout.pp, layout.ep) == (case.layout.tp, case.layout.pp, case.layout.ep)
    grouped = case.experts == "grouped"
    found = judge_logits(ours, source, ids, layout, from_args=True, grouped_experts=grouped)
    np.testing.assert_allclose(found, expected(source), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", [c for c in CASES if c.experts != "grouped"], ids=lambda case: case.name)
def test_every_rank_holds_what_megatron_cores_own_sharding_gives(case: Case, converted: Converted) -> None:
    """The same files and chunks, the same names in the same order, the same bits; and nothing more."""
    source, ours = converted(case)
    release = iteration_folder(ours)
    theirs = filled_states(source, case.layout, DIVISOR)
    assert sorted(p.name for p in release.iterdir()) == sorted(theirs)
    for rank, chunks in theirs.items():
        state = read_rank(release / rank / "model_optim_rng.pt")
        assert sorted(k for k in state if k.startswith("model")) == sorted(chunks)
        compare(rank, chunks, state)


def compare(rank: str, chunks: RankTensors, state: dict[str, Any]) -> None:
    for chunk, tensors in chunks.items():
        found = {k: v.numpy() for k, v in state[chunk].items() if isinstance(v, torch.Tensor)}
        assert list(found) == list(tensors), f"{rank} {chunk}"
        assert [k for k in tensors if not same_bits(found[k], tensors[k])] == [], f"{rank} {chunk}"


def all_args(ours: Path) -> list[Namespace]:
    return [read_rank(path)["args"] for path in sorted(iteration_folder(ours).glob("*/model_optim_rng.pt"))]


def test_a_wrong_file_is_noticed(converted: Converted, ids: torch.Tensor, expected: Callable[[Path], Any]) -> None:
    """The comparison has teeth: two tensors of one file exchanged move the logits."""
    source, ours = converted(CASES[0])
    path = sorted(iteration_folder(ours).glob("*/model_optim_rng.pt"))[0]
    state, kept = read_rank(path), path.read_bytes()
    one, two = (f"decoder.layers.{i}.self_attention.linear_proj.weight" for i in (0, 1))
    state["model"][one], state["model"][two] = state["model"][two], state["model"][one]
    torch.save(state, path)
    try:
        found = judge_logits(ours, source, ids, CASES[0].layout, divisor=DIVISOR)
    finally:
        path.write_bytes(kept)
    assert np.abs(found - expected(source)).max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("kind", "degrees", "words"),
    [
        ("llama", {"tp": 3}, "3"),
        ("llama", {"tp": 8}, "8"),
        ("llama", {"pp": 3}, "3"),
        ("mixtral", {"ep": 3}, "3"),
    ],
)
def test_a_layout_that_divides_nothing_is_refused(
    hf: Hf, tmp_path: Path, kind: str, degrees: dict[str, Any], words: str
) -> None:
    """Megatron-Core refuses these too: heads, layers or experts do not divide."""
    with pytest.raises(ckptconv.CkptconvError, match=words):
        ckptconv.convert(hf(kind, num_hidden_layers=4), tmp_path / "out", saver="mcore", **degrees)
    assert not (tmp_path / "out").exists()


def test_older_megatron_core_with_more_ranks_than_key_value_heads_is_refused(hf: Hf, tmp_path: Path) -> None:
    with pytest.raises(ckptconv.CkptconvError, match="key/value heads"):
        ckptconv.convert(
            hf("llama", num_hidden_layers=4),
            tmp_path / "out",
            saver="mcore",
            tp=4,
            saver_options={"mcore_version": "0.12"},
        )


@pytest.mark.parametrize("case", [CASES[0], CASES[9], CASES[19], CASES[25]], ids=lambda case: case.name)
def test_files_of_megatron_core_come_back_to_hugging_face_bit_for_bit(
    case: Case, converted: Converted, tmp_path: Path
) -> None:
    """Its own state dicts, cut by its own sharding, saved with torch.save beside our args."""
    from safetensors.numpy import load_file

    source, ours = converted(case)
    theirs = tmp_path / "theirs"
    release = theirs / iteration_folder(ours).name
    for rank, chunks in filled_states(source, case.layout, DIVISOR).items():
        state = read_rank(iteration_folder(ours) / rank / "model_optim_rng.pt")
        tensors = {name: {k: torch.from_numpy(v) for k, v in held.items()} for name, held in chunks.items()}
        (release / rank).mkdir(parents=True)
        torch.save({**state, **tensors}, release / rank / "model_optim_rng.pt")
    (theirs / "latest_checkpointed_iteration.txt").write_text("1")
    ckptconv.convert(theirs, tmp_path / "back", saver="hf", saver_options={"template": source})
    want, found = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert sorted(found) == sorted(want)
    assert [k for k in want if not same_bits(found[k], want[k])] == []
