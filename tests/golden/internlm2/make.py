"""Makes this folder with the models' own code: see README.md. It runs in an environment of its own, never in a test.

usage: python make.py INTERNVL_CHAT CONVERT2LLAMA INTO
INTERNVL_CHAT is the folder of that name in OpenGVLab/InternVL, CONVERT2LLAMA the folder tools in InternLM/InternLM.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file

LANGUAGE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1000000, "pad_token_id": 2,
}  # fmt: skip
DYNAMIC = {"type": "dynamic", "factor": 2.0}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {**LANGUAGE, "num_hidden_layers": 3, "bias": False, "rope_scaling": DYNAMIC},
    "bias": {**LANGUAGE, "num_hidden_layers": 2, "bias": True},
}
VISION: dict[str, Any] = {  # as InternViT-300M: biases, LayerNorm, no norms of queries and keys
    "architectures": ["InternVisionModel"], "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_hidden_layers": 2, "image_size": 16, "patch_size": 4, "qkv_bias": True, "qk_normalization": False,
    "norm_type": "layer_norm", "drop_path_rate": 0.0,
}  # fmt: skip
OF_LANGUAGE, OF_WHOLE = "modeling_internlm2.InternLM2ForCausalLM", "modeling_internvl_chat.InternVLChatModel"
CHAT: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig", "AutoModel": OF_WHOLE, "AutoModelForCausalLM": OF_WHOLE,
    },
    "vision_config": VISION,
    "llm_config": {
        **LANGUAGE, "num_hidden_layers": 2, "bias": False, "rope_scaling": DYNAMIC, "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config", "AutoModel": OF_LANGUAGE, "AutoModelForCausalLM": OF_LANGUAGE,
        },
    },
    "template": "internlm2-chat", "force_image_size": 16, "ps_version": "v2", "dynamic_image_size": True,
    "use_thumbnail": True, "max_dynamic_patch": 12,
}  # fmt: skip
IMAGE_TOKEN, TILES = 60, 4


def randomized(model: Any) -> Any:
    """Every parameter random, norms too: two tensors exchanged always show."""
    generator = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else noise * (0.2 if name.endswith("bias") else 0.1))
    return model.eval()


def make_language_model(folder: Path, said: dict[str, Any]) -> None:
    model_class = importlib.import_module("internvl.model.internlm2.modeling_internlm2").InternLM2ForCausalLM
    model = randomized(model_class(model_class.config_class(**said)))
    model.save_pretrained(folder)
    ids = torch.from_numpy(np.random.default_rng(7).integers(0, said["vocab_size"], (2, 17)))
    record(folder, model(ids), ids=ids)


def write_defaults(file: Path) -> None:
    """What the class takes for every key that a config.json leaves out."""
    config_class = importlib.import_module("internvl.model.internlm2.configuration_internlm2").InternLM2Config
    file.write_text(config_class().to_json_string(use_diff=False))


def make_whole(folder: Path) -> None:
    """Weights of bf16, with which a model in fp32 computes an image and a sentence behind it."""
    code = importlib.import_module("internvl.model.internvl_chat")
    randomized(code.InternVLChatModel(code.InternVLChatConfig(**CHAT))).to(torch.bfloat16).save_pretrained(folder)
    model = code.InternVLChatModel.from_pretrained(folder, torch_dtype=torch.float32)  # rotary angles too are fp32 so
    model.img_context_token_id = IMAGE_TOKEN
    rng = np.random.default_rng(7)
    pixels = torch.from_numpy(rng.normal(size=(1, 3, 16, 16)).astype(np.float32))
    ids = torch.cat([torch.full((1, TILES), IMAGE_TOKEN), torch.from_numpy(rng.integers(0, IMAGE_TOKEN, (1, 13)))], 1)
    record(folder, model(pixels, ids, image_flags=torch.ones(1, 1, dtype=torch.long)), ids=ids, pixels=pixels)


def record(folder: Path, answer: Any, **asked: torch.Tensor) -> None:
    save_file({**asked, "logits": answer.logits.contiguous()}, folder.with_name(f"{folder.name}-logits.safetensors"))


def as_llama(source: Path, folder: Path) -> None:
    """What convert2llama.py makes: its config.json, and the digest of every tensor."""
    tool: Any = importlib.import_module("convert2llama")
    made = folder.parent / "made"
    tool.LlamaTokenizer = NoTokenizer
    tool.convert(str(source), str(made))
    folder.mkdir()
    shutil.copy(made / "config.json", folder)
    tensors = load_file(made / "model.safetensors")
    digests = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
    (folder / "sha256.json").write_text(json.dumps(digests, indent=1) + "\n")
    shutil.rmtree(made)


class NoTokenizer:
    """The models here have none."""

    init_kwargs: ClassVar[dict[str, Any]] = {}

    @classmethod
    def from_pretrained(cls, folder: str) -> NoTokenizer:
        return cls()

    def save_pretrained(self, folder: str) -> None:
        pass


def main(internvl_chat: str, tools: str, into: str) -> None:
    sys.path[:0] = [internvl_chat, tools]
    place = Path(into)
    for name, said in KINDS.items():
        make_language_model(place / name, said)
    write_defaults(place / "defaults.json")
    make_whole(place / "internvl_chat")
    as_llama(place / "plain", place / "llama")
    for code in place.glob("*/*.py"):  # save_pretrained copies the models' code, which is not ours to have here
        code.unlink()


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
