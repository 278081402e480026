"""The console script `r1engine`. Thin: each command imports what it runs when it runs.

Help and a config error answer without importing torch. A command is a function of `runs`, `looks` or `files` and its
line below.
"""

from __future__ import annotations

from typing import Annotated

import typer

from r1engine import __version__
from r1engine.cli import evaluate, files, looks, runs

app = typer.Typer(
    name="r1engine",
    help="Post-training as in DeepSeek-R1.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a plain traceback can be pasted into an issue
)
app.command()(runs.train)
app.command()(runs.curate)
app.command()(runs.pipeline)
app.command()(runs.sample)
app.command()(runs.search)
app.command()(runs.label)
app.command()(runs.iterate)
app.command("config")(looks.show_config)
app.command()(looks.report)
app.command()(looks.plan)
app.command()(looks.simulate)
app.command()(runs.serve)
app.add_typer(evaluate.app, name="evaluate")
app.command()(files.reward)
app.command()(files.convert)
app.command()(files.export)
app.command()(files.generate)
app.command()(looks.data)
app.command()(looks.doctor)


def main() -> None:
    """Entry of the console script."""
    app()


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"r1engine {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...
