"""OpenAI's own files of CLIP: a state dict, or the TorchScript program that they publish. Only the vision tower is taken."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptconv.checkpoint import Checkpoint, Key, Stored, Target
from ckptconv.config import ModelConfig
from ckptconv.containers import safetensors, torch_script, torch_write
from ckptconv.dialect import detect
from ckptconv.errors import CkptconvError, ConfigError, FormatError
from ckptconv.formats import NoOptions, Request, refuse_more_than_weights
from ckptconv.huggingface.config_table import fixed_or_default
from ckptconv.mapping_files import chosen, load_mapping
from ckptconv.plan import Plan
from ckptconv.tensor import Shape, Tensor
from ckptconv.topology import Rank, Topology, even

FAMILY = "hf-clip"
HEAD = 64  # entries of a head in every transformer that OpenAI has published
PATCHES, FIRST = "visual.conv1.weight", "visual.transformer.resblocks.0."


@dataclass(frozen=True, slots=True)
class OpenaiClipLoad:
    heads: int | None = field(
        default=None,
        metadata={"help": "attention heads of the tower, which the file does not say (default: width / 64)"},
    )


class OpenaiClip:
    """Files that OpenAI's package `clip` loads."""

    name = "openai-clip"
    summary = "OpenAI's CLIP: a .pt file, state dict or TorchScript; its vision tower"
    aliases: tuple[str, ...] = ()
    Load = OpenaiClipLoad
    Save = NoOptions

    def sniff(self, path: Path) -> bool:
        try:
            return path.is_file() and PATCHES in _read(path, check=False)
        except CkptconvError:
            return False

    def load(self, path: Path, options: OpenaiClipLoad, request: Request) -> Stored:
        if not path.is_file():
            raise FormatError(path, "is not a file; expected the .pt file of a CLIP model")
        tensors = _read(path, check=request.check)
        config = _config({name: tensor.shape for name, tensor in tensors.items()}, options.heads, path)
        topology = even(config.layers)
        ranks = {Rank(): {Key(name): tensor for name, tensor in tensors.items()}}
        mapping, variant = detect([chosen("openai-clip", request.mappings)], config, topology, ranks)
        return Stored(self.name, mapping, variant, topology, config, ranks, {Rank(): str(path)})

    def target(self, checkpoint: Checkpoint, topology: Topology, options: NoOptions, request: Request) -> Target:
        config = checkpoint.config
        if config.family != FAMILY or config.kind != "vision":
            raise ConfigError(f"OpenAI's files hold CLIP's vision tower, this is a model of {config.family}")
        refuse_more_than_weights(checkpoint, topology, request, "OpenAI's")
        return Target(chosen("openai-clip", request.mappings), frozenset(), even(config.layers), config.vocab_rows)

    def save(self, stored: Stored, options: NoOptions, request: Request) -> Plan:
        (tensors,) = stored.ranks.values()
        state = {key.name: tensor for key, tensor in tensors.items()}
        return Plan((torch_write.layout("clip.pt", state),), single=True)

    def usage(self, stored: Stored, dst: str, options: NoOptions) -> str:
        c = stored.config
        sizes = f"{c.image}, {c.patch}, {c.hidden}, {c.layers}, {c.heads}, {c.projection}"
        return (
            "import torch\nfrom clip.model import VisionTransformer\n"
            f'state = {{k.removeprefix("visual."): v for k, v in torch.load({dst!r}).items()}}\n'
            f"VisionTransformer({sizes}).load_state_dict(state)"
        )


def _read(path: Path, *, check: bool) -> dict[str, Tensor]:
    """The tensors by name; older copies of these files are safetensors of the same names."""
    if path.suffix == ".safetensors":
        return dict(safetensors.read(path).tensors)
    value = torch_script.read(path, check=check)
    if not isinstance(value, dict):
        raise FormatError(path, f"holds a {type(value).__name__}, expected a state dict or a TorchScript program")
    if odd := [name for name, tensor in value.items() if not (isinstance(name, str) and isinstance(tensor, Tensor))]:
        raise FormatError(
            path, f"expected a table of tensors by name, found {len(odd)} other entries, such as {odd[0]!r}"
        )
    return value


def _config(shapes: Dict[str, Shape], heads: int | None, path: Path) -> ModelConfig:
    """Sizes as the shapes have them; what CLIP's towers have in common is the Hugging Face family's."""
    if "visual.layer1.0.conv1.weight" in shapes:
        raise FormatError(path, "is a CLIP whose vision tower is a ResNet; only vision transformers are supported")
    patches = shapes.get(PATCHES, ())
    if len(patches) != 4:
        raise FormatError(path, f"{PATCHES} has shape {patches}, expected [width, channels, patch, patch]")
    hidden, channels, patch, _ = patches
    heads = heads or hidden // HEAD
    if heads < 1 or hidden % heads:
        raise ConfigError(
            f"{path}: a width of {hidden} does not divide into {heads} heads; say their number with --loader.heads"
        )
    common: dict[str, Any] = fixed_or_default(load_mapping(FAMILY))
    positions = _rows(shapes, "visual.positional_embedding")
    sizes = {
        "layers": sum(name.startswith("visual.transformer.") and name.endswith(".ln_1.weight") for name in shapes),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": hidden // heads,
        "ffn": _rows(shapes, FIRST + "mlp.c_fc.weight"),
        "max_positions": positions,
        "patch": patch,
        "channels": channels,
        "image": round((positions - common["class_tokens"]) ** 0.5) * patch,
        "projection": (shapes.get("visual.proj", (0, 0)))[-1],
    }
    config = ModelConfig(FAMILY, rope=None, **{**common, **sizes})
    config.check()
    return config


def _rows(shapes: Dict[str, Shape], name: str) -> int:
    return next(iter(shapes.get(name, ())), 0)
