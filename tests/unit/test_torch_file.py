"""Torch files as torch.save writes them, read without torch: values, dtypes and bits are what torch.load gives."""

from __future__ import annotations

import argparse
import collections
import io
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckptconv.containers import torch_file
from ckptconv.containers.pickled import Namespace, Opaque, Ordered, Storage, bytes_of, to_numpy
from ckptconv.dtypes import DTYPES
from ckptconv.errors import FormatError
from ckptconv.nodes import View
from ckptconv.source import Source
from tests.unit.helpers.containers import assert_same, torch_load

GOLDENS = sorted((Path(__file__).parents[1] / "golden" / "mlm").glob("**/*.pt"))
BASE = torch.arange(48).reshape(6, 8)

OBJECTS: dict[str, Any] = {
    **{f"dtype-{name}": {"a": BASE.to(getattr(torch, d.torch))} for name, d in DTYPES.items()},
    "views": {"t": BASE.T, "slice": BASE[1:5:2, 2:], "row": BASE[3], "same": BASE, "last": BASE[5, 7]},
    "expanded": {"a": torch.ones(3, 1).expand(3, 5)},
    "empty": {"a": torch.zeros(0), "b": torch.zeros(3, 0, 2), "scalar": torch.tensor(2.5, dtype=torch.bfloat16)},
    "parameters": {"p": torch.nn.Parameter(torch.ones(2, 3)), "frozen": torch.nn.Parameter(torch.ones(2), False)},
    "module": torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict(),
    "args": {"args": argparse.Namespace(lr=1e-4, dtype=torch.bfloat16, big=1 << 70, neg=-5, none=None, text="ü")},
    "numbers": [0, 255, 256, 65535, 65536, -1, -(1 << 31), 1 << 31, -(1 << 63), 1 << 64, 0.0, float("inf"), True],
    "containers": ((), (1,), (1, 2, 3, 4), [[]], {}, {1: {2.5: [b"raw\xff", b""]}}, {"s"}, frozenset((1, "x"))),
    "dtype-keys": {(torch.bfloat16, torch.float32): {"param": torch.ones(4)}},
    "rng": {"random": random.Random(1).getstate(), "numpy": np.random.RandomState(1).get_state()},
    "arrays": [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.ones((2, 3), np.int16)), np.zeros(0, bool)],
    "bytes-io": {"_extra_state": io.BytesIO(b"state")},
    "ordered": collections.OrderedDict([("z", 1), ("a", 2)]),
    "optimizer": {
        "state": {0: {"step": torch.tensor(2.0), "exp_avg": torch.ones(3)}},
        "param_groups": [{"params": [0]}],
    },
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("name", OBJECTS)
def test_read_equals_torch_load(tmp_path: Path, name: str, zipped: bool) -> None:
    torch.save(OBJECTS[name], tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    ours = torch_file.read(tmp_path / "x.pt", check=True)
    assert_same(ours, OBJECTS[name])
    if zipped or name not in ("dtype-fp8_e4m3", "dtype-fp8_e5m2", "dtype-uint16", "dtype-uint32", "dtype-uint64"):
        assert_same(ours, torch_load(tmp_path / "x.pt"))  # torch writes those types to old files and cannot load them


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_read_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    state = {k: v for k, v in OBJECTS.items() if not k.startswith("dtype-")}
    torch.save(state, tmp_path / "x.pt", pickle_protocol=protocol)
    assert_same(torch_file.read(tmp_path / "x.pt"), torch_load(tmp_path / "x.pt"))


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: "/".join(p.parts[-4:-1]))
def test_read_megatron_file_equals_torch_load(path: Path) -> None:
    assert_same(torch_file.read(path, check=True), torch_load(path))


def test_tensors_of_one_storage_share_its_range(tmp_path: Path) -> None:
    torch.save([BASE, BASE[1:], BASE.T], tmp_path / "x.pt")
    views = torch_file.read(tmp_path / "x.pt")
    assert isinstance(views, list)
    a, b, c = views
    assert isinstance(a, View)
    assert a.source == b.source == c.source
    assert (b.offset, c.strides) == (64, (8, 64))


def test_state_dict_keeps_its_order_and_attributes(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "x.pt")
    state = torch_file.read(tmp_path / "x.pt")
    assert isinstance(state, Ordered)
    assert list(state) == ["weight", "bias"]
    assert list(state.attributes or {}) == ["_metadata"]


def test_unknown_classes_are_inert_and_compare_by_value(tmp_path: Path) -> None:
    torch.save([torch.device("cpu"), torch.Size([1, 2]), collections.Counter("aab"), Path("a/b")], tmp_path / "x.pt")
    first, again = torch_file.read(tmp_path / "x.pt"), torch_file.read(tmp_path / "x.pt")
    assert first == again
    assert isinstance(first, list)
    assert first[0] == Opaque("torch", "device", ("cpu",))
    assert repr(first[0]) == "<torch.device('cpu')>"


def test_tensor_with_attributes_is_a_tensor(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    tensor.partition_dim = 0  # type: ignore[attr-defined]
    torch.save({"a": tensor}, tmp_path / "x.pt")
    assert_same(torch_file.read(tmp_path / "x.pt"), {"a": torch.ones(3)})


def test_bare_storage_is_inert(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3).untyped_storage()}, tmp_path / "x.pt")
    value = torch_file.read(tmp_path / "x.pt")
    assert isinstance(value, dict)
    assert isinstance(value["a"], Storage)
    assert value["a"].source.nbytes == 12


def test_bytes_io_and_numpy_content(tmp_path: Path) -> None:
    torch.save([io.BytesIO(b"abc"), np.arange(3, dtype=">i4"), np.array(["text"])], tmp_path / "x.pt")
    loaded = torch_file.read(tmp_path / "x.pt")
    assert isinstance(loaded, list)
    buffer, array, text = loaded
    assert bytes_of(buffer) == b"abc"
    found = to_numpy(array)
    assert found is not None
    assert found.tolist() == [0, 1, 2]
    assert to_numpy(text) is None
    assert bytes_of(array) is None


def test_namespace_knows_what_it_holds(tmp_path: Path) -> None:
    torch.save(argparse.Namespace(a=1), tmp_path / "x.pt")
    args = torch_file.read(tmp_path / "x.pt")
    assert args == Namespace(a=1)
    assert isinstance(args, Namespace)
    assert "a" in args
    assert list(args) == ["a"]
    with pytest.raises(AttributeError, match="'b'"):
        _ = args.b


def test_unused_storage_records_are_listed(tmp_path: Path) -> None:
    writer = torch._C.PyTorchFileWriter(str(tmp_path / "x.pt"))
    writer.write_record("data.pkl", b"\x80\x02N.", 4)
    writer.write_record("data/0", b"1234", 4)
    writer.write_end_of_file()
    assert torch_file.inspect(tmp_path / "x.pt").unused == ("x/data/0",)


def test_old_file_with_a_long_pickle_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptconv.containers.torch_legacy.FIRST_READ", 64)
    state = {f"layer.{i}": torch.full((2,), i) for i in range(40)}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert_same(torch_file.read(tmp_path / "x.pt"), state)


def test_read_inside_another_file(tmp_path: Path) -> None:
    torch.save({"a": BASE}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "outer").write_bytes(b"h" * 512 + data + b"t" * 512)
    assert_same(torch_file.read(Source(str(tmp_path / "outer"), 512, len(data)), check=True), {"a": BASE})


def test_file_without_checksums_is_read_but_not_checked(tmp_path: Path) -> None:
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"a": BASE}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(torch_file.read(tmp_path / "x.pt"), {"a": BASE})
    with pytest.raises(FormatError, match="without CRC32s"):
        torch_file.read(tmp_path / "x.pt", check=True)


def test_read_fifty_thousand_tensors_quickly(tmp_path: Path) -> None:
    torch.save({f"layers.{i}.weight": torch.zeros(1) for i in range(50_000)}, tmp_path / "x.pt")
    start = time.process_time()
    torch_file.read(tmp_path / "x.pt")
    assert time.process_time() - start < 5  # about 1.5 s; the bound allows for a busy machine
