"""What a folder of goldens holds, and the ckptconv command that must give each of its outputs, read off the official command line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ckptconv
from tools.rank_files import Leaf, args_of, leaves, rank_states

SAVERS = {"core": "mcore", "mcore": "mcore", "legacy": "legacy", "megatron": "legacy"}
STAND_IN_TE = "1.11.0"  # what the official tool found installed unless case.json says otherwise
Ranks = dict[str, dict[str, Leaf]]


@dataclass(frozen=True)
class Golden:
    """One output of an official tool: its folder or, condensed, its manifest."""

    case: Path
    name: str
    command: str = ""
    version: str = ""
    te: str = STAND_IN_TE
    manifest: Ranks | None = field(default=None, compare=False)
    args: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def title(self) -> str:
        return f"{self.case.name}/{self.name}"

    @property
    def folder(self) -> Path:
        return self.case / self.name

    @property
    def hf(self) -> Path:
        return self.case / "hf"

    @property
    def source(self) -> Path:
        return self.case / (self.option("--load-dir") or "hf")

    def option(self, flag: str) -> str | None:
        words = shlex.split(self.command)
        return words[words.index(flag) + 1] if flag in words else None

    def ranks(self) -> Ranks:
        if self.manifest is not None:
            return self.manifest
        return {rank: leaves(state) for rank, state in rank_states(self.folder).items()}

    def wishes(self) -> dict[str, Any]:
        """The arguments of ckptconv.convert that say what the official command said."""
        vocab = self.option("--true-vocab-size")
        wishes: dict[str, Any] = {
            "saver": SAVERS[self.option("--saver") or ""],
            "tp": self.option("--target-tensor-parallel-size"),
            "pp": self.option("--target-pipeline-parallel-size"),
            "ep": self.option("--target-expert-parallel-size"),
            "vocab_size": int(vocab) if vocab else None,
            "vocab_divisor": self._divisor(),
            "saver_options": self._saver_options(),
        }
        if self.source != self.hf:
            wishes |= {"loader_options": {"config": self.hf}}
        return wishes

    def _divisor(self) -> int:
        """128 unless said; a tool that was not told the true vocabulary leaves the padded rows as they are."""
        if self.source == self.hf or self.option("--true-vocab-size"):
            return int(self.option("--make-vocab-size-divisible-by") or 128)
        rows: int = args_of(self.source)["padded_vocab_size"]
        return rows // int(self.option("--target-tensor-parallel-size") or 1)

    def _saver_options(self) -> dict[str, object]:
        if SAVERS[self.option("--saver") or ""] == "legacy":
            return {}
        major, minor = self.version.removeprefix("core_v").split(".")[:2]
        options: dict[str, object] = {
            "transformer_impl": self.option("--saver-transformer-impl"),
            "mcore_version": f"{major}.{minor}",
            "te_version": self.te,
        }
        mixtral = self.option("--loader") == "mixtral_hf"
        return options | ({"experts": "sequential"} if mixtral else {})


def goldens(folder: Path) -> Iterator[Golden]:
    """Every output that came out and is on disk, as case.json tells; sources made by hand too (they have no command)."""
    for told in sorted(folder.glob("*/case.json")):
        outputs = json.loads(told.read_text()).get("outputs", {})
        for name, facts in outputs.items():
            if facts["ok"] and (told.parent / name).is_dir():
                te = facts["env"].get("FAKE_TE_VERSION", STAND_IN_TE)
                yield Golden(told.parent, name, facts["command"], facts["version"], te)
        for path in sorted(told.parent.glob("src-*")):
            yield Golden(told.parent, path.name)


def condensed(folder: Path) -> Iterator[Golden]:
    """The same from the manifests that `make golden` writes."""
    for path in sorted(folder.glob("*/*.manifest.json")):
        text = json.loads(path.read_text())
        ranks = {r: {k: Leaf.from_json(v) for k, v in held.items()} for r, held in text["ranks"].items()}
        yield Golden(
            path.parent, path.name.split(".")[0], text["command"], text["version"], text["te"], ranks, text["args"]
        )


def with_optimizer(folder: Path) -> Iterator[Path]:
    """Checkpoints of real training steps: weights beside optimizer and random-number state."""
    yield from (path for path in sorted(folder.glob("opt-*")) if path.is_dir())


def convert(source: Path, target: Path, **wishes: Any) -> None:
    ckptconv.convert(source, target, execute_options=ckptconv.ExecuteOptions(durable=False), **wishes)
