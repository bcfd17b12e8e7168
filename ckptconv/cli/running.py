"""What commands that write do alike: prepare, show or execute, and tell what happens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptconv.cli.options import make_execute_options

if TYPE_CHECKING:
    from ckptconv.pipeline import Job, Prepared


def examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def run(job: Job, dst: Path, params: dict[str, Any]) -> None:
    """Prepare, and unless it is a dry run execute, telling what happens."""
    from ckptconv.pipeline import check_places, prepare

    check_places(job.source, dst)
    carry_out(prepare(job), dst, params, {})


def carry_out(prepared: Prepared, dst: Path, params: dict[str, Any], more: dict[str, list[str]]) -> None:
    """Execute what is prepared, or show it; `more` is told with it, line by line."""
    from dataclasses import asdict

    from ckptconv.cli import render
    from ckptconv.cli.progress import progress
    from ckptconv.executor.execute import execute

    options = make_execute_options(params)
    if not params["quiet"]:
        render.show_notes(prepared)
        render.show_more(more)
    if params["dry_run"]:
        facts = {**render.plan_facts(prepared), **more}
        render.emit(facts) if params["as_json"] else render.show_plan(facts)
        if facts["memory_needed"] > options.memory:
            click.echo(f"note: --memory {params['memory']} is too small: this would be refused", err=True)
        return
    usage = prepared.usage(str(dst))  # now: it may look into scratch files, which go when the result is there
    report = execute(prepared.plan, dst, options, progress(quiet=params["quiet"] or params["as_json"]))
    if params["as_json"]:
        losses = {name: loss._asdict() for name, loss in report.losses.items()}
        told = {**asdict(report), "losses": losses}
        render.emit({"dst": str(dst), **prepared.plan.about, **more, "usage": usage.splitlines(), "report": told})
        return
    if not params["quiet"]:
        render.show_report(report)
    click.echo(usage)
