"""FormatContract: what every format promises, as tests that its author inherits."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import MISSING, fields, is_dataclass, replace
from itertools import product
from pathlib import PurePosixPath
from typing import Any

import pytest

from ckptconv.checkpoint import Checkpoint, Key
from ckptconv.compare import compare
from ckptconv.config import ModelConfig
from ckptconv.errors import CkptconvError, UsageError
from ckptconv.formats import Format, ReadOnly, Request
from ckptconv.formats.hf import Hf
from ckptconv.registry import BUILT_IN, CHOICES, formats, make_options
from ckptconv.testing.checkpoints import WEIGHTS
from ckptconv.testing.damage_contract import DamageContract
from ckptconv.testing.workbench import (
    NO_LANGUAGE_MODELS,
    PARTS_ALONE,
    Bench,
    StopAfter,
    Stopped,
    bytes_read,
    erase_payload,
    payload,
    run,
    tree,
    write_hollow,
)

NOT_COMPARED = {"family", "raw", "vocab", "vocab_rows", "dtype", "towers"}
BIG: dict[str, Any] = {"hidden_size": 2048, "head_dim": 256, "intermediate_size": 8192, "vocab_size": 32000}


def same(a: Checkpoint, b: Checkpoint) -> None:
    """Equal in canonical form, tensor bytes and all."""
    verdict = compare(a, b)
    assert verdict.same, "\n".join(f"{d.kind}: {d.name}: {d.detail}" for d in verdict.differences[:10])


def described(config: ModelConfig) -> dict[str, object]:
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in NOT_COMPARED}


class FormatContract(DamageContract):
    """Subclass it as `class TestMine(FormatContract): format = Mine()`; see FormatBase for what else can be stated."""

    # what it is called and what it can be told

    def test_name_and_summary_are_said(self) -> None:
        assert self.format.name.isascii()
        assert self.format.name == self.format.name.lower().strip()
        assert len(self.format.summary.split()) > 1
        assert "\n" not in self.format.summary

    def test_no_name_belongs_to_another_format(self) -> None:
        own = [self.format.name, *self.format.aliases]
        assert len(set(own)) == len(own)
        for name, (_, other) in formats().items():
            if name != self.format.name:
                assert not {name, *other.aliases} & set(own), f"{name} has one of these names"

    def test_options_are_frozen_dataclasses(self) -> None:
        for kind in (self.format.Load, self.format.Save):
            assert is_dataclass(kind)
            assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
            hash(kind())

    def test_every_option_has_a_default_and_a_help_text(self) -> None:
        for kind in (self.format.Load, self.format.Save):
            for option in fields(kind):
                assert (option.default, option.default_factory) != (MISSING, MISSING), option.name
                assert len(str(option.metadata.get("help", ""))) > 10, f"{option.name} has no help text"

    def test_option_that_does_not_exist_is_a_usage_error(self) -> None:
        for side, kind in (("loader", self.format.Load), ("saver", self.format.Save)):
            with pytest.raises(UsageError, match="no-such-thing"):
                make_options(kind, {"no-such-thing": "1"}, side, self.format.name)

    def test_only_the_choices_of_an_option_are_taken(self) -> None:
        for side, kind in (("loader", self.format.Load), ("saver", self.format.Save)):
            for option in fields(kind):
                choices = option.metadata.get(CHOICES, ())
                for choice in choices:
                    made = make_options(kind, {option.name: str(choice)}, side, self.format.name)
                    assert getattr(made, option.name) == choice
                if choices:
                    with pytest.raises(UsageError, match=str(choices[0])):
                        make_options(kind, {option.name: "987"}, side, self.format.name)

    def test_usage_names_the_result(self, bench: Bench) -> None:
        text = self.format.usage(bench.stored(bench.source(), {}), "some/where", self.format.Save())
        assert "some/where" in text

    # recognising folders

    def test_its_own_folders_are_recognised(self, bench: Bench, topology: dict[str, int]) -> None:
        assert self.format.sniff(bench.write(bench.stored(bench.source(), topology)))

    def test_nothing_else_is_recognised(self, bench: Bench) -> None:
        root = bench.folder
        (root / "empty").mkdir()
        (root / "junk").mkdir()
        (root / "junk" / "notes.txt").write_text("hello")
        (root / "junk" / "index.json").write_text('{"hello": 1}')
        (root / "file.bin").write_bytes(b"\0" * 64)
        for name in ("empty", "junk", "file.bin", "missing"):
            assert self.format.sniff(root / name) is False, name

    def test_folders_of_other_formats_are_not_recognised(self, bench: Bench) -> None:
        for name, other in self._others():
            if isinstance(other, ReadOnly) or name in PARTS_ALONE:
                continue  # nobody but its own tests can write one
            theirs = Bench(other, bench.folder / name, NO_LANGUAGE_MODELS.get(name, "llama"))
            folder = theirs.write(theirs.stored(theirs.source(), {}))
            assert self.format.sniff(folder) is False, f"it takes {name} folders for its own"

    def test_other_formats_do_not_recognise_its_folders(self, bench: Bench) -> None:
        folder = bench.write(bench.stored(bench.source(), {}))
        for name, other in self._others():
            assert other.sniff(folder) is False, f"{name} takes them for its own"

    def _others(self) -> list[tuple[str, Format]]:
        known = formats()
        return [(name, known[name][1]) for name in BUILT_IN if name != self.format.name]

    # saving

    def test_round_trip_gives_the_same_model(self, bench: Bench, model: str, topology: dict[str, int]) -> None:
        checkpoint = bench.source(model)
        back = bench.read(bench.write(bench.stored(checkpoint, topology)))
        same(checkpoint, back)
        assert described(back.config) == described(checkpoint.config)

    def test_every_saver_option_gives_the_same_model(self, bench: Bench, model: str, option: dict[str, object]) -> None:
        checkpoint = bench.source(model)
        same(checkpoint, bench.read(bench.write(bench.stored(checkpoint, {}, option), options=option)))

    def test_every_dtype_is_kept(self, bench: Bench, dtype: str) -> None:
        checkpoint = bench.source(dtype=dtype)
        back = bench.read(bench.write(bench.stored(checkpoint, {})))
        assert {t.dtype.name for t in back.tensors.values()} == {dtype}
        same(checkpoint, back)

    def test_padding_of_the_vocabulary_is_taken_away_again(self, bench: Bench, topology: dict[str, int]) -> None:
        checkpoint = bench.source()
        stored = bench.stored(checkpoint, topology)
        assert stored.config.vocab_rows >= checkpoint.config.vocab_rows
        back = bench.read(bench.write(stored)).config
        assert (back.vocab or back.vocab_rows) == checkpoint.config.vocab_rows

    def test_segments_tile_every_file(self, bench: Bench, model: str, topology: dict[str, int]) -> None:
        for file in bench.plan(bench.stored(bench.source(model), topology)).files:
            at = 0
            for segment in file.segments:
                assert segment.offset == at, f"{file.path}: a gap or an overlap at {at}"
                at += segment.nbytes
            assert at == file.size, file.path

    def test_every_stored_byte_is_in_the_plan(self, bench: Bench, topology: dict[str, int]) -> None:
        stored = bench.stored(bench.source(), topology)
        held = sum(t.nbytes for tensors in stored.ranks.values() for t in tensors.values())
        assert sum(segment.nbytes for _, segment in payload(bench.plan(stored))) == held

    def test_paths_stay_inside_the_folder(self, bench: Bench, topology: dict[str, int]) -> None:
        paths = [PurePosixPath(f.path) for f in bench.plan(bench.stored(bench.source(), topology)).files]
        assert len(set(paths)) == len(paths)
        assert not any(p.is_absolute() or ".." in p.parts or p.name == "ckptconv.json" for p in paths)

    def test_weights_are_not_read_to_plan(self, bench: Bench, topology: dict[str, int]) -> None:
        checkpoint = bench.source()
        (bench.folder / "source" / WEIGHTS).unlink()
        assert bench.plan(bench.stored(checkpoint, topology)).files

    def test_nothing_is_written_to_plan(self, bench: Bench, topology: dict[str, int]) -> None:
        checkpoint = bench.source()
        before = sorted(bench.folder.rglob("*"))
        bench.plan(bench.stored(checkpoint, topology))
        assert sorted(bench.folder.rglob("*")) == before

    def test_same_plan_twice_and_through_pickle(self, bench: Bench, topology: dict[str, int]) -> None:
        checkpoint = bench.source()
        plan = bench.plan(bench.stored(checkpoint, topology))
        assert bench.plan(bench.stored(checkpoint, topology)) == plan
        assert pickle.loads(pickle.dumps(plan)) == plan

    def test_same_bytes_from_another_place(self, bench: Bench, model: str) -> None:
        """Neither a path nor a time is in the files."""
        first = tree(bench.write(bench.stored(bench.source(model), self.topologies[0])))
        other = Bench(self.format, bench.folder / "elsewhere")
        assert tree(other.write(other.stored(other.source(model), self.topologies[0]), "other name")) == first

    def test_layout_it_cannot_hold_is_refused(self, bench: Bench, refused: dict[str, int]) -> None:
        with pytest.raises(CkptconvError):
            bench.plan(bench.stored(bench.source(), refused))

    # running its plans

    @pytest.mark.parametrize("advances", [1, 2, 5])
    def test_stopped_run_is_continued_to_the_same_bytes(self, bench: Bench, advances: int) -> None:
        plan = bench.plan(bench.stored(bench.source(), self.topologies[-1] if self._dense() else {}))
        run(plan, bench.folder / "at once")
        try:
            run(plan, bench.folder / "stopped", StopAfter(advances))
        except Stopped:
            assert not (bench.folder / "stopped").exists()
            run(plan, bench.folder / "stopped")
        assert tree(bench.folder / "stopped") == tree(bench.folder / "at once")

    # loading

    def test_layout_is_told_from_the_files(self, bench: Bench, model: str, topology: dict[str, int]) -> None:
        stored = bench.stored(bench.source(model), topology)
        back = bench.load(bench.hollow(stored))
        assert back.topology.stages == stored.topology.stages
        for name in ("tp", "pp", "vpp", "ep"):
            assert back.topology.degree(name) == stored.topology.degree(name)
        assert set(back.ranks) == set(back.topology.ranks())

    def test_names_and_shapes_come_back(self, bench: Bench, model: str, topology: dict[str, int]) -> None:
        stored = bench.stored(bench.source(model), topology)
        back = bench.load(bench.hollow(stored))
        assert back.mapping.name == stored.mapping.name
        for rank, tensors in stored.ranks.items():
            assert {k: t.shape for k, t in back.ranks[rank].items()} == {k: t.shape for k, t in tensors.items()}

    def test_format_says_its_name_and_where_ranks_lie(self, bench: Bench, topology: dict[str, int]) -> None:
        back = bench.load(bench.write(bench.stored(bench.source(), topology)))
        assert back.format == self.format.name
        assert set(back.places) == set(back.ranks)
        assert all(back.places.values())

    def test_loading_depends_on_no_weight(self, bench: Bench, topology: dict[str, int]) -> None:
        plan = bench.plan(bench.stored(bench.source(), topology))
        run(plan, bench.folder / "result")
        before = bench.load(bench.folder / "result")
        erase_payload(plan, bench.folder / "result")
        assert bench.load(bench.folder / "result").ranks == before.ranks

    def test_loading_a_large_model_reads_headers_only(self, bench: Bench) -> None:
        plan = bench.plan(bench.stored(bench.source(sparse=True, **BIG), {}))
        write_hollow(plan, bench.folder / "big")
        self.format.sniff(bench.folder / "big")
        before = bytes_read()
        bench.read(bench.folder / "big")
        assert bytes_read() - before < 2_000_000 < plan.nbytes // 100

    def test_loading_leaves_the_folder_alone(self, bench: Bench) -> None:
        folder = bench.write(bench.stored(bench.source(), {}))
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
        bench.read(folder)
        assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before

    def test_loading_twice_gives_the_same(self, bench: Bench) -> None:
        folder = bench.write(bench.stored(bench.source(), {}))
        first, second = bench.load(folder), bench.load(folder)
        assert first.ranks == second.ranks
        assert first.config == second.config
        assert first.topology == second.topology

    def test_folder_may_be_moved(self, bench: Bench) -> None:
        checkpoint = bench.source()
        folder = bench.write(bench.stored(checkpoint, {}))
        shutil.move(folder, bench.folder / "moved here")
        same(checkpoint, bench.read(bench.folder / "moved here"))

    # from its folders to others

    def test_written_again_in_the_same_layout_it_is_the_same(self, bench: Bench, topology: dict[str, int]) -> None:
        first = bench.write(bench.stored(bench.source(), topology))
        again = bench.write(bench.stored(bench.read(first), topology), "again")
        ours = ("ckptconv.json",)
        one, two = ({k: v for k, v in tree(p).items() if k not in ours} for p in (first, again))
        assert one == two

    def test_every_layout_can_be_made_from_every_other(self, bench: Bench) -> None:
        wanted = [t for t in self.topologies if "ep" not in t]
        checkpoint = bench.source()
        folders = [bench.write(bench.stored(checkpoint, t), f"from {i}") for i, t in enumerate(wanted)]
        for (i, folder), (j, topology) in product(enumerate(folders), enumerate(wanted)):
            if i != j:
                stored = bench.stored(bench.read(folder), topology)
                same(checkpoint, bench.read(bench.write(stored, f"{i} to {j}")))

    def test_hugging_face_files_come_back_byte_for_byte(self, bench: Bench, model: str) -> None:
        if not self.to_hf:
            pytest.skip("the format says it does not keep what a Hugging Face folder needs")
        checkpoint = bench.source(model)
        back = bench.read(bench.write(bench.stored(checkpoint, self.topologies[0])))
        hf = Bench(Hf(), bench.folder)
        folder = hf.write(hf.stored(replace(back, replicas=()), {}), "hf again")
        assert (folder / WEIGHTS).read_bytes() == (bench.folder / "source" / WEIGHTS).read_bytes()

    def test_request_is_taken_whole(self, bench: Bench) -> None:
        """A loader is told the common options, and needs none of them."""
        folder = bench.write(bench.stored(bench.source(), {}))
        options = make_options(self.format.Load, {}, "loader", self.format.name)
        stored = self.format.load(folder, options, Request(check=True))
        assert Key in {type(k) for tensors in stored.ranks.values() for k in tensors}
