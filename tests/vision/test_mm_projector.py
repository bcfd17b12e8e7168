"""Projectors alone: what torch saved is read in every form, what LLaVA begins with is written, and what is neither is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ckptconv import ExecuteOptions, Job, convert
from ckptconv.combine import prepare_combine, prepare_extract
from ckptconv.errors import CkptconvError, ConfigError, UsageError
from ckptconv.executor.execute import execute
from ckptconv.pipeline import load
from ckptconv.testing.models import make_whole
from tests.vision.arrays import atoms, same

NVLM = Path(__file__).parents[1] / "golden" / "vlm" / "nvlm_d"
QUICK = ExecuteOptions(durable=False)
SHAPES = {"0.weight": (80, 48), "0.bias": (80,), "2.weight": (64, 80), "2.bias": (64,)}
LINEAR = {"weight": (64, 48), "bias": (64,)}


def saved(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    rng = np.random.default_rng(5)
    state = {f"model.mm_projector.{name}": torch.from_numpy(rng.normal(size=shape)) for name, shape in shapes.items()}
    path = folder / "mm_projector.bin"
    torch.save({name: value.half() for name, value in state.items()}, path)
    return path


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("shapes", [SHAPES, LINEAR])
def test_one_layer_or_two_with_biases_or_without(
    shapes: dict[str, tuple[int, ...]], biases: bool, tmp_path: Path
) -> None:
    path = saved(tmp_path, {name: shape for name, shape in shapes.items() if biases or name.endswith("weight")})
    expected = torch.load(path)
    found = load(path).tensors
    assert sorted(t.numpy().tobytes() for t in found.values()) == sorted(t.numpy().tobytes() for t in expected.values())
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({**LINEAR, "weight": (64,)}, "weight"),
        ({**SHAPES, "0.weight": (80,)}, "0.weight"),
        ({**SHAPES, "2.weight": (64, 81)}, "2.weight"),
        ({**SHAPES, "2.bias": (63,)}, "2.bias"),
        ({name: shape for name, shape in SHAPES.items() if name != "2.weight"}, "2.weight"),
        ({name: shape for name, shape in SHAPES.items() if name != "0.bias"}, "2.bias"),
        ({**SHAPES, **LINEAR}, "weight"),
        ({**SHAPES, "4.weight": (64, 64)}, "no projector"),
    ],
)
def test_what_does_not_fit_is_named(shapes: dict[str, tuple[int, ...]], said: str, tmp_path: Path) -> None:
    with pytest.raises(CkptconvError, match=said):
        load(saved(tmp_path, shapes), loader="mm-projector")


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, SHAPES)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CkptconvError, match=r"mm_projector\.bin"):
        load(path, loader="mm-projector")


# written


def taken_out(model: Path, path: Path, **wishes: str) -> Path:
    execute(prepare_extract(Job(model, saver="mm-projector", **wishes), "projector").plan, path, QUICK)  # type: ignore[arg-type]
    return path


def in_llava(state: dict[str, torch.Tensor], model: torch.nn.Module) -> torch.nn.Module:
    """The module with what LLaVA takes from such a file, which must be all that it has: what stands behind `mm_projector.`."""
    model.load_state_dict({name.split("mm_projector.")[1]: value for name, value in state.items()})
    return model


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_projector_of_a_model_computes_in_llava_what_it_does_in_transformers(dtype: str, tmp_path: Path) -> None:
    import transformers

    source = make_whole(tmp_path / "llava", "Llava")
    state = torch.load(taken_out(source, tmp_path / "mm_projector.bin", dtype=dtype), weights_only=True)
    assert list(state) == [f"model.mm_projector.{name}" for name in SHAPES]
    whole = transformers.LlavaForConditionalGeneration.from_pretrained(source)
    theirs = whole.model.multi_modal_projector.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    layers = torch.nn.Linear(64, 48), torch.nn.GELU(), torch.nn.Linear(48, 48)
    ours = in_llava(state, torch.nn.Sequential(*layers).to(theirs.linear_1.weight.dtype))
    patches = torch.rand(3, 64).to(theirs.linear_1.weight.dtype)
    assert torch.equal(ours(patches), theirs(patches))


def test_projector_taken_out_and_put_back_is_the_same(tmp_path: Path) -> None:
    """The end of a row of tiles, LLaVA-NeXT's, is no part of the file."""
    source = make_whole(tmp_path / "next", "LlavaNext")
    projector = taken_out(source, tmp_path / "projector")
    for part in ("lm", "vision"):
        execute(prepare_extract(Job(source, saver="hf"), part).plan, tmp_path / part, QUICK)
    job = Job(tmp_path / "lm", saver="mcore")
    made = prepare_combine(job, Job(tmp_path / "vision"), Job(projector), kind="llava")
    execute(made.plan, tmp_path / "joined", QUICK)
    found, expected = (
        {name: value for name, value in atoms(folder).items() if name.startswith("projector.fc")}
        for folder in (tmp_path / "joined", source)
    )
    same(found, expected)
    assert len(found) == 4


@pytest.mark.parametrize("shapes", [{**SHAPES, "0.weight": (64, 48), "0.bias": (64,), "2.weight": (64, 64)}, LINEAR])
def test_file_written_again_has_the_names_that_llava_finds(shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    first = torch.load(saved(tmp_path, shapes))
    torch.save({name.removeprefix("model.mm_projector."): value for name, value in first.items()}, tmp_path / "bare")
    convert(tmp_path / "bare", tmp_path / "again", execute_options=QUICK)
    again = torch.load(tmp_path / "again", weights_only=True)
    assert list(again) == list(first)
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_projector_that_llava_would_build_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a norm in front") as error:
        taken_out(NVLM, tmp_path / "out")
    assert "without biases" in str(error.value)
    with pytest.raises(ConfigError, match="80 entries inside and 64 out"):
        convert(saved(tmp_path, SHAPES), tmp_path / "out")


def test_more_than_a_projector_is_refused(tmp_path: Path) -> None:
    source = make_whole(tmp_path / "llava", "Llava")
    with pytest.raises(UsageError, match="--part projector"):
        convert(source, tmp_path / "out", saver="mm-projector")
    with pytest.raises(CkptconvError, match="no --tp"):
        convert(saved(tmp_path, LINEAR), tmp_path / "out", tp=2)


@pytest.mark.parametrize("saver", ["hf", "mcore", "mcore-dist", "legacy", "nemo", "nemo2"])
def test_formats_without_a_place_for_it_name_the_one_that_has(saver: str, tmp_path: Path) -> None:
    with pytest.raises(CkptconvError, match=r"projector alone.* --saver mm-projector"):
        convert(saved(tmp_path, LINEAR), tmp_path / "out", saver=saver)
