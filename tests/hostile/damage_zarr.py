"""Kinds of damage to distributed checkpoints of zarr: chunks gone or of the wrong size, headers that lie, keys that are none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ckptconv.errors import CkptconvError, ConfigError, CoverageError, FormatError
from tests.hostile.damage import (
    ITERATION,
    Act,
    Case,
    append,
    cases,
    copied,
    cut,
    edit_json,
    edit_pt,
    from_other,
    instead,
    link,
    link_out,
    moved,
    remove,
    shorten,
    text,
)
from tests.hostile.damage_bits import flips, whole
from tests.hostile.damage_dist import EXTRA, FC1, TELLING, every
from tests.hostile.damage_pickle import gadgets

KEY = f"{ITERATION}/{FC1}"
HEADER, CHUNK, LAST = (f"{KEY}/{name}" for name in (".zarray", "0.0.0", "3.0.0"))
OBJECT = f"{ITERATION}/{EXTRA}.pt"
NAMED = f"{FC1}/.zarray"
OUTPUT, FINAL = (f"{ITERATION}/{key}/.zarray" for key in ("output_layer.weight", "decoder.final_layernorm.weight"))
EMBEDDING = "embedding.word_embeddings.weight"
ANY = (FormatError, ConfigError, CoverageError)


def says(**values: Any) -> Act:
    return edit_json(HEADER, lambda header: header.update(values))


def planted(gadget: Any) -> Act:
    return edit_pt(OBJECT, lambda _: [gadget, "x" * 4000])


MANY = every(cut(CHUNK, 0.5), text(f"{KEY}/x", "y"), link_out(OUTPUT), text(FINAL, ""))
CASES: list[Case] = [
    *cases("zarr chunk missing", "zarr", {
        "first": (remove(CHUNK), FC1, "1 of 4 chunks are not there (0.0.0)", "--loader.zarr-missing"),
        "last": (remove(LAST), FC1, "(3.0.0)", "--loader.zarr-missing"),
        "all": (remove(*(f"{KEY}/{n}.0.0" for n in range(4))), FC1, "4 of 4 chunks are not there"),
        "renamed": (moved(LAST, f"{KEY}/4.0.0"), f"{FC1}/4.0.0", "outside the grid"),
        "a folder": (instead(LAST, Path.mkdir), FC1),
        "a pipe": (instead(LAST, os.mkfifo), f"{FC1}/3.0.0", "not a regular file"),
        "a device": (link(LAST, "/dev/zero"), f"{FC1}/3.0.0"),
        "a link to nothing": (link(LAST, "gone"), f"{FC1}/3.0.0"),
        "a link out": (link_out(LAST), f"{FC1}/3.0.0", "leaves the folder"),
        "a link to a system file": (link(LAST, "/etc/passwd"), f"{FC1}/3.0.0", "leaves the folder"),
        "of several": (every(remove(LAST), remove(f"{ITERATION}/{EMBEDDING}/0.0")), FC1, EMBEDDING),
    }),
    *cases("zarr chunk of another size", "zarr", {
        "cut": (cut(CHUNK, 0.5), f"{FC1}/0.0.0", "truncated?"),
        "empty": (cut(CHUNK, 0), f"{FC1}/0.0.0", "truncated?"),
        "a byte short": (shorten(CHUNK, 1), f"{FC1}/0.0.0", "truncated?"),
        "a byte more": (append(CHUNK, b"x"), f"{FC1}/0.0.0", "expected"),
        "endless": (lambda folder: os.truncate(folder / CHUNK, 1 << 40), f"{FC1}/0.0.0"),
        "of another key": (copied(f"{ITERATION}/output_layer.weight/0.0", CHUNK), f"{FC1}/0.0.0"),
        "two of them": (every(cut(CHUNK, 0.5), cut(LAST, 0.5)), f"{FC1}/0.0.0", f"{FC1}/3.0.0"),
    }),
    *cases("zarr chunk of its twin, --check", "zarr", {
        "of another model": (from_other(CHUNK), CHUNK), "of another layer": (copied(LAST, CHUNK), CHUNK),
    }, CkptconvError, other="zarr other", wishes={"check": True}),
    *cases("zarr stray file", "zarr", {
        "no chunk": (text(f"{KEY}/notes.txt", "x"), f"{FC1}/notes.txt", "is no chunk"),
        "few axes": (copied(CHUNK, f"{KEY}/0.0"), f"{FC1}/0.0"),
        "another separator": (copied(CHUNK, f"{KEY}/0-0-0"), f"{FC1}/0-0-0"),
        "zeros before": (copied(CHUNK, f"{KEY}/00.0.0"), f"{FC1}/00.0.0"),
        "a huge number": (copied(CHUNK, f"{KEY}/{'9' * 60}.0.0"), FC1, "is no chunk"),
        "an empty folder": (lambda folder: (folder / ITERATION / "empty").mkdir(), "empty"),
        "a folder in folders": (copied(KEY, f"{ITERATION}/x/y/z"), "x"),
    }),
    *cases("zarr keys", "zarr", {
        "missing": (remove(KEY), FC1),
        "renamed": (moved(KEY, f"{KEY}s"), FC1),
        "one more": (copied(KEY, f"{ITERATION}/stray"), "stray"),
        "no embedding": (remove(f"{ITERATION}/{EMBEDDING}"), EMBEDDING),
        "a layer less": (every(says(shape=[3, 96, 32]), remove(LAST)), FC1),
        "no header": (remove(HEADER), FC1, "no .zarray"),
    }, ANY),
    *cases("zarr header lies", "zarr", {
        "more rows": (says(shape=[4, 97, 32]), FC1, "chunks are not there"),
                "fewer layers": (says(shape=[3, 96, 32]), f"{FC1}/3.0.0", "outside the grid"),
        "smaller chunks": (says(chunks=[1, 48, 32]), f"{FC1}/0.0.0", "expected"),
        "larger chunks": (says(chunks=[2, 96, 32]), f"{FC1}/0.0.0", "expected"),
        "fewer axes": (says(shape=[384, 32], chunks=[96, 32]), FC1),
        "axes of one": (says(shape=[4, 96, 32], chunks=[96, 32]), NAMED, "3 axes in chunks of 2"),
        "wider": (says(dtype="<f4"), f"{FC1}/0.0.0", "expected"),
        "big-endian": (says(dtype=">f4"), NAMED),
        "objects": (says(dtype="|O"), NAMED),
        "unknown dtype": (says(dtype="float99"), NAMED, "float99"),
        "dtype of a list": (says(dtype=[["x", "<f4"]]), NAMED),
        "version 3": (says(zarr_format=3), NAMED, "zarr_format 3"),
        "compressed": (says(compressor={"id": "nonsense"}), NAMED, "nonsense"),
        "filtered": (says(filters=[{"id": "delta"}]), NAMED, "filters"),
        "order": (says(order="Z"), NAMED, "order"),
        "separator": (says(dimension_separator="-"), NAMED, "dimension_separator"),
        "fill of text": (says(fill_value="x"), NAMED, "fill_value"),
        "huge shape": (says(shape=[1 << 62, 1 << 62, 1 << 62]), NAMED, "too large"),
                "huge chunks": (says(chunks=[1 << 40, 1 << 40, 32]), FC1),
        "negative": (says(shape=[-4, 96, 32]), NAMED, "shape"),
        "zero chunks": (says(chunks=[0, 96, 32]), NAMED, "chunks"),
        "fractions": (says(shape=[4.0, 96, 32]), NAMED, "shape"),
        "booleans": (says(shape=[True, 96, 32]), NAMED, "shape"),
        "many axes": (says(shape=[1] * 4000, chunks=[1] * 4000), NAMED),
        "a field less": (edit_json(HEADER, lambda header: header.pop("order")), NAMED, "does not say order"),
        "a field more": (says(secret=1), NAMED, "secret"),
    }),
    *cases("zarr header tells of other layers", "zarr", {
        "one more": (says(shape=[5, 96, 32]), "layers: hf/config.json says 4, the tensors say 5"),
        "endless": (says(shape=[1 << 50, 96, 32]), FC1, "layers are damage"),
    }, ConfigError),
    *cases("zarr header damaged", "zarr", {
        "empty": (text(HEADER, b""), NAMED),
        "garbage": (text(HEADER, b"\xff\xfe"), NAMED),
        "a list": (text(HEADER, "[]"), NAMED),
        "deep": (text(HEADER, "[" * 100_000), NAMED),
        "endless": (lambda folder: os.truncate(folder / HEADER, 1 << 40), NAMED),
        "a pipe": (instead(HEADER, os.mkfifo), NAMED),
        "a device": (link(HEADER, "/dev/zero"), NAMED),
        "a link out": (link_out(HEADER), NAMED, "leaves the folder"),
        **{f"cut at {part:.0%}": (cut(HEADER, part), NAMED) for part in (0.2, 0.5, 0.9)},
    }),
    *cases("flip in a zarr header", "zarr", flips(HEADER, whole, "fc1", FC1, 60), CkptconvError, harmless=True),
    *cases("zarr that is said to be something else", "zarr", {
        "torch_dist": (edit_json(TELLING, lambda told: told.update(sharded_backend="torch_dist")), ".metadata", "is missing"),
        "nothing": (remove(TELLING), "source"),
    }, CkptconvError),
    *cases("zarr object that would run code", "zarr", {
        name: (planted(gadget), OBJECT, "would run") for name, gadget in gadgets().items()
    }),
    *cases("many things at once in zarr", "zarr", {"all": (MANY, f"{FC1}/0.0.0", f"{FC1}/x", OUTPUT, FINAL)}),
]  # fmt: skip
