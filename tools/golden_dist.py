"""Distributed checkpoints that real Megatron-Core saved, each beside the Hugging Face model it was made of, and the way back to that.

usage: python tools/golden_dist.py CASE INTO      (a copy of a case for the project, its weights condensed to digests)
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import ckptconv
from tools.golden_cases import convert
from tools.golden_checks import differences, hf_leaves
from tools.rank_files import Leaf, read

DIGESTS = "hf.json"


@dataclass(frozen=True)
class Saved:
    """One checkpoint, and the model's folder beside it. The model's weights may be condensed to `hf.json`."""

    case: Path

    @property
    def title(self) -> str:
        return self.case.name

    @property
    def folder(self) -> Path:
        return self.case / "ckpt"

    @property
    def hf(self) -> Path:
        return self.case / "hf"

    @property
    def has_args(self) -> bool:
        (common,) = self.folder.glob("iter_*/common.pt")
        return "args" in read(common)

    def wishes(self) -> dict[str, Any]:
        """What must be said of it: that the random states may go, and without args what these would have told."""
        wishes: dict[str, Any] = {"optimizer": "drop", "vocab_size": self._vocab()}
        return wishes if self.has_args else wishes | {"loader_options": {"config": self.hf}}

    def job(self) -> ckptconv.Job:
        """To verify it."""
        return ckptconv.Job(self.folder, **self.wishes())

    def weights(self) -> dict[str, Leaf]:
        """Those of the model it was made of, in Hugging Face's names."""
        condensed = self.case / DIGESTS
        if condensed.exists():
            return {name: Leaf.from_json(row) for name, row in json.loads(condensed.read_text()).items()}
        return hf_leaves(self.hf)

    def _vocab(self) -> int:
        rows: int = json.loads((self.hf / "config.json").read_text())["vocab_size"]
        return rows


def distributed(folder: Path) -> Iterator[Saved]:
    """Every case that is not about optimizers."""
    for path in sorted(folder.glob("*/ckpt")):
        if "opt_" not in path.parent.name and (path.parent / "hf").is_dir():
            yield Saved(path.parent)


def back(golden: Saved, work: Path) -> list[str]:
    """A checkpoint of Megatron-Core back to the Hugging Face folder it came from, bit for bit."""
    convert(golden.folder, work, saver="hf", saver_options={"template": golden.hf}, **golden.wishes())
    same = (golden.hf / "config.json").read_bytes() == (work / "config.json").read_bytes()
    wrong = differences({"hf": golden.weights()}, {"hf": hf_leaves(work)})
    return wrong + ([] if same else ["config.json differs"])


def condense(case: Path, into: Path) -> None:
    """The case as the project keeps it: the checkpoint whole, of the model its config and digests."""
    shutil.copytree(case / "ckpt", into / "ckpt")
    (into / "hf").mkdir()
    shutil.copy(case / "hf" / "config.json", into / "hf")
    rows = (f"{json.dumps(name)}: {json.dumps(leaf.as_json())}" for name, leaf in hf_leaves(case / "hf").items())
    (into / DIGESTS).write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    condense(Path(sys.argv[1]), Path(sys.argv[2]))
