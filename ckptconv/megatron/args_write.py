"""`args` for a checkpoint we write, and what of the model no Megatron flag can say."""

from __future__ import annotations

from dataclasses import replace

from ckptconv.config import ModelConfig
from ckptconv.containers.pickled import Namespace
from ckptconv.errors import ConfigError
from ckptconv.formats import refuse_projector_alone
from ckptconv.megatron.args_multimodal import MULTIMODAL, sight_notes
from ckptconv.megatron.args_read import llama3_scaling
from ckptconv.megatron.args_table import FIELDS, Subject, layer_freq
from ckptconv.megatron.versions import Core, show

PLAIN = (int, float, str, bool, type(None))
ACTIVATIONS = {(True, "silu"), (False, "gelu"), (False, "gelu_pytorch_tanh"), (False, "gelu_new"), (False, "relu2")}


def write_args(subject: Subject) -> Namespace:
    """The args, in the order of their names. The source's own are kept only where they are plain values."""
    plain: dict[str, object] = {k: v for k, v in subject.carried.items() if isinstance(v, PLAIN)}
    kept = replace(subject, carried=plain)
    table = (*FIELDS, *(MULTIMODAL if "vision" in subject.config.towers else ()))
    fields = {f.name: f.value(kept) for f in table if f.since <= kept.core.version}
    return Namespace(**dict(sorted(fields.items())))


def bias_problems(config: ModelConfig) -> list[str]:
    """Whether neither Megatron's flags nor NeMo's can say which linear layers have biases."""
    biases = (config.qkv_bias, config.out_bias, config.mlp_bias)
    if biases in ((False, False, False), (True, False, False), (True, True, True)):
        return []
    said = ", ".join(
        f"{n} {'yes' if b else 'no'}" for n, b in zip(("q/k/v", "attention output", "mlp"), biases, strict=True)
    )
    return [f"biases {said}: it has flags for all of them, for q/k/v alone, or for none"]


def refuse_inexpressible(config: ModelConfig, core: Core, *, legacy: bool) -> None:
    """Models that Megatron of this version would build with other tensors or another forward pass: written files would be wrong."""
    who = f"Megatron-Core {show(core.version)}" + (" (legacy models)" if legacy else "")
    refuse_projector_alone(config, who)
    problems = bias_problems(config)
    if (config.glu, config.activation) not in ACTIVATIONS:
        problems.append(f"activation {config.activation!r} {'with' if config.glu else 'without'} a gate")
    if config.rope is None and not config.learned_positions:
        problems.append("no position embedding")
    if config.rope is not None and not float(config.rope.base).is_integer():
        problems.append(f"rotary base {config.rope.base}: --rotary-base takes whole numbers")
    problems += _scaling_problems(config, core)
    if (
        config.experts
        and not core.expert_sizes
        and (config.moe_ffn != (config.ffn or config.moe_ffn) or layer_freq(config) != 1)
    ):
        problems.append(
            "dense layers among those with experts, or experts of another size than the mlp (0.10 and newer can)"
        )
    if legacy and config.experts:
        problems.append("experts: save as mcore")
    if legacy and config.rope and config.rope.kind == "llama3":
        problems.append("llama3 rope scaling: save as mcore")
    if legacy and config.qk_norm:
        problems.append("norms of queries and keys: save as mcore")
    if legacy and config.sliding_window:
        problems.append(f"a sliding window of {config.sliding_window}: save as mcore")
    if problems:
        raise ConfigError("\n  ".join([f"{who} has no way to say:", *problems]))


def _scaling_problems(config: ModelConfig, core: Core) -> list[str]:
    """A rope scaling that would silently be left out gives wrong results at every position."""
    if config.rope is None or not config.rope.scaling or config.rope.kind == "default":
        return []
    scaling, kind = config.rope.scaling, config.rope.kind
    factor = scaling.get("factor")
    if kind in ("linear", "llama3") and (
        isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor <= 0
    ):
        return [f"{kind} rope scaling by {factor!r}: the factor must be a number above 0"]
    if kind == "linear":
        whole = float(str(factor)).is_integer()
        return (
            []
            if whole
            else [f"linear rope scaling by {factor}: --rotary-seq-len-interpolation-factor takes whole numbers"]
        )
    if kind == "dynamic":
        return []  # see dynamic_rope
    if kind != "llama3":
        return [f"rope scaling {kind!r}: only llama3 and linear are known to it"]
    if not core.rope_scaling:
        return ["llama3 rope scaling (0.10 and newer can)"]
    fixed = llama3_scaling(0.0)
    other = [
        f"{k} {scaling.get(k)} (fixed at {fixed[k]})"
        for k in fixed
        if k not in ("rope_type", "factor") and scaling.get(k) != fixed[k]
    ]
    problems = [f"llama3 rope scaling with {', '.join(other)}"] if other else []
    if not core.rope_scaling_factor and factor != 8:
        problems.append(f"llama3 rope scaling by {factor} (before 0.11 it is always by 8)")
    return problems


def dynamic_rope(config: ModelConfig, who: str) -> list[str]:
    """It acts beyond the positions that a model was trained with, so that leaving it out changes nothing up to there."""
    if config.rope is None or config.rope.kind != "dynamic":
        return []
    return [
        f"dynamic rope scaling: {who} has no words for it; sequences of up to {config.max_positions} tokens give the same results"
    ]


def notes(config: ModelConfig, core: Core, *, legacy: bool) -> tuple[str, ...]:
    """What the files say rightly but Megatron's own scripts do not pass on, for the user to see to."""
    out = []
    if legacy and config.rope and config.rope.base != 10000:
        out.append(
            f"rotary base is {config.rope.base:g}: Megatron's legacy models have 10000 in their code (0.9 to 0.16) "
            "and would run this model wrongly; the files keep it, and mcore models use it"
        )
    if config.rope and config.rope.scaling and config.rope.kind == "llama3" and config.rope.scaling.get("factor") != 8:
        out.append(
            f"rope_scaling_factor is {config.rope.scaling.get('factor')}: pretrain_gpt.py up to 0.16 never passes it to the model, "
            "which then scales by 8; give GPTModel(rope_scaling_factor=...) yourself"
        )
    out += dynamic_rope(config, "Megatron")
    if config.sliding_window and core.sliding_window:
        out.append(
            f"sliding window of {config.sliding_window}: Megatron does not copy window_size from checkpoints; see the flags"
        )
    elif config.sliding_window:
        out.append(
            f"sliding window of {config.sliding_window}: Megatron-Core {show(core.version)} has no flag for it (0.15 has --window-size); "
            f"sequences of up to {config.sliding_window} tokens give the same results"
        )
    return (*out, *sight_notes(config))
