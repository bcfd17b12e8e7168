"""Links in the folders of every format: those of a Hugging Face cache are followed, those that lead elsewhere are refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.errors import FormatError
from ckptconv.testing.checkpoints import write_hf

SAVED: dict[str, tuple[str, dict[str, Any], str]] = {  # name -> (format, its options, a file of weights)
    "hf": ("hf", {}, "model.safetensors"),
    "mcore": ("mcore", {}, "iter_0000001/mp_rank_00/model_optim_rng.pt"),
    "legacy": ("legacy", {}, "iter_0000001/mp_rank_00/model_optim_rng.pt"),
    "torch_dist": ("mcore-dist", {}, "iter_0000001/__0_0.distcp"),
    "zarr": ("mcore-dist", {"backend": "zarr", "mcore_version": "0.12"}, "iter_0000001/output_layer.weight/0.0"),
    "nemo": ("nemo", {"pack": "false"}, "model_weights/__0_0.distcp"),
}


@pytest.fixture(params=SAVED)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A folder of each format, and a file in it."""
    saver, options, file = SAVED[request.param]
    ckptconv.convert(write_hf(tmp_path / "model"), tmp_path / "saved", saver=saver, saver_options=options)
    return tmp_path / "saved", file


def cached(folder: Path, cache: Path) -> Path:
    """The folder as huggingface_hub keeps it: every file a link to a blob of the repository."""
    snapshot, blobs = cache / "models--some--model/snapshots/0123abcd", cache / "models--some--model/blobs"
    shutil.copytree(folder, snapshot)
    blobs.mkdir()
    for i, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(blobs / f"hash{i}")
        path.symlink_to(os.path.relpath(blobs / f"hash{i}", path.parent))
    return snapshot


def test_cache_is_a_source(saved: tuple[Path, str], tmp_path: Path) -> None:
    folder, file = saved
    snapshot = cached(folder, tmp_path / "cache")
    assert (snapshot / file).is_symlink()
    assert ckptconv.verify(ckptconv.Job(tmp_path / "model"), ckptconv.Job(snapshot)).same


def test_link_that_leaves_is_refused(saved: tuple[Path, str], tmp_path: Path) -> None:
    folder, file = saved
    (folder / file).rename(tmp_path / "elsewhere")
    (folder / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=f"{Path(file).name}: is a link that leaves the folder"):
        ckptconv.load(folder)
