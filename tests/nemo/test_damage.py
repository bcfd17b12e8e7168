"""Damaged and hostile archives: one clear error each, through ckptconv.convert, and nothing is written."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ckptconv
from ckptconv.testing.checkpoints import write_hf
from tests.cli.conftest import console
from tests.cli.helpers.console import Console
from tests.nemo.conftest import Archive, Files, packed
from tests.unit.helpers.nemo import GZIPPED, PER_RANK, TORCH_DIST, contents, extracted
from tools.golden_cases import convert

__all__ = ["console"]

Change = Callable[[Files], None]
CONFIG = "model_config.yaml"


def refused(source: Path, work: Path, saver: str = "nemo") -> str:
    """The one error, and that nothing is left of the attempt."""
    work.mkdir()
    with pytest.raises(ckptconv.CkptconvError) as error:
        convert(source, work / "out.nemo", saver=saver)
    assert list(work.iterdir()) == []
    return str(error.value)


def edited(old: bytes, new: bytes) -> Change:
    def change(files: Files) -> None:
        assert old in files[CONFIG]
        files[CONFIG] = files[CONFIG].replace(old, new)

    return change


def without(text: str) -> Change:
    def change(files: Files) -> None:
        for name in [name for name in files if text in name]:
            del files[name]

    return change


def added(name: str, data: bytes = b"x") -> Change:
    def change(files: Files) -> None:
        files[name] = data

    return change


def copied(name: str, to: str) -> Change:
    def change(files: Files) -> None:
        files[to] = files[name]

    return change


BOMB = b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 30))
FIRST, SECOND = (f"tp_rank_{tp:02d}_pp_rank_000/model_weights.ckpt" for tp in (0, 1))
CASES: dict[str, tuple[str, Change, str]] = {
    "no config": (TORCH_DIST, without(CONFIG), CONFIG),
    "yaml bomb": (TORCH_DIST, added(CONFIG, BOMB), CONFIG),
    "yaml tag": (TORCH_DIST, added(CONFIG, b"a: !!python/object/apply:os.system ['true']\n"), CONFIG),
    "yaml key twice": (TORCH_DIST, edited(b"num_layers: 4", b"num_layers: 4\nnum_layers: 5"), "num_layers"),
    "other layers": (TORCH_DIST, edited(b"num_layers: 4", b"num_layers: 5"), "layers"),
    "config is no yaml": (TORCH_DIST, added(CONFIG, b"\x00\xff{"), CONFIG),
    "config is huge": (TORCH_DIST, added(CONFIG, b"#" * (5 << 20)), "more than"),
    "no tokenizer": (TORCH_DIST, without("tokenizer.model"), "tokenizer.model"),
    "tokenizer is junk": (TORCH_DIST, lambda f: f.update({n: b"\xff" * 99 for n in f if "token" in n}), "tokenizer"),
    "no weights": (PER_RANK, without("model_weights"), "no weights"),
    "missing rank": (PER_RANK, without("tp_rank_01_pp_rank_001"), "tp"),
    "missing stage": (PER_RANK, without("pp_rank_001"), "pp"),
    "two ways of ranks": (PER_RANK, copied(FIRST, "mp_rank_00/model_weights.ckpt"), "more than one form"),
    "ranks and whole": (PER_RANK, copied(FIRST, "model_weights.ckpt"), "more than one form"),
    "ranks and distributed": (PER_RANK, added("model_weights/metadata.json", b"{}"), "more than one form"),
    "rank is junk": (PER_RANK, added(SECOND, b"junk"), SECOND),
    "no chunk file": (TORCH_DIST, without("__0_1.distcp"), "__0_1.distcp"),
    "chunk file cut": (TORCH_DIST, lambda f: f.update({n: f[n][:5000] for n in f if "__0_0" in n}), "__0_0.distcp"),
    "metadata is junk": (TORCH_DIST, added("model_weights/.metadata", b"junk"), ".metadata"),
    "legacy config without TE": (
        TORCH_DIST,
        lambda f: (
            edited(b"transformer_engine: true", b"transformer_engine: false")(f)
            or edited(b"mcore_gpt: true", b"mcore_gpt: false")(f)
        ),
        "names of Megatron-Core models",
    ),
    "legacy config, core names": (TORCH_DIST, edited(b"mcore_gpt: true", b"mcore_gpt: false"), "mcore_gpt"),
    "core config, legacy names": (PER_RANK, edited(b"mcore_gpt: false", b"mcore_gpt: true"), "mcore_gpt"),
    "absolute name": (TORCH_DIST, added("/etc/passwd"), "/etc/passwd"),
    "name above": (TORCH_DIST, added("../up"), "../up"),
    "artifact above": (TORCH_DIST, edited(b"nemo:", b"nemo:../"), "tokenizer.model"),
}


@pytest.mark.parametrize("case", CASES)
def test_changed_archive_is_refused(case: str, archive: Archive, tmp_path: Path) -> None:
    name, change, said = CASES[case]
    files = contents(archive(name))
    change(files)
    problem = refused(packed(files, tmp_path / "x.nemo"), tmp_path / "work")
    assert said in problem
    assert "x.nemo" in problem or "tensors do not fit" in problem


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_members_that_are_no_files_are_refused(kind: bytes, archive: Archive, tmp_path: Path) -> None:
    info = tarfile.TarInfo("link_weights")
    info.type, info.linkname = kind, "/etc/passwd"
    source = packed(contents(archive(TORCH_DIST)), tmp_path / "x.nemo", (info,))
    assert "link_weights" in refused(source, tmp_path / "work")


def test_two_configurations_are_refused(archive: Archive, tmp_path: Path) -> None:
    files = contents(archive(TORCH_DIST))
    source = packed({**files, f"./{CONFIG}": files[CONFIG]}, tmp_path / "x.nemo")
    assert f"{CONFIG}: is there twice" in refused(source, tmp_path / "work")


@pytest.mark.parametrize("part", [0.01, 0.3, 0.6, 0.97])
@pytest.mark.parametrize("name", [TORCH_DIST, PER_RANK])
def test_truncated_archive_is_refused(name: str, part: float, archive: Archive, tmp_path: Path) -> None:
    whole = archive(name).read_bytes()
    (tmp_path / "x.nemo").write_bytes(whole[: int(len(whole) * part)])
    assert "truncated" in refused(tmp_path / "x.nemo", tmp_path / "work")


@pytest.mark.parametrize("size", [1, 100, 10**9])
def test_sizes_that_lie_are_refused(size: int, archive: Archive, tmp_path: Path) -> None:
    """The checksum of the header is set right."""
    data = bytearray(archive(TORCH_DIST).read_bytes())
    with tarfile.open(archive(TORCH_DIST)) as opened:
        member = next(m for m in opened if m.name.endswith("__0_0.distcp"))
    member.size = size
    data[member.offset : member.offset + 512] = member.tobuf(tarfile.USTAR_FORMAT)
    (tmp_path / "x.nemo").write_bytes(bytes(data))
    refused(tmp_path / "x.nemo", tmp_path / "work")


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: data[:-8] + bytes(8), lambda data: data[:3] + b"junk"],
    ids=["truncated", "checksum", "junk"],
)
def test_damaged_gzip_is_refused_and_leaves_nothing(
    damage: Callable[[bytes], bytes], archive: Archive, tmp_path: Path
) -> None:
    source, scratch, work = tmp_path / "x.nemo", tmp_path / "scratch", tmp_path / "work"
    source.write_bytes(damage(archive(GZIPPED).read_bytes()))
    work.mkdir()
    with pytest.raises(ckptconv.CkptconvError, match=r"x\.nemo.*truncated or damaged"):
        convert(source, work / "out.nemo", loader_options={"scratch": scratch})
    assert list(work.iterdir()) == []
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("name", ["model_config.yaml", "model_weights/__0_0.distcp"])
def test_links_that_leave_an_unpacked_folder_are_refused(name: str, archive: Archive, tmp_path: Path) -> None:
    folder = extracted(archive(TORCH_DIST), tmp_path / "x.nemo")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert "link that leaves the folder" in refused(folder, tmp_path / "work")


def test_legacy_model_of_grouped_queries_is_refused_as_nemo_does(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", "llama")
    with pytest.raises(ckptconv.CkptconvError, match="quer"):
        convert(tmp_path / "hf", tmp_path / "out.nemo", saver="nemo", saver_options={"mcore_gpt": "false"})
    assert not (tmp_path / "out.nemo").exists()


def test_projector_of_an_unknown_kind_is_named_and_listed(archive: Archive, tmp_path: Path) -> None:
    """As NeVA saves a down-sampling one when the language model is frozen."""
    first = "model.embedding.word_embeddings.adapter_layer.mm_projector_adapter.mm_projector."
    shapes = {"1.weight": (128,), "2.weight": (64, 128), "4.weight": (64, 64)}
    weights = io.BytesIO()
    torch.save({first + name: torch.zeros(shape) for name, shape in shapes.items()}, weights)
    config = (Path(__file__).parents[1] / "golden" / "nemo" / "configs" / "neva_pre.yaml").read_bytes()
    files = {n: data for n, data in contents(archive(TORCH_DIST)).items() if n.endswith("tokenizer.model")}
    ((_, tokenizer),) = files.items()
    name = re.findall(r"nemo:(\w+\.model)", config.decode())[0]
    source = packed({name: tokenizer, CONFIG: config, "model_weights.ckpt": weights.getvalue()}, tmp_path / "x.nemo")
    problem = refused(source, tmp_path / "work")
    assert "mm_projector.4.weight [64, 64]" in problem
    assert "known are linear and mlp2x_gelu" in problem


def test_half_a_projector_is_inspected_as_far_as_it_is_known(
    archive: Archive, console: Console, tmp_path: Path
) -> None:
    """A language model, and in its embedding a projector that lacks its second layer."""
    convert(archive(TORCH_DIST), tmp_path / "language.nemo", saver_options={"weights": "ranks"})
    files = contents(tmp_path / "language.nemo")
    model = torch.load(io.BytesIO(files["model_weights.ckpt"]), weights_only=False)
    projector = "embedding.word_embeddings.adapter_layer.mm_projector_adapter.mm_projector.0.weight"
    weights = io.BytesIO()
    torch.save({**model, f"model.{projector}": torch.zeros(4, 8)}, weights)
    source = packed({**files, "model_weights.ckpt": weights.getvalue()}, tmp_path / "x.nemo")
    ran = console("inspect", source, code=1)
    assert "mm_projector.0.weight [4, 8]" in ran.err
