"""`ckptconv combine` and `ckptconv extract`: multimodal models from their parts, and parts of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ckptconv.cli.options import (
    COUNT,
    PATH,
    FormatCommand,
    PartsCommand,
    change_options,
    conversion_options,
    dry_run_option,
    layout_options,
    make_job,
    output_options,
    run_options,
    saver_option,
    source_options,
)
from ckptconv.cli.running import carry_out, examples
from ckptconv.errors import UsageError

PART = "lm|vision|projector"


@click.command(
    cls=PartsCommand,
    epilog=examples(
        "ckptconv combine mistral/ clip/ out/ --saver mcore --tp 4 --as llava",
        "ckptconv combine qwen2/ internvit/ out/ --saver mcore --tp 8 --pp 4 --as nvlm --lm.dtype bf16",
        "ckptconv combine vicuna/ clip/ out/ --saver hf --as llava --init-projector normal:0.02:1 --vocab-rows 32064",
        "ckptconv combine vlm/ tuned-clip/ out/ --saver mcore --replace vision",
    ),
)
@click.argument("lm", type=PATH)
@click.argument("vision", type=PATH)
@click.argument("dst", type=PATH)
@saver_option
@click.option(
    "--projector",
    metavar="PATH|none",
    default="none",
    show_default=True,
    help="Where the projector comes from: a checkpoint of any kind, or a mm_projector.bin.",
)
@click.option("--init-projector", metavar="normal:STD:SEED|zeros", help="A new projector, as large as --as says.")
@click.option("--as", "kind", metavar="llava|nvlm|internvl|neva", help="The kind of model to make.")
@click.option("--replace", metavar=PART, help="LM is a whole model, and VISION the new one of this part.")
@click.option("--lm.dtype", "lm_dtype", default="keep", metavar="DTYPE", help="Cast the language model alone.")
@click.option("--vision.dtype", "vision_dtype", default="keep", metavar="DTYPE", help="Cast the vision tower alone.")
@click.option("--projector.dtype", "projector_dtype", default="keep", metavar="DTYPE", help="Cast the projector alone.")
@click.option("--vocab-rows", type=COUNT, metavar="N", help="Rows for new tokens, such as an image's: N in all.")
@click.option("--init", default="mean", show_default=True, metavar="mean|zero|last", help="What new rows are.")
@click.option("--loader-vision", metavar="FORMAT", help="Format of VISION; its options: --loader-vision.X.")
@click.option("--loader-projector", metavar="FORMAT", help="Format of the projector's checkpoint.")
@click.option("--family-vision", metavar="NAME", help="Family of VISION, where it does not say; --family is LM's.")
@dry_run_option
@layout_options
@source_options
@change_options
@run_options
@output_options
@click.pass_context
def combine(ctx: click.Context, /, lm: Path, vision: Path, dst: Path, saver: str, **params: Any) -> None:
    """Join the language model LM and the vision tower VISION into one checkpoint, of any formats and layouts."""
    from ckptconv.combine import prepare_combine, prepare_swap
    from ckptconv.pipeline import check_places

    named = ctx.get_parameter_source("projector") is ParameterSource.COMMANDLINE
    if named and params["projector"] == "none" and params["init_projector"]:
        raise UsageError("--projector none and --init-projector: without a projector, or with a new one")
    sources = [lm, vision, *([Path(params["projector"])] if params["projector"] != "none" else [])]
    for source in sources:
        check_places(source, dst)
    families = (params["family"], params["family_vision"], None)
    jobs = [
        make_job(ctx, path, saver, {**params, "family": family}, side)
        for path, side, family in zip(sources, ("", "-vision", "-projector"), families, strict=False)
    ]
    dtypes = {part: params[f"{part}_dtype"] for part in ("lm", "vision", "projector")}
    said: dict[str, Any] = {"kind": params["kind"], "dtypes": dtypes}
    if params["replace"] is None:
        made = {name: params[name] for name in ("init_projector", "vocab_rows", "init")}
        prepared = prepare_combine(jobs[0], jobs[1], jobs[2] if len(jobs) > 2 else None, **said, **made)
    elif len(jobs) > 2 or params["init_projector"] or params["vocab_rows"]:
        raise UsageError(
            "--replace exchanges one part, the second path: no --projector, --init-projector or --vocab-rows beside it"
        )
    else:
        prepared = prepare_swap(jobs[0], jobs[1], params["replace"], **said)
    carry_out(prepared, dst, params, {})


@click.command(
    cls=FormatCommand,
    epilog=examples(
        "ckptconv extract nvlm/ vit/ --part vision --saver hf", "ckptconv extract nvlm/ lm/ --part lm --saver mcore"
    ),
)
@click.option("--part", required=True, metavar=PART, help="Which part to take out.")
@saver_option
@dry_run_option
@layout_options
@conversion_options
@click.pass_context
def extract(ctx: click.Context, /, src: Path, dst: Path, part: str, saver: str, **params: Any) -> None:
    """Take one part out of the multimodal model SRC and write it to DST as a checkpoint of its own."""
    from ckptconv.combine import prepare_extract
    from ckptconv.pipeline import check_places

    check_places(src, dst)
    carry_out(prepare_extract(make_job(ctx, src, saver, params), part), dst, params, {})
