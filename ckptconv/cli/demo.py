"""`ckptconv demo`: a tiny random model made on the spot, taken through Megatron and back, each step verified. Core dependencies alone."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ckptconv.bind import bind
from ckptconv.compare import verify
from ckptconv.config import ModelConfig
from ckptconv.containers import safetensors
from ckptconv.dtypes import BF16
from ckptconv.errors import CkptconvError
from ckptconv.executor.execute import ExecuteOptions, execute
from ckptconv.leaves import contiguous
from ckptconv.mapping_files import load_mapping
from ckptconv.pipeline import convert
from ckptconv.plan import File, Plan, Segment
from ckptconv.source import whole
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank, even

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 1003,
}
SHAPE = ModelConfig(family="hf-llama", layers=4, hidden=256, heads=8, kv_heads=4, head_dim=32, ffn=688, vocab_rows=1003)


def run_demo(say: Callable[[str], None]) -> None:
    """Make, convert, reshard, convert back; raises when any step is not the same model."""
    with tempfile.TemporaryDirectory(prefix="ckptconv-demo-") as folder:
        place = Path(folder)
        say("A random Llama of 4 layers, 8 heads on 4 key/value heads, a vocabulary of 1003, in bf16:")
        make_model(place / "llama")
        steps: list[tuple[str, str, dict[str, Any]]] = [
            ("llama", "mcore-tp2pp2", {"saver": "mcore", "tp": 2, "pp": 2}),
            ("mcore-tp2pp2", "mcore-tp4", {"tp": "2:4", "pp": "2:1"}),
            ("mcore-tp4", "llama-again", {"saver": "hf"}),
        ]
        for src, dst, wishes in steps:
            asked = " ".join(f"--{k} {v}" for k, v in wishes.items())
            say(f"\n$ ckptconv {'convert' if 'saver' in wishes else 'reshard'} {src} {dst} {asked}")
            report = convert(place / src, place / dst, **wishes)
            for file in sorted(p for p in (place / dst).rglob("*") if p.is_file()):
                say(f"    {file.relative_to(place)}  {file.stat().st_size:,} bytes")
            say(f"    {report.tensors} tensors in {report.seconds:.2f} s")
            verdict = verify(place / "llama", place / dst)
            if not verdict.same:
                raise CkptconvError(
                    f"the demo failed: {dst} is not the model it was made from: {verdict.differences[:3]}"
                )
            say(f"$ ckptconv verify llama {dst}\n    same ({verdict.tensors} tensors)")
        one, two = ((place / name / "model.safetensors").read_bytes() for name in ("llama", "llama-again"))
        say(
            f"\nThe weights file came back {'byte for byte' if one == two else 'with the same tensors in another order'}."
        )


def make_model(folder: Path) -> None:
    """A Hugging Face folder with seeded random weights."""
    with tempfile.TemporaryDirectory(prefix="ckptconv-demo-") as scratch:
        tensors = {}
        rng = np.random.default_rng(2026)
        for i, row in enumerate(bind(load_mapping("hf-llama"), frozenset(), SHAPE, even(4), Rank())):
            path = Path(scratch) / f"{i}"
            values = rng.normal(0, 0.02, math.prod(row.shape)).astype(BF16.numpy)
            path.write_bytes(values.tobytes())
            tensors[row.stored] = _on_file(path, row.shape)
        text = (json.dumps(CONFIG, indent=2) + "\n").encode()
        weights = safetensors.layout("model.safetensors", tensors, {"format": "pt"})
        config = File("config.json", len(text), (Segment(0, text),), final=True)
        execute(Plan((weights, config), root=scratch), folder, ExecuteOptions(durable=False))


def _on_file(path: Path, shape: tuple[int, ...]) -> Tensor:
    return contiguous(whole(str(path)), shape, BF16)
