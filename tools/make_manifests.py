"""Condenses a folder of goldens into what the tests carry: the sources, and per official output the digests of all it holds.

usage: python tools/make_manifests.py GOLDENS
Writes tests/golden/mlm/CASE/hf and CASE/OUTPUT.manifest.json; whole official outputs stand there where `WHOLE` names them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from ckptconv.megatron.args_table import FIELDS
from tools.golden_cases import Golden, goldens
from tools.rank_files import args_of

ROOT = Path(__file__).parent.parent
INTO = ROOT / "tests" / "golden" / "mlm"
LIMIT = 10_000_000
# One of every dialect and era, for reading; the rest is written by us bit for bit and need not travel.
WHOLE = (
    "a-llama2-mha-bf16/out-v010-te2-tp2pp2",
    "a-llama2-mha-bf16/out-v012-local-tp2pp1",
    "b-llama3-gqa/src-vpp2-tp2pp2",
    "d-qwen25-tied/out-v010-te-tp2pp2",
    "d-qwen25-tied/out-v012-legacy-tp2pp2",
    "d-qwen25-tied/out-v012-te-tp2pp2",
    "f-mixtral/out-v09-te-tp2pp1ep2",
    "opt-legacy-bf16-tp2pp1dp2-distopt",
)
LEFT_OUT = (
    "distrib_optim.pt"  # half the size of a training checkpoint; only that it is there matters to reading weights
)


def manifest(golden: Golden) -> str:
    """What the files hold, a line per tensor."""
    ranks = {rank: {k: v.as_json() for k, v in held.items()} for rank, held in golden.ranks().items()}
    lines = [
        f"  {json.dumps(rank)}: {{\n"
        + ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in held.items())
        + "\n  }"
        for rank, held in ranks.items()
    ]
    ours = {field.name for field in FIELDS}
    args = {k: v for k, v in args_of(golden.folder).items() if k in ours}
    head = {"command": golden.command, "version": golden.version, "te": golden.te, "args": args}
    told = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in head.items())
    return "{\n" + told + ' "ranks": {\n' + ",\n".join(lines) + "\n }\n}\n"


def condense(folder: Path) -> None:
    for golden in goldens(folder):
        case = INTO / golden.case.name
        if not (case / "hf" / "model.safetensors").exists():
            shutil.copytree(golden.hf, case / "hf", dirs_exist_ok=True)
        if golden.command:
            (case / f"{golden.name}.manifest.json").write_text(manifest(golden))
    for name in WHOLE:
        if not (INTO / name).is_dir():
            shutil.copytree(folder / name, INTO / name, ignore=shutil.ignore_patterns(LEFT_OUT))


def main() -> int:
    condense(Path(sys.argv[1]))
    size = sum(path.stat().st_size for path in INTO.rglob("*") if path.is_file())
    print(f"{INTO.relative_to(ROOT)}: {size:,} bytes of at most {LIMIT:,}")
    return 0 if size <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
