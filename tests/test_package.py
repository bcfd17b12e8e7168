"""The package as users get it: a wheel in an empty environment, the core dependencies alone, and a start that costs nothing."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest

import ckptconv

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = ("numpy", "ml_dtypes", "click", "tqdm", "xxhash", "pyyaml")
START = 0.2  # CPU seconds

pytestmark = [pytest.mark.install, pytest.mark.xdist_group("install")]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that neither leftovers of other builds get in nor new ones stay behind; no network."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in ("ckptconv", "mappings"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place, source)
    (found,) = place.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment with the wheel and copies of our core dependencies; nothing else."""
    place = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(place, symlinks=True)
    library = next(place.glob("lib/python*/site-packages"))
    for name in CORE:
        files = distribution(name).files or []
        for file in files:
            target = library / str(file)
            if library in target.resolve().parents:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), target)
    pip("--python", place / "bin" / "python", "install", "--no-index", "--no-deps", wheel)
    return place / "bin"


def pip(*words: str | Path) -> None:
    quiet = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*quiet, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run(words: list[str | Path], cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_the_mappings_and_the_types_marker_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"ckptconv/mappings/{p.name}" for p in (ROOT / "mappings").glob("*.toml")} < names
    assert {"ckptconv/py.typed", "ckptconv/__main__.py"} < names
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "ckptconv").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == modules


def test_wheel_needs_the_core_dependencies_and_nothing_else() -> None:
    plain = [r for r in requires("ckptconv") or [] if "extra ==" not in r]
    assert sorted(r.split(">=")[0].lower() for r in plain) == sorted(CORE)


def test_installed_command_starts_without_numpy_or_torch(environment: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv[1:] = ['--help']\nfrom ckptconv.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    )
    shown = run([environment / "python", "-c", code + "print(*sorted(m.split('.')[0] for m in sys.modules))"], tmp_path)
    assert "Usage: ckptconv" in shown
    assert not {"numpy", "torch", "ml_dtypes", "yaml"} & set(shown.splitlines()[-1].split())


@pytest.mark.parametrize(
    "words", [["ckptconv", "--help"], ["ckptconv", "convert", "--help"], ["python", "-c", "import ckptconv"]]
)
def test_start_costs_little(environment: Path, tmp_path: Path, words: list[str]) -> None:
    def cost() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run([environment / words[0], *words[1:]], tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cost() for _ in range(4)) <= START


def test_installed_package_finds_its_mappings_and_runs_the_demo(environment: Path, tmp_path: Path) -> None:
    families = run([environment / "ckptconv", "families"], tmp_path)
    assert all(p.stem in families for p in (ROOT / "mappings").glob("hf-*.toml"))
    assert "verify" in run([environment / "python", "-m", "ckptconv", "demo"], tmp_path)


def test_a_missing_extra_names_the_pip_command(environment: Path, tmp_path: Path) -> None:
    code = (
        "from ckptconv.errors import ExtraMissingError\nfrom ckptconv.torch_bridge import to_torch\n"
        "try: to_torch(None)\nexcept ExtraMissingError as error: print(error)"
    )
    assert "pip install 'ckptconv[torch]'" in run([environment / "python", "-c", code], tmp_path)


def test_version_is_the_same_everywhere(environment: Path, tmp_path: Path) -> None:
    assert ckptconv.__version__ == PROJECT["version"]
    assert PROJECT["version"] in run([environment / "ckptconv", "--version"], tmp_path)
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_pin_is_exact_and_every_dependency_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = dict(line.split("==") for line in lines)
    assert list(pins) == sorted(pins, key=str.lower)
    known = {name.lower().replace("_", "-") for name in pins}
    extras = [r for group in PROJECT["optional-dependencies"].values() for r in group if not r.startswith("ckptconv[")]
    for requirement in [*PROJECT["dependencies"], *extras]:
        assert requirement.split(">=")[0].split("==")[0].lower().replace("_", "-") in known, requirement


def test_public_names_are_those_announced() -> None:
    for name in ckptconv.__all__:
        assert getattr(ckptconv, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(ckptconv, "no_such" + "_name")
