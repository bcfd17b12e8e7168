"""Plans, verdicts and inspections as text for people, or as JSON for scripts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from ckptconv.cli import render_storage
from ckptconv.errors import UsageError
from ckptconv.sizes import human

if TYPE_CHECKING:
    from ckptconv.compare import Verdict
    from ckptconv.executor.execute import Report
    from ckptconv.pipeline import Prepared
    from ckptconv.tensor import Tensor

SHOWN = 200


def emit(data: object) -> None:
    click.echo(json.dumps(data, indent=2, default=str))


def plan_facts(prepared: Prepared) -> dict[str, Any]:
    """A plan as plain data: files, sizes, and each tensor's recipe."""
    from ckptconv.executor.execute import memory_needed
    from ckptconv.tensor import Tensor

    plan = prepared.plan
    files = []
    for file in plan.files:
        tensors = [
            {"name": s.name, "bytes": s.nbytes, "recipe": recipe(s.body, plan.root)}
            for s in file.segments
            if s.name and isinstance(s.body, Tensor)
        ]
        files.append({"path": file.path, "bytes": file.size, "tensors": tensors})
    return {
        "files": files,
        "bytes": plan.nbytes,
        "disk_needed": plan.nbytes,
        "memory_needed": memory_needed(plan),
        "replicas_to_compare": len(plan.checks),
        **{k: v for k, v in plan.about.items() if k != "ckptconv"},
    }


def recipe(tensor: Tensor, root: str) -> str:
    """What a tensor is made of, in one line."""
    from ckptconv.nodes import Concat, Fill, Fold, Map, View

    head = f"{tensor.dtype}{list(tensor.shape)}"
    if isinstance(tensor, View):
        path = tensor.source.path.removeprefix(root).lstrip("/")
        return f"{head} = {path}@{tensor.source.offset + tensor.offset} strides {list(tensor.strides)}"
    if isinstance(tensor, Fill):
        return f"{head} = constant"
    if isinstance(tensor, Map):
        return f"{head} = {type(tensor.fn).__name__.lower()} of ({recipe(tensor.child, root)})"
    if isinstance(tensor, Fold):
        return f"{head} = fold {tensor.axis} of ({recipe(tensor.child, root)})"
    if isinstance(tensor, Concat):
        parts = "; ".join(recipe(p, root) for p in tensor.parts[:4])
        more = f"; and {len(tensor.parts) - 4} more" if len(tensor.parts) > 4 else ""
        return f"{head} = {len(tensor.parts)} parts along {tensor.axis}: ({parts}{more})"
    return head


def show_plan(facts: dict[str, Any]) -> None:
    for file in facts["files"]:
        click.echo(f"{file['path']}  {human(file['bytes'])}  {len(file['tensors'])} tensors")
        for tensor in file["tensors"][:SHOWN]:
            click.echo(f"    {tensor['name']}  {tensor['recipe']}")
        if len(file["tensors"]) > SHOWN:
            click.echo(f"    and {len(file['tensors']) - SHOWN} more (--json lists all)")
    click.echo(f"{len(facts['files'])} files; {facts['replicas_to_compare']} replicas to compare")
    click.echo(f"needs {human(facts['disk_needed'])} of disk, and at least {human(facts['memory_needed'])} of memory")


def show_notes(prepared: Prepared) -> None:
    """What to know before bytes move: notes, changes to the configuration, what is left out or not to be trusted."""
    about = prepared.plan.about
    lines = [f"note: {note}" for note in prepared.stored.extras.notes]
    for key, label in (
        ("dropped", "left out"),
        ("config_changes", "config.json"),
        ("config_untrusted", "config.json, not to be trusted"),
    ):
        items = about.get(key, [])
        lines += [f"{label}: {item}" for item in items] if isinstance(items, list) else []
    for line in lines:
        click.echo(line, err=True)


def show_more(more: dict[str, list[str]]) -> None:
    """Further lines to know before bytes move, under their titles."""
    for title, lines in more.items():
        click.echo(f"{title}:", err=True)
        for line in lines:
            click.echo(f"  {line}", err=True)


def show_report(report: Report) -> None:
    rate = report.bytes_written / report.seconds if report.seconds else 0
    resumed = f" ({human(report.bytes_resumed)} were there already)" if report.bytes_resumed else ""
    click.echo(
        f"{report.tensors} tensors, {human(report.bytes_written)} written{resumed} in {report.seconds:.1f} s "
        f"({human(rate)}/s), peak memory {human(report.peak_memory)}",
        err=True,
    )
    for name, loss in list(report.losses.items())[:SHOWN]:
        click.echo(f"cast: {name}: {loss.to_inf} values became infinite, {loss.to_zero} became zero", err=True)


def show_verdict(verdict: Verdict) -> None:
    for d in verdict.differences[:SHOWN]:
        click.echo(f"{d.kind}: {d.name}: {d.detail}")
    if len(verdict.differences) > SHOWN:
        click.echo(f"and {len(verdict.differences) - SHOWN} more (--json lists all)")
    for note in verdict.notes:
        click.echo(f"note: {note}", err=True)
    word = "same" if verdict.same else f"different: {len(verdict.differences)} differences"
    click.echo(f"{word} ({verdict.tensors} tensors, {human(verdict.nbytes)} compared)")


def verdict_facts(verdict: Verdict) -> dict[str, Any]:
    return {
        "same": verdict.same,
        "tensors": verdict.tensors,
        "bytes": verdict.nbytes,
        "differences": [{"kind": d.kind, "name": d.name, "detail": d.detail} for d in verdict.differences],
        "notes": list(verdict.notes),
    }


def format_rows() -> list[dict[str, Any]]:
    from ckptconv.registry import formats

    return [
        {"name": name, "aliases": list(fmt.aliases), "origin": origin, "summary": fmt.summary}
        for name, (origin, fmt) in formats().items()
    ]


def show_formats(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        also = f" ({', '.join(row['aliases'])})" if row["aliases"] else ""
        click.echo(f"{row['name']}{also}: {row['summary']} [{row['origin']}]")


def format_facts(name: str) -> dict[str, Any]:
    """A format, and the options of its two sides."""
    from ckptconv.registry import get_format, option_rows

    fmt = get_format(name)
    options = {
        side: [row._asdict() for row in option_rows(kind)] for side, kind in (("loader", fmt.Load), ("saver", fmt.Save))
    }
    return {"name": fmt.name, "aliases": list(fmt.aliases), "summary": fmt.summary, **options}


def show_format(facts: dict[str, Any]) -> None:
    click.echo(f"{facts['name']}: {facts['summary']}")
    for side in ("loader", "saver"):
        for option in facts[side]:
            default = f" [{option['default']}]" if option["default"] else ""
            choices = f"{'|'.join(option['choices'])}: " if option["choices"] else ""
            click.echo(f"  --{side}.{option['name']}{default}  {choices}{option['help']}")


def family_rows() -> list[dict[str, Any]]:
    from ckptconv.mapping_files import family_names, load_mapping, mapping_paths

    return [{"name": n, "origin": mapping_paths()[n][0], "match": load_mapping(n).match} for n in family_names()]


def show_families(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        match = ", ".join(f"{key} {value}" for key, value in row["match"].items())
        click.echo(f"{row['name']}: config.json with {match} [{row['origin']}]")


def mapping_rules(name: str) -> dict[str, list[dict[str, Any]]]:
    """Stored name -> what it may be, of a mapping or, by its short name, of a family."""
    from ckptconv.mapping_files import family_names, load_mapping, mapping_paths

    full = f"hf-{name}" if f"hf-{name}" in family_names() else name
    if full not in mapping_paths():
        raise UsageError(f"no family or mapping {name!r}; known: {', '.join(mapping_paths())}")
    mapping = load_mapping(full)
    return {
        rule.stored: [
            {"is": str(a.expr), "when": list(a.when), "on": sorted(a.on), "copy": a.copy} for a in rule.alternatives
        ]
        for rule in mapping.rules
    }


def show_rules(rules: dict[str, list[dict[str, Any]]]) -> None:
    for stored, alternatives in rules.items():
        click.echo(stored)
        for one in alternatives:
            told = [f"{word} {', '.join(one[word])}" for word in ("when", "on") if one[word]]
            told += ["a copy: read where there is one, never written"] if one["copy"] else []
            click.echo(f"    {one['is']}" + (f"  ({'; '.join(told)})" if told else ""))


def show_facts(facts: dict[str, Any]) -> None:
    """An inspection: the head as lines, then a line per rank."""
    for name in ("format", "mapping", "form", "family", "step", "parameters"):
        if facts.get(name) not in (None, [], ""):
            value = facts[name]
            click.echo(f"{name}: {', '.join(value) if isinstance(value, list) else value}")
    if "layout" in facts:
        click.echo("layout: " + " ".join(f"{k}={v}" for k, v in facts["layout"].items()))
        click.echo("architecture: " + ", ".join(f"{k}={_plain(v)}" for k, v in facts["architecture"].items()))
    for row in facts.get("ranks", []):
        degrees = " ".join(f"{k}={v}" for k, v in row["rank"].items())
        layers = f"layers {row['layers'][0]}-{row['layers'][-1]}" if row["layers"] else "no layers"
        click.echo(
            f"  {degrees}: {layers}, {row['tensors']} tensors, {human(row['bytes'])}, {' '.join(row['dtypes'])}  {row['place']}"
        )
        for name, text in row.get("listed", {}).items():
            click.echo(f"      {name}  {text}")
    if "storage" in facts:
        for line in render_storage.lines(facts["storage"]):
            click.echo(line)
    for row in facts.get("files", []):
        rest = ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("file", "bytes"))
        click.echo(f"  {row['file']}  {human(row['bytes'])}  {rest}")
    for name in ("state", "ignored", "notes"):
        for item in facts.get(name, []):
            click.echo(f"{name.rstrip('s')}: {item}")


def _plain(value: object) -> str:
    """An entry of an architecture, without the punctuation of a dictionary."""
    if not isinstance(value, dict):
        return str(value)
    return "(" + " ".join(f"{k}={_plain(v)}" for k, v in value.items() if v is not None) + ")"
