"""The commands. Each reads its options, calls the pipeline, and prints; heavy modules are imported when a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ckptconv.cli.multimodal import combine, extract
from ckptconv.cli.options import (
    PATH,
    FormatCommand,
    LoaderCommand,
    TwoLoadersCommand,
    conversion_options,
    dry_run_option,
    layout_options,
    make_job,
    output_options,
    saver_option,
    source_options,
)
from ckptconv.cli.running import carry_out, examples, run
from ckptconv.cli.tokenizer import tokenizer
from ckptconv.errors import CkptconvError, UsageError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(
    context_settings=CONTEXT,
    epilog=examples(
        "ckptconv convert llama/ llama-tp2pp2/ --saver mcore --tp 2 --pp 2", "ckptconv inspect llama-tp2pp2/"
    ),
)
@click.version_option(package_name="ckptconv")
def cli() -> None:
    """Convert and reshard model checkpoints: Hugging Face and Megatron, any layout, bit-exactly, on a CPU, in bounded memory."""


@cli.command(
    cls=FormatCommand,
    epilog=examples(
        "ckptconv convert llama/ llama-mcore/ --saver mcore --tp 4 --pp 2",
        "ckptconv convert llama-mcore/ llama-hf/ --saver hf",
        "ckptconv convert mixtral/ out/ --saver mcore --ep 8 --saver.experts sequential",
        "ckptconv formats mcore      (lists the --loader.X and --saver.X options of a format)",
    ),
)
@saver_option
@dry_run_option
@layout_options
@conversion_options
@click.pass_context
def convert(ctx: click.Context, /, src: Path, dst: Path, saver: str, **params: Any) -> None:
    """Convert SRC to DST in another format and layout."""
    run(make_job(ctx, src, saver, params), dst, params)


@cli.command(
    cls=FormatCommand,
    epilog=examples(
        "ckptconv reshard llama-tp4/ llama-tp2pp2/ --tp 4:2 --pp 1:2",
        "ckptconv reshard in/ out/ --pp 4 --pp-layers 7,9,9,7",
    ),
)
@dry_run_option
@layout_options
@conversion_options
@click.pass_context
def reshard(ctx: click.Context, /, src: Path, dst: Path, **params: Any) -> None:
    """Write SRC to DST in the same format and another layout; what is not said stays as it is."""
    run(make_job(ctx, src, None, params), dst, params)


@cli.command(
    cls=FormatCommand,
    epilog=examples(
        "ckptconv upgrade old/ new/ --optimizer drop",
        "ckptconv upgrade old-zarr/ new/ --loader.config llama/ --mcore-version 0.12",
    ),
)
@dry_run_option
@conversion_options
@click.pass_context
def upgrade(ctx: click.Context, /, src: Path, dst: Path, **params: Any) -> None:
    """Write SRC, a Megatron checkpoint of any era, to DST as torch_dist, the form of today, and say what that changes."""
    from ckptconv.pipeline import check_places
    from ckptconv.upgrade import prepare_upgrade

    check_places(src, dst)
    prepared, changes = prepare_upgrade(make_job(ctx, src, None, params))
    carry_out(prepared, dst, params, {"changes": changes})


@cli.group(epilog=examples("ckptconv plan convert llama/ out/ --saver mcore --tp 8"))
def plan() -> None:
    """Show what convert or reshard would do (the same as --dry-run)."""


@plan.command(
    "convert",
    cls=FormatCommand,
    epilog=examples(
        "ckptconv plan convert llama/ out/ --saver mcore --tp 8 --pp 4",
        "ckptconv plan convert m/ out/ --saver hf --json",
    ),
)
@saver_option
@layout_options
@conversion_options
@click.pass_context
def plan_convert(ctx: click.Context, /, src: Path, dst: Path, saver: str, **params: Any) -> None:
    """Show what convert would write: files, bytes, each tensor's recipe."""
    run(make_job(ctx, src, saver, params), dst, {**params, "dry_run": True})


@plan.command("reshard", cls=FormatCommand, epilog=examples("ckptconv plan reshard llama-tp4/ out/ --tp 4:2"))
@layout_options
@conversion_options
@click.pass_context
def plan_reshard(ctx: click.Context, /, src: Path, dst: Path, **params: Any) -> None:
    """Show what reshard would write: files, bytes, each tensor's recipe."""
    run(make_job(ctx, src, None, params), dst, {**params, "dry_run": True})


@cli.command(
    cls=LoaderCommand,
    epilog=examples("ckptconv inspect llama-mcore/", "ckptconv inspect llama/ --tensors '*layers.0.*' --json"),
)
@click.argument("path", type=PATH)
@click.option("--tensors", metavar="GLOB", help="List the tensors whose stored name matches.")
@source_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def inspect(ctx: click.Context, /, path: Path, tensors: str | None, as_json: bool, **params: Any) -> None:
    """Show format, architecture, layout and what each rank holds, from headers alone. Of a broken one what can be said."""
    from ckptconv import inspection
    from ckptconv.cli import render

    facts, problem = inspection.inspect(make_job(ctx, path, None, params), tensors)
    if as_json:
        render.emit({**facts, "problem": str(problem) if problem else None})
    else:
        render.show_facts(facts)
    if problem:
        raise problem


@cli.command(
    cls=TwoLoadersCommand,
    epilog=examples(
        "ckptconv verify llama/ llama-mcore/",
        "ckptconv verify a/ b/ --json",
        "ckptconv verify llama/ old/ --loader-b legacy --loader-b.config llama/",
    ),
)
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@source_options
@click.option("--loader-a", metavar="FORMAT", help="Format of A, if not that of --loader; its options: --loader-a.X.")
@click.option("--loader-b", metavar="FORMAT", help="Format of B, if not that of --loader; its options: --loader-b.X.")
@output_options
@click.pass_context
def verify(ctx: click.Context, /, a: Path, b: Path, as_json: bool, quiet: bool, **params: Any) -> None:
    """Compare two checkpoints of any formats and layouts, tensor by tensor. Exit 0: same, 1: different, 3: could not compare."""
    from ckptconv.cli import render
    from ckptconv.cli.progress import progress
    from ckptconv.compare import verify as compare

    jobs = make_job(ctx, a, None, params, "-a"), make_job(ctx, b, None, params, "-b")
    try:
        verdict = compare(*jobs, progress=progress(quiet=quiet or as_json))
    except UsageError:
        raise
    except (CkptconvError, OSError) as error:
        if as_json:
            render.emit({"same": None, "problem": str(error)})
        click.echo(f"ckptconv: could not compare: {error}", err=True)
        sys.exit(3)
    render.emit(render.verdict_facts(verdict)) if as_json else render.show_verdict(verdict)
    sys.exit(0 if verdict.same else 1)


@cli.command(epilog=examples("ckptconv formats", "ckptconv formats mcore"))
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def formats(name: str | None, as_json: bool) -> None:
    """List the formats, or the options of one."""
    from ckptconv.cli import render

    if name is None:
        rows = render.format_rows()
        render.emit(rows) if as_json else render.show_formats(rows)
    else:
        facts = render.format_facts(name)
        render.emit(facts) if as_json else render.show_format(facts)


@cli.command(epilog=examples("ckptconv families", "ckptconv families hf-qwen3", "ckptconv families mcore"))
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def families(name: str | None, as_json: bool) -> None:
    """List the model families, or the rules of one mapping: each stored tensor, and what it is made of."""
    from ckptconv.cli import render

    if name is None:
        rows = render.family_rows()
        render.emit(rows) if as_json else render.show_families(rows)
    else:
        rules = render.mapping_rules(name)
        render.emit(rules) if as_json else render.show_rules(rules)


@cli.command(epilog=examples("ckptconv demo"))
def demo() -> None:
    """Make a tiny model, convert it to Megatron tp2 pp2, reshard it, convert it back, and verify each step."""
    from ckptconv.cli.demo import run_demo

    run_demo(click.echo)


for command in (combine, extract, tokenizer):
    cli.add_command(command)
