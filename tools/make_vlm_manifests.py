"""Writes the manifests of tests/golden/vlm, each in place of files that Megatron-LM's own tools made: usage: FOLDER, as golden_vlm.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tools.golden_vlm import MANIFEST, ranks

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "vlm"
CASES = (
    "clip/tp2_te", "clip/tp2_local", "internvit/tp1_local", "internvit/tp8_te", "siglip/tp1_te", "siglip/tp2_local",
    "radio_g/tp1_local", "combine_mistral_clip_tp2", "pp/v0.12_1to4", "pp/v0.12_4to1_BUG",
)  # fmt: skip


def main() -> None:
    for case in CASES:
        found = ranks(Path(sys.argv[1]) / case / "out")
        told = {rank: {name: held.as_json() for name, held in entries.items()} for rank, entries in found.items()}
        path = GOLDEN / case / MANIFEST
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (f"{json.dumps(rank)}: {json.dumps(entries, separators=(',', ':'))}" for rank, entries in told.items())
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
