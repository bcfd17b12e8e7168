"""The comparisons behind the table: our output beside the official one, and every official one back to Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import ckptconv
from tools.golden_cases import Golden, Ranks, convert
from tools.rank_files import Leaf, args_of, iteration_folder, leaf, leaves, rank_states


def forward(golden: Golden, work: Path) -> list[str]:
    """(a), (b): the source converted as the official tool was told to; differences in files, keys, kinds, bits."""
    theirs = golden.ranks()
    wishes = golden.wishes()
    if golden.source != golden.hf:
        wishes["dtype"] = "fp32" if _dtype(theirs) == "float32" else "keep"
    convert(golden.source, work, **wishes)
    ours = {rank: leaves(state) for rank, state in rank_states(work).items()}
    return [*differences(theirs, ours), *_strange_files(work, theirs)]


def differences(theirs: Ranks, ours: Ranks) -> list[str]:
    wrong = [f"rank files: {sorted(ours)} and not {sorted(theirs)}"] if ours.keys() != theirs.keys() else []
    for rank in theirs.keys() & ours.keys():
        one, two = theirs[rank], ours[rank]
        wrong += [f"{rank}: {name} is missing" for name in one if name not in two]
        wrong += [f"{rank}: {name} is not in the official file" for name in two if name not in one]
        wrong += [
            f"{rank}: {n}: {_show(two[n])}, official {_show(one[n])}" for n in one if n in two and one[n] != two[n]
        ]
        if not wrong and list(one) != list(two):
            wrong.append(f"{rank}: the same names in another order")
    return sorted(wrong)


def _show(value: Leaf) -> str:
    return f"{value.kind}{list(value.shape)} {value.digest[:8]}".strip()


def _dtype(ranks: Ranks) -> str:
    kinds = {v.kind for held in ranks.values() for v in held.values() if v.digest and v.kind != "uint8"}
    assert len(kinds) == 1
    return kinds.pop()


def _strange_files(work: Path, theirs: Ranks) -> Iterator[str]:
    expected = {"ckptconv.json", "latest_checkpointed_iteration.txt"}
    expected |= {f"{iteration_folder(work).name}/{rank}/model_optim_rng.pt" for rank in theirs}
    for path in sorted(p.relative_to(work) for p in work.rglob("*") if p.is_file()):
        if str(path) not in expected and path.parts[0] != "hf":
            yield f"a file nobody asked for: {path}"


def backward(golden: Golden, work: Path) -> list[str]:
    """(c): an official output back to the Hugging Face folder it came from, bit for bit."""
    upcast = _dtype(golden.ranks()) == "float32"
    options = {"loader_options": {"config": golden.hf}, "saver_options": {"template": golden.hf}}
    convert(golden.folder, work, saver="hf", dtype="bf16" if upcast else "keep", **options)
    return hf_differences(golden.hf, work)


def hf_differences(want: Path, found: Path) -> list[str]:
    one, two = (hf_leaves(folder) for folder in (want, found))
    wrong = differences({"hf": one}, {"hf": {k: two[k] for k in one if k in two} | two})
    same = (want / "config.json").read_bytes() == (found / "config.json").read_bytes()
    return wrong + ([] if same else ["config.json differs"])


def hf_leaves(folder: Path) -> dict[str, Leaf]:
    found = {k: leaf(v) for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
    return dict(sorted(found.items()))


def weights_of_training(folder: Path, work: Path) -> list[str]:
    """Weights leave a training checkpoint only when the rest is given up on purpose, and then are what they were.

    To Hugging Face and back to the same layout: what the judge shows of that way out makes this a proof of the way in.
    """
    work.mkdir()
    try:
        convert(folder, work / "refused", saver="hf", vocab_size=args_of(folder)["padded_vocab_size"])
    except ckptconv.CkptconvError as error:
        wrong = [] if "--optimizer drop" in str(error) else [f"the refusal does not name the option: {error}"]
    else:
        return ["training state was dropped without being asked"]
    states = rank_states(folder)
    args = args_of(folder)
    rows = args["padded_vocab_size"]  # trained as well: all of them are kept
    family: dict[str, Any] = {"family": "hf-llama", "saver_options": {"config_from_args": True}}
    convert(folder, work / "hf", saver="hf", optimizer="drop", vocab_size=rows, **family)
    degrees = {"tp": args["tensor_model_parallel_size"], "pp": args["pipeline_model_parallel_size"]}
    local = {"saver_options": {"transformer_impl": "local"}}
    convert(work / "hf", work / "again", saver="mcore", **degrees, **local)
    again = {rank: leaves(state) for rank, state in rank_states(work / "again").items()}
    return wrong + differences({r: leaves(s) for r, s in states.items()}, again)
