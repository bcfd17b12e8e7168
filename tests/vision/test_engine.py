"""Combine and extract are conversions like any other: one executor, its bound of memory, resumed after a kill, wary of damage."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv import combine as combining
from ckptconv.combine import prepare_combine, prepare_extract
from ckptconv.executor.execute import ExecuteOptions, execute
from ckptconv.layout import layout_from
from ckptconv.pipeline import Prepared, prepare_from
from ckptconv.testing.plans import read_tree
from tests.hostile import damage_ranks, damage_zip
from tests.hostile.bases import QUICK
from tests.hostile.damage import Case
from tests.hostile.test_end_to_end import check_refused
from tests.judge.vlm_reference import make_llava
from tests.roundtrip import headers
from tests.roundtrip.fresh import measured

ROOT = Path(__file__).parents[2]
HOME = Path(combining.__file__).parent
BOUND = 64 * 10**6
# what moves bytes, or opens a file to write
MOVERS = {"ckptconv.executor", "ckptconv.executor.execute", "ckptconv.executor.worker", "ckptconv.moves", "os.open"}


def damage() -> Iterator[Case]:
    """What a language model's rank files are damaged with, but for edits of keys that a multimodal config.json has in sections.

    Args do not count for the stages of a multimodal model, so that one is missing shows in the layers.
    """
    for case in (*damage_zip.CASES, *damage_ranks.CASES):
        if case.base != "mcore" or case.other or case.place in ("other layers", "other heads"):
            continue
        stage = case.place == "a stage" or (case.kind == "rank is another stage's" and "pp 1" in case.place)
        yield replace(case, named=("layers", "4", "2")) if stage else case


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lm`, `vision` and `whole`, the two joined by a projector, from transformers. Megatron has a place for all of SigLIP."""
    return make_llava(tmp_path_factory.mktemp("parts"), "siglip")


def jobs(parts: Path) -> list[ckptconv.Job]:
    to = ckptconv.Job(parts / "lm", saver="mcore", layout=layout_from({"tp": 2, "pp": 2}, None))
    return [to, ckptconv.Job(parts / "vision"), ckptconv.Job(parts / "whole")]


# one path


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


@pytest.mark.parametrize(
    "module",
    ["combine", "parts", "projectors", "tower_passes", "megatron/towers", "megatron/args_multimodal", "cli/multimodal"],
)
def test_nothing_about_towers_moves_bytes_itself(module: str) -> None:
    assert not imports(HOME / f"{module}.py") & MOVERS


def test_both_are_planned_by_the_pipeline_of_every_conversion(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def told(job: ckptconv.Job, *rest: Any) -> Prepared:
        asked.append(str(job.source))
        return prepare_from(job, *rest)

    monkeypatch.setattr(combining, "prepare_from", told)
    assert prepare_combine(*jobs(parts)).plan.files
    assert prepare_extract(ckptconv.Job(parts / "whole", saver="hf"), "lm").plan.files
    assert asked == [str(parts / "lm"), str(parts / "whole")]


# a kill, and the same again

CHILD = """
import os, signal, sys
from pathlib import Path
from ckptconv.combine import prepare_combine
from ckptconv.executor.execute import execute
from tests.vision.test_engine import OPTIONS, jobs

class Killed:
    left = int(sys.argv[3])
    def start(self, total): pass
    def advance(self, nbytes):
        self.left -= nbytes > 0
        if self.left <= 0: os.kill(os.getpid(), signal.SIGKILL)
    def done(self): pass

execute(prepare_combine(*jobs(Path(sys.argv[1]))).plan, Path(sys.argv[2]), OPTIONS, Killed())
"""
OPTIONS = ExecuteOptions(workers=1, durable=False)


@pytest.mark.parametrize("pieces", [1, 3])
def test_killed_combine_is_finished_by_the_same_command(parts: Path, tmp_path: Path, pieces: int) -> None:
    """kill -9 after some pieces: no destination yet; afterwards every byte is as if nothing had happened."""
    execute(prepare_combine(*jobs(parts)).plan, tmp_path / "whole", OPTIONS)
    command = [sys.executable, "-c", CHILD, str(parts), str(tmp_path / "out"), str(pieces)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    died = subprocess.run(command, env=env, check=False, timeout=60, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
    execute(prepare_combine(*jobs(parts)).plan, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out.partial").exists()
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "whole")


# memory


def tower(layers: int, hidden: int, ffn: int) -> tuple[dict[str, Any], headers.Shapes]:
    config = {
        "model_type": "siglip_vision_model", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    shapes: headers.Shapes = {
        "embeddings.patch_embedding.bias": (hidden,),
        "embeddings.patch_embedding.weight": (hidden, 3, 14, 14),
        "embeddings.position_embedding.weight": (576, hidden),
    }
    layer = {f"self_attn.{n}_proj": (hidden, hidden) for n in ("q", "k", "v", "out")} | {
        "mlp.fc1": (ffn, hidden),
        "mlp.fc2": (hidden, ffn),
    }
    for i in range(layers):
        for name, shape in layer.items():
            shapes |= {f"encoder.layers.{i}.{name}.weight": shape, f"encoder.layers.{i}.{name}.bias": shape[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"encoder.layers.{i}.{norm}.{kind}": (hidden,) for kind in ("weight", "bias")}
    return config, shapes | {f"post_layernorm.{kind}": (hidden,) for kind in ("weight", "bias")}


def hollow(folder: Path) -> Path:
    """A LLaVA of 150 MB, its weights holes."""
    text, language = headers.llama(4, hidden=1024, ffn=2816, heads=16, kv_heads=8, vocab=8000)
    vision, tensors = tower(4, 1024, 4096)
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text, "vision_config": vision,
        "image_token_index": 7999, "projector_hidden_act": "gelu", "torch_dtype": "bfloat16",
    }  # fmt: skip
    projector = {f"multi_modal_projector.linear_{i}": (1024, 1024) for i in (1, 2)}
    shapes = {f"language_model.{name}": shape for name, shape in language.items()}
    shapes |= {f"vision_tower.vision_model.{name}": shape for name, shape in tensors.items()}
    for name, shape in projector.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return headers.write(folder, config, shapes)


def test_multimodal_models_keep_to_the_memory_bound(tmp_path: Path) -> None:
    """hf -> Megatron tp2 pp2 -> hf, each in a fresh process."""
    source, there = hollow(tmp_path / "hf"), tmp_path / "mcore"
    for src, dst, saver, layout in (
        (source, there, "mcore", '{"tp": 2, "pp": 2}'),
        (there, tmp_path / "back", "hf", "{}"),
    ):
        found = measured("convert", src, dst, saver, layout, BOUND)
        assert found["written"] > 150 * 10**6
        assert found["peak"] <= BOUND


# damage


@pytest.fixture(scope="module")
def bases(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases") / "mcore"
    ckptconv.convert(parts / "whole", folder, saver="mcore", tp=2, pp=2, execute_options=QUICK)
    return {"mcore": folder}


@pytest.fixture(scope="module")
def clean(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clean") / "mcore"
    ckptconv.convert(bases["mcore"], folder, saver="hf", execute_options=QUICK, check=True)
    return {"mcore": folder}


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in damage()])
def test_damage_is_refused(
    case: Case, bases: dict[str, Path], clean: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_refused(case, bases, clean, tmp_path, monkeypatch)
