"""zarr v2 folders: a real one of Megatron-Core, arrays that tensorstore and zarr-python wrote, and ours opened by both."""

from __future__ import annotations

import sys
import tarfile
from itertools import product
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import safetensors.torch
import tensorstore
import torch
import zarr

from ckptconv.containers import torch_file, zarr2, zarr2_write
from ckptconv.containers.zarr2_header import spelling
from ckptconv.dtypes import BF16, DTYPES, FP32, DType
from ckptconv.errors import ExtraMissingError, FormatError, PlanError
from ckptconv.executor.execute import ExecuteOptions, execute
from ckptconv.executor.fingerprint import fingerprint
from ckptconv.leaves import contiguous
from ckptconv.nodes import Fill, View
from ckptconv.plan import Plan
from ckptconv.source import Source
from ckptconv.tensor import Tensor
from ckptconv.testing.plans import read_tree
from tests.unit.helpers.containers import write

GOLDEN = Path(__file__).parents[1] / "golden" / "mcore" / "zarr_mcore0.12.0_llama_bf16_tp2pp2"
FOLDER = GOLDEN / "ckpt" / "iter_0000007"
RAW: dict[str, Any] | None = None
CODECS: list[dict[str, Any] | None] = [
    RAW,
    {"id": "zlib", "level": 1},
    {"id": "gzip", "level": 9},
    {"id": "bz2", "level": 1},
    {"id": "zstd", "level": 3},
    {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1},
    {"id": "blosc", "cname": "zstd", "clevel": 1, "shuffle": 2},
    {"id": "blosc", "cname": "blosclz", "clevel": 9, "shuffle": 0},
]


def name_of(codec: dict[str, Any] | None) -> str:
    return "-".join(map(str, codec.values())) if codec else "raw"


def values(shape: tuple[int, ...], dtype: DType) -> Any:
    """Unlike values in every place, of which a part shows that it stands elsewhere."""
    numbers = np.arange(1, 1 + int(np.prod(shape))).reshape(shape)
    return (numbers % 2 == 0) if dtype.name == "bool" else (numbers % 120).astype(dtype.numpy)


def by_tensorstore(path: Path, array: Any, chunks: tuple[int, ...], dtype: DType, **fields: Any) -> Any:
    metadata = {"shape": array.shape, "chunks": chunks, "dtype": spelling(dtype), **fields}
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}, "metadata": metadata}
    store = tensorstore.open(spec, create=True).result()
    store.write(array).result()
    return store


def opened(path: Path) -> Any:
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, open=True, read=True).result().read().result()


def read_one(folder: Path, key: str = "key", **wish: Any) -> Any:
    return zarr2.tensors(zarr2.read(folder), **wish)[key].numpy()


def same_bits(ours: Any, theirs: Any) -> bool:
    return bool(ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes())


def hugging_face() -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = safetensors.torch.load_file(GOLDEN / "hf" / "model.safetensors")
    return found


def expected_layer(hf: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """What Megatron-Core's keys hold of a layer: 4 heads on 2 groups of 16 rows a head; gate rows, then up rows."""
    weight = {k.removeprefix(f"model.layers.{layer}."): v for k, v in hf.items() if f".layers.{layer}." in k}
    q, k, v = (weight[f"self_attn.{x}_proj.weight"].reshape(2, -1, 64) for x in "qkv")
    return {
        "self_attention.linear_qkv.weight": torch.cat([q, k, v], 1).reshape(128, 64),
        "self_attention.linear_qkv.layer_norm_weight": weight["input_layernorm.weight"],
        "self_attention.linear_proj.weight": weight["self_attn.o_proj.weight"],
        "mlp.linear_fc1.layer_norm_weight": weight["post_attention_layernorm.weight"],
        "mlp.linear_fc1.weight": torch.cat([weight["mlp.gate_proj.weight"], weight["mlp.up_proj.weight"]]),
        "mlp.linear_fc2.weight": weight["mlp.down_proj.weight"],
    }


class TestGolden:
    def test_every_tensor_is_the_one_of_hugging_face(self) -> None:
        hf = hugging_face()
        found = {k: torch.from_numpy(t.numpy().view(np.int16)) for k, t in zarr2.tensors(zarr2.read(FOLDER)).items()}
        expected: dict[str, list[torch.Tensor]] = {f"decoder.layers.{k}": [] for k in expected_layer(hf, 0)}
        for layer in range(4):
            for name, tensor in expected_layer(hf, layer).items():
                expected[f"decoder.layers.{name}"].append(tensor)
        stacked = {key: torch.stack(layers) for key, layers in expected.items()}
        stacked["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            found[key] = found[key][:160]  # the rest pads the vocabulary
        stacked["embedding.word_embeddings.weight"] = hf["model.embed_tokens.weight"]
        stacked["output_layer.weight"] = hf["lm_head.weight"]
        assert found.keys() == stacked.keys()
        for key, tensor in stacked.items():
            assert torch.equal(found[key], tensor.view(torch.int16)), key

    def test_objects_and_files_beside_are_told(self) -> None:
        found = zarr2.read(FOLDER)
        assert set(found.others) == {"common.pt", "metadata.json"}
        modules = ("mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_proj", "self_attention.linear_qkv")
        keys = {f"decoder.layers.{m}._extra_state/shard_{i}_4" for m, i in product(modules, range(4))}
        assert set(found.objects) == keys
        for source in found.objects.values():
            assert torch_file.read(source) is None

    def test_grid_of_chunks_is_told(self) -> None:
        entry = zarr2.read(FOLDER).tensors["decoder.layers.mlp.linear_fc1.weight"]
        assert (entry.dtype, entry.shape, entry.chunks) == (BF16, (4, 192, 64), (1, 48, 64))
        assert (len(entry.present), entry.missing, entry.header.fill) == (16, 0, None)

    def test_written_again_every_file_is_the_same(self, tmp_path: Path) -> None:
        found = zarr2.read(FOLDER)
        arrays = {key: (t, found.tensors[key].chunks) for key, t in zarr2.tensors(found).items()}
        objects = {key: Path(source.path).read_bytes() for key, source in found.objects.items()}
        for file in zarr2_write.layout("iter", arrays, objects):
            write(file, tmp_path)
        theirs = read_tree(FOLDER)
        beside = {name: theirs.pop(name) for name in found.others}
        assert beside
        assert read_tree(tmp_path / "iter") == theirs

    def test_inside_an_archive(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.nemo", "w") as archive:
            archive.add(FOLDER, "weights")
        with tarfile.open(tmp_path / "a.nemo") as archive:
            files = {
                m.name.removeprefix("weights/"): Source(str(tmp_path / "a.nemo"), m.offset_data, m.size)
                for m in archive
                if m.isfile()
            }
        inside = zarr2.tensors(zarr2.interpret(str(tmp_path / "a.nemo"), files))
        for key, tensor in zarr2.tensors(zarr2.read(FOLDER)).items():
            assert same_bits(inside[key].numpy(), tensor.numpy())


class TestTensorstoreWrote:
    @pytest.mark.parametrize("codec", CODECS, ids=name_of)
    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("separator", [".", "/"])
    def test_codecs_orders_separators(self, tmp_path: Path, codec: Any, order: str, separator: str) -> None:
        array = values((5, 7, 4), BF16)
        by_tensorstore(
            tmp_path / "key", array, (2, 3, 4), BF16, compressor=codec, order=order, dimension_separator=separator
        )
        assert same_bits(read_one(tmp_path), array)

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=repr)
    @pytest.mark.parametrize("codec", [RAW, CODECS[4]], ids=name_of)
    def test_dtypes(self, tmp_path: Path, dtype: DType, codec: Any) -> None:
        array = values((4, 5), dtype)
        by_tensorstore(tmp_path / "key", array, (3, 3), dtype, compressor=codec)
        assert same_bits(read_one(tmp_path), array)

    @pytest.mark.parametrize(
        ("shape", "chunks"), [((), ()), ((1,), (1,)), ((3,), (10,)), ((2, 3), (9, 2)), ((0, 4), (1, 2))]
    )
    @pytest.mark.parametrize("codec", [RAW, CODECS[1]], ids=name_of)
    def test_shapes_unlike_any_weight(self, tmp_path: Path, shape: Any, chunks: Any, codec: Any) -> None:
        array = values(shape, FP32)
        by_tensorstore(tmp_path / "key", array, chunks, FP32, compressor=codec)
        assert same_bits(read_one(tmp_path), array)

    @pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d.is_float], ids=repr)
    @pytest.mark.parametrize("fill", [0.0, 1.5, 0.1, -0.0, "NaN", "-Infinity"])
    def test_missing_chunks_are_the_fill_value(self, tmp_path: Path, dtype: DType, fill: Any) -> None:
        if (dtype.name, fill) == ("fp8_e4m3", "-Infinity"):
            fill = "NaN"  # it has no infinities
        array = values((9, 7, 5), dtype)
        store = by_tensorstore(tmp_path / "key", array, (2, 3, 2), dtype, compressor=None, fill_value=fill)
        for i, path in enumerate(sorted((tmp_path / "key").glob("[0-9]*"))):
            if i % 3 == 1 or path.name.startswith(("1.", "2.")):
                path.unlink()
        assert zarr2.read(tmp_path).tensors["key"].missing > 20
        assert same_bits(read_one(tmp_path), store.read().result())

    @pytest.mark.parametrize(("dtype", "fill"), [("int64", -3), ("uint8", 255), ("bool", True), ("uint64", 2**64 - 1)])
    def test_fill_values_that_are_no_floats(self, tmp_path: Path, dtype: str, fill: Any) -> None:
        kind = DTYPES[dtype]
        store = by_tensorstore(tmp_path / "key", values((4, 4), kind), (2, 2), kind, compressor=None, fill_value=fill)
        (tmp_path / "key" / "0.1").unlink()
        assert same_bits(read_one(tmp_path), store.read().result())
        assert zarr2.read(tmp_path).tensors["key"].missing_names(9) == ["0.1"]

    def test_nothing_stored_is_one_constant(self, tmp_path: Path) -> None:
        by_tensorstore(tmp_path / "key", values((4, 4), FP32), (2, 2), FP32, compressor=None, fill_value=2.0)
        for path in (tmp_path / "key").glob("[0-9]*"):
            path.unlink()
        assert zarr2.tensors(zarr2.read(tmp_path))["key"] == Fill((4, 4), FP32, 0x40000000)

    def test_missing_chunk_without_fill_value_is_an_error_unless_zeros_are_wished(self, tmp_path: Path) -> None:
        store = by_tensorstore(tmp_path / "w.x", values((4, 4), BF16), (2, 2), BF16, compressor=None, fill_value=None)
        for name in ("0.1", "1.0"):
            (tmp_path / "w.x" / name).unlink()
        with pytest.raises(FormatError, match=r"w\.x: 2 of 4 chunks are not there \(0\.1, 1\.0\)"):
            zarr2.tensors(zarr2.read(tmp_path))
        assert same_bits(read_one(tmp_path, "w.x", missing="zero"), store.read().result())  # tensorstore takes zeros


class TestZarrPythonWrote:
    @pytest.mark.parametrize("codec", ["raw", "zstd", "zlib", "gzip", "bz2", "blosc", "default"])
    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("dtype", ["fp32", "fp16", "int64", "bool"])
    def test_codecs_orders_dtypes(self, tmp_path: Path, codec: str, order: Any, dtype: str) -> None:
        special: dict[str, Any] = {"raw": None, "default": "auto"}
        compressor = special[codec] if codec in special else numcodecs.get_codec({"id": codec})
        array = values((6, 7), DTYPES[dtype])
        made = zarr.create_array(
            str(tmp_path / "key"),
            shape=array.shape,
            chunks=(4, 4),
            dtype=array.dtype,
            zarr_format=2,
            compressors=compressor,
            order=order,
        )
        made[...] = array
        assert same_bits(read_one(tmp_path), array)

    @pytest.mark.parametrize("separator", [".", "/"])
    def test_empty_chunks_left_out_and_attributes(self, tmp_path: Path, separator: Any) -> None:
        array = values((6, 6), FP32)
        array[2:4] = 7
        made = zarr.create_array(
            str(tmp_path / "key"),
            shape=(6, 6),
            chunks=(2, 2),
            dtype="<f4",
            zarr_format=2,
            fill_value=7,
            config={"write_empty_chunks": False},
            chunk_key_encoding={"name": "v2", "separator": separator},
            attributes={"made": "by zarr-python"},
        )
        made[...] = array
        assert (tmp_path / "key" / ".zattrs").exists()
        assert zarr2.read(tmp_path).tensors["key"].missing == 3
        assert same_bits(read_one(tmp_path), array)


def stored(folder: Path, array: Any, dtype: DType) -> Tensor:
    """An array as a lazy tensor of a plain file."""
    (folder / "plain").write_bytes(array.tobytes())
    return contiguous(Source(str(folder / "plain"), 0, array.nbytes), array.shape, dtype)


class TestOurs:
    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=repr)
    @pytest.mark.parametrize("chunks", [(5, 7), (2, 3), (1, 7), (8, 8)])
    def test_tensorstore_opens_every_dtype(self, tmp_path: Path, dtype: DType, chunks: Any) -> None:
        array = values((5, 7), dtype)
        for file in zarr2_write.layout("", {"key": (stored(tmp_path, array, dtype), chunks)}):
            write(file, tmp_path)
        assert same_bits(opened(tmp_path / "key"), array)
        (tmp_path / "plain").unlink()
        assert same_bits(read_one(tmp_path), array)

    @pytest.mark.parametrize("dtype", ["fp32", "fp16"])
    @pytest.mark.parametrize("shape", [(5, 7), (0, 4), ()])
    def test_zarr_python_opens_it(self, tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
        array = values(shape, DTYPES[dtype])
        tensor = stored(tmp_path, array, DTYPES[dtype])
        for file in zarr2_write.layout("", {"key": (tensor, (3,) * len(shape))}):
            write(file, tmp_path)
        theirs: Any = zarr.open_array(str(tmp_path / "key"), mode="r", zarr_format=2)
        assert same_bits(np.asarray(theirs[...]), array)

    def test_edge_chunks_are_whole_and_padded_with_zeros(self, tmp_path: Path) -> None:
        tensor = stored(tmp_path, values((3,), FP32), FP32)
        files = {f.path: write(f, tmp_path).read_bytes() for f in zarr2_write.layout("i", {"key": (tensor, (2,))})}
        assert files["i/key/1"] == np.array([3, 0], np.float32).tobytes()

    @pytest.mark.parametrize(("key", "chunks"), [("a/b", (2,)), (".x", (2,)), ("a", (0,)), ("a", (2, 2))])
    def test_what_cannot_be_stored_is_refused(self, key: str, chunks: Any) -> None:
        with pytest.raises(PlanError, match=key):
            zarr2_write.layout("", {key: (Fill((4,), FP32), chunks)})


class TestFolder:
    def test_locks_of_old_ranks_are_known(self, tmp_path: Path) -> None:
        by_tensorstore(tmp_path / "key", values((4,), FP32), (2,), FP32, compressor=None)
        (tmp_path / "key.sync").mkdir()
        assert set(zarr2.read(tmp_path).tensors) == {"key"}
        (tmp_path / "key.sync" / "0").touch()
        assert set(zarr2.read(tmp_path).tensors) == {"key"}
        (tmp_path / "key.sync" / "0").write_bytes(b"x")
        with pytest.raises(FormatError, match=r"key\.sync: holds 0"):
            zarr2.read(tmp_path)

    def test_raw_chunks_are_windows_of_files(self, tmp_path: Path) -> None:
        by_tensorstore(tmp_path / "key", values((4, 4), FP32), (4, 4), FP32, compressor=None)
        tensor = zarr2.tensors(zarr2.read(tmp_path))["key"]
        assert isinstance(tensor, View)
        assert tensor.source == Source(str(tmp_path / "key" / "0.0"), 0, 64)


class TestCoded:
    def make(self, folder: Path, size: int = 64, chunks: tuple[int, int] = (16, 32)) -> tuple[Any, Tensor]:
        array = values((size, size), FP32)
        by_tensorstore(folder / "key", array, chunks, FP32, compressor={"id": "zlib", "level": 1})
        return array, zarr2.tensors(zarr2.read(folder))["key"]

    @pytest.mark.parametrize("workers", [1, 3])
    def test_executed_to_raw_chunks(self, tmp_path: Path, workers: int) -> None:
        array, tensor = self.make(tmp_path / "in", 256, (64, 128))
        arrays = {f"rank{r}": (tensor.narrow(1, r * 64, r * 64 + 64), (100, 30)) for r in range(4)}
        arrays["turned"] = (tensor.permute((1, 0)), (17, 256))
        plan = Plan(tuple(zarr2_write.layout("", arrays)), root=str(tmp_path / "in"))
        execute(plan, tmp_path / "out", ExecuteOptions(memory=200 * 10**6, workers=workers, durable=False))
        for r in range(4):
            assert same_bits(opened(tmp_path / "out" / f"rank{r}"), array[:, r * 64 : r * 64 + 64].copy())
        assert same_bits(opened(tmp_path / "out" / "turned"), array.T.copy())

    @pytest.mark.parametrize("chunks", [(16, 32), (64, 64)])
    def test_fingerprint_sees_the_files_and_how_they_are_decoded(self, tmp_path: Path, chunks: Any) -> None:
        self.make(tmp_path, 64, chunks)
        assert (tmp_path / "key" / "0.0").stat().st_size < 64 * 64 * 4 // 8

        def digest() -> str:
            arrays = {"key": (zarr2.tensors(zarr2.read(tmp_path))["key"], (64, 64))}
            return fingerprint(Plan(tuple(zarr2_write.layout("", arrays)))).digest

        first = digest()
        assert digest() == first
        header = tmp_path / "key" / ".zarray"
        header.write_text(header.read_text().replace("zlib", "gzip"))
        other = digest()
        assert other != first
        chunk = tmp_path / "key" / "0.0"
        chunk.write_bytes(chunk.read_bytes() + b" ")
        assert digest() != other

    def test_without_the_extra_the_command_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.make(tmp_path)
        monkeypatch.setitem(sys.modules, "tensorstore", None)
        found = zarr2.read(tmp_path)  # told without it
        with pytest.raises(ExtraMissingError, match=r"pip install 'ckptconv\[zarr\]'"):
            zarr2.tensors(found)
