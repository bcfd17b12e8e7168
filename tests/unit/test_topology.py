"""Ranks, stages and layer counts, against Megatron-LM's documented numbering."""

from __future__ import annotations

import pytest

from ckptconv.errors import TopologyError, UsageError
from ckptconv.layout import Layout, layout_from
from ckptconv.topology import Rank, Topology, account_counts, even, even_counts, parse_layout, with_stages


def test_virtual_stages_number_layers_chunk_first() -> None:
    """8 layers, pp 2, vpp 2: offset(p, v) = v * 4 + p * 2."""
    topology = even(8, pp=2, vpp=2)
    held = {(p, v): topology.stage(Rank(pp=p, vpp=v)).layers for p in range(2) for v in range(2)}
    assert held == {(0, 0): (0, 1), (1, 0): (2, 3), (0, 1): (4, 5), (1, 1): (6, 7)}
    assert topology.stage(Rank(pp=0, vpp=0)).roles == {"embed"}
    assert topology.stage(Rank(pp=1, vpp=1)).roles == {"norm", "head", "head_apart"}


def test_single_stage_has_every_role_but_a_head_apart() -> None:
    assert even(4).stages[0].roles == {"embed", "norm", "head"}


@pytest.mark.parametrize(
    ("tp", "ep", "etp", "places"),
    [
        (1, 1, 1, {(0, 0, 0)}),
        (2, 1, 2, {(0, 0, 0), (1, 0, 1)}),
        (2, 2, 2, {(0, 0, 0), (1, 0, 1), (0, 1, 0), (1, 1, 1)}),
        (2, 4, 1, {(0, 0, 0), (1, 1, 0), (0, 2, 0), (1, 3, 0)}),
        (4, 2, 1, {(0, 0, 0), (1, 1, 0), (2, 0, 0), (3, 1, 0)}),
    ],
)
def test_processes_pair_dense_and_expert_ranks_as_megatron_numbers_them(
    tp: int, ep: int, etp: int, places: set[tuple[int, int, int]]
) -> None:
    assert {(r.tp, r.ep, r.etp) for r in even(1, tp=tp, ep=ep, etp=etp).ranks()} == places


@pytest.mark.parametrize(
    ("kwargs", "counts"),
    [
        ({"layers": 8, "pp": 4, "vpp": 1}, [[2, 2, 2, 2]]),
        ({"layers": 10, "pp": 4, "vpp": 1, "first": 3, "last": 1}, [[3, 3, 3, 1]]),
        ({"layers": 7, "pp": 3, "vpp": 1, "last": 1}, [[3, 3, 1]]),
        ({"layers": 12, "pp": 2, "vpp": 2, "first": 4}, [[2, 4], [2, 4]]),
    ],
)
def test_counts(kwargs: dict[str, int], counts: list[list[int]]) -> None:
    assert even_counts(**kwargs) == counts


def test_account_counts_make_the_ends_shorter() -> None:
    assert account_counts(6, 4, 1, embedding=True, loss=True) == [[1, 2, 2, 1]]
    assert account_counts(7, 2, 2, embedding=True, loss=False) == [[1, 2], [2, 2]]


@pytest.mark.parametrize(
    ("text", "pp", "layers", "counts"),
    [
        ("Ettt|(tt|)*2,L", 4, 7, [[3, 2, 2, 0]]),
        ("Et|t*3|tt|tL", 2, 7, [[1, 3], [2, 1]]),
        ("E|t*4|L", 3, 4, [[0, 4, 0]]),
    ],
)
def test_layout_strings(text: str, pp: int, layers: int, counts: list[list[int]]) -> None:
    assert parse_layout(text, pp, layers) == counts


@pytest.mark.parametrize("text", ["Et|tmL", "t|EtL", "Et|xL", "Et|t|L"])
def test_layout_string_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(TopologyError):
        parse_layout(text, 2, 2)


@pytest.mark.parametrize(
    "build",
    [
        lambda: even(7, pp=2),
        lambda: even_counts(8, 2, 2, first=3),
        lambda: with_stages(Topology(pp=2), [[2, 1]]).check(4),
        lambda: with_stages(Topology(pp=2), [[2]]).check(2),
        lambda: Topology(tp=0).check(1),
        lambda: even(4, tp=3, etp=2).check(4),
        lambda: even(4, tp=2).cut("kv", "tp", 6, 3, Rank(tp=1)),
        lambda: even(4, ep=3).dealt("ep", 4, Rank(ep=1), "experts"),
        lambda: account_counts(6, 4, 1, embedding=True, loss=False),
    ],
)
def test_impossible_layouts_are_refused(build: object) -> None:
    with pytest.raises(TopologyError):
        build()  # type: ignore[operator]


def test_reshard_keeps_what_is_not_said() -> None:
    source = with_stages(Topology(tp=2, pp=2, etp=2), [[3, 1]])
    assert Layout(tp=4).topology(4, source, keep=True) == with_stages(Topology(tp=4, pp=2, etp=4), [[3, 1]])
    assert Layout(pp=1).topology(4, source, keep=True).stages[0].layers == (0, 1, 2, 3)
    assert Layout().topology(4, source, keep=False) == even(4)


def test_replicated_cut_gives_neighbours_the_same_unit() -> None:
    topology = even(1, tp=4)
    cuts = [topology.cut("kv", "tp", 12, 2, Rank(tp=r), replicate=True) for r in range(4)]
    assert [(c.lo, c.hi) for c in cuts] == [(0, 6), (0, 6), (6, 12), (6, 12)]


def test_degree_with_source_is_checked() -> None:
    layout = layout_from({"tp": "2:4", "pp": None}, None)
    layout.check_source(even(4, tp=2))
    with pytest.raises(TopologyError, match=r"tp 2 \(it has 1\)"):
        layout.check_source(even(4))


@pytest.mark.parametrize("text", ["x", "1:2:3", "-1", "2:", ":2", "1.5", ""])
def test_malformed_degree_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        layout_from({"tp": text}, None)


@pytest.mark.parametrize("text", ["3,x", "3,,4", "3;4"])
def test_malformed_pp_layers_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        layout_from({"pp": "2"}, text)


def test_pp_layers_must_add_up() -> None:
    with pytest.raises(TopologyError, match="needs 2"):
        layout_from({"pp": "2"}, "1,2,3").topology(6, even(6), keep=False)
    with pytest.raises(TopologyError, match="model has 6"):
        layout_from({"pp": "2"}, "1,2").topology(6, even(6), keep=False)
