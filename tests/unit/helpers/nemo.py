"""The real archives of NeMo, as files to open."""

from __future__ import annotations

import gzip
import lzma
import tarfile
from pathlib import Path

ARCHIVES = Path(__file__).parents[2] / "golden" / "nemo" / "archives"
TORCH_DIST, ZARR = "mcore_mha_fp16_torchdist", "mcore_gqa_fp32_zarr"
PER_RANK, GZIPPED = "legacy_mha_tp2pp2", "legacy_mha_fp16_o2_gz"
NEVA = "neva_pre"  # the projector of a LLaVA alone
PLAIN = (TORCH_DIST, ZARR, PER_RANK)


def nemo(name: str, folder: Path) -> Path:
    """A plain archive, just as NeMo wrote it."""
    path = folder / f"{name}.nemo"
    path.write_bytes(lzma.decompress((ARCHIVES / f"{name}.nemo.xz").read_bytes()))
    return path


def nemo_gz(folder: Path) -> Path:
    """The gzip'ed one, elsewhere, so that it may be changed."""
    path = folder / f"{GZIPPED}.nemo"
    path.write_bytes((ARCHIVES / path.name).read_bytes())
    return path


def gunzipped(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def contents(path: Path) -> dict[str, bytes]:
    """Every file of an archive (plain or gzip'ed), by Python's tarfile; the leading `./` dropped."""
    with tarfile.open(path) as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        return {name.removeprefix("./"): file.read() for name, file in files.items() if file}


def extracted(path: Path, folder: Path) -> Path:
    """The archive unpacked, by Python's tarfile."""
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    return folder
