"""The half of FormatContract about what is wrong with a folder: refused with a CkptconvError, never with anything else, never silently."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ckptconv.checkpoint import Key, Stored
from ckptconv.errors import CkptconvError, CoverageError
from ckptconv.leaves import contiguous
from ckptconv.plan import File, Plan
from ckptconv.source import Source
from ckptconv.tensor import Tensor
from ckptconv.testing.format_base import FormatBase, refusal
from ckptconv.testing.workbench import Bench, changed, payload, place, write_hollow
from ckptconv.topology import Rank

FLIPS = 60  # damaged headers tried in one test


class DamageContract(FormatBase):
    """Tests of refusals. They write through the format, break something, and read through the format."""

    def _written(self, bench: Bench, topology: dict[str, int] | None = None) -> tuple[Stored, Plan, Path]:
        stored = bench.stored(bench.source(), topology or self.topologies[-1] if self._dense() else {})
        plan = bench.plan(stored)
        return stored, plan, bench.write(stored)

    def _dense(self) -> bool:
        return "ep" not in self.topologies[-1]

    def test_path_that_is_not_there_is_refused(self, bench: Bench) -> None:
        with pytest.raises(CkptconvError):
            bench.load(bench.folder / "nothing")

    def test_empty_folder_is_refused(self, bench: Bench) -> None:
        (bench.folder / "empty").mkdir()
        with pytest.raises(CkptconvError):
            bench.load(bench.folder / "empty")

    def test_file_in_place_of_the_folder_is_refused(self, bench: Bench) -> None:
        (bench.folder / "file").write_bytes(b"not a checkpoint")
        with pytest.raises(CkptconvError):
            bench.load(bench.folder / "file")

    def test_missing_weight_file_is_refused(self, bench: Bench) -> None:
        _, plan, folder = self._written(bench)
        for file in _weight_files(plan):
            data = place(plan, folder, file.path).read_bytes()
            place(plan, folder, file.path).unlink()
            assert refusal(bench, folder), f"{file.path} is gone and nobody noticed"
            place(plan, folder, file.path).write_bytes(data)
        assert refusal(bench, folder) is None

    @pytest.mark.parametrize("left", ["nothing", "half", "all but a byte"])
    def test_truncated_weight_file_is_refused(self, bench: Bench, left: str) -> None:
        _, plan, folder = self._written(bench)
        for file in _weight_files(plan):
            data = place(plan, folder, file.path).read_bytes()
            size = {"nothing": 0, "half": len(data) // 2, "all but a byte": len(data) - 1}[left]
            place(plan, folder, file.path).write_bytes(data[:size])
            padding = plan.single and not any(data[size:])  # zeros that fill the last record of an archive
            assert padding or refusal(bench, folder), f"{file.path} has {size} of {len(data)} bytes and nobody noticed"
            place(plan, folder, file.path).write_bytes(data)

    def test_garbage_in_place_of_a_weight_file_is_refused(self, bench: Bench) -> None:
        _, plan, folder = self._written(bench)
        file = _weight_files(plan)[0]
        place(plan, folder, file.path).write_bytes(random.Random(0).randbytes(file.size))
        assert refusal(bench, folder)

    def test_folder_in_place_of_a_weight_file_is_refused(self, bench: Bench) -> None:
        _, plan, folder = self._written(bench)
        path = place(plan, folder, _weight_files(plan)[0].path)
        path.unlink()
        path.mkdir()
        assert refusal(bench, folder)

    def test_missing_tensor_is_refused_and_named(self, bench: Bench) -> None:
        stored = bench.stored(bench.source(), {})
        rank, key = _victim(stored)
        error = self._refused(bench, changed(stored, rank, {key: None}))
        assert key.name in str(error)

    def test_unexpected_tensor_is_refused_and_named(self, bench: Bench) -> None:
        stored = bench.stored(bench.source(), {})
        rank, key = _victim(stored)
        stray = Key(key.name + "_stray")
        error = self._refused(bench, changed(stored, rank, {stray: stored.ranks[rank][key]}))
        assert stray.name in str(error)

    def test_tensor_of_another_shape_is_refused_and_named(self, bench: Bench) -> None:
        stored = bench.stored(bench.source(), {})
        rank, key = _victim(stored)
        tensor = stored.ranks[rank][key]
        error = self._refused(bench, changed(stored, rank, {key: tensor.narrow(0, 0, tensor.shape[0] // 2)}))
        assert key.name in str(error)

    def test_every_misfit_is_listed_at_once(self, bench: Bench) -> None:
        stored = bench.stored(bench.source(), {})
        rank, key = _victim(stored)
        stray = Key(key.name + "_stray")
        error = self._refused(bench, changed(stored, rank, {key: None, stray: stored.ranks[rank][key]}))
        assert isinstance(error, CoverageError)
        assert len(error.problems) == 2

    def test_optimizer_state_is_kept_or_refused(self, bench: Bench) -> None:
        """A slot that a format has no place for must not be lost without a word."""
        checkpoint = bench.source()
        moments = bench.folder / "moments.bin"
        state = {Key(key.name, "exp_avg"): _like(t, moments) for key, t in checkpoint.tensors.items()}
        both = replace(checkpoint, tensors={**checkpoint.tensors, **state})
        try:
            folder = bench.write(bench.stored(both, {}))
        except CkptconvError as error:
            problem = str(error)
        else:
            assert {key.slot for key in bench.read(folder).tensors} == {"param", "exp_avg"}
            return
        assert "optimizer" in problem or "exp_avg" in problem

    def test_damaged_headers_give_errors_of_ours_or_none(self, bench: Bench) -> None:
        """A flipped byte outside the payload is refused, or changes nothing that matters: it never crashes the reader."""
        stored = bench.stored(bench.source(), self.topologies[0])
        plan = bench.plan(stored)
        folder = bench.folder / "hollow"
        write_hollow(plan, folder)
        assert refusal(bench, folder) is None
        for path, at, bit in _flips(plan):
            with place(plan, folder, path).open("r+b") as file:
                file.seek(at)
                before = file.read(1)
                file.seek(at)
                file.write(bytes([before[0] ^ bit]))
            refusal(bench, folder)
            with place(plan, folder, path).open("r+b") as file:
                file.seek(at)
                file.write(before)

    def _refused(self, bench: Bench, stored: Stored) -> CkptconvError:
        """The error with which a wrong checkpoint is refused: when it is written, or when it is read."""
        shutil.rmtree(bench.folder / "wrong", ignore_errors=True)
        try:
            folder = bench.write(stored, "wrong")
        except CkptconvError as error:
            return error
        problem = refusal(bench, folder)
        assert problem is not None, "a checkpoint with wrong tensors was read without complaint"
        return problem


def _weight_files(plan: Plan) -> list[File]:
    return list({file.path: file for file, _ in payload(plan)}.values())


def _victim(stored: Stored) -> tuple[Rank, Key]:
    """A tensor in the middle of the model, whose absence says nothing about how large the model is."""
    for rank, tensors in stored.ranks.items():
        for key in tensors:
            stacked = "l" in stored.mapping.stack and ".layers." in key.name  # then all layers are one tensor
            if (stacked or "1" in key.name.split(".")) and len(tensors[key].shape) == 1 + stacked:
                return rank, key
    raise AssertionError("no tensor of layer 1 has one axis")


def _like(tensor: Tensor, path: Path) -> Tensor:
    """A tensor of the same shape in a file of its own."""
    if not path.exists() or path.stat().st_size < tensor.nbytes:
        path.write_bytes(bytes(tensor.nbytes))
    return contiguous(Source(str(path), 0, tensor.nbytes), tensor.shape, tensor.dtype)


def _flips(plan: Plan) -> Iterator[tuple[str, int, int]]:
    """(file, position, bits to flip): positions outside the payload, spread over all files, the same ones every time."""
    weights = {(file.path, segment.offset) for file, segment in payload(plan)}
    places = [
        (file.path, segment.offset, segment.nbytes)
        for file in plan.files
        for segment in file.segments
        if (file.path, segment.offset) not in weights and segment.nbytes
    ]
    rng = random.Random(7)
    for _ in range(FLIPS):
        path, offset, nbytes = rng.choice(places)
        yield path, offset + rng.randrange(nbytes), rng.choice([1, 2, 16, 32, 128, 255])
