"""Kinds of damage to Hugging Face folders: safetensors headers, indexes, shards, links, config.json, .bin files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ckptconv.errors import ConfigError, CoverageError, FormatError, ReplicaError
from tests.hostile.damage import (
    Act,
    Case,
    Row,
    append,
    cases,
    copied,
    cut,
    edit_json,
    from_other,
    instead,
    link,
    link_out,
    remove,
    replaced,
    shorten,
    text,
)

ONE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SHARDS = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
EMBED, UP, NORM = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
TENSORS = {"first": EMBED, "inner": UP, "small": NORM}
Header = dict[str, Any]


def rewrite(path: Path, change: Callable[[Header], Header | bytes | None], length: int | None = None) -> None:
    """The header changed, the body kept; `length` is what the file says of the header's length."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    new = change(header)
    raw = new if isinstance(new, bytes) else json.dumps(new or header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data[end:])


def header(change: Callable[[Header], Header | bytes | None], name: str = ONE, length: int | None = None) -> Act:
    return lambda folder: rewrite(folder / name, change, length)


def entry(tensor: str, change: Callable[[dict[str, Any]], object]) -> Act:
    """One header entry changed, in whichever weight file holds it."""

    def changed(info: dict[str, Any]) -> dict[str, Any]:
        change(info)
        return info

    def act(folder: Path) -> None:
        for path in sorted(folder.glob("*.safetensors")):
            if tensor.encode() in path.read_bytes():
                rewrite(path, lambda table: table.update({tensor: changed(table[tensor])}))
                return
        raise AssertionError(tensor)

    return act


def each(lies: dict[str, Callable[[dict[str, Any]], object]]) -> dict[str, Row]:
    """Every lie told of every one of TENSORS."""
    return {
        f"{place}, {lie}": (entry(tensor, change), ".safetensors", tensor)
        for lie, change in lies.items()
        for place, tensor in TENSORS.items()
    }


def offsets(change: Callable[[int, int], list[Any]]) -> Callable[[dict[str, Any]], object]:
    return lambda e: e.update(data_offsets=change(*e["data_offsets"]))


def shape(change: Callable[[list[int]], Any]) -> Callable[[dict[str, Any]], object]:
    return lambda e: e.update(shape=change(e["shape"]))


OFFSETS = {
    "too long": offsets(lambda a, b: [a, b + 2]),
    "too short": offsets(lambda a, b: [a, b - 2]),
    "backwards": offsets(lambda a, b: [b, a]),
    "negative": offsets(lambda a, b: [a - b - 8, -8]),
    "no numbers": offsets(lambda a, b: [str(a), b]),
    "three": offsets(lambda a, b: [a, b, b]),
}
SHAPES = {
    "more rows": shape(lambda s: [s[0] + 1, *s[1:]]),
    "another axis of 2": shape(lambda s: [*s, 2]),
    "negative": shape(lambda s: [-s[0], *s[1:]]),
    "beyond 64 bits": shape(lambda s: [1 << 40, 1 << 40]),
    "a fraction": shape(lambda s: [s[0] + 0.5, *s[1:]]),
    "no list": shape(lambda s: "x"),
}
DTYPES: dict[str, Callable[[dict[str, Any]], object]] = {
    "wider": lambda e: e.update(dtype="F32"),
    "unknown": lambda e: e.update(dtype="BF61"),
    "a number": lambda e: e.update(dtype=5),
    "absent": lambda e: e.pop("dtype"),
}


def shift(by: Callable[[int], int]) -> Act:
    """Every tensor but the first in the file moved, so that ranges overlap or leave a hole."""

    def change(table: Header) -> None:
        entries = sorted((e for n, e in table.items() if n != "__metadata__"), key=lambda e: e["data_offsets"])
        for e in entries[1:]:
            e["data_offsets"] = [by(n) for n in e["data_offsets"]]

    return header(change)


def onto(tensor: str, target: str) -> Act:
    """Two tensors of one shape given the same bytes."""
    return header(lambda t: t[tensor].update(data_offsets=t[target]["data_offsets"]))


def transposed(tensor: str) -> Act:
    return entry(tensor, shape(lambda s: s[::-1]))


def twice(tensor: str) -> Act:
    def change(table: Header) -> bytes:
        raw = json.dumps(table)
        return (raw[:-1] + "," + json.dumps(tensor) + ":" + json.dumps(table[tensor]) + "}").encode()

    return header(change)


def place_of(tensor: str, target: Any) -> Act:
    """The index says that a tensor is elsewhere."""
    return edit_json(INDEX, lambda t: t["weight_map"].update({tensor: target}))


GATE = UP.replace("up_proj", "gate_proj")
Q = "model.layers.0.self_attn.q_proj.weight"
K, V = Q.replace("q_proj", "k_proj"), Q.replace("q_proj", "v_proj")
ESCAPES = {
    "upward": "../x.safetensors",
    "absolute": "/etc/passwd",
    "below": "sub/x.safetensors",
    "zero byte": "x\0.safetensors",
    "backslash": "..\\x.safetensors",
    "the folder above": "..",
    "a surrogate": "\ud800.safetensors",
    "a pickle": "model.bin",
}
LENGTHS = {
    "0": 0,
    "1": 1,
    "a little less": 600,
    "a little more": 1 << 12,
    "100 MB": 10**8 + 1,
    "2^40": 1 << 40,
    "2^64-1": (1 << 64) - 1,
}


_OVERLAPS: dict[str, Row] = {t: (onto(t, u), ONE, "begins at") for t, u in ((UP, GATE), (K, V), (V, K))}
_LOOSE: dict[str, Row] = {
    "before the second": (shift(lambda n: n + 8), ONE, "hole"),
    "after the last": (append(ONE, b"\0" * 8), ONE),
}
SAFETENSORS_CASES: list[Case] = [
    *cases("safetensors cut", "hf", {f"at {k:g}": (cut(ONE, k), ONE) for k in (0, 0.0001, 0.01, 0.03, 0.5, 0.9)}),
    *cases("safetensors cut", "hf", {"by a byte": (shorten(ONE, 1), ONE), "by a page": (shorten(ONE, 4096), ONE)}),
    *cases("safetensors cut", "shards", {f"shard {s[6:11]}": (cut(s, 0.7), s) for s in SHARDS}),
    *cases("header length lies", "hf", {k: (header(lambda t: t, ONE, v), ONE) for k, v in LENGTHS.items()}),
    *cases("header offsets lie", "hf", each(OFFSETS)),
    *cases("header shape lies", "hf", each(SHAPES)),
    *cases("header shape lies", "shards", {"in a shard": (entry(UP, SHAPES["more rows"]), SHARDS[1][:6], UP)}),
    *cases("header dtype lies", "hf", each(DTYPES)),
    *cases("tensors overlap", "hf", _OVERLAPS | {"all by 2": (shift(lambda n: n - 2), ONE, "overlaps")}),
    *cases(
        "bytes without a tensor",
        "hf",
        _LOOSE | {"hidden megabyte": (append(ONE, bytes(1 << 20)), ONE)},
    ),
    *cases("name twice in a header", "hf", {t: (twice(t), ONE, "twice") for t in TENSORS.values()}),
    *cases(
        "header is no JSON",
        "hf",
        {
            "nested": (header(lambda t: b"{" + b'"a":{' * 9000), ONE),
            "a list": (header(lambda t: b"[1]"), ONE),
            "NaN": (header(lambda t: {**t, "x": float("nan")}), ONE),
            "no text": (header(lambda t: b"{\xff\xfe}"), ONE),
            "a pickle": (header(lambda t: b"\x80\x02N."), ONE),
            "metadata of numbers": (header(lambda t: {**t, "__metadata__": {"a": 1}}), ONE),
        },
    ),
]


_WIDER: dict[str, Row] = {s: (from_other(s), ".weight") for s in SHARDS}
_SWAPPED: dict[str, Row] = {f"{s[6:11]} is {t[6:11]}": (copied(t, s), s) for s, t in pairwise(SHARDS)}
INDEX_CASES: list[Case] = [
    *cases("shard name escapes", "shards", {k: (place_of(UP, v), INDEX, UP) for k, v in ESCAPES.items()}),
    *cases("index cut", "shards", {f"at {k:g}": (cut(INDEX, k), INDEX) for k in (0, 0.02, 0.3, 0.6, 0.97)}),
    *cases(
        "index lies",
        "shards",
        {
            "another shard": (place_of(EMBED, SHARDS[2]), INDEX, EMBED),
            "a shard that is not there": (place_of(EMBED, "x.safetensors"), "x.safetensors"),
            "a tensor more": (place_of("x.weight", SHARDS[0]), INDEX, "x.weight"),
            "a tensor less": (edit_json(INDEX, lambda t: t["weight_map"].pop(UP)), INDEX, UP),
        },
        CoverageError,
    ),
    *cases(
        "index lies",
        "shards",
        {
            "a number": (place_of(UP, 5), INDEX, UP),
            "no map": (edit_json(INDEX, lambda t: t.pop("weight_map")), INDEX),
            "a list": (edit_json(INDEX, lambda t: t.update(weight_map=[1])), INDEX),
            "of bin files": (place_of(UP, "pytorch_model.bin"), INDEX, UP),
            "twice": (replaced(INDEX, '"weight_map": {', f'"weight_map": {{"{UP}": "{SHARDS[0]}", '), INDEX, "twice"),
        },
    ),
    *cases("shard missing", "shards", {s: (remove(s), s) for s in SHARDS}, CoverageError),
    *cases("shard missing", "shards", {"index too": (remove(INDEX), SHARDS[0])}),
    *cases("shard of a wider model", "shards", _WIDER, CoverageError, other="shards wide"),
    *cases(
        "shard of another model, --check",
        "shards",
        {s: (from_other(s), s) for s in SHARDS},
        other="shards other",
        wishes={"check": True},
    ),
    *cases("shards swapped", "shards", _SWAPPED, CoverageError),
]


NAMES = [*SHARDS, INDEX, CONFIG, "tokenizer.json"]
LINK_CASES: list[Case] = [
    *cases("link out of the folder", "shards", {n: (link_out(n), n, "leaves the folder") for n in NAMES}),
    *cases("link to nothing", "shards", {n: (link(n, "gone"), n) for n in NAMES}),
    *cases("link to itself", "shards", {n: (link(n, n), n) for n in NAMES[2:]}),
    *cases("a pipe", "shards", {n: (instead(n, os.mkfifo), n) for n in NAMES}),
    *cases("a folder", "shards", {n: (instead(n, Path.mkdir), n) for n in NAMES[:-1]}),
    *cases("a device", "shards", {n: (link(n, "/dev/zero"), n) for n in NAMES[2:]}),
]


def set_config(**values: Any) -> Act:
    return edit_json(CONFIG, lambda t: t.update(values))


CONFIG_CASES: list[Case] = [
    *cases(
        "config cut",
        "hf",
        {f"at {k:g}": (cut(CONFIG, k), CONFIG) for k in (0, 0.1, 0.5, 0.98)},
        (FormatError, ConfigError),
    ),
    *cases("config cut", "hf", {"all of it": (remove(CONFIG), CONFIG)}, ConfigError),
    *cases(
        "config contradicts the tensors",
        "hf",
        {
            "layers": (set_config(num_hidden_layers=5), "layers.4."),
            "fewer layers": (set_config(num_hidden_layers=3), "layers.3."),
            "groups": (set_config(num_key_value_heads=8), "k_proj"),
            "hidden": (set_config(hidden_size=64), "norm"),
            "biases": (set_config(attention_bias=True), "q_proj.bias"),
            "ffn": (set_config(intermediate_size=64), "up_proj"),
            "family": (set_config(model_type="qwen3"), "q_norm"),
        },
        CoverageError,
    ),
    *cases(
        "config contradicts the tensors",
        "hf",
        {"vocabulary": (set_config(vocab_size=60), CONFIG, "61 rows")},
        ConfigError,
    ),
    *cases(
        "config contradicts the tensors",
        "hf",
        {"tied": (set_config(tie_word_embeddings=True), "lm_head")},
        ReplicaError,
    ),
    *cases(
        "config with absurd values",
        "hf",
        {
            "no layers": (set_config(num_hidden_layers=0), "layers"),
            "a million layers": (set_config(num_hidden_layers=10**6), CONFIG, "layers"),
            "negative": (set_config(hidden_size=-32), CONFIG, "hidden_size"),
            "huge": (set_config(vocab_size=1 << 60), CONFIG, "vocab_size"),
            "text": (set_config(num_attention_heads="8"), CONFIG, "num_attention_heads"),
            "true": (set_config(num_attention_heads=True), CONFIG, "num_attention_heads"),
            "zero heads": (set_config(num_attention_heads=0), CONFIG, "heads"),
            "no family": (set_config(model_type="???"), CONFIG, "???"),
            "quantised": (set_config(quantization_config={}), CONFIG, "quantis"),
            "rope of text": (set_config(rope_theta="x"), CONFIG, "rope_theta"),
        },
        ConfigError,
    ),
    *cases(
        "config is no JSON",
        "hf",
        {
            "nested": (text(CONFIG, "[" * 10**5), CONFIG),
            "NaN": (replaced(CONFIG, "1e-06", "NaN"), CONFIG),
            "100 GB": (lambda f: os.truncate(f / CONFIG, 10**11), CONFIG),
            "a key twice": (replaced(CONFIG, "{", '{"head_dim": 6,'), CONFIG),
        },
    ),
]


BIN = "pytorch_model.bin"


def resave(change: Callable[[dict[str, Any]], object], **options: Any) -> Act:
    def act(folder: Path) -> None:
        state = torch.load(folder / BIN)
        changed = change(state)
        torch.save(changed if isinstance(changed, dict | list) else state, folder / BIN, **options)

    return act


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda state: state.pop(name) is None


KEEPS = (0, 0.001, 0.1, 0.5, 0.99)
BIN_CASES: list[Case] = [
    *cases("bin cut", "bin", {f"at {k:g}": (cut(BIN, k), BIN) for k in KEEPS}),
    *cases("old bin cut", "old bin", {f"at {k:g}": (cut(BIN, k), BIN) for k in KEEPS}),
    *cases(
        "old bin lies",
        "old bin",
        {
            "bytes after": (append(BIN, b"\0"), BIN),
            "a storage more": (replaced(BIN, "]q", "]q\x00"), BIN),
            "magic": (replaced(BIN, "\x19.", "\x18."), BIN),
        },
    ),
    *cases(
        "bin of other things",
        "bin",
        {
            "a list": (resave(lambda s: [s]), BIN, "list"),
            "nested": (resave(lambda s: {"state_dict": s}), BIN, "state_dict"),
            "a number": (resave(lambda s: s.update(step=5)), BIN, "step"),
            "numbered": (resave(lambda s: {7: s[EMBED]}), BIN, "7: View"),
            "safetensors": (lambda f: (f / BIN).write_bytes((2).to_bytes(8, "little") + b"{}"), BIN),
        },
    ),
    *cases(
        "bin lacks a tensor",
        "bin",
        {t: (resave(without(t)), t) for t in (UP, NORM)},
        CoverageError,
    ),
]


CASES = [*SAFETENSORS_CASES, *INDEX_CASES, *LINK_CASES, *CONFIG_CASES, *BIN_CASES]
