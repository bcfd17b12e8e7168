"""Runs every archive of NeMo's own tools through ckptconv and prints a table; exits 1 on any difference.

usage: python tools/golden_nemo.py FOLDER [--only TEXT]
FOLDER holds CASE/case.json with the official command, CASE/llama.nemo as it came out (or nothing, where the tool failed), and
_inputs/MODEL, the Hugging Face models they were made from.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

sys.path.insert(0, str(Path(__file__).parent.parent))

from tools.golden_cases import convert
from tools.golden_checks import differences, hf_leaves
from tools.golden_table import Check, arguments, print_table
from tools.rank_files import Leaf, leaf

Leaves = dict[str, Leaf]
DTYPES = {"32": "fp32", "16": "fp16"}
HASHES = re.compile(r"[0-9a-f]{32}_")
HALVED = "linear_fc1.weight"  # gate and up are two chunks of one tensor for Megatron-Core, one for us: read alike
FREQUENCIES = "rotary_pos_emb.inv_freq"  # a half precision run (O2) rounds this buffer too; ours is in fp32
# every key of a model_config.yaml in which ours may differ from NeMo's, and why
REASONS = {
    "scale_positional_embedding": "NeMo's converter sets it for every llama; these have no rope scaling",
    "rotary_base": "said, where NeMo leaves out what it takes for granted",
    "megatron_amp_O2": "how a run trains, not what the files hold: taken from a NeMo source, off in a new file",
    "dist_ckpt_format": "how NeMo saves next: loading goes by metadata.json",
}


LLAVA = "llava_tiny"  # and its tower alone
TOWER = "clip_tiny"
TUNED = 384  # rows of it; those behind are what NeMo's model happened to begin with
RANKS = {"tp": 2, "pp": 2}


@dataclass(frozen=True)
class Golden:
    """One case; `archive` is not there where the official tool failed."""

    case: Path
    command: str

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def archive(self) -> Path:
        return self.case / "llama.nemo"

    @property
    def inputs(self) -> Path:
        return self.case.parent / "_inputs"

    def option(self, flag: str) -> str | None:
        words = shlex.split(self.command)
        return words[words.index(flag) + 1] if flag in words else None

    @property
    def hf(self) -> Path:
        """The Hugging Face model at the beginning of the chain."""
        given = self.option("--input_name_or_path")
        if given:
            return self.inputs / Path(given).name
        source = Path(self.option("--model_file") or self.archive).parent.name
        return self.inputs / re.sub(r".*?(mha|gqa)(_v\d+)?.*", r"llama_\1\2", source)

    @property
    def vocab(self) -> int:
        rows: int = json.loads((self.hf / "config.json").read_text())["vocab_size"]
        return rows

    @property
    def source(self) -> Path:
        """What the official tool read; its Hugging Face model where that is not kept."""
        given = self.option("--model_file")
        path = self.case.parent / Path(given).parent.name / "llama.nemo" if given else self.hf
        return path if path.exists() else self.hf

    def wishes(self) -> dict[str, Any]:
        """What the official command asked for, in our words."""
        legacy, partitions = "legacy" in self.name, self.option("--model_file") is not None
        options = {"mcore_gpt": "false"} if legacy else {}
        if "zarr" in self.name:
            options["backend"] = "zarr"
        wishes: dict[str, Any] = {"saver": "nemo", "saver_options": options}
        if partitions:
            wishes["tp"] = self.option("--target_tensor_model_parallel_size")
            wishes["pp"] = self.option("--target_pipeline_model_parallel_size")
        else:
            wishes["dtype"] = DTYPES[self.option("--precision") or "32"]
        return wishes


def goldens(folder: Path) -> Iterator[Golden]:
    """Those of the llama converter and of the partition changer."""
    for told in sorted(folder.glob("*/case.json")):
        command = json.loads(told.read_text())["command"]
        if command.startswith("v2.0.0/"):
            yield Golden(told.parent, command)


def forward(golden: Golden, work: Path) -> list[str]:
    """Converted as the official tool was told to: differences in members, names and their order, dtypes, bits, configuration."""
    work.mkdir()
    convert(golden.source, work / "ours.nemo", **golden.wishes())
    return archive_differences(golden.archive, work / "ours.nemo")


def archive_differences(theirs: Path, ours: Path) -> list[str]:
    one, two = (_joined(members(path)) for path in (theirs, ours))
    wrong = [] if list(one) == list(two) else [f"members: {list(two)}, official {list(one)}"]
    wrong += [row for row in differences(described(one), described(two)) if not _rounded(row)]
    wrong += [f"{name} differs" for name in one if name.endswith("tokenizer.model") and one[name] != two.get(name)]
    rows = config_rows(one["model_config.yaml"], two["model_config.yaml"])
    return wrong + [f"model_config.yaml: {key}: {row}" for key, row in rows.items() if key not in REASONS]


def back(golden: Golden, work: Path) -> list[str]:
    """An official archive back to the Hugging Face folder it came from, bit for bit."""
    convert(
        golden.archive, work, loader_options={"config": golden.hf}, saver="hf", saver_options={"template": golden.hf}
    )
    half = "fp16" in golden.name
    tensors = load_file(golden.hf / "model.safetensors")
    want = {name: leaf(tensor.half() if half else tensor) for name, tensor in sorted(tensors.items())}
    same = half or (golden.hf / "config.json").read_bytes() == (work / "config.json").read_bytes()
    return differences({"hf": want}, {"hf": hf_leaves(work)}) + ([] if same else ["config.json differs"])


def not_in_nemo(golden: Golden, work: Path) -> list[str]:
    """What the official tool failed at: done, padded with zeros, and back to Hugging Face bit for bit."""
    work.mkdir()
    convert(golden.source, work / "ours.nemo", **golden.wishes())
    ours = work / "ours.nemo"
    convert(ours, work / "hf", loader_options={"config": golden.hf}, saver="hf", saver_options={"template": golden.hf})
    return differences({"hf": hf_leaves(golden.hf)}, {"hf": hf_leaves(work / "hf")}) + padding(ours, golden.vocab)


def padding(archive: Path, vocab: int) -> list[str]:
    """Rows beyond the true vocabulary are zero, in every table of it."""
    found = members(archive)
    ranks = [loaded(found[name]) for name in sorted(found) if name.endswith(".ckpt")] or [torch_dist(found)[0]]
    wrong = []
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        table = torch.cat([value for state in ranks for key, value in state.items() if key.endswith(name)])
        wrong += [f"{name}: rows after {vocab} are not zero"] if table[vocab:].any() else []
    return wrong


def neva_states(path: Path) -> dict[str, Any]:
    """The tensors of a distributed archive, as torch reads them; without what NeMo had no rows for."""
    tables = ("word_embeddings.weight", "output_layer.weight")
    found = torch_dist(members(path))[0]
    return {name: value[:TUNED] if name.endswith(tables) else value for name, value in found.items()}


def neva_rounds(archive: Path, work: Path) -> list[str]:
    """Cut for ranks, for others, and joined: what torch reads then is what it reads of NeMo's file."""
    work.mkdir()
    last = archive
    for i, layout in enumerate((RANKS, {"tp": 4, "pp": 1}, {"tp": 1, "pp": 4}, {"tp": 1, "pp": 1})):
        whole = {"weights": "distributed"} if layout == {"tp": 1, "pp": 1} else {}
        convert(last, work / f"{i}.nemo", saver_options=whole, **layout)
        last = work / f"{i}.nemo"
    one, two = torch_dist(members(archive))[0], torch_dist(members(last))[0]
    return differences({"": {k: leaf(one[k]) for k in sorted(one)}}, {"": {k: leaf(two[k]) for k in sorted(two)}})


def neva_forward(archive: Path, work: Path) -> list[str]:
    """From the LLaVA it was made of, its tower left out: the same tensors, and what the configuration says of the image side."""
    work.mkdir()
    inputs = archive.parent.parent
    options = {"tokenizer": inputs / "add_special_tokens" / "output.model", "frozen_vision": True}
    named = {"vision_encoder": "openai/clip-vit-large-patch14"}  # as NeMo's converter names it, whatever it is
    convert(inputs / "_inputs" / LLAVA, work / "ours.nemo", saver="nemo", saver_options={**options, **named})
    one, two = neva_states(archive), neva_states(work / "ours.nemo")
    wrong = differences({"": {k: leaf(one[k]) for k in sorted(one)}}, {"": {k: leaf(two[k]) for k in sorted(two)}})
    theirs, ours = (yaml.safe_load(members(path)["model_config.yaml"]) for path in (archive, work / "ours.nemo"))
    ours["mm_cfg"]["vision_encoder"].pop("vision_select_feature")  # said, where NeMo takes it for granted
    return wrong + [f"{key} differs" for key in ("mm_cfg", "target") if ours[key] != theirs[key]]


def neva_back(archive: Path, work: Path) -> list[str]:
    """To the LLaVA that it was made of, with the tower that NeMo left out, bit for bit."""
    inputs = archive.parent.parent / "_inputs"
    given: dict[str, Any] = {"loader_options": {"vision_encoder": inputs / TOWER}, "vocab_size": TUNED}
    convert(archive, work, saver="hf", saver_options={"template": inputs / LLAVA}, **given)
    same = (inputs / LLAVA / "config.json").read_bytes() == (work / "config.json").read_bytes()
    return differences({"hf": hf_leaves(inputs / LLAVA)}, {"hf": hf_leaves(work)}) + (
        [] if same else ["config.json differs"]
    )


def neva_checks(folder: Path) -> Iterator[tuple[str, str, Check]]:
    for archive in sorted(folder.glob("neva_*/neva.nemo")):
        name = archive.parent.name
        yield name, "cut and joined", partial(neva_rounds, archive)
        if name == "neva_fin":  # the other has no language model, or a tower of its own
            yield name, f"from _inputs/{LLAVA}", partial(neva_forward, archive)
            yield name, "back to hf", partial(neva_back, archive)


def _rounded(row: str) -> bool:
    return f"{FREQUENCIES}: float32[" in row and "official float16[" in row


def members(path: Path) -> dict[str, bytes]:
    """Files in the order of the archive, by Python's tarfile; without the leading `./` and the hashes of artifacts."""
    with tarfile.open(path) as archive:
        files = {HASHES.sub("", m.name.removeprefix("./")): archive.extractfile(m) for m in archive if m.isfile()}
        return {name: file.read() for name, file in files.items() if file}


def _joined(found: dict[str, bytes]) -> dict[str, bytes]:
    """The chunks of a layer in which gate and up are two, as one."""
    out: dict[str, bytes] = {}
    for name, content in found.items():
        chunk = re.fullmatch(rf"(.*{HALVED}/\d+)\.\d+\.0", name)
        where = chunk[1] if chunk else name
        out[where] = out.get(where, b"") + content
    return out


def described(found: dict[str, bytes]) -> dict[str, Leaves]:
    """What the weights are: for each file of a rank its entries, in order; of distributed ones what torch reads, and each chunk."""
    out: dict[str, Leaves] = {}
    for name, content in found.items():
        if name.endswith(".ckpt"):
            out[name] = {str(key): leaf(value) for key, value in loaded(content).items()}
        elif name.endswith((".pt", "common.pt")):
            out[name] = {"": leaf(loaded(content))}
        elif name.endswith((".zarray", "metadata.json")):
            told = {key: value for key, value in json.loads(content).items() if HALVED not in name or key != "chunks"}
            out[name] = {"": Leaf("json", (), json.dumps(told, sort_keys=True))}
        elif name.startswith("model_weights/") and not name.endswith((".distcp", ".metadata")):
            out[name] = {"": Leaf("chunk", (len(content),), hashlib.sha256(content).hexdigest())}
    return out | (_described_dist(found) if "model_weights/.metadata" in found else {})


def loaded(content: bytes) -> Any:
    """A file of torch's."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return torch.load(file.name, map_location="cpu", weights_only=False)


def torch_dist(found: dict[str, bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every tensor and object as torch reads it, and what `.metadata` says of each."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in found.items():
            if name.startswith("model_weights/"):
                (Path(folder) / name.removeprefix("model_weights/")).write_bytes(content)
        reader = FileSystemReader(folder)
        entries = reader.read_metadata().state_dict_metadata
        state: dict[str, Any] = {}
        planner: Any = _EmptyStateDictLoadPlanner()  # type: ignore[no-untyped-call]
        _load_state_dict(state, reader, planner=planner, no_dist=True)
    return state, entries


def _described_dist(found: dict[str, bytes]) -> dict[str, Leaves]:
    state, entries = torch_dist(found)
    chunks = {
        key: sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
        for key, entry in sorted(entries.items())
        if isinstance(entry, TensorStorageMetadata) and not key.endswith(HALVED)
    }
    flat = {key: leaf(state[key]) for key in sorted(entries)}
    return {"weights": flat, "chunks": {key: Leaf("chunks", (), repr(value)) for key, value in chunks.items()}}


def config_rows(theirs: bytes, ours: bytes) -> dict[str, str]:
    """Keys whose values differ, both values; random parts of artifacts' names apart."""
    one, two = (yaml.safe_load(HASHES.sub("", text.decode())) for text in (theirs, ours))
    absent = "(absent)"
    keys = sorted(one.keys() | two.keys())
    return {
        k: f"{two.get(k, absent)}, official {one.get(k, absent)}"
        for k in keys
        if one.get(k, absent) != two.get(k, absent)
    }


def checks(folder: Path) -> Iterator[tuple[str, str, Check]]:
    """(case, what is compared, the comparison)."""
    for golden in goldens(folder):
        if golden.archive.exists():
            yield golden.name, f"from {golden.source.parent.name}/{golden.source.name}", partial(forward, golden)
            yield golden.name, "back to hf", partial(back, golden)
        else:
            yield golden.name, "NeMo's tool failed", partial(not_in_nemo, golden)
    yield from neva_checks(folder)


def main() -> int:
    asked = arguments(__doc__)
    passed, failed = print_table(checks(asked.folder), asked.only)
    print(f"\n{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
