"""Damaged and hostile checkpoints, end to end: every one is refused by name, quickly, in little memory, and nothing is left behind."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptconv import convert
from ckptconv.errors import CkptconvError
from tests.hostile import damage_args, damage_bits, damage_hf, damage_pickle, damage_ranks, damage_zip
from tests.hostile.bases import QUICK
from tests.hostile.damage import Case, edit_pt, rank_pt

PARTS = (damage_hf, damage_zip, damage_pickle, damage_ranks, damage_args, damage_bits)
MATRIX: list[Case] = [case for part in PARTS for case in part.CASES]
SECONDS, BYTES = 5, 200_000_000


def lay_out(case: Case, bases: dict[str, Path], work: Path) -> Path:
    """The damaged copy; nothing else is left in `work`."""
    source = work / "source"
    shutil.copytree(bases[case.base], source)
    if case.other is not None:
        shutil.copytree(bases[case.other], work / "other")
    case.act(source)
    if case.other is not None:
        shutil.rmtree(work / "other")
    return source


def saver_of(base: str) -> dict[str, Any]:
    """Hugging Face sources become Megatron files, and the other way round."""
    to_mcore = base.startswith(("hf", "shards", "bin", "old bin"))
    return {"saver": "mcore", "tp": 2} if to_mcore else {"saver": "hf"}


def reset_peak() -> int:
    """The memory held now; the peak counts from here on."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "ckptconv.json"
    }


@pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in MATRIX])
def test_damage_is_refused(
    case: Case, bases: dict[str, Path], clean: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_refused(case, bases, clean, tmp_path, monkeypatch)


def check_refused(
    case: Case, bases: dict[str, Path], clean: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, quickly, in little memory, without running code; or, where it may mean nothing, converted as if clean."""
    work, empty = folder / "work", folder / "empty"
    work.mkdir()
    empty.mkdir()
    source = lay_out(case, bases, work)
    monkeypatch.chdir(empty)  # where code hidden in a pickle would leave its canary
    before, start = reset_peak(), time.monotonic()
    error = attempt(source, work / "result", case)
    assert time.monotonic() - start < SECONDS
    assert memory("VmHWM") - before < BYTES
    assert list(empty.iterdir()) == [], "a canary: code was run"
    if error is None:
        assert case.harmless, "not refused"
        assert tree(work / "result") == tree(clean[case.base]), "taken for something else"
        return
    assert isinstance(error, case.error), repr(error)
    assert [name for name in case.named if name not in str(error)] == [], str(error)
    assert [p.name for p in work.iterdir()] == ["source"], "nothing may be left behind"


def attempt(source: Path, result: Path, case: Case) -> CkptconvError | None:
    """Convert, and give the refusal; any other exception comes through."""
    try:
        convert(source, result, execute_options=QUICK, **saver_of(case.base), **case.wishes)
    except CkptconvError as error:
        return error
    return None


@pytest.fixture(scope="session")
def clean(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the undamaged checkpoints are converted to."""
    root = tmp_path_factory.mktemp("clean")
    for base in sorted({case.base for case in MATRIX}):
        convert(bases[base], root / base, execute_options=QUICK, check=True, **saver_of(base))
    return {path.name: path for path in root.iterdir()}


def test_matrix_is_large_and_each_case_once() -> None:
    kinds = Counter(case.kind for case in MATRIX)
    assert len(kinds) >= 25
    assert len(MATRIX) >= 200
    assert len({case.id for case in MATRIX}) == len(MATRIX)
    assert all(n >= 2 for n in kinds.values()), "each kind at several places"


@pytest.mark.parametrize("base", sorted({case.base for case in MATRIX}))
def test_undamaged_checkpoints_are_converted(base: str, clean: dict[str, Path]) -> None:
    """Else the refusals of the others would prove nothing."""
    assert (clean[base] / "ckptconv.json").is_file()


@pytest.mark.parametrize("name", ["os.system", "os.mkdir", "eval", "exec", "pickle.loads"])
def test_canaries_sing_when_code_is_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(damage_pickle.gadgets()[name]))
    assert (tmp_path / "canary").exists()


def test_unknown_classes_are_data_and_their_setstate_is_not_called(
    bases: dict[str, Path], clean: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(bases["mcore"], tmp_path / "source"))
    edit_pt(rank_pt(0, 0), damage_pickle.planted("args", damage_pickle.Setstate()))(source)
    monkeypatch.chdir(tmp_path)
    convert(source, tmp_path / "result", execute_options=QUICK, **saver_of("mcore"))
    assert not (tmp_path / "canary").exists()
    assert tree(tmp_path / "result") == tree(clean["mcore"])


FIRST_OF_KIND = {case.kind: case for case in reversed(MATRIX)}
CHILD = """
import sys
from ckptconv.cli import main
try:
    main()
finally:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
    print("peak", peak, file=sys.stderr)
"""


@pytest.mark.parametrize("kind", list(FIRST_OF_KIND)[::3])
def test_command_line_refuses_in_a_small_fresh_process(
    kind: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of every third kind, as a user would meet it: exit code 1, one message, no trace."""
    case = FIRST_OF_KIND[kind]
    work, empty = tmp_path / "work", tmp_path / "empty"
    work.mkdir()
    empty.mkdir()
    source = lay_out(case, bases, work)
    flags = [f"--{name}={value}" for name, value in saver_of(case.base).items()] + ["--check"] * (
        "check" in case.wishes
    )
    command = [sys.executable, "-c", CHILD, "convert", str(source), str(work / "result"), "--quiet", *flags]
    path = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, cwd=empty, capture_output=True, text=True, timeout=SECONDS, env={"PYTHONPATH": path}, check=False
    )
    message, _, peak = done.stderr.rpartition("peak ")
    assert done.returncode == 1, done
    assert message.startswith("ckptconv: error: ")
    assert "Traceback" not in message
    assert done.stdout == ""
    assert all(name in message for name in case.named)
    assert int(peak) * 1024 < BYTES
    assert list(empty.iterdir()) == []
    assert [p.name for p in work.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "kind", ["rank file cut", "rank of another model", "flip in a payload, --check", "manifest damaged"]
)
def test_old_result_stays_when_its_successor_is_refused(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    case = FIRST_OF_KIND[kind]
    source, result = lay_out(case, bases, tmp_path), tmp_path / "result"
    shutil.copytree(bases["hf"], result)
    before = tree(result)
    with pytest.raises(case.error):
        convert(source, result, execute_options=replace(QUICK, force=True), **saver_of(case.base), **case.wishes)
    assert tree(result) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result", "source"]
