"""The `lissom` command. One file per command; nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import typer

from lissom import __version__
from lissom.errors import UserError

COMMANDS = (
    "optimize", "apply", "compare", "generate", "train", "align", "train_dit", "edit", "refine", "quantize", "compact",
    "budgets", "export", "check", "bench", "assets", "doctor",
)  # fmt: skip

_INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt

app = typer.Typer(
    help="Make open language models small, fast and adaptable.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lissom {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Make open language models small, fast and adaptable."""


for _name in COMMANDS:
    import_module(f"lissom.cli.{_name}").register(app)


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit code 2, never a traceback (LISSOM_DEBUG=1 shows it)."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars would break ours
    try:
        # Not standalone: there an interrupt would end with a word and a code that are not ours.
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except (KeyboardInterrupt, UserError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("LISSOM_DEBUG") == "1":
            raise
        print(f"lissom: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not hasattr(error, "show") or not hasattr(error, "exit_code"):
            raise
        error.show()  # a wrong option or argument, which typer words
        sys.exit(error.exit_code)


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted; nothing was half written."
    if isinstance(error, ModuleNotFoundError):
        from lissom.models.registry import missing

        return missing(error)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}."
    return str(error)
