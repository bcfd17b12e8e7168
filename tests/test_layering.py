"""The house rules that a machine can check: who may import whom, how long things are, and that only the command line speaks."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up. A module may import modules of earlier lines, and its own package; nothing else.
LAYERS = """
errors source dtypes shapes collecting
coding
sizes values
moves
tensor
nodes
leaves assemble ops plan torch_bridge
config topology
layout vocabulary
mapping
mapping_files checkpoint bind
canonicalize localize dialect passes parts tower_passes projectors
containers
formats
huggingface
formats.hf formats.openai_clip
megatron
nemo
formats.mcore formats.legacy formats.mm_projector
formats.dcp
formats.mcore_dist formats.nemo formats.nemo2 formats.lightning
registry
executor
pipeline
compare inspection upgrade combine tokenizer
testing
cli
__main__
trainer
"""
LEVEL = {name: number for number, line in enumerate(LAYERS.split("\n")) for name in line.split()}
CORE = {"numpy", "ml_dtypes", "xxhash", "yaml"}
FACE = {"click", "tqdm"}
EXTRAS = {"isal": "crc", "tensorstore": "coding", "huggingface_hub": "formats", "matplotlib": "trainer"}
EXTRAS |= dict.fromkeys(("sentencepiece", "google", "tokenizers"), "tokenizer")
HEAVY = {"torch", "transformers", "safetensors", "pytest", "hypothesis"}
MAY_BE_HEAVY = ("torch_bridge", "testing", "logits", "trainer")
LONGEST_FILE, LONGEST_FUNCTION = 400, 40


class Import(NamedTuple):
    """`ckptconv.x.y` written as `x.y`, other packages by their first name; `inside` a function or for typing only."""

    module: str
    target: str
    ours: bool
    inside: bool

    def __str__(self) -> str:
        return f"{self.module} imports {self.target}"


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "ckptconv").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"


@cache
def package() -> dict[str, ast.Module]:
    return {name_of(p): ast.parse(p.read_text()) for p in sorted((ROOT / "ckptconv").rglob("*.py"))}


@cache
def everything() -> dict[str, ast.Module]:
    folders = ("ckptconv", "tests", "tools", "benchmarks")
    paths = [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]
    return {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in paths}


def imports_of(module: str, tree: ast.AST, inside: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        yield from _of_node(module, node, inside)
        yield from imports_of(module, node, inside or function or typing)


def _of_node(module: str, node: ast.AST, inside: bool) -> Iterator[Import]:
    names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom):
        assert not node.level, f"{module}: a relative import"
        base = node.module or ""
        inner = [f"{base}.{a.name}" for a in node.names]
        names = [i if i.removeprefix("ckptconv.") in package() else base for i in inner]
    for name in dict.fromkeys(names):
        ours = name.split(".")[0] == "ckptconv"
        yield Import(module, name.removeprefix("ckptconv.") if ours else name.split(".")[0], ours, inside)


@cache
def all_imports() -> list[Import]:
    return [i for module, tree in package().items() for i in imports_of(module, tree)]


def layer(module: str) -> str:
    """The listed name a module falls under: itself, or its package."""
    return module if module in LEVEL else module.split(".")[0]


def test_every_module_has_its_place() -> None:
    lost = [m for m in package() if layer(m) not in LEVEL and m != "__init__"]
    assert lost == [], "say in LAYERS where these stand"
    assert [n for n in LEVEL if n not in package()] == [], "LAYERS names modules that are gone"


def test_modules_import_only_what_stands_below_them() -> None:
    wrong = []
    for item in all_imports():
        here, there = layer(item.module), layer(item.target)
        if item.ours and item.module != "__init__" and here != there and LEVEL[there] >= LEVEL[here]:
            wrong.append(str(item))
    assert wrong == []


def test_the_trainer_and_the_converter_know_nothing_of_each_other() -> None:
    """It is there to judge the converter, so it may share no mistake with it."""
    crossing = [i for i in all_imports() if i.ours and (layer(i.module) == "trainer") != (layer(i.target) == "trainer")]
    assert [str(i) for i in crossing] == []


def test_formats_know_nothing_of_each_other() -> None:
    def kind(module: str) -> str:
        return module.removeprefix("formats.").split("_")[0] if module.startswith("formats.") else ""

    assert [str(i) for i in all_imports() if kind(i.module) and kind(i.target) not in ("", kind(i.module))] == []


def test_nothing_imports_in_a_circle() -> None:
    needs = {m: {i.target for i in all_imports() if i.module == m and i.ours and not i.inside} - {m} for m in package()}
    while needs:
        free = [m for m, targets in needs.items() if not targets & needs.keys()]
        assert free, f"in a circle: {sorted(needs)}"
        for module in free:
            del needs[module]


def test_importing_the_package_imports_nothing_of_its_own_or_of_others() -> None:
    assert [str(i) for i in all_imports() if i.module == "__init__" and not i.inside and _foreign(i)] == []


def test_the_core_stands_on_its_own_dependencies_alone() -> None:
    """Heavier packages are imported inside functions, each only where it is listed."""
    wrong = []
    for item in all_imports():
        if not _foreign(item) or item.ours or item.target in CORE:
            continue
        top = item.module.split(".")[0]
        face = item.target in FACE and top == "cli"
        extra = EXTRAS.get(item.target) == top
        late = item.inside or top == "trainer" or item.target in ("pytest", "hypothesis")
        heavy = item.target in HEAVY and top in MAY_BE_HEAVY and late
        if not (face or extra or heavy):
            wrong.append(str(item))
    assert wrong == []


def _foreign(item: Import) -> bool:
    return item.ours or item.target not in sys.stdlib_module_names


def test_files_and_functions_can_be_taken_in_at_one_sitting() -> None:
    long = [f"{p}: {n} lines" for p in everything() if (n := len((ROOT / p).read_text().splitlines())) > LONGEST_FILE]
    for path, tree in everything().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                long += [f"{path}: {node.name} has {lines} lines"] if lines > LONGEST_FUNCTION else []
    assert long == []


def test_every_file_opens_with_a_sentence() -> None:
    def good(text: str | None) -> bool:
        return bool(text) and str(text).split("\n\n")[0].rstrip().endswith((".", "?", "!", ":", '"'))

    assert [path for path, tree in everything().items() if not good(ast.get_docstring(tree))] == []


def test_only_the_command_line_prints_or_exits() -> None:
    wrong = []
    for module, tree in package().items():
        if module.split(".")[0] in ("cli", "__main__") or module == "trainer.__main__":
            continue
        for node in ast.walk(tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            wrong += (
                [f"{module}: {called}"] if called in ("print", "sys.exit", "exit", "os._exit", "warnings.warn") else []
            )
    assert wrong == []


@pytest.mark.parametrize("key", ["packages", "package-dir"])
def test_every_package_is_in_the_wheel(key: str) -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    inits = (path.parent.relative_to(ROOT) for path in (ROOT / "ckptconv").rglob("__init__.py"))
    folders = {".".join(folder.parts) for folder in inits}
    if key == "packages":
        assert set(setup[key]) == folders | {"ckptconv.mappings"}
    else:
        assert setup[key] == {"ckptconv": "ckptconv", "ckptconv.mappings": "mappings"}
