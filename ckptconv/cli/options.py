"""Options of the command line that several commands share, and the --loader.X / --saver.X ones that formats declare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckptconv.errors import UsageError

if TYPE_CHECKING:
    from ckptconv.executor.execute import ExecuteOptions
    from ckptconv.pipeline import Job

F = TypeVar("F", bound=Callable[..., Any])
COUNT = click.IntRange(min=1)


class FormatCommand(click.Command):
    """A command that takes --loader.NAME VALUE and --saver.NAME VALUE: which names there are is the format's business."""

    sides: tuple[str, ...] = ("loader", "saver")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest: list[str] = []
        found: dict[str, dict[str, object]] = {side: {} for side in self.sides}
        items = iter(args)
        for item in items:
            flag, equals, value = item.partition("=")
            side, dot, name = flag.removeprefix("--").partition(".")
            if not (item.startswith("--") and dot and side in SIDES):
                rest.append(item)
                continue
            if side not in found:
                raise click.UsageError(f"{flag}: {ctx.info_name} takes --{'.X, --'.join(self.sides)}.X alone", ctx)
            if not equals:
                value = "true" if _is_switch(side, name) else next(items, "")
            if not value:
                raise click.UsageError(f"{flag} needs a value", ctx)
            found[side][name] = value
        ctx.meta["ckptconv.options"] = found
        return super().parse_args(ctx, rest)


class LoaderCommand(FormatCommand):
    """A command that only reads."""

    sides = ("loader",)


class PartsCommand(FormatCommand):
    """A command that joins parts: --loader.X is said to the language model, --loader-vision.X and --loader-projector.X to the others."""

    sides = ("loader", "loader-vision", "loader-projector", "saver")


class TwoLoadersCommand(FormatCommand):
    """A command that reads two checkpoints: --loader.X is said to both, --loader-a.X and --loader-b.X to one."""

    sides = ("loader", "loader-a", "loader-b")


SIDES = ("loader", "saver", "loader-a", "loader-b", "loader-vision", "loader-projector")


def _is_switch(side: str, name: str) -> bool:
    """Whether some format declares the option as a yes-or-no one, which needs no value."""
    from ckptconv.registry import formats, switches

    return any(
        name.replace("-", "_") in switches(fmt.Save if side == "saver" else fmt.Load) for _, fmt in formats().values()
    )


def _stack(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


layout_options = _stack(
    *(
        click.option(f"--{name}", metavar="N|A:B", help=text)
        for name, text in (
            ("tp", "Tensor parallel size; A:B also checks that the source has A."),
            ("pp", "Pipeline parallel size."),
            ("vpp", "Virtual pipeline size: model chunks per pipeline rank."),
            ("ep", "Expert parallel size."),
            ("etp", "Expert tensor parallel size (default: tp)."),
        )
    ),
    click.option(
        "--pp-layers",
        metavar="N,N,...",
        help="Layers of each virtual stage (pp x vpp numbers, all stages of chunk 0 first).",
    ),
)
source_options = _stack(
    click.option("--loader", metavar="auto|FORMAT", help="Format of the source (default: recognised)."),
    click.option("--family", metavar="NAME", help="Model family, where the source does not say (ckptconv families)."),
    click.option("--vocab-size", type=COUNT, metavar="N", help="True vocabulary size, where the source does not say."),
    click.option(
        "--mapping",
        type=click.Path(path_type=Path),
        multiple=True,
        help="A mapping file (or an installed one by name) that extends a known one.",
    ),
    click.option(
        "--drop", multiple=True, metavar="GLOB", help="Leave out tensors by name, on purpose; recorded in the result."
    ),
    click.option("--iteration", metavar="N|release", help="Which iteration of the source (default: the latest)."),
    click.option(
        "--check", is_flag=True, help="Verify checksums of the source files, and its ckptconv.json (reads them whole)."
    ),
)
change_options = _stack(
    click.option(
        "--dtype", default="keep", show_default=True, metavar="keep|fp32|bf16|fp16", help="Cast the parameters."
    ),
    click.option(
        "--make-vocab-size-divisible-by",
        "vocab_divisor",
        type=COUNT,
        metavar="N",
        help="Padding of the vocabulary (times tp).",
    ),
    click.option(
        "--optimizer", default="keep", show_default=True, metavar="keep|drop", help="Training state of the source."
    ),
    click.option(
        "--replicas",
        default="check",
        show_default=True,
        metavar="check|first",
        help="Copies on several ranks: compare, or trust the first.",
    ),
    click.option(
        "--tokenizer",
        type=click.Path(path_type=Path),
        help="The model's tokenizer, for formats that hold one: --loader.tokenizer and --saver.tokenizer.",
    ),
    click.option("--mcore-version", metavar="V", help="Megatron-Core that loads the result (--saver.mcore-version)."),
)
run_options = _stack(
    click.option(
        "--memory",
        default="1GB",
        show_default=True,
        metavar="SIZE",
        help="Bound on memory; refused if it cannot be kept.",
    ),
    click.option("--workers", type=COUNT, metavar="N", help="Threads that move bytes (default: up to 4)."),
    click.option("--allow-overflow", is_flag=True, help="Let a cast turn finite values into infinities."),
    click.option("--force", is_flag=True, help="Replace DST, once the new result is complete."),
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
PATH = click.Path(path_type=Path)
output_options = _stack(
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    click.option("--quiet", is_flag=True, help="No progress and no notes."),
)


saver_option = click.option(
    "--saver",
    required=True,
    metavar="FORMAT",
    help="Format to write: hf, mcore, mcore-dist, legacy, nemo, nemo2 (see ckptconv formats).",
)
conversion_options = _stack(
    click.argument("src", type=PATH),
    click.argument("dst", type=PATH),
    source_options,
    change_options,
    run_options,
    output_options,
)


def make_job(ctx: click.Context, src: Path, saver: str | None, params: dict[str, Any], side: str = "") -> Job:
    """The Job that a command line asks for; `side` (-a, -b) is which of two sources it is about."""
    from ckptconv.layout import DEGREES, layout_from
    from ckptconv.pipeline import Job

    _check_choices(params)
    found = ctx.meta["ckptconv.options"]
    iteration = params.get("iteration")
    return Job(
        src,
        loader=params.get(f"loader{side.replace('-', '_')}") or params.get("loader"),
        saver=saver,
        layout=layout_from({name: params.get(name) for name in DEGREES}, params.get("pp_layers")),
        loader_options={**found["loader"], **found.get(f"loader{side}", {})},
        saver_options=_saver_options(found.get("saver", {}), params.get("mcore_version")),
        iteration=int(iteration) if iteration and iteration.isdecimal() else iteration,
        mapping=tuple(params.get("mapping") or ()),
        drop=tuple(params.get("drop") or ()),
        **{
            k: params[k]
            for k in ("dtype", "vocab_size", "vocab_divisor", "family", "optimizer", "replicas", "check", "tokenizer")
            if k in params
        },
    )


def _check_choices(params: dict[str, Any]) -> None:
    iteration = params.get("iteration")
    if iteration is not None and iteration != "release" and not iteration.isdecimal():
        raise UsageError(f"--iteration {iteration}: expected a number or release")
    for name, allowed in (
        ("optimizer", ("keep", "drop")),
        ("replicas", ("check", "first")),
        ("dtype", ("keep", "fp32", "bf16", "fp16")),
    ):
        if params.get(name, allowed[0]) not in allowed:
            raise UsageError(f"--{name} {params[name]}: expected {' or '.join(allowed)}")


def _saver_options(given: dict[str, object], mcore_version: str | None) -> dict[str, object]:
    """--mcore-version V is short for --saver.mcore-version V."""
    if mcore_version is None:
        return given
    said = given.get("mcore-version", given.get("mcore_version", mcore_version))
    if said != mcore_version:
        raise UsageError(f"--mcore-version {mcore_version} and --saver.mcore-version {said}: give one")
    return {**given, "mcore-version": mcore_version}


def make_execute_options(params: dict[str, Any]) -> ExecuteOptions:
    from ckptconv.executor.execute import ExecuteOptions
    from ckptconv.sizes import parse_size

    return ExecuteOptions(
        memory=parse_size(params["memory"], "--memory"),
        workers=params["workers"],
        force=params["force"],
        allow_overflow=params["allow_overflow"],
    )
