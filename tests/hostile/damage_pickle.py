"""Kinds of damage to the pickle in a rank's .pt: lies about tensors, things that are no tensors, code, bombs."""

from __future__ import annotations

import os
import pickle
import runpy
import shutil
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ckptconv.errors import CoverageError, FormatError
from tests.hostile.damage import ITERATION, PT, Act, Case, Row, cases, edit_pt, edit_records, member
from tests.hostile.damage_hf import BIN
from tests.hostile.damage_zip import FIRST, LAST, PLACES, everywhere

FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
State = dict[str, Any]


class Lie:
    """A tensor that is pickled with another offset, shape and strides than it has."""

    def __init__(self, tensor: torch.Tensor, offset: Any, shape: Any, strides: Any) -> None:
        self.tensor, self.told = tensor, (offset, shape, strides)

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild: Any = torch._utils
        storage: Any = self.tensor
        return rebuild._rebuild_tensor_v2, (storage._typed_storage(), *self.told, False, OrderedDict())


def lie(key: str, change: Callable[[torch.Tensor], tuple[Any, Any, Any]]) -> Callable[[State], None]:
    def act(state: State) -> None:
        tensor = state["model"][key]
        state["model"][key] = Lie(tensor, *change(tensor))

    return act


LIES: dict[str, Callable[[torch.Tensor], tuple[Any, Any, Any]]] = {
    "more rows": lambda t: (0, (t.shape[0] + 1, *t.shape[1:]), t.stride()),
    "long strides": lambda t: (0, tuple(t.shape), (t.stride(0) + 1, 1)),
    "offset": lambda t: (1, tuple(t.shape), t.stride()),
    "negative offset": lambda t: (-1, tuple(t.shape), t.stride()),
    "negative stride": lambda t: (0, tuple(t.shape), (-t.stride(0), 1)),
    "negative shape": lambda t: (0, (-1, t.shape[1]), t.stride()),
    "huge shape": lambda t: (0, (1 << 40, 1 << 40), (0, 0)),
    "few strides": lambda t: (0, tuple(t.shape), (1,)),
    "text": lambda t: (0, "xy", t.stride()),
}


def resized(suffix: str, change: Callable[[bytes], bytes]) -> Callable[[dict[str, bytes]], None]:
    return lambda records: records.update({member(records, suffix): change(records[member(records, suffix)])})


SIZES: dict[str, Callable[[bytes], bytes]] = {
    "short": lambda b: b[:-2],
    "long": lambda b: b + bytes(2),
    "empty": lambda b: b"",
}
_LIES: dict[str, Row] = {
    f"{k}, {p}": (edit_pt(n, lie(FC1, c)), n, "data.pkl") for k, c in LIES.items() for p, n in PLACES.items()
}
_SIZES: dict[str, Row] = {
    f"data/{i} {k}": (edit_records(FIRST, resized(f"data/{i}", c)), FIRST, f"data/{i}", "data.pkl says")
    for i in (0, 1, 2)
    for k, c in SIZES.items()
}
LIE_CASES: list[Case] = [
    *cases("pickle lies about a tensor", "mcore", _LIES),
    *cases("storage size lies", "mcore", _SIZES),
    *cases(
        "tensor misshapen",
        "mcore",
        everywhere(
            {
                "transposed": lambda n: (
                    edit_pt(n, lambda s: s["model"].update({FC1: s["model"][FC1].t().contiguous()})),
                    FC1,
                    "shape",
                ),
                "cut": lambda n: (
                    edit_pt(n, lambda s: s["model"].update({FC1: s["model"][FC1][1:].clone()})),
                    FC1,
                    "shape",
                ),
            }
        ),
        (CoverageError, FormatError),
    ),
    *cases(
        "tensor misnamed",
        "mcore",
        everywhere(
            {
                "missing": lambda n: (edit_pt(n, lambda s: s["model"].pop(FC1) is None), FC1),
                "unexpected": lambda n: (
                    edit_pt(n, lambda s: s["model"].update(stray=torch.zeros(1))),
                    "unexpected: stray",
                ),
                "renamed": lambda n: (
                    edit_pt(n, lambda s: s["model"].update({QKV + "s": s["model"].pop(QKV)})),
                    QKV,
                    "did you mean",
                ),
                "a layer more": lambda n: (
                    edit_pt(n, lambda s: s["model"].update({FC1.replace("0", "7"): s["model"][FC1]})),
                    n,
                    "no layer",
                ),
            }
        ),
        (CoverageError, FormatError),
    ),
    *cases(
        "no tensor where one belongs",
        "mcore",
        everywhere(
            {
                "a list": lambda n: (edit_pt(n, lambda s: s["model"].update({FC1: [1.0]})), n, FC1),
                "a number": lambda n: (edit_pt(n, lambda s: s["model"].update({FC1: 3})), n, FC1),
                "no model": lambda n: (edit_pt(n, lambda s: s.pop("model") is None), n, "model"),
                "model is a list": lambda n: (edit_pt(n, lambda s: s.update(model=[])), n, "model"),
                "chunks 0 and 2": lambda n: (
                    edit_pt(n, lambda s: s.update(model0=s["model"], model2=s.pop("model"))),
                    n,
                    "model2",
                ),
                "a list of states": lambda n: (edit_pt(n, lambda s: [s]), n, "list"),
            }
        ),
    ),
]


# -- pickles that would run code -------------------------------------------------------------------------------------


class Call:
    """Pickles as a call: whoever unpickles it runs `function(*args)`."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


TOUCH = "touch canary"
OPEN = "open('canary', 'w').close()"


class Setstate:
    """Its __setstate__ leaves the canary; to us it is an object of an unknown class."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Setstate, (), {"x": 1}

    def __setstate__(self, state: Any) -> None:
        Path("canary").touch()


def gadgets() -> dict[str, Any]:
    return {
        "os.system": Call(os.system, TOUCH),
        "os.mkdir": Call(os.mkdir, "canary"),
        "eval": Call(eval, OPEN),
        "exec": Call(exec, OPEN),
        "subprocess": Call(subprocess.Popen, ["touch", "canary"]),
        "import": Call(__import__, "antigravity"),
        "open": Call(open, "canary", "w"),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.system, TOUCH))),
        "runpy": Call(runpy.run_path, "canary.py"),
        "rmtree": Call(shutil.rmtree, "."),
        "torch.load": Call(torch.load, "canary"),
        "compile": Call(compile, OPEN, "x", "exec"),
    }


def planted(where: str, gadget: Any) -> Callable[[State], Any]:
    """The gadget in a place of the state that a loader would look at, or would not."""

    def act(state: State) -> Any:
        if where == "args":
            state["args"].x = gadget
        elif where == "model":
            state["model"]["x"] = gadget
        elif where == "extra state":
            state["model"][FC1.replace("weight", "_extra_state")] = gadget
        elif where == "whole":
            return [gadget]
        else:
            state[where] = gadget
        return state

    return act


def _bin(gadget: Any) -> Act:
    return lambda folder: torch.save({"x": gadget}, folder / BIN)


_PLANTED: dict[str, Row] = {
    f"{name} in {place}": (edit_pt(FIRST, planted(place, gadget)), FIRST, "data.pkl", "would run")
    for place in ("args", "model", "extra state", "optimizer", "whole")
    for name, gadget in gadgets().items()
}
CODE_CASES: list[Case] = [
    *cases("pickle that would run code", "mcore", _PLANTED),
    *cases(
        "pickle that would run code",
        "mcore",
        {
            f"{name} in the last rank": (edit_pt(LAST, planted("rng_state", g)), LAST, "would run")
            for name, g in gadgets().items()
        },
    ),
    *cases(
        "pickle that would run code",
        "legacy",
        {
            f"{name} in a legacy file": (edit_pt(f"{ITERATION}/mp_rank_01/{PT}", planted("args", g)), PT, "would run")
            for name, g in gadgets().items()
        },
    ),
    *cases(
        "bin that would run code",
        "bin",
        {name: (_bin(g), BIN, "would run") for name, g in gadgets().items()},
    ),
]


# Pickles whose object is far larger than they are, or has no end.
def nested(times: int, width: int) -> list[Any]:
    """Lists in lists: `width` times the same one in each."""
    value: list[Any] = ["ha"]
    for _ in range(times):
        value = [value] * width
    return value


LOOP: list[Any] = []
LOOP.append(LOOP)
BOMBS = {"a loop": LOOP, "billion laughs": nested(40, 2), "deep": nested(300, 1)}
_BOMBS: dict[str, Row] = {
    f"{name} in {place}": (edit_pt(FIRST, planted(place, value)), FIRST, "data.pkl")
    for place in ("args", "optimizer")
    for name, value in BOMBS.items()
}
BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda b: b[: len(b) // 2],
    "no stop": lambda b: b[:-1],
    "more after it": lambda b: b + b"N.",
    "empty": lambda b: b"",
    "zeros": lambda b: bytes(len(b)),
    "two objects": lambda b: b[:-1] + b"N.",
    "memo of nothing": lambda b: b"\x80\x02h\x07.",
    "huge string": lambda b: b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
    "protocol 0": lambda b: b"(dp0\n.",
    "extension code": lambda b: b"\x80\x02\x82\x01.",
}
BOMB_CASES: list[Case] = [
    *cases("pickle bomb", "mcore", _BOMBS),
    *cases(
        "pickle is broken",
        "mcore",
        {k: (edit_records(FIRST, resized("data.pkl", c)), FIRST, "data.pkl") for k, c in BROKEN.items()},
    ),
]

CASES = [*LIE_CASES, *CODE_CASES, *BOMB_CASES]
