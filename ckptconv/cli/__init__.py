"""The command line: a thin face over the pipeline. Results go to stdout, messages and progress to stderr."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; errors raised on purpose become one message and an exit code."""
    from ckptconv.cli.commands import cli
    from ckptconv.errors import CkptconvError

    try:
        cli(prog_name="ckptconv")
    except CkptconvError as error:
        print(f"ckptconv: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        print(f"ckptconv: error: {error}", file=sys.stderr)
        sys.exit(1)
