"""Optimizer state that Megatron-Core's own training steps left, in every form it has, converted and then trained on by Megatron-Core.

usage: python tools/golden_optim.py GOLDENS      (holds mcore/opt_* and mlm/opt-legacy-*, bf16 models trained at tp 2)

At tp 2 its losses must be exactly those that it recorded, elsewhere those of its own way to that layout. Exits 1 if one is not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import ckptconv
from tests.judge.optim import SAVED_AT, Run, Step, resume
from tests.judge.ranks import Layout
from tests.optim.rank_runs import resume as resume_ranks

FLAT, LISTS = "mcore/opt_llama_bf16_tp2pp1dp2_distopt", "mcore/opt_llama_bf16_tp2pp2dp1_nodistopt"
OWN = {
    True: f"{FLAT}/ckpt_fully_reshardable",
    False: f"{LISTS}/ckpt_nodistopt",
}  # what it can load at any layout itself
SOURCES = {  # -> whether the optimizer is distributed
    **{f"{FLAT}/ckpt_{form}": True for form in ("fully_reshardable", "dp_reshardable", "dp_zero_gather_scatter")},
    "mcore/opt_mcore0.12.0_llama_bf16_tp2pp2dp1/ckpt_fully_sharded_model_space": True,
    "mlm/opt-legacy-bf16-tp2pp1dp2-distopt": True,
    f"{LISTS}/ckpt_nodistopt": False,
    "mlm/opt-legacy-bf16-tp2pp2dp1-float16": False,
}
FLAT_LAYOUTS = (Layout(tp=2, dp=2), Layout(tp=2, pp=2), Layout(dp=2), Layout(pp=2, dp=2))
LISTS_LAYOUTS = (Layout(tp=2, pp=2), Layout(tp=2), Layout(), Layout(pp=4))


def main() -> int:
    root, failed = Path(sys.argv[1]), 0
    print("| state | written as | continued at | largest difference of a loss | |")
    print("|---|---|---|---|---|")
    for name, saver, layout, found, expected in cases(root):
        far = max(abs(a - b) for (a, _), (b, _) in zip(found, expected, strict=True))
        failed += far != 0
        said = "FAILED" if far else "passed"
        print(f"| {name} | {saver} | {layout.name} | {far:.1e} | {said} |", flush=True)
    return 1 if failed else 0


def cases(root: Path) -> Iterator[tuple[str, str, Layout, list[Step], list[Step]]]:
    hf = root / FLAT / "hf_initial"

    @cache
    def expected(run: Run) -> list[Step]:
        if run.layout.tp != 2:
            return resume(run, root / OWN[run.distributed])
        recorded = json.loads((root / (FLAT if run.distributed else LISTS) / "losses.json").read_text())
        return [(loss, norm) for loss, norm in recorded["loss_gradnorm_steps_0_3"][SAVED_AT:]]

    for name, distributed in SOURCES.items():
        with TemporaryDirectory() as folder:
            whole = convert(root / name, Path(folder, "whole"), Run(hf, distributed=distributed), "mcore-dist")
            for layout in FLAT_LAYOUTS if distributed else LISTS_LAYOUTS:
                run = replace(Run(hf, distributed=distributed), layout=layout)
                yield name, "torch_dist", layout, resume(run, whole), expected(run)
                ranks = convert(root / name, Path(folder, f"{layout.name}"), run, "mcore")
                yield name, "rank files", layout, resume_ranks(run, ranks), expected(run)


def convert(source: Path, out: Path, run: Run, saver: str) -> Path:
    options: dict[str, Any] = {"transformer_impl": "local", "distributed_optimizer": run.distributed}
    degrees: dict[str, Any] = {"tp": run.layout.tp, "pp": run.layout.pp} if saver == "mcore" else {}
    ckptconv.convert(source, out, saver=saver, saver_options=options, vocab_divisor=run.divisor, **degrees)
    return out


if __name__ == "__main__":
    sys.exit(main())
