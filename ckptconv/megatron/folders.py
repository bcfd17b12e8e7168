"""Where a Megatron checkpoint keeps its files: iterations, rank folders and their numbers. Nothing here opens a file of weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckptconv.containers.folder import inside
from ckptconv.errors import FormatError, UsageError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
FILES = ("model_optim_rng.pt", "model_rng.pt")
OPTIMIZER_FILES = ("distrib_optim.pt", "optim.pt")
DISTRIBUTED = (".metadata", "metadata.json")
MEGATRONS = ("metadata.json", "common.pt")
DIGESTS = "integrity.json"  # of all other files; Megatron-Core writes it from 0.18 on, if asked to
HF = "hf"
_ITERATION = re.compile(r"iter_(\d{1,12})")
_RANK = re.compile(r"mp_rank_(\d{2,6})(?:_(\d{3,6}))?(?:_(\d{3,6}))?")

Step = int | str | None


@dataclass(frozen=True, slots=True)
class RankFile:
    """One process's file. `numbers` are those of its folder's name: tensor rank, then pipeline and expert rank where they are written."""

    numbers: tuple[int, ...]
    path: Path

    @property
    def name(self) -> str:
        return self.path.parent.name


@dataclass(frozen=True, slots=True)
class Iteration:
    """One saved iteration: its folder, which step it is, and the folder of Hugging Face files beside it."""

    folder: Path
    step: Step
    hf: Path | None


@dataclass(frozen=True, slots=True)
class Ranks:
    """The rank files of an iteration, and what optimizer files lie beside them."""

    iteration: Iteration
    files: tuple[RankFile, ...]
    optimizer: tuple[str, ...] = ()


def iteration_name(step: int | str) -> str:
    return RELEASE if step == RELEASE else f"iter_{int(step):07d}"


def rank_name(tp: int, pp: int | None, ep: int | None) -> str:
    """The folder of a process; pipeline and expert rank are written only where that parallelism is used."""
    return f"mp_rank_{tp:02d}" + "".join(f"_{n:03d}" for n in (pp, ep) if n is not None)


def has_ranks(folder: Path) -> bool:
    """Whether a folder is an iteration of per-rank files; NeMo calls its folders alike, and what lies in them otherwise."""
    ranks = [entry for entry in folder.iterdir() if entry.name.startswith("mp_rank_")]
    return any(not any(rank.glob("*.ckpt")) for rank in ranks)


def is_distributed(folder: Path) -> bool:
    """Whether a folder is an iteration of a distributed checkpoint (torch_dist, zarr)."""
    return any((folder / name).exists() for name in DISTRIBUTED)


def is_plain(folder: Path) -> bool:
    """Whether torch alone wrote a distributed checkpoint: nothing of Megatron-Core's lies beside `.metadata`."""
    theirs = has_ranks(folder) or any((folder / name).exists() for name in MEGATRONS)
    return (folder / DISTRIBUTED[0]).exists() and not theirs


def looks_like(path: Path, holds: Callable[[Path], bool]) -> bool:
    """Whether `path` is an iteration that `holds`, or has one, judged by names alone."""
    try:
        return holds(path) or any(holds(folder) for folder in _iterations(path).values())
    except OSError:
        return False


def open_ranks(path: Path, wanted: Step = None) -> Ranks:
    """The per-rank iteration meant by a base or iteration folder; every rank folder of it is named, none is guessed."""
    with _readable(path):
        iteration = _open(path, wanted)
        if is_distributed(iteration.folder):
            raise FormatError(
                iteration.folder, "is a distributed checkpoint (torch_dist or zarr): read it with --loader mcore-dist"
            )
        files = _rank_files(iteration.folder)
        optimizer = tuple(sorted({n for f in files for n in OPTIMIZER_FILES if (f.path.parent / n).exists()}))
        return Ranks(iteration, files, optimizer)


def open_distributed(path: Path, wanted: Step = None) -> Iteration:
    """The distributed iteration meant by a base or iteration folder."""
    with _readable(path):
        iteration = _open(path, wanted)
        if not is_distributed(iteration.folder):
            raise FormatError(
                iteration.folder, f"is not a distributed checkpoint: it has neither {' nor '.join(DISTRIBUTED)}"
            )
        return iteration


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FormatError(error.filename or path, f"cannot be read: {error.strerror}") from None


def _open(path: Path, wanted: Step) -> Iteration:
    if not path.is_dir():
        raise FormatError(path, "is not a folder; a Megatron checkpoint is a folder of iter_XXXXXXX folders")
    folder = path if has_ranks(path) or is_distributed(path) else _choose(path, wanted)
    step = _step_of(folder.name)
    if wanted is not None and step is not None and _same(step, wanted) is False:
        raise UsageError(
            f"--iteration {wanted}: {path} is iteration {step}; give the folder above it to choose another"
        )
    hf = next((base / HF for base in (folder.parent, folder) if (base / HF / "config.json").is_file()), None)
    return Iteration(folder, step, hf)


def _choose(path: Path, wanted: Step) -> Path:
    """The iteration folder asked for, or the one the tracker file names, or the only one there is."""
    known = _iterations(path)
    if wanted is None and (path / TRACKER).exists():
        wanted = _read_tracker(path / TRACKER)
    elif wanted is None and len(known) == 1:
        wanted = next(iter(known))
    names = ", ".join(sorted(iteration_name(k) for k in known)) or "none"
    if wanted is None:
        raise FormatError(path, f"has no {TRACKER} and its iterations are: {names}; choose one with --iteration")
    step: int | str = RELEASE if str(wanted) == RELEASE else _number(wanted)
    if step not in known:
        raise FormatError(path, f"has no folder for iteration {wanted}; it has: {names}")
    return known[step]


def _number(wanted: int | str) -> int:
    if not re.fullmatch(r"\d{1,12}", str(wanted)):
        raise UsageError(f"--iteration {wanted}: an iteration is a number or the word {RELEASE}")
    return int(wanted)


def _read_tracker(path: Path) -> int | str:
    if not path.is_file():
        raise FormatError(path, "is not a regular file")
    with path.open("rb") as file:
        raw = file.read(64)
    text = raw.decode("ascii", "replace").strip()
    if text == RELEASE:
        return RELEASE
    if not re.fullmatch(r"\d{1,12}", text):
        raise FormatError(path, f"must hold an iteration number or the word {RELEASE}, found {text[:40]!r}")
    return int(text)


def _iterations(path: Path) -> dict[int | str, Path]:
    found: dict[int | str, Path] = {}
    for entry in sorted(path.iterdir()):
        step = _step_of(entry.name)
        if step is None or not entry.is_dir():
            continue
        if step in found:
            raise FormatError(path, f"holds iteration {step} twice: {found[step].name} and {entry.name}")
        found[step] = entry
    return found


def _step_of(name: str) -> Step:
    match = _ITERATION.fullmatch(name)
    return int(match[1]) if match else RELEASE if name == RELEASE else None


def _same(step: int | str, wanted: int | str) -> bool:
    return str(step) == str(wanted) or (str(wanted).isdigit() and step == int(wanted))


def _rank_files(folder: Path) -> tuple[RankFile, ...]:
    """Every rank file, in order of its numbers. Names that only look like a rank folder are refused, not skipped."""
    found: dict[tuple[int, ...], RankFile] = {}
    problems = []
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith("mp_rank"):
            continue
        match = _RANK.fullmatch(entry.name)
        if match is None or not entry.is_dir():
            problems.append(f"{entry.name} is not a rank folder (mp_rank_TT, mp_rank_TT_PPP or mp_rank_TT_PPP_EEE)")
            continue
        numbers = tuple(int(n) for n in match.groups() if n is not None)
        file = next((name for name in FILES if (entry / name).is_file()), None)
        if file is None:
            problems.append(f"{entry.name} has no {FILES[0]}")
        elif numbers in found:
            problems.append(f"{entry.name} and {found[numbers].name} are the same rank")
        else:
            found[numbers] = RankFile(numbers, inside(folder, f"{entry.name}/{file}"))
    if len({len(n) for n in found}) > 1:
        problems.append(f"rank folders of different layouts are mixed: {', '.join(f.name for f in found.values())}")
    if not found and not problems:
        problems.append("there are no mp_rank_* folders")
    if problems:
        raise FormatError(folder, "; ".join(problems))
    return tuple(found[n] for n in sorted(found))
