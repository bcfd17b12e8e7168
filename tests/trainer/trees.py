"""What a checkpoint is made of, without its values: names, kinds, dtypes, shapes; to hold ours against Megatron's.

`python -m tests.trainer.trees GOLDENS` writes the manifests in tests/trainer/golden from files that Megatron-Core 0.16.1 wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

MANIFESTS = Path(__file__).parent / "golden"
SINGLE = {  # manifest -> file of one rank
    "float16": "mlm/opt-legacy-bf16-tp2pp2dp1-float16/iter_0000002/mp_rank_00_001/model_optim_rng.pt",
    "distopt": "mlm/opt-legacy-bf16-tp2pp1dp2-distopt/iter_0000002/mp_rank_00/model_optim_rng.pt",
    "distopt_flat": "mlm/opt-legacy-bf16-tp2pp1dp2-distopt/iter_0000002/mp_rank_00/distrib_optim.pt",
}
BUFFER = "mlm/opt-legacy-bf16-tp2pp1dp2-distopt/buffer_layout_rank0.json"  # where its parameters lie
DISTRIBUTED = {  # manifest -> folder
    "dist_float16": "mcore/opt_llama_bf16_tp2pp2dp1_nodistopt/ckpt_nodistopt/iter_0000002",
    "dist_distopt": "mcore/opt_llama_bf16_tp2pp1dp2_distopt/ckpt_fully_reshardable/iter_0000002",
}
OPAQUE = ("args", "rng_state", "content_metadata")  # their contents differ from run to run
Tree = dict[str, Any]


def of_file(path: Path) -> Tree:
    return dict(_walk(torch.load(path, weights_only=False), ""))


def of_folder(path: Path) -> Tree:
    """Keys of a distributed checkpoint with shape, dtype and where its chunks begin, and the tree of its common.pt."""
    tree = {f"common{key}": value for key, value in of_file(path / "common.pt").items()}
    for key, stored in FileSystemReader(path).read_metadata().state_dict_metadata.items():
        chunks = getattr(stored, "chunks", None)
        if chunks is None:
            tree[key] = "object"
        else:
            described = [str(stored.properties.dtype), list(stored.size)]  # type: ignore[union-attr]
            tree[key] = [*described, sorted([list(c.offsets), list(c.sizes)] for c in chunks)]
    return tree


def _walk(value: object, path: str) -> Any:
    if isinstance(value, torch.Tensor):
        yield path, [str(value.dtype), list(value.shape), sorted(getattr(value, "__dict__", {}).items())]
    elif path.strip("/") in OPAQUE or not isinstance(value, dict | list):
        yield path, type(value).__name__
    else:
        yield path, type(value).__name__
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _walk(item, f"{path}/{key}")


def main() -> None:
    goldens = Path(sys.argv[1])
    MANIFESTS.mkdir(exist_ok=True)
    trees = {name: of_file(goldens / path) for name, path in SINGLE.items()}
    trees |= {name: of_folder(goldens / path) for name, path in DISTRIBUTED.items()}
    model = torch.load(goldens / SINGLE["float16"], weights_only=False)["model"]
    trees["order"] = {key: place for place, key in enumerate(model)}
    trees["buffer"] = json.loads((goldens / BUFFER).read_text())["buffer"]
    trees["args"] = {
        key: type(value).__name__
        for key, value in vars(torch.load(goldens / SINGLE["distopt"], weights_only=False)["args"]).items()
    }
    for name, tree in trees.items():
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(tree.items()))
        (MANIFESTS / f"{name}.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
