"""Torch distributed checkpoints read without torch: what Megatron-Core and torch wrote, bit for bit."""

from __future__ import annotations

import gzip
import io
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv.containers import dcp, dcp_blobs, dcp_tiling, safetensors
from ckptconv.containers.dcp_metadata import read_metadata
from ckptconv.containers.pickled import bytes_of, to_numpy
from ckptconv.dtypes import BY_TORCH, DTYPES
from ckptconv.errors import FormatError
from ckptconv.source import Source
from tests.unit.helpers.containers import assert_same
from tests.unit.helpers.dcp import grid, handmade, load, save

GOLDEN = Path(__file__).parents[1] / "golden" / "mcore"
LLAMA = GOLDEN / "llama_tp2pp2" / "ckpt" / "iter_0000007"
LLAMA_012 = GOLDEN / "torch_dist_mcore0.12.0_llama_bf16_tp2pp2"
OLD = LLAMA_012 / "ckpt" / "iter_0000007"


def equal(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Our reading of all tensors is what is expected, in shape, dtype and bits."""
    ours = dcp.tensors(dcp.read(folder))
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_same(ours[key], tensor, key)


def test_megatron_checkpoint_reads_as_torch_reads_it() -> None:
    equal(LLAMA, load(LLAMA))


def test_megatron_checkpoint_has_its_chunks_and_objects() -> None:
    found = dcp.read(LLAMA)
    fc1 = found.tensors["decoder.layers.mlp.linear_fc1.weight"]
    assert (fc1.dtype, fc1.shape) == (DTYPES["fp32"], (4, 192, 64))
    assert [c.offset for c in fc1.chunks[:5]] == [(0, 0, 0), (0, 48, 0), (0, 96, 0), (0, 144, 0), (1, 0, 0)]
    assert (found.unused, found.reformulated) == ((), {})
    values = {key: dcp.value(item) for key, item in found.objects.items()}
    states = [v for k, v in values.items() if "_extra_state" in k]
    assert states == [[None]] * 16
    rng = values["rng_state/shard_1.0_2.2"]
    assert isinstance(rng, list)
    array = to_numpy(rng[0][0]["np_rng_state"][1])
    assert array is not None
    assert array.shape == (624,)


@pytest.mark.parametrize("folder", [LLAMA, OLD], ids=["0.16.1", "0.12.0"])
def test_megatron_checkpoint_holds_the_model_it_was_made_from(folder: Path) -> None:
    """Both goldens were made from one model; what Megatron keeps under one name is compared, in bf16."""
    hf = safetensors.read(LLAMA_012 / "some_of_hf.safetensors").tensors
    ours = dcp.tensors(dcp.read(folder))

    def same(stored: Any, name: str) -> None:
        values = torch.from_numpy(stored.astype("float32")).bfloat16()
        expected = torch.from_numpy(hf[name].numpy().astype("float32")).bfloat16()
        assert torch.equal(values, expected), name

    same(ours["embedding.word_embeddings.weight"].numpy()[:160], "model.embed_tokens.weight")
    same(ours["output_layer.weight"].numpy()[:160], "lm_head.weight")
    same(ours["decoder.final_layernorm.weight"].numpy(), "model.norm.weight")
    for i in range(4):
        for key, name in (
            ("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
            ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
            ("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
        ):
            same(ours[f"decoder.layers.{key}"].numpy()[i], f"model.layers.{i}.{name}")


def test_some_tensors_alone() -> None:
    found = dcp.read(LLAMA)
    assert dcp.tensors(found, ["decoder.final_layernorm.weight"]).keys() == {"decoder.final_layernorm.weight"}


def test_flattened_shards_are_recognised(tmp_path: Path) -> None:
    """Megatron-Core 0.12 with its distributed optimizer; the files are made as long as the metadata says, and empty."""
    path = tmp_path / ".metadata"
    path.write_bytes(gzip.decompress((GOLDEN / "flattened_mcore0.12.0" / "metadata.gz").read_bytes()))
    places = [place for places in read_metadata(path).places.values() for place in places]
    for name in {place.file for place in places}:
        with (tmp_path / name).open("wb") as out:
            out.truncate(max(p.start + p.nbytes for p in places if p.file == name))
    found = dcp.read(tmp_path)
    key = "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight"
    assert found.tensors[key].shape == (4, 1, 2, 3072)
    assert found.reformulated[key] == (4, 64, 96)
    assert found.reformulated.keys() < found.tensors.keys()


PLAIN: dict[str, Any] = {
    "model": {
        "layers": [{"weight": torch.arange(12.0).reshape(3, 4)}, {"weight": torch.ones(2, 5, dtype=torch.bfloat16)}],
        **{name: torch.arange(6).reshape(2, 3).to(getattr(torch, d.torch)) for name, d in DTYPES.items()},
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
    },
    "optimizer": {"state": {"exp_avg": torch.ones(3)}, "param_groups": [{"lr": 0.5, "betas": (0.9, 0.95)}]},
    "step": 7,
    "blob": io.BytesIO(b"state"),
}


@pytest.mark.parametrize("options", [{}, {"single_file_per_rank": False}, {"thread_count": 3}], ids=str)
def test_plain_torch_checkpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = save(PLAIN, tmp_path / "x", **options)
    equal(folder, load(folder))
    found = dcp.read(folder)
    assert {"model.layers.0.weight", "model.bf16", "optimizer.state.exp_avg"} <= found.tensors.keys()
    values = {key: dcp.value(item) for key, item in found.objects.items()}
    assert values["step"] == 7
    assert values["optimizer.param_groups.0.betas"] == (0.9, 0.95)
    assert bytes_of(values["blob"]) == b"state"


def in_one_file(folder: Path, path: Path) -> dict[str, Source]:
    """All files of a folder in one, with other bytes between them, as in an archive."""
    found, at = {}, 0
    with path.open("wb") as out:
        for inner in sorted(folder.iterdir()):
            at += out.write(b"#" * 77)
            found[inner.name] = Source(str(path), at, inner.stat().st_size)
            at += out.write(inner.read_bytes())
    return found


def test_checkpoint_inside_another_file(tmp_path: Path) -> None:
    folder = save(PLAIN, tmp_path / "x", thread_count=3)
    files = in_one_file(folder, tmp_path / "all")
    theirs = load(folder)
    values = {key: dcp.value(item) for key, item in dcp.read(folder).objects.items()}
    shutil.rmtree(folder)
    found = dcp.interpret("all!weights", files)
    ours = dcp.tensors(found)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert_same(ours[key], tensor, key)
    assert {key: dcp.value(item) for key, item in found.objects.items()} == values
    assert (found.where, found.unused) == ("all!weights", ())


def test_checkpoint_inside_another_file_is_refused_by_name(tmp_path: Path) -> None:
    """A chunk may not reach into what follows its file there; a file that is not there is told."""
    files = in_one_file(save(PLAIN, tmp_path / "x"), tmp_path / "all")
    name = next(name for name in files if name.endswith(".distcp"))
    short = files[name]._replace(nbytes=files[name].nbytes - 1)
    with pytest.raises(FormatError, match=rf"all!weights/.metadata: .* of {name}, which has {short.nbytes} bytes"):
        dcp.interpret("all!weights", {**files, name: short})
    with pytest.raises(FormatError, match=f"{name}: is missing"):
        dcp.interpret("all!weights", {".metadata": files[".metadata"]})
    with pytest.raises(FormatError, match=r"all!weights/.metadata: is missing"):
        dcp.interpret("all!weights", {name: files[name]})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    tensor = torch.arange(12).reshape(3, 4)
    folder = handmade(tmp_path, {"w": (tensor, grid(random.Random(1), (3, 4), 3))}, {"o": [None]}, protocol=protocol)
    equal(folder, {"w": tensor})


def test_older_spellings_of_the_classes(tmp_path: Path) -> None:
    """TensorProperties stood in another module until torch 2.3; Megatron-Core 0.15 had a Metadata of its own."""
    folder = handmade(tmp_path, {"w": (torch.ones(2), [((0, 2),)])}, protocol=2)
    data = (folder / ".metadata").read_bytes()
    for new, old in (
        (b"metadata\nTensorProperties", b"metadata\nTensorProperties"),
        (b"checkpoint.metadata\nTensorProperties", b"_shard.sharded_tensor.metadata\nTensorProperties"),
        (b"checkpoint.metadata\n_MEM_FORMAT_ENCODING", b"_shard.sharded_tensor.metadata\nMEM_FORMAT_ENCODING"),
        (
            b"torch.distributed.checkpoint.metadata\nMetadata\n",
            b"megatron.core.dist_checkpointing.strategies.torch\nMCoreMetadata\n",
        ),
    ):
        assert new in data
        data = data.replace(new, old)
    (folder / ".metadata").write_bytes(data)
    equal(folder, {"w": torch.ones(2)})


def test_absolute_paths_in_the_metadata_are_ignored(tmp_path: Path) -> None:
    save({"w": torch.ones(3)}, tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    equal(tmp_path / "there", {"w": torch.ones(3)})


def test_unused_bytes_and_files_are_told(tmp_path: Path) -> None:
    folder = handmade(tmp_path, {"a": (torch.ones(2), [((0, 2),)]), "b": (torch.ones(3), [((0, 3),)])}, {"o": [None]})
    found = dcp.read(folder)
    assert found.unused == ()
    item = found.tensors["a"].chunks[0].item

    def forget(metadata: Any) -> None:
        del metadata.state_dict_metadata["a"]
        metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if k.fqn != "a"}

    handmade(folder, {"a": (torch.ones(2), [((0, 2),)]), "b": (torch.ones(3), [((0, 3),)])}, {"o": [None]}, edit=forget)
    (folder / "__9_9.distcp").write_bytes(b"12345")
    assert dcp.read(folder).unused == (item, Source(str(folder / "__9_9.distcp"), 0, 5))


def test_chunk_whose_storage_is_strided_or_larger(tmp_path: Path) -> None:
    """torch.save keeps strides and the whole storage; nothing says that a chunk was cloned first."""
    base = torch.arange(20.0).reshape(4, 5)
    folder = handmade(tmp_path, {"w": (base[1:3].T.contiguous(), [((0, 5), (0, 2))])})
    blob = io.BytesIO()
    torch.save(base[1:3].T, blob)

    def lengthen(metadata: Any) -> None:
        (info,) = metadata.storage_data.values()
        info.length = len(blob.getvalue())

    handmade(tmp_path, {"w": (base[1:3].T.contiguous(), [((0, 5), (0, 2))])}, edit=lengthen)
    (folder / "__0_0.distcp").write_bytes(blob.getvalue())
    equal(folder, {"w": base[1:3].T})


def test_blobs_written_without_checksums(tmp_path: Path) -> None:
    """As a job does that wants to save a little faster; then they are all zero."""
    tensor = torch.arange(24.0).reshape(6, 4)
    torch.serialization.set_crc32_options(False)
    try:
        folder = handmade(tmp_path, {"w": (tensor, [((i, i + 1), (0, 4)) for i in range(6)])})
    finally:
        torch.serialization.set_crc32_options(True)
    equal(folder, {"w": tensor})


def test_tensor_without_elements_needs_no_chunk(tmp_path: Path) -> None:
    equal(handmade(tmp_path, {"w": (torch.ones(0, 3), [])}), {"w": torch.ones(0, 3)})


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.lists(st.integers(1, 6), max_size=4), st.integers(0, 12))
def test_any_grid_reads_back(tmp_path_factory: pytest.TempPathFactory, rng: Any, shape: list[int], cuts: int) -> None:
    name = rng.choice(["float32", "bfloat16", "int64", "uint8"])
    tensor = torch.arange(max(1, torch.Size(shape).numel())).reshape(shape).to(getattr(torch, name))
    boxes = grid(rng, shape, cuts)
    folder = handmade(tmp_path_factory.mktemp("grid"), {"w": (tensor, boxes)}, files=rng.randint(1, 3))
    equal(folder, {"w": tensor})
    assert dcp_tiling.problems(tuple(shape), boxes) == []


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 10))
def test_boxes_that_do_not_tile_are_told(rng: Any, shape: list[int], cuts: int) -> None:
    """One box of a tiling is left out, moved, or made larger or smaller: what counting every element says."""
    boxes = grid(rng, shape, cuts)
    i, axis, by = rng.randrange(len(boxes)), rng.randrange(len(shape)), rng.choice([-1, 1])
    lo, hi = boxes[i][axis]
    changed = rng.choice([None, (lo + by, hi + by), (lo, hi + by), (lo + by, hi)])
    if changed is None:
        del boxes[i]
    else:
        boxes[i] = (*boxes[i][:axis], changed, *boxes[i][axis + 1 :])
    count: dict[tuple[int, ...], int] = {}
    for box in boxes:
        for at in _elements(box):
            count[at] = count.get(at, 0) + 1
    tiles = count == dict.fromkeys(_elements(tuple((0, n) for n in shape)), 1)
    assert bool(dcp_tiling.problems(tuple(shape), boxes)) is not tiles


def _elements(box: Any) -> list[tuple[int, ...]]:
    out: list[tuple[int, ...]] = [()]
    for lo, hi in box:
        out = [(*at, i) for at in out for i in range(lo, hi)]
    return out


def test_hundred_thousand_chunks_are_checked_in_seconds() -> None:
    shape = (60, 1700, 8)
    grid_of = [((i, i + 1), (j, j + 1), (0, 8)) for i in range(60) for j in range(1700)]
    # the second half of the rows is cut elsewhere, so that it is no regular grid
    odd = [*grid_of[:51_000], *(((i, i + 1), (j, j + 2), (0, 8)) for i in range(30, 60) for j in range(0, 1700, 2))]
    flat = [((i, i + 1),) for i in range(100_000)]
    start = time.process_time()
    assert dcp_tiling.problems(shape, grid_of) == []
    assert dcp_tiling.problems(shape, odd) == []
    assert dcp_tiling.problems((100_000,), flat) == []
    assert dcp_tiling.problems((99_999,), flat) == ["the chunk [99999:100000] lies outside shape (99999,)"]
    assert dcp_tiling.problems(shape, odd[:-1]) == ["of [59:60, 1696:1700, 0:8] only [59:60, 1696:1698, 0:8] is there"]
    assert time.process_time() - start < 8  # about 2 s


def test_forty_thousand_blobs_open_in_seconds(tmp_path: Path) -> None:
    blob = io.BytesIO()
    torch.save(torch.ones(1, 4), blob)
    nbytes, path = len(blob.getvalue()), tmp_path / "__0_0.distcp"
    path.write_bytes(blob.getvalue() * 40_000)
    blobs = [
        dcp_blobs.Blob(Source(str(path), i * nbytes, nbytes), BY_TORCH["float32"], (1, 4), "w") for i in range(40_000)
    ]
    problems: list[str] = []
    start = time.process_time()
    found = dcp_blobs.tensors(blobs, problems)
    assert time.process_time() - start < 5  # about 1 s; parsing each would take some 10 s
    assert (problems, len(found)) == ([], 40_000)
    assert found[blobs[-1].item].numpy().tolist() == [[1.0] * 4]
