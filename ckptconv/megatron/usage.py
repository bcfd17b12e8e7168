"""The flags with which Megatron-LM loads a checkpoint we wrote: all that it does not copy from the files, and the layout."""

from __future__ import annotations

from shlex import quote

from ckptconv.checkpoint import Stored
from ckptconv.dtypes import FP32
from ckptconv.megatron.args_multimodal import MULTIMODAL, vision_type
from ckptconv.megatron.args_table import Subject, layer_freq, whole
from ckptconv.megatron.args_write import notes
from ckptconv.megatron.optimizer.generators import left_out
from ckptconv.megatron.saving import DIVISOR, Form, carried, vocab_rows
from ckptconv.megatron.stages import pipeline_args
from ckptconv.megatron.versions import Core

ANY_LAYOUT = (
    "--tensor-model-parallel-size TP --pipeline-model-parallel-size PP (and any others: all layouts can load it)"
)
PIPELINE_FLAGS = {
    "num_layers_per_virtual_pipeline_stage": "--num-layers-per-virtual-pipeline-stage",
    "num_virtual_stages_per_pipeline_rank": "--num-virtual-stages-per-pipeline-rank",
    "decoder_first_pipeline_num_layers": "--decoder-first-pipeline-num-layers",
    "decoder_last_pipeline_num_layers": "--decoder-last-pipeline-num-layers",
    "account_for_embedding_in_pipeline_split": "--account-for-embedding-in-pipeline-split",
    "account_for_loss_in_pipeline_split": "--account-for-loss-in-pipeline-split",
    "pipeline_model_parallel_layout": "--pipeline-model-parallel-layout",
}


def usage(stored: Stored, dst: str, form: Form) -> str:
    """Lines to put on a Megatron-LM command line."""
    if stored.config.kind == "vision":
        return _tower(stored, dst)
    layout = _layout(stored, form.core) if form.ckpt_format == "torch" else [ANY_LAYOUT]
    flags = [*_files(stored, dst, form), *layout, *_model(stored), *_experts(stored, form), *_multimodal(stored, form)]
    script = "examples/multimodal/train.py" if stored.config.towers else "pretrain_gpt.py"
    lines = [f"Megatron-LM flags ({script}{' --use-legacy-models' if form.legacy else ''}):"]
    lines += [f"  {flag}" for flag in flags]
    said = (*notes(stored.config, form.core, legacy=form.legacy), *left_out(stored, distributed=form.whole))
    lines += [f"note: {note}" for note in said]
    return "\n".join(lines)


def _tower(stored: Stored, dst: str) -> str:
    """Megatron trains no tower alone."""
    name = vision_type(stored.config)
    kind = f"--vision-model-type {name}" if name else "none that Megatron-LM's example has a --vision-model-type for"
    return (
        f"A vision tower ({kind}) for tensor parallel size {stored.topology.tp}; join it to a language model:\n"
        f"  ckptconv combine LM {quote(dst)} DST --saver mcore --tp {stored.topology.tp}"
    )


def _multimodal(stored: Stored, form: Form) -> list[str]:
    """What the multimodal example takes beside; what we cannot know stands in capitals."""
    config = stored.config
    if "vision" not in config.towers:
        return []
    subject = Subject(
        config, stored.topology, form.core, config.dtype or FP32, DIVISOR, form.local, carried=carried(stored.extras)
    )
    args = {field.name: field.value(subject) for field in MULTIMODAL}
    flags = [
        f"--language-model-type {args['language_model_type'] or 'TYPE'} --vision-model-type {args['vision_model_type'] or 'TYPE'}",
        f"--img-h {args['img_h']} --img-w {args['img_w']} --patch-dim {args['patch_dim']}",
        f"--decoder-seq-length {args['decoder_seq_length']} --tokenizer-prompt-format {args['tokenizer_prompt_format'] or 'FORMAT'}",
    ]
    switches = {
        "--disable-vision-class-token": args["disable_vision_class_token"],
        "--pixel-shuffle": args["pixel_shuffle"],
        "--use-tiling": args["use_tiling"],
        "--use-thumbnail": args["use_thumbnail"],
        "--use-tile-tags": args["use_tile_tags"],
        "--use-te": args["use_te"],
        "--allow-missing-vision-projection-checkpoint": "projector" not in config.towers,
    }
    flags += [" ".join(flag for flag, on in switches.items() if on)]
    flags += [f"--max-num-tiles {args['max_num_tiles']}"] if args["use_tiling"] else []
    return flags + ([f"--image-tag-type {args['image_tag_type']}"] if args["image_tag_type"] else [])


def _files(stored: Stored, dst: str, form: Form) -> list[str]:
    impl = "local" if form.local else "transformer_engine"
    written = form.written(stored)
    state = {
        "--no-load-optim": "optimizer" not in written,
        "--no-load-rng": "rng" not in written,
        "--use-distributed-optimizer": "distributed" in written,
    }
    flags = [
        f"--load {quote(dst)} --ckpt-format {form.ckpt_format} {' '.join(f for f, on in state.items() if on)}".rstrip()
    ]
    flags.append(f"--transformer-impl {impl}")
    if form.legacy:
        flags.append("--use-legacy-models")
    dtype = stored.config.dtype
    if dtype is not None and dtype.name in ("bf16", "fp16"):
        flags.append(f"--{dtype.name}")
    if "tokenizer_config.json" in stored.extras.files:
        flags.append(f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {quote(dst + '/hf')}")
    return flags


def _layout(stored: Stored, core: Core) -> list[str]:
    topology = stored.topology
    flags = [f"--tensor-model-parallel-size {topology.tp} --pipeline-model-parallel-size {topology.pp}"]
    if stored.config.experts:
        flags.append(f"--expert-model-parallel-size {topology.ep} --expert-tensor-parallel-size {topology.etp}")
    for name, value in pipeline_args(topology, core).items():
        if value is True:
            flags.append(PIPELINE_FLAGS[name])
        elif value not in (None, False):
            flags.append(
                f"{PIPELINE_FLAGS[name]} '{value}'" if isinstance(value, str) else f"{PIPELINE_FLAGS[name]} {value}"
            )
    return flags


def _model(stored: Stored) -> list[str]:
    config = stored.config
    flags = [
        f"--num-layers {config.layers} --hidden-size {config.hidden} --ffn-hidden-size {config.ffn or config.moe_ffn}",
        f"--num-attention-heads {config.heads} --kv-channels {config.head_dim}",
        f"--group-query-attention --num-query-groups {config.kv_heads}",
        f"--max-position-embeddings {config.max_positions} --seq-length {config.max_positions}",
        f"--normalization {'LayerNorm' if config.norm == 'layernorm' else 'RMSNorm'} --norm-epsilon {config.norm_eps}",
    ]
    if config.rope:
        flags.append(
            f"--position-embedding-type rope --rotary-base {whole(config.rope.base)} --rotary-percent {config.rope.percent}"
        )
        scaling, kind = config.rope.scaling or {}, config.rope.kind
        flags += [f"--use-rope-scaling --rope-scaling-factor {scaling.get('factor')}"] if kind == "llama3" else []
        flags += [f"--rotary-seq-len-interpolation-factor {whole(scaling.get('factor'))}"] if kind == "linear" else []
    switches = {
        "--swiglu": config.glu and config.activation == "silu",
        "--squared-relu": not config.glu and config.activation == "relu2",
        "--openai-gelu": not config.glu and config.activation == "gelu_new",
        "--disable-bias-linear": not (config.out_bias and config.mlp_bias),
        "--add-qkv-bias": config.qkv_bias and not config.out_bias,
        "--qk-layernorm": config.qk_norm,
        "--untie-embeddings-and-output-weights": not config.tied,
    }
    flags.append(" ".join(flag for flag, on in switches.items() if on))
    flags += [f"--window-size {config.sliding_window - 1},0"] if config.sliding_window else []
    if vocab_rows(config, stored.topology, DIVISOR) != config.vocab_rows:
        flags.append(f"--make-vocab-size-divisible-by {config.vocab_rows // stored.topology.tp}")
    return [*flags, "--attention-dropout 0 --hidden-dropout 0"]


def _experts(stored: Stored, form: Form) -> list[str]:
    config = stored.config
    if not config.experts:
        return []
    flags = [
        f"--num-experts {config.experts} --moe-ffn-hidden-size {config.moe_ffn} --moe-router-topk {config.router_topk}"
    ]
    flags += ["--moe-router-pre-softmax"] if config.router_pre_softmax else []
    freq = layer_freq(config)
    flags += [f"--moe-layer-freq '{freq}'"] if freq != 1 else []
    if form.experts == "te-grouped":
        flags.append("--moe-grouped-gemm")
    elif form.experts == "grouped":
        flags.append("--moe-grouped-gemm --moe-use-legacy-grouped-gemm")
    return flags
