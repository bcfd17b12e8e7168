"""What the tensors themselves say of the architecture: sizes, biases, experts, layers per chunk; and the check of a config against it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field

from ckptconv.config import ModelConfig
from ckptconv.errors import FormatError
from ckptconv.tensor import Shape

LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,6})\.")
_EXPERT_FC2 = re.compile(r"mlp\.experts\.(?:linear_fc2\.weight0|local_experts\.0\.linear_fc2\.weight|(weight2))$")


@dataclass(frozen=True, slots=True)
class Names:
    """How a dialect calls what is measured."""

    embed: str
    positions: str
    head: str
    qkv: str
    proj: str
    fc1: str
    fc2: str
    norms: tuple[str, ...]


MCORE = Names(
    embed="embedding.word_embeddings.weight",
    positions="embedding.position_embeddings.weight",
    head="output_layer.weight",
    qkv="self_attention.linear_qkv.",
    proj="self_attention.linear_proj.",
    fc1="mlp.linear_fc1.",
    fc2="mlp.linear_fc2.",
    norms=("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
)
LEGACY = Names(
    embed="language_model.embedding.word_embeddings.weight",
    positions="language_model.embedding.position_embeddings.weight",
    head="language_model.output_layer.weight",
    qkv="self_attention.query_key_value.",
    proj="self_attention.dense.",
    fc1="mlp.dense_h_to_4h.",
    fc2="mlp.dense_4h_to_h.",
    norms=("input_norm.",),
)


@dataclass
class Measured:
    """Facts of the whole model. `local_moe_ffn` is one rank's part: how many ranks share an expert is not in the shapes."""

    facts: dict[str, object] = field(default_factory=dict)
    rows: int = 0
    has_head: bool = False
    q_size: int | None = None
    qkv_size: int | None = None
    local_moe_ffn: int | None = None
    padded_positions: int | None = None


def layer_count(names: Iterable[str], where: str) -> int:
    """How many layers a chunk holds; they must be numbered from 0 without a gap."""
    held = {int(m[1]) for name in names if (m := LAYER.search(name))}
    if held != set(range(len(held))):
        absent = sorted(set(range(max(held) + 1)) - held)
        raise FormatError(
            where, f"layers are numbered up to {max(held)}, but there is no layer {', '.join(map(str, absent[:8]))}"
        )
    return len(held)


def measure(
    first: Dict[str, Shape], last: Dict[str, Shape], layers: Sequence[Dict[str, Shape]], names: Names, tp: int, ep: int
) -> Measured:
    """`first` and `last`: names and shapes of the chunks with embedding and head; `layers`: of one rank of every layer, in order."""
    out = Measured(facts={"layers": len(layers)})
    embed = first.get(names.embed)
    if embed is not None and len(embed) == 2:
        out.rows, out.facts["hidden"] = embed[0] * tp, embed[1]
    positions = first.get(names.positions)
    out.facts["learned_positions"] = positions is not None
    out.padded_positions = positions[0] if positions else None
    out.has_head = names.head in last
    experts = tuple(
        i for i, layer in enumerate(layers) if any("mlp.experts." in n or "mlp.router." in n for n in layer)
    )
    out.facts["moe_layers"] = experts
    if layers:
        _measure_attention(out, layers[0], names, tp)
    dense = next((layer for i, layer in enumerate(layers) if i not in set(experts)), None)
    if dense is not None:
        _measure_mlp(out, dense, names, tp)
    if experts:
        _measure_experts(out, layers[experts[0]], ep)
    else:
        out.facts["experts"] = 0
    return out


def _measure_attention(out: Measured, layer: Dict[str, Shape], names: Names, tp: int) -> None:
    def has(part: str) -> bool:
        return any(part in name for name in layer)

    qkv, proj = layer.get(names.qkv + "weight"), layer.get(names.proj + "weight")
    if qkv and len(qkv) == 2:
        out.qkv_size = qkv[0] * tp
        out.facts.setdefault("hidden", qkv[1])
    if proj and len(proj) == 2:
        out.q_size = proj[1] * tp
    out.facts["qkv_bias"] = names.qkv + "bias" in layer
    out.facts["out_bias"] = names.proj + "bias" in layer
    out.facts["qk_norm"] = has("q_layernorm.")
    out.facts["norm"] = "layernorm" if any(has(n + "bias") for n in names.norms) else "rmsnorm"


def _measure_mlp(out: Measured, layer: Dict[str, Shape], names: Names, tp: int) -> None:
    fc1, fc2 = layer.get(names.fc1 + "weight"), layer.get(names.fc2 + "weight")
    if fc2 and len(fc2) == 2 and fc2[1]:
        out.facts["ffn"] = fc2[1] * tp
        if fc1 and fc1[0] in (fc2[1], 2 * fc2[1]):
            out.facts["glu"] = fc1[0] == 2 * fc2[1]
    out.facts["mlp_bias"] = names.fc2 + "bias" in layer


def _measure_experts(out: Measured, layer: Dict[str, Shape], ep: int) -> None:
    router = layer.get("mlp.router.weight")
    if router and len(router) == 2:
        out.facts["experts"] = router[0]
    for name, shape in layer.items():
        match = _EXPERT_FC2.search(name)
        if match and len(shape) == 2:
            local = max(int(str(out.facts.get("experts", 0))) // ep, 1)
            out.local_moe_ffn = shape[0] // local if match[1] else shape[1]


def conflicts(config: ModelConfig, measured: Measured, label: str) -> list[str]:
    """Where a config and the tensors say different things, one line each."""
    lines = []
    for name, found in measured.facts.items():
        said = getattr(config, name)
        if said != found:
            lines.append(f"{name}: {label} says {_short(said)}, the tensors say {_short(found)}")
    if measured.q_size is not None and config.q_size != measured.q_size:
        lines.append(
            f"heads x head_dim: {label} says {config.heads} x {config.head_dim} = {config.q_size}, the tensors say {measured.q_size}"
        )
    qkv = config.q_size + 2 * config.kv_size
    if measured.qkv_size is not None and qkv != measured.qkv_size:
        lines.append(
            f"(heads + 2 x kv_heads) x head_dim: {label} says ({config.heads} + 2 x {config.kv_heads}) x {config.head_dim} = {qkv}, "
            f"the tensors say {measured.qkv_size}"
        )
    return lines


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
