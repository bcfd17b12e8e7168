"""A result that is one file: what it replaces and what it never touches, faults on the way, and its manifest beside it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ckptconv.checkpoint import Key, Stored
from ckptconv.config import ModelConfig
from ckptconv.errors import FormatError, PlanError, ResumeError, UsageError
from ckptconv.executor import destination, system
from ckptconv.executor.execute import ExecuteOptions, execute
from ckptconv.executor.fingerprint import fingerprint
from ckptconv.executor.manifest import damage, read_manifest
from ckptconv.executor.manifest_check import check_manifest
from ckptconv.mapping_files import load_mapping
from ckptconv.pipeline import check_places
from ckptconv.plan import File, Plan, Segment
from ckptconv.testing.plans import carve, expected, mixed_bytes, mixed_plan, read_tree, write_source
from ckptconv.topology import Rank, even
from tests.executor.child import single_plan
from tests.executor.test_faults import Meddler, beside, failing, is_output

SCALE = 2
BOTH = ["out.nemo", "out.nemo.ckptconv.json"]
FORCE = ExecuteOptions(force=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("single") / "source.bin", mixed_bytes(SCALE))


@pytest.fixture(scope="module")
def made(source: Path) -> Path:
    path = source.with_name("out.nemo")
    execute(single_plan(source, SCALE), path)
    return path


@pytest.fixture
def plan(source: Path) -> Plan:
    return single_plan(source, SCALE)


@pytest.fixture
def dst(tmp_path: Path) -> Path:
    return tmp_path / "out.nemo"


def assert_whole(plan: Plan, dst: Path) -> None:
    """The file is right, its manifest speaks of it, and nothing else is there."""
    assert [dst.read_bytes()] == list(expected(plan).values())
    manifest = read_manifest(dst)
    assert manifest is not None
    assert damage(dst, manifest) == []
    assert beside(dst.parent) == [dst.name, f"{dst.name}.ckptconv.json"]


def small(data: bytes, about: str = "") -> Plan:
    return Plan((File("title", len(data), (Segment(0, data),)),), about={"told": about}, single=True)


class TestDestination:
    def test_absent_is_made(self, plan: Plan, dst: Path) -> None:
        report = execute(plan, dst)
        assert_whole(plan, dst)
        assert (report.bytes_written, report.bytes_resumed) == (plan.nbytes, 0)

    def test_file_is_refused_and_forced(self, plan: Plan, dst: Path) -> None:
        dst.write_text("precious")
        with pytest.raises(PlanError, match=r"out\.nemo exists \(--force replaces it"):
            execute(plan, dst)
        assert read_tree(dst.parent) == {"out.nemo": b"precious"}
        execute(plan, dst, FORCE)
        assert_whole(plan, dst)

    def test_older_result_is_replaced_with_its_manifest(self, plan: Plan, dst: Path) -> None:
        execute(small(b"old"), dst)
        Path(f"{dst}.replaced").write_text("not ours")
        execute(plan, dst, FORCE)
        Path(f"{dst}.replaced").unlink()
        assert_whole(plan, dst)

    def test_manifest_alone_is_refused_and_forced(self, plan: Plan, dst: Path) -> None:
        Path(f"{dst}.ckptconv.json").write_text("precious")
        with pytest.raises(PlanError, match=r"out\.nemo\.ckptconv\.json exists"):
            execute(plan, dst)
        execute(plan, dst, FORCE)
        assert_whole(plan, dst)

    @pytest.mark.parametrize("name", BOTH)
    @pytest.mark.parametrize("force", [True, False])
    def test_folder_is_never_replaced(self, plan: Plan, dst: Path, name: str, force: bool) -> None:
        (dst.parent / name).mkdir()
        with pytest.raises(PlanError, match=rf"{name} is a folder, the result is a single file"):
            execute(plan, dst, ExecuteOptions(force=force))
        assert beside(dst.parent) == [name]

    def test_pipe_is_never_replaced(self, plan: Plan, dst: Path) -> None:
        os.mkfifo(dst)
        with pytest.raises(PlanError, match="is no regular file"):
            execute(plan, dst, FORCE)
        assert beside(dst.parent) == ["out.nemo"]

    def test_missing_parent_is_refused(self, plan: Plan, dst: Path) -> None:
        with pytest.raises(PlanError, match="is not a folder: make it first"):
            execute(plan, dst / "deeper.nemo")

    def test_name_without_room_for_the_manifest_is_refused_at_once(self, plan: Plan, dst: Path) -> None:
        with pytest.raises(OSError, match="too long"):
            execute(plan, dst.with_name("x" * 245))
        assert beside(dst.parent) == []

    def test_link_is_followed(self, plan: Plan, dst: Path) -> None:
        (dst.parent / "link").symlink_to(dst)
        execute(plan, dst.parent / "link")
        assert beside(dst.parent) == ["link", *BOTH]
        manifest = read_manifest(dst.parent / "link")
        assert manifest is not None
        assert damage(dst.parent / "link", manifest) == []

    def test_source_is_never_replaced(self, dst: Path) -> None:
        write_source(dst, mixed_bytes(1))
        with pytest.raises(PlanError, match=r"out\.nemo is or holds the source .*out\.nemo"):
            execute(single_plan(dst, 1), dst, FORCE)
        assert beside(dst.parent) == ["out.nemo"]

    @pytest.mark.parametrize("other", ["out.nemo", "link", "out.nemo/inside", "."])
    def test_places_that_meet_are_refused(self, dst: Path, other: str) -> None:
        dst.touch()
        (dst.parent / "link").symlink_to(dst)
        check_places(dst, dst.with_name("other.nemo"))
        with pytest.raises(UsageError, match="are the same or one lies inside the other"):
            check_places(dst, dst.parent / other)

    def test_too_little_disk_is_refused(self, plan: Plan, dst: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(PlanError, match="has 1,000 bytes free"):
            execute(plan, dst)
        assert beside(dst.parent) == []

    def test_plan_of_more_or_final_files_is_refused(self, source: Path, dst: Path) -> None:
        several = replace(mixed_plan(source, SCALE), single=True)
        final = replace(small(b""), files=(replace(small(b"").files[0], final=True),))
        for plan in (several, final, Plan((), single=True)):
            with pytest.raises(PlanError, match="the plan of a single file has"):
                execute(plan, dst)
        assert beside(dst.parent) == []


class TestFaults:
    def test_full_disk_at_allocation_leaves_the_old(
        self, plan: Plan, dst: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        execute(small(b"old"), dst)
        monkeypatch.setattr("ckptconv.executor.outputs.allocate", failing(system.allocate, 0, errno.ENOSPC))
        with pytest.raises(OSError, match=r"No space left"):
            execute(plan, dst, FORCE)
        assert_whole(small(b"old"), dst)

    @pytest.mark.parametrize("after", [0, 15, 30])
    def test_full_disk_later_keeps_what_is_finished(
        self, plan: Plan, dst: Path, monkeypatch: pytest.MonkeyPatch, after: int
    ) -> None:
        monkeypatch.setattr("ckptconv.executor.worker.BARRIER", 1 << 20)
        real = os.pwrite
        out = failing(real, after, errno.ENOSPC)
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: (out if is_output(fd) else real)(fd, data, at))
        with pytest.raises(OSError, match=r"No space left.*out\.nemo\.partial"):
            execute(plan, dst, ExecuteOptions(workers=1))
        assert beside(dst.parent) == (["out.nemo.journal", "out.nemo.partial"] if after else [])
        monkeypatch.undo()
        report = execute(plan, dst)
        assert (report.bytes_resumed > 0) == (after > 0)
        assert report.bytes_written <= plan.nbytes - report.bytes_resumed
        assert_whole(plan, dst)

    def test_full_disk_for_the_manifest_keeps_the_work(
        self, plan: Plan, dst: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ckptconv.executor.complete.write_file", failing(None, 0, errno.ENOSPC))
        with pytest.raises(OSError, match="No space left"):
            execute(plan, dst)
        assert beside(dst.parent) == ["out.nemo.journal", "out.nemo.partial"]
        monkeypatch.undo()
        assert execute(plan, dst).bytes_resumed > 0
        assert_whole(plan, dst)

    @pytest.mark.parametrize("links", [True, False])
    @pytest.mark.parametrize("name", BOTH)
    @pytest.mark.parametrize("kind", ["file", "folder", "dead link"])
    def test_what_appears_meanwhile_is_not_touched(
        self, plan: Plan, dst: Path, monkeypatch: pytest.MonkeyPatch, links: bool, name: str, kind: str
    ) -> None:
        if not links:
            monkeypatch.setattr(os, "link", failing(os.link, 0, errno.EPERM))
        there = dst.parent / name

        def appear() -> None:
            there.write_text("mine") if kind == "file" else there.mkdir() if kind == "folder" else there.symlink_to("x")

        with pytest.raises(PlanError, match=rf"{name} appeared meanwhile"):
            execute(plan, dst, progress=Meddler(appear))
        assert there.is_dir() or there.is_symlink() or there.read_text() == "mine"
        there.rmdir() if there.is_dir() else there.unlink()
        assert execute(plan, dst).bytes_written == 0
        assert_whole(plan, dst)

    def test_folder_that_appears_meanwhile_is_not_touched_even_by_force(self, plan: Plan, dst: Path) -> None:
        with pytest.raises(PlanError, match=r"out\.nemo appeared meanwhile"):
            execute(plan, dst, FORCE, Meddler(dst.mkdir))
        assert list(dst.iterdir()) == []

    def test_file_system_without_links_is_fine(self, plan: Plan, dst: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "link", failing(os.link, 0, errno.ENOSYS))
        execute(plan, dst)
        assert_whole(plan, dst)


class Stopped(BaseException):
    """No code may catch it: what a kill is, at one chosen step."""


def stop(*args: Any) -> None:
    raise Stopped


class TestLeftovers:
    """What a run leaves that was stopped at its end, seen by other runs and by `--check`."""

    @pytest.fixture
    def half(self, dst: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
        """The file is in place, its manifest not yet."""
        old = small(b"half in place", "first")
        monkeypatch.setattr(destination, "_put_manifest_beside", stop)
        with pytest.raises(Stopped):
            execute(old, dst)
        monkeypatch.undo()
        assert beside(dst.parent) == ["out.nemo", "out.nemo.journal", "out.nemo.partial"]
        return old

    def test_same_command_finishes(self, half: Plan, dst: Path) -> None:
        assert execute(half, dst).bytes_written == 0
        assert_whole(half, dst)

    def test_another_plan_finishes_it_first(self, half: Plan, plan: Plan, dst: Path) -> None:
        with pytest.raises(PlanError, match=r"exists \(--force"):
            execute(plan, dst)
        assert_whole(half, dst)
        execute(plan, dst, FORCE)
        assert_whole(plan, dst)

    def test_a_plan_of_a_folder_finishes_it_first(self, half: Plan, source: Path, dst: Path) -> None:
        with pytest.raises(PlanError, match="is not an empty folder"):
            execute(mixed_plan(source, SCALE), dst)
        assert_whole(half, dst)

    def test_folder_in_place_is_finished_by_a_plan_of_a_file(
        self, plan: Plan, source: Path, dst: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = mixed_plan(source, SCALE)
        execute(folder, dst)
        other = replace(folder, about={"told": "other"})
        monkeypatch.setattr(destination, "_remove", stop)
        with pytest.raises(Stopped):
            execute(other, dst, FORCE)
        monkeypatch.undo()
        with pytest.raises(PlanError, match="is a folder, the result is a single file"):
            execute(plan, dst, FORCE)
        assert beside(dst.parent) == ["out.nemo"]
        assert json.loads((dst / "ckptconv.json").read_text())["about"] == {"told": "other"}

    def test_unfinished_folder_is_not_continued_as_a_file(self, plan: Plan, source: Path, dst: Path) -> None:
        def interrupt() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            execute(mixed_plan(source, SCALE), dst, progress=Meddler(interrupt))
        with pytest.raises(ResumeError, match="other inputs or options"):
            execute(plan, dst)
        assert fingerprint(plan).digest != fingerprint(replace(plan, single=False)).digest

    def test_check_says_what_to_do(self, half: Plan, dst: Path) -> None:
        (note,) = check_manifest(dst, stored(dst))
        assert "there is no out.nemo.ckptconv.json" in note
        assert "out.nemo.partial: a run that was to make this file was stopped, the same command finishes it" in note
        execute(half, dst)
        assert check_manifest(dst, stored(dst)) == ()


def stored(path: Path) -> Stored:
    """A checkpoint whose one tensor is the file's first bytes."""
    (tensor,) = carve(path, [(4,)])
    config = ModelConfig(
        family="hf-llama", layers=2, hidden=8, heads=4, kv_heads=2, head_dim=2, ffn=12, vocab_rows=16, vocab=13
    )
    return Stored(
        "nemo",
        load_mapping("mcore"),
        frozenset(),
        even(layers=2),
        config,
        {Rank(): {Key("w"): tensor}},
    )


class TestManifest:
    @pytest.fixture
    def copy(self, made: Path, tmp_path: Path) -> Path:
        """The two files under other names."""
        shutil.copy(f"{made}.ckptconv.json", tmp_path / "moved.nemo.ckptconv.json")
        return Path(shutil.copy(made, tmp_path / "moved.nemo"))

    def test_equal_inputs_elsewhere_give_equal_bytes(self, made: Path, tmp_path: Path) -> None:
        source = write_source(tmp_path / "source.bin", mixed_bytes(SCALE))
        execute(single_plan(source, SCALE), tmp_path / "another.nemo", ExecuteOptions(workers=3))
        assert (tmp_path / "another.nemo").read_bytes() == made.read_bytes()
        text = Path(f"{made}.ckptconv.json").read_text()
        assert (tmp_path / "another.nemo.ckptconv.json").read_text() == text
        assert "out.nemo" not in text

    def test_both_may_be_renamed(self, copy: Path) -> None:
        manifest = read_manifest(copy)
        assert manifest is not None
        assert list(manifest.files) == ["moved.nemo"]
        assert damage(copy, manifest) == []
        assert check_manifest(copy, stored(copy)) == ()

    @pytest.mark.parametrize("at", [0, 100, 3_000_000, -1])
    def test_any_flipped_bit_is_found(self, copy: Path, at: int) -> None:
        data = bytearray(copy.read_bytes())
        data[at] ^= 4
        copy.write_bytes(data)
        with pytest.raises(FormatError, match=r"moved\.nemo: is not what ckptconv wrote, by its moved\.nemo\.ckpt"):
            check_manifest(copy, stored(copy))

    def test_file_that_was_cut_or_replaced_is_found(self, copy: Path) -> None:
        copy.write_bytes(b"something else")
        advice = r"moved\.nemo: has 14 bytes, expected [\d,]+\nIf another file .* remove moved\.nemo\.ckptconv\.json"
        with pytest.raises(FormatError, match=advice):
            check_manifest(copy, stored(copy))

    def test_damaged_tensor_is_named(self, copy: Path, plan: Plan) -> None:
        segment = next(s for s in plan.files[0].segments if s.name == "rank_1/model.pt: row")
        with copy.open("r+b") as file:
            file.seek(segment.offset)
            file.write(bytes(8))
        with pytest.raises(FormatError, match=r"moved\.nemo: tensor rank_1/model\.pt: row is not the one"):
            check_manifest(copy, stored(copy))

    def test_without_manifest_a_note_says_so(self, copy: Path) -> None:
        Path(f"{copy}.ckptconv.json").unlink()
        (note,) = check_manifest(copy, stored(copy))
        assert note.startswith("--check: there is no moved.nemo.ckptconv.json, so only checksums inside")
        assert "stopped" not in note

    def test_manifest_of_a_folder_is_refused(self, source: Path, copy: Path, tmp_path: Path) -> None:
        execute(mixed_plan(source, SCALE), tmp_path / "folder")
        shutil.copy(tmp_path / "folder" / "ckptconv.json", f"{copy}.ckptconv.json")
        with pytest.raises(FormatError, match=r"4 files are listed, expected moved\.nemo alone"):
            read_manifest(copy)

    def test_file_inside_a_folder_that_is_a_result_has_none_of_its_own(self, source: Path, tmp_path: Path) -> None:
        execute(mixed_plan(source, SCALE), tmp_path / "folder")
        inside = tmp_path / "folder" / "deep" / "er" / "model.safetensors"
        assert "there is no model.safetensors.ckptconv.json" in check_manifest(inside, stored(inside))[0]
        assert check_manifest(tmp_path / "folder", stored(inside)) == ()
