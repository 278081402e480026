"""Train one stage of DeepSeek-R1: torchrun r1engine/train.py configs/r1_zero.yaml [key=value ...]"""

import os
import sys

if not __package__:
    # Run as a script, Python puts r1engine/ itself first on sys.path, where a module of ours
    # could shadow one that PyTorch imports. Put the repo root there instead.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import typer

from r1engine.cli.runs import train


def main() -> None:
    """Runs `r1engine train` with the arguments of this process."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(train)
    app()


if __name__ == "__main__":
    main()
