"""`ckptconv tokenizer`: commands about tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptconv.cli.options import COUNT, PATH, output_options
from ckptconv.errors import UsageError

if TYPE_CHECKING:
    from ckptconv.tokenizer.growth import Growth
    from ckptconv.tokenizer.tokens import Extended, Wanted

EXAMPLES = "\b\nExamples:\n  ckptconv tokenizer add-tokens tokenizer.model neva.model '<extra_id_0>' '<extra_id_1>'"


@click.group(epilog=EXAMPLES)
def tokenizer() -> None:
    """Tokenizers: give them new tokens, and a model rows for these."""


@tokenizer.command(
    "add-tokens",
    epilog=EXAMPLES
    + "\n  ckptconv tokenizer add-tokens llama/ llama-chat/ --tokens-file new.txt --control"
    + "\n  ckptconv tokenizer add-tokens llama/ out/ '<image>' --checkpoint llama/ --vocab-rows 32064",
)
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.argument("tokens", nargs=-1)
@click.option("--tokens-file", type=PATH, metavar="FILE", help="More tokens, one a line.")
@click.option(
    "--control/--user-defined",
    default=False,
    help="Control tokens (special) are no text of a user; user-defined ones (the default) are found in any text.",
)
@click.option(
    "--checkpoint", type=PATH, metavar="HF_DIR", help="A model to write to DST too, with rows for the tokens."
)
@click.option("--vocab-rows", type=COUNT, metavar="N", help="How many rows its embeddings get, in all.")
@click.option(
    "--init",
    metavar="mean|zero|last",
    help="New rows: the mean of those there are (default), zeros, or the last again.",
)
@click.option("--vocab-size", type=COUNT, metavar="N", help="How many of its rows are real, if it is padded.")
@click.option("--memory", default="1GB", show_default=True, metavar="SIZE", help="Bound on memory.")
@click.option("--force", is_flag=True, help="Replace DST, once the new result is complete.")
@output_options
def add_tokens(src: Path, dst: Path, tokens: tuple[str, ...], tokens_file: Path | None, **params: Any) -> None:
    """Write the tokenizer SRC with new TOKENS to DST: a sentencepiece model to a file, a Hugging Face folder to a folder."""
    from ckptconv.cli.progress import progress
    from ckptconv.executor.execute import ExecuteOptions
    from ckptconv.sizes import parse_size
    from ckptconv.tokenizer.add_tokens import add_tokens as add
    from ckptconv.tokenizer.tokens import Wanted, read_tokens

    wanted = Wanted((*tokens, *(read_tokens(tokens_file) if tokens_file else ())), params["control"])
    silent = params["quiet"] or params["as_json"]
    options = ExecuteOptions(memory=parse_size(params["memory"], "--memory"), force=params["force"])
    extended = add(src, dst, wanted, _growth(params), options, progress(quiet=silent))
    _tell(extended, wanted, dst, params)


def _growth(params: dict[str, Any]) -> Growth | None:
    from ckptconv.tokenizer.growth import Growth

    given = {name: params[name] for name in ("vocab_rows", "init", "vocab_size") if params[name] is not None}
    if params["checkpoint"] is None:
        if given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise UsageError(f"{flags}: about a checkpoint; name it with --checkpoint HF_DIR")
        return None
    if "vocab_rows" not in given:
        raise UsageError("--checkpoint: say with --vocab-rows how many rows its embeddings are to have")
    return Growth(params["checkpoint"], given["vocab_rows"], given.get("init", "mean"), given.get("vocab_size"))


def _tell(extended: Extended, wanted: Wanted, dst: Path, params: dict[str, Any]) -> None:
    from ckptconv.cli import render

    if params["as_json"]:
        facts = {"kind": wanted.kind, "added": extended.ids, "size": extended.size, "notes": list(extended.notes)}
        render.emit({"dst": str(dst), **facts})
        return
    if not params["quiet"]:
        for note in extended.notes:
            click.echo(f"note: {note}", err=True)
    for token, number in extended.ids.items():
        click.echo(f"{number}  {token}")
    click.echo(f"{extended.size} tokens in all")
