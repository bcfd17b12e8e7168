"""The commands. Each reads its options, calls the pipeline, and prints; heavy modules are imported when a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptconv.cli.options import (
    FormatCommand,
    change_options,
    layout_options,
    make_execute_options,
    make_job,
    output_options,
    run_options,
    source_options,
)
from ckptconv.errors import CkptconvError, UsageError

if TYPE_CHECKING:
    from ckptconv.pipeline import Job

PATH = click.Path(path_type=Path)
DRY = {"memory": "1GB", "workers": None, "force": False, "allow_overflow": False, "dry_run": True}
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


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
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.option(
    "--saver", required=True, metavar="FORMAT", help="Format to write: hf, mcore, legacy (see ckptconv formats)."
)
@layout_options
@source_options
@change_options
@run_options
@output_options
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
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@layout_options
@source_options
@change_options
@run_options
@output_options
@click.pass_context
def reshard(ctx: click.Context, /, src: Path, dst: Path, **params: Any) -> None:
    """Write SRC to DST in the same format and another layout; what is not said stays as it is."""
    run(make_job(ctx, src, None, params), dst, params)


@cli.group(epilog=examples("ckptconv plan convert llama/ out/ --saver mcore --tp 8"))
def plan() -> None:
    """Show what convert or reshard would do (the same as --dry-run)."""


@plan.command("convert", cls=FormatCommand, epilog=convert.epilog)
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.option("--saver", required=True, metavar="FORMAT", help="Format to write.")
@layout_options
@source_options
@change_options
@output_options
@click.pass_context
def plan_convert(ctx: click.Context, /, src: Path, dst: Path, saver: str, **params: Any) -> None:
    """Show what convert would write: files, bytes, each tensor's recipe."""
    run(make_job(ctx, src, saver, params), dst, {**DRY, **params})


@plan.command("reshard", cls=FormatCommand, epilog=reshard.epilog)
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@layout_options
@source_options
@change_options
@output_options
@click.pass_context
def plan_reshard(ctx: click.Context, /, src: Path, dst: Path, **params: Any) -> None:
    """Show what reshard would write: files, bytes, each tensor's recipe."""
    run(make_job(ctx, src, None, params), dst, {**DRY, **params})


def run(job: Job, dst: Path, params: dict[str, Any]) -> None:
    """Prepare, and unless it is a dry run execute, telling what happens."""
    from dataclasses import asdict

    from ckptconv.cli import render
    from ckptconv.cli.progress import progress
    from ckptconv.execute import execute
    from ckptconv.pipeline import check_places, prepare

    options = make_execute_options(params)
    check_places(job.source, dst)
    prepared = prepare(job)
    if not params["quiet"]:
        render.show_notes(prepared)
    if params["dry_run"]:
        render.emit(render.plan_facts(prepared)) if params["as_json"] else render.show_plan(prepared)
        return
    report = execute(prepared.plan, dst, options, progress(quiet=params["quiet"] or params["as_json"]))
    if params["as_json"]:
        losses = {name: loss._asdict() for name, loss in report.losses.items()}
        render.emit({"dst": str(dst), **prepared.plan.about, "report": {**asdict(report), "losses": losses}})
        return
    if not params["quiet"]:
        render.show_report(report)
    click.echo(prepared.usage(str(dst)))


@cli.command(
    cls=FormatCommand,
    epilog=examples("ckptconv inspect llama-mcore/", "ckptconv inspect llama/ --tensors '*layers.0.*' --json"),
)
@click.argument("path", type=PATH)
@click.option("--tensors", metavar="GLOB", help="List the tensors whose stored name matches.")
@source_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def inspect(ctx: click.Context, /, path: Path, tensors: str | None, as_json: bool, **params: Any) -> None:
    """Show format, architecture, layout and what each rank holds, from headers alone."""
    from ckptconv import inspection
    from ckptconv.cli import render

    facts, problem = inspection.inspect(make_job(ctx, path, None, params), tensors)
    if as_json:
        render.emit({**facts, "problem": str(problem) if problem else None})
    else:
        render.show_facts(facts)
    if problem:
        raise problem


@cli.command(cls=FormatCommand, epilog=examples("ckptconv verify llama/ llama-mcore/", "ckptconv verify a/ b/ --json"))
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@source_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def verify(ctx: click.Context, /, a: Path, b: Path, as_json: bool, **params: Any) -> None:
    """Compare two checkpoints of any formats and layouts, tensor by tensor. Exit 0: same, 1: different, 3: could not compare."""
    from dataclasses import replace

    from ckptconv.cli import render
    from ckptconv.compare import verify as compare

    job = make_job(ctx, a, None, params)
    try:
        verdict = compare(job, replace(job, source=b))
    except UsageError:
        raise
    except (CkptconvError, OSError) as error:
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
    from ckptconv.registry import formats as known
    from ckptconv.registry import get_format, option_rows

    if name is None:
        rows = [
            {"name": n, "aliases": list(f.aliases), "origin": origin, "summary": f.summary}
            for n, (origin, f) in known().items()
        ]
        if as_json:
            render.emit(rows)
        for row in rows if not as_json else ():
            also = f" ({', '.join(row['aliases'])})" if row["aliases"] else ""
            click.echo(f"{row['name']}{also}: {row['summary']} [{row['origin']}]")
        return
    fmt = get_format(name)
    options = {side: option_rows(kind) for side, kind in (("loader", fmt.Load), ("saver", fmt.Save))}
    if as_json:
        render.emit(
            {side: [{"name": n, "default": d, "help": h} for n, d, h in rows] for side, rows in options.items()}
        )
        return
    click.echo(f"{fmt.name}: {fmt.summary}")
    for side, rows in options.items():
        for n, default, text in rows:
            click.echo(f"  --{side}.{n}" + (f" [{default}]" if default else "") + f"  {text}")


@cli.command(epilog=examples("ckptconv families", "ckptconv families hf-qwen3"))
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def families(name: str | None, as_json: bool) -> None:
    """List the model families, or the rules of one mapping."""
    from ckptconv.cli import render
    from ckptconv.mapping_files import family_names, load_mapping, mapping_paths

    if name is None:
        rows = [{"name": n, "origin": mapping_paths()[n][0], "match": load_mapping(n).match} for n in family_names()]
        if as_json:
            render.emit(rows)
        for row in rows if not as_json else ():
            click.echo(f"{row['name']} [{row['origin']}]: {row['match']}")
        return
    mapping = load_mapping(name)
    rules = {
        r.stored: [{"is": str(a.expr), "when": list(a.when), "on": sorted(a.on)} for a in r.alternatives]
        for r in mapping.rules
    }
    if as_json:
        render.emit(rules)
        return
    for stored, alternatives in rules.items():
        click.echo(stored)
        for one in alternatives:
            click.echo(f"    {one['is']}  {' '.join([*one['when'], *one['on']])}")


@cli.command(epilog=examples("ckptconv demo"))
def demo() -> None:
    """Make a tiny model, convert it to Megatron tp2 pp2, reshard it, convert it back, and verify each step."""
    from ckptconv.cli.demo import run_demo

    run_demo(click.echo)
