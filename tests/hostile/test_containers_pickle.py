"""Pickles that attack: each is refused by name, fast and in little memory, and nothing in it ever runs."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptconv.containers import torch_file
from ckptconv.errors import FormatError
from tests.unit.helpers.containers import refused, torch_zip

P2, P4 = b"\x80\x02", b"\x80\x04"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(module: str, name: str, *args: str) -> bytes:
    return P2 + f"c{module}\n{name}\n".encode() + b"(" + b"".join(map(text, args)) + b"tR."


def stack_call(module: str, name: str, argument: str) -> bytes:
    return P4 + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


CODE = {
    "os-system": lambda c: call("os", "system", c),
    "posix-system": lambda c: call("posix", "system", c),
    "nt-system": lambda c: call("nt", "system", c),
    "eval": lambda c: call("builtins", "eval", f"__import__('os').system({c!r})"),
    "python2-eval": lambda c: call("__builtin__", "eval", f"__import__('os').system({c!r})"),
    "exec": lambda c: call("builtins", "exec", f"import os; os.system({c!r})"),
    "import": lambda c: call("builtins", "__import__", "antigravity"),
    "open": lambda c: call("builtins", "open", c.split()[-1], "w"),
    "io-open": lambda c: call("io", "open", c.split()[-1], "w"),
    "popen": lambda c: call("subprocess", "Popen", c),
    "check-output": lambda c: call("subprocess", "check_output", c),
    "new-popen": lambda c: P2 + b"csubprocess\nPopen\n" + text(c) + b"\x85\x81.",
    "new-ex-popen": lambda c: P4 + b"csubprocess\nPopen\n" + text(c) + b"\x85}\x92.",
    "new-ex-with-names": lambda c: P4 + b"cm\nC\n" + text(c) + b"\x85}" + text("shell") + b"\x88s\x92.",
    "stack-global": lambda c: stack_call("os", "system", c),
    "dotted-name": lambda c: stack_call("torch.serialization", "os.system", c),
    "dotted-builtins": lambda c: stack_call("collections", "abc.sys.modules", c),
    "memoized-names": lambda c: P4 + text("os") + b"\x94" + text("system") + b"\x94h\0h\1\x93" + text(c) + b"\x85R.",
    "importlib": lambda c: call("importlib", "import_module", "antigravity"),
    "runpy": lambda c: call("runpy", "run_path", c),
    "webbrowser": lambda c: call("webbrowser", "open", "http://127.0.0.1/"),
    "rmtree": lambda c: call("shutil", "rmtree", "/nonexistent"),
    "ctypes": lambda c: call("ctypes", "CDLL", "libc.so.6"),
    "nested-pickle": lambda c: call("pickle", "loads", call("os", "system", c).decode("latin-1")),
    "attrgetter": lambda c: call("operator", "attrgetter", "system"),
    "torch-load": lambda c: call("torch", "load", c),
    "torch-hub": lambda c: call("torch.hub", "load", "a/b", "c"),
    "numpy-load": lambda c: call("numpy", "load", c),
    "timeit": lambda c: call("timeit", "timeit", c),
    "getattr-chain": lambda c: P2 + b"cbuiltins\ngetattr\nccollections\nOrderedDict\n" + text("a.b") + b"\x86R.",
    "getattr-code": lambda c: P2 + b"cbuiltins\ngetattr\n" + b"ctorch\nserialization\n" + text("os") + b"\x86R.",
    "only-named": lambda c: P2 + b"}" + text("hook") + b"cos\nsystem\ns.",
    "call-a-result": lambda c: P2 + b"cm\nf\n)R" + text(c) + b"\x85R.",
    "call-a-text": lambda c: P2 + text("os.system") + text(c) + b"\x85R.",
    "inst": lambda c: P2 + b"(" + text(c) + b"ios\nsystem\n.",
    "obj": lambda c: P2 + b"(cos\nsystem\n" + text(c) + b"o.",
    "setstate-of-code": lambda c: P2 + b"cos\n_wrap_close\n)\x81}" + text("close") + text(c) + b"sb.",
    "ext1": lambda c: P2 + b"\x82\x01.",
    "ext2": lambda c: P2 + b"\x83\x01\x00.",
    "ext4": lambda c: P2 + b"\x84\x01\x00\x00\x00.",
    "persid": lambda c: P2 + b"Pos.system\n.",
    "module-persistent-id": lambda c: P2 + b"(" + text("module") + b"cm\nC\n" + text("f.py") + text(c) + b"tQ.",
    "name-with-space": lambda c: P2 + b"cos \nsystem\n.",
    "name-empty": lambda c: P2 + b"c\n\n.",
    "name-with-code": lambda c: P2 + b"c__import__('os')\nsystem\n.",
    "name-not-ascii": lambda c: P4 + text("\uff4f\uff53") + text("system") + b"\x93.",
    "name-a-number": lambda c: P4 + b"K\x01K\x02\x93.",
}  # fmt: skip


@pytest.mark.parametrize("name", CODE)
def test_code_is_refused_and_never_runs(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make: Callable[[str], bytes] = CODE[name]
    canary = tmp_path / "canary"
    path = torch_zip(make(f"touch {canary}"), tmp_path / "x.pt")
    monkeypatch.setattr(os, "system", lambda _: canary.touch())
    with refused(path, "x/data.pkl"):
        torch_file.read(path)
    assert not canary.exists()


class Setter:
    """An object whose __setstate__ would tell that it ran."""

    ran = False

    def __setstate__(self, state: Any) -> None:
        Setter.ran = True

    def __reduce__(self) -> Any:
        return Setter, (), {"a": 1}


def test_setstate_is_not_called(tmp_path: Path) -> None:
    path = torch_zip(pickle.dumps(Setter(), 2), tmp_path / "x.pt")
    assert "Setter() with state {'a': 1}" in repr(torch_file.read(path))
    assert not Setter.ran


def deep(n: int) -> bytes:
    return P2 + b")" + b"\x85" * n + b"."


def laughs(n: int) -> bytes:
    """Lists of ten times the list before."""
    body = b"]q\0" + b"".join(b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(n))
    return P2 + body + b"."


def deep_by_memo(n: int) -> bytes:
    return P2 + b"]q\0" + b"]h\0aq\x000h\0" * n + b"."


BOMBS = {
    "deep-tuples": deep(1_000_000),
    "deep-enough": deep(200),
    "deep-lists": P2 + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep-by-memo": deep_by_memo(50_000),
    "deep-key": P2 + b"})" + b"\x85" * 500_000 + b"K\0s.",
    "deep-set-item": P2 + b"c__builtin__\nset\n])" + b"\x85" * 500_000 + b"a\x85R.",
    "wide-key": P2 + b"}(" + b"K\0" * 100 + b"tK\0s.",
    "contains-itself": P2 + b"]q\0h\0a.",
    "dict-contains-itself": P2 + b"}q\0" + text("a") + b"h\0s.",
    "object-contains-itself": P2 + b"cm\nC\n)Rq\0}" + text("a") + b"h\0sb.",
    "billion-laughs": laughs(20),
    "million-encodes": P2
    + text("A" * 100_000)
    + b"q\x000("
    + (b"c_codecs\nencode\nh\0" + text("latin1") + b"\x86R") * 3000
    + b"t.",
    "copied-lists": P2 + b"](" + b"]" * 10_000 + b"eq\x000(" + b"c__builtin__\nset\nh\0\x85R" * 500 + b"t.",
    "copied-ordered": P2
    + b"]("
    + b"K\0K\0\x86" * 10_000
    + b"eq\x000("
    + b"ccollections\nOrderedDict\nh\0\x85R" * 2000
    + b"t.",
    "copied-namespaces": P2
    + b"}("
    + b"".join(text(str(i)) + b"N" for i in range(10_000))
    + b"uq\x000("
    + b"cargparse\nNamespace\n)\x81h\0b" * 2000
    + b"t.",
    "text-length": P2 + b"X\xff\xff\xff\xffa.",
    "text8-length": P4 + b"\x8d" + b"\xff" * 7 + b"\x7fa.",
    "bytes-length": P4 + b"B\xff\xff\xff\x7fa.",
    "bytes8-length": P4 + b"\x8e" + struct.pack("<Q", 1 << 62) + b"a.",
    "bytearray-length": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"a.",
    "long4-length": P2 + b"\x8b\xff\xff\xff\x7f\1.",
    "long4-negative": P2 + b"\x8b\xff\xff\xff\xff\1.",
    "long-number": P2 + b"\x8b" + struct.pack("<I", 1 << 20) + b"\x7f" * (1 << 20) + b".",
    "frame-length": P4 + b"\x95" + b"\xff" * 8 + b"N.",
    "memo-index": P2 + b"}r\xff\xff\xff\xff0j\xff\xff\xff\xfe.",
    "memo-missing": P2 + b"h\x05.",
    "stack-underflow": P2 + b"0.",
    "stack-empty-at-stop": P2 + b".",
    "stack-full-at-stop": P2 + b"NN.",
    "mark-missing": P2 + b"Nt.",
    "mark-left": P2 + b"N(.",
    "pop-empties-below-mark": P2 + b"N(00.",
    "binput-of-nothing": P2 + b"q\0.",
    "tuple3-of-two": P2 + b"NN\x87.",
    "no-stop": P2 + b"N",
    "only-protocol": P2,
    "empty": b"",
    "no-protocol": b"}.",
    "protocol-0": b"(lp0\n.",
    "protocol-9": b"\x80\x09N.",
    "protocol-twice": P2 + P2 + b"N.",
    "trailing-bytes": P2 + b"N.rest",
    "text-opcode": P2 + b"I42\n.",
    "text-long": P2 + b"L42L\n.",
    "text-unicode": P2 + b"Vabc\n.",
    "text-string": P2 + b"S'abc'\n.",
    "text-put": P2 + b"Np0\n.",
    "next-buffer": b"\x80\x05\x97.",
    "readonly-buffer": b"\x80\x05N\x98.",
    "unknown-opcode": P2 + b"\xff.",
    "not-utf8": P2 + b"X\2\0\0\0\xff\xfe.",
    "odd-items": P2 + b"}(Nu.",
    "odd-dict": P2 + b"(Nd.",
    "items-of-a-list": P2 + b"]NNs.",
    "append-to-a-tuple": P2 + b")Na.",
    "add-to-a-list": P4 + b"](N\x90.",
    "list-as-key": P2 + b"}]Ns.",
    "dict-as-key": P2 + b"}}Ns.",
    "colliding-numbers": P2 + b"}(\x8a\x20" + b"\1" * 32 + b"Nu.",
    "changed-key": P2 + b"}cm\nC\n)Rq\0Ns0h\0}b.",
    "state-of-a-list": P2 + b"]}b.",
    "state-of-args-not-a-dict": P2 + b"cargparse\nNamespace\n)\x81Nb.",
    "state-of-args-with-numbers": P2 + b"cargparse\nNamespace\n)\x81}K\1Nsb.",
    "state-twice": P2 + b"cm\nC\n)R}b}b.",
    "args-with-arguments": P2 + b"cargparse\nNamespace\nN\x85R.",
    "ordered-of-text": P2 + b"ccollections\nOrderedDict\n" + text("ab") + b"\x85R.",
    "ordered-of-singles": P2 + b"ccollections\nOrderedDict\n]N\x85a\x85R.",
    "set-of-lists": P2 + b"c__builtin__\nset\n]]a\x85R.",
    "encode-utf16": P2 + b"c_codecs\nencode\n" + text("a") + text("utf-16") + b"\x86R.",
    "encode-not-latin": P2 + b"c_codecs\nencode\n" + text("€") + text("latin1") + b"\x86R.",
    "arguments-not-a-tuple": P2 + b"cm\nf\n]R.",
    "endless-name": P2 + b"c" + b"a" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_in_bounds(tmp_path: Path, name: str) -> None:
    path = torch_zip(BOMBS[name], tmp_path / "x.pt")
    with refused(path, "x/data.pkl"):
        torch_file.read(path)


@pytest.mark.parametrize("name", ["deep-key", "billion-laughs", "million-encodes", "copied-lists", "bytes8-length"])
def test_bomb_takes_little_memory(tmp_path: Path, name: str) -> None:
    path = torch_zip(BOMBS[name], tmp_path / "x.pt")
    tracemalloc.start()
    try:
        with refused(path, "x/data.pkl"):
            torch_file.read(path)
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


def storage(kind: str = "torch\nFloatStorage", key: str = "0", numel: bytes = b"K\x04", head: str = "storage") -> bytes:
    return b"(" + text(head) + f"c{kind}\n".encode() + text(key) + text("cpu") + numel + b"tQ"


def tensor(offset: bytes = b"K\0", shape: bytes = b"K\4\x85", strides: bytes = b"K\1\x85", body: bytes = b"") -> bytes:
    rest = b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + (body or storage()) + offset + shape + strides + rest + b"tR"


V3 = b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage("torch.storage\nUntypedStorage", numel=b"K\x10")
BIG = b"\x8a\x09" + b"\xff" * 8 + b"\0"
TENSORS = {
    "offset-outside": tensor(offset=b"K\5"),
    "offset-negative": tensor(offset=b"J\xff\xff\xff\xff"),
    "offset-huge": tensor(offset=BIG),
    "offset-text": tensor(offset=text("0")),
    "offset-bool": tensor(offset=b"\x88"),
    "shape-outside": tensor(shape=b"K\5\x85"),
    "shape-negative": tensor(shape=b"J\xff\xff\xff\xff\x85"),
    "shape-huge": tensor(shape=BIG + b"\x85"),
    "shape-overflows": tensor(shape=BIG + BIG + b"\x86", strides=b"K\0K\0\x86"),
    "shape-product-overflows": tensor(shape=b"J\xff\xff\xff\x7f" * 3 + b"\x87", strides=b"K\0" * 3 + b"\x87"),
    "shape-a-list": tensor(shape=b"](K\4e"),
    "shape-of-texts": tensor(shape=text("4") + b"\x85"),
    "shape-a-number": tensor(shape=b"K\4"),
    "stride-outside": tensor(strides=b"K\2\x85"),
    "stride-negative": tensor(offset=b"K\3", strides=b"J\xff\xff\xff\xff\x85"),
    "stride-missing": tensor(strides=b")"),
    "stride-huge": tensor(strides=BIG + b"\x85"),
    "many-axes": tensor(shape=b"(" + b"K\1" * 70 + b"t", strides=b"(" + b"K\1" * 70 + b"t"),
    "storage-none": tensor(body=b"N"),
    "storage-text": tensor(body=text("0")),
    "storage-missing": tensor(body=storage(key="7")),
    "storage-escapes": tensor(body=storage(key="../version")),
    "storage-other-record": tensor(body=storage(key="../data.pkl")),
    "storage-size-lies": tensor(body=storage(numel=b"K\5")),
    "storage-size-negative": tensor(body=storage(numel=b"J\xff\xff\xff\xff")),
    "storage-size-text": tensor(body=storage(numel=text("4"))),
    "storage-type-lies": tensor(body=storage("torch\nDoubleStorage")),
    "storage-type-complex": tensor(body=storage("torch\nComplexFloatStorage", numel=b"K\2")),
    "storage-type-elsewhere": tensor(body=storage("elsewhere\nFloatStorage")),
    "storage-untyped-for-v2": tensor(body=storage("torch.storage\nUntypedStorage", numel=b"K\x10")),
    "storage-not-a-storage": tensor(body=storage(head="tensor")),
    "storage-two-sizes": b"(" + tensor() + tensor(body=storage("torch\nByteStorage", numel=b"K\4")) + b"t",
    "v2-too-few-arguments": b"ctorch._utils\n_rebuild_tensor_v2\n" + storage() + b"\x85R",
    "v2-no-arguments": b"ctorch._utils\n_rebuild_tensor_v2\n)R",
    "v3-type-unknown": V3 + b"K\0K\4\x85K\1\x85\x89}ctorch\ncomplex64\ntR",
    "v3-type-a-text": V3 + b"K\0K\4\x85K\1\x85\x89}" + text("float32") + b"tR",
    "v3-type-too-wide": V3 + b"K\0K\4\x85K\1\x85\x89}ctorch\nfloat64\ntR",
    "parameter-of-nothing": b"ctorch._utils\n_rebuild_parameter\n)R",
    "parameter-of-text": b"ctorch._utils\n_rebuild_parameter\n" + text("a") + b"\x85R",
    "subclass-too-few": b"ctorch._tensor\n_rebuild_from_type_v2\n)R",
    "subclass-bad-inner": b"ctorch._tensor\n_rebuild_from_type_v2\n"
    b"(ctorch._utils\n_rebuild_tensor_v2\nctorch\nTensor\n)}tR",
}


@pytest.mark.parametrize("name", TENSORS)
def test_lying_tensor_is_refused(tmp_path: Path, name: str) -> None:
    path = torch_zip(P2 + TENSORS[name] + b".", tmp_path / "x.pt", data_0=bytes(16))
    with refused(path, "x/data"):
        torch_file.read(path)


def test_honest_tensor_is_read(tmp_path: Path) -> None:
    """The frame of the cases above is sound: without a lie it is read."""
    path = torch_zip(P2 + tensor() + b".", tmp_path / "x.pt", data_0=bytes(16))
    assert torch_file.read(path).shape == (4,)  # type: ignore[attr-defined]


@pytest.mark.parametrize("cut", range(1, 100, 6))
def test_truncated_pickle_is_refused(tmp_path: Path, cut: int) -> None:
    whole = P2 + tensor() + b"."
    path = torch_zip(whole[: len(whole) * cut // 100], tmp_path / "x.pt", data_0=bytes(16))
    with refused(path, "x/data.pkl"):
        torch_file.read(path)


@pytest.mark.parametrize("seed", range(8))
def test_random_pickles_end_in_a_value_or_a_refusal(tmp_path: Path, seed: int) -> None:
    """Damage that a correct CRC32 hides: whatever bytes come, no other error gets out."""
    rng, whole = random.Random(seed), P2 + b"(" + tensor() + b"}" + text("a") + b"]K\1asccollections\nOrderedDict\n)Rt."
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(2, len(data))] = rng.randrange(256)
        path = torch_zip(bytes(data), tmp_path / "x.pt", data_0=bytes(16))
        with contextlib.suppress(FormatError):
            torch_file.read(path)
