"""What the commands share: their arguments, the ranks around a run, and how a command ends with a problem."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from r1engine.config import ConfigError
from r1engine.ending import Ended, Ending

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file with what differs from the defaults.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="e.g. grpo.kl_coef=0 'rollout.max_tokens={0: 32, 10: 64}'"),
]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the config, stop.")]
Live = Annotated[
    bool, typer.Option("--live", help="With --dry-run: try the sandbox of this machine and ask the servers, too.")
]
DryRunStages = Annotated[bool, typer.Option("--dry-run", help="Check every stage, print what would run, stop.")]
Status = Annotated[bool, typer.Option("--status", help="Print what is done, and stop.")]
Redo = Annotated[
    str | None,
    typer.Option("--redo", metavar="STAGE", help="Make it again, and what is made from it; old folders are kept."),
]
Join = Annotated[
    int,
    typer.Option(
        "--join",
        min=0,
        metavar="N",
        help="Share the stages with others that join, such as one a node; N - 1 of them are started here, on CPUs.",
    ),
]

PASSED = "dry run: found nothing that stops a start"


@contextmanager
def ranks_of_a_run(timeout_minutes: int) -> Iterator[Ending]:
    """Inside, torch.distributed may run, and a signal ends the run where it is saved; of many ranks one tells why."""
    with Ending() as ending:
        agree(None, timeout_minutes)
        from r1engine.model.parallel import leave
        from r1engine.observe.failure import RunFailed
        from r1engine.ranks import is_first_to

        try:
            yield ending
        except Ended as end:
            typer.echo(end, err=True) if is_first() else None
            raise typer.Exit(end.status) from None
        except RunFailed as error:
            typer.echo(error, err=True) if error.args else None
            raise typer.Exit(1) from None
        except ConfigError as error:
            if is_first_to("tell the failure"):
                rank = "" if is_first() else f" on rank {os.environ['RANK']}"
                typer.echo(f"error{rank}: {error}", err=True)
            raise typer.Exit(2) from None
        finally:
            leave()


def world_size() -> int:
    """Ranks of this run, as the launcher says; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def tell(notes: list[str], config: str = "") -> None:
    """Prints on the first rank the config that a dry run has checked, what is worth knowing, and that it may start."""
    if is_first():
        typer.echo(config, nl=False)
        typer.echo("".join(f"note: {note}\n" for note in notes) + PASSED, err=True)


def fail(error: ConfigError) -> NoReturn:
    """Ends the program with status 2 and the message, once and not once a rank."""
    agree(str(error))
    if is_first():
        typer.echo(f"error: {error}", err=True)
    raise typer.Exit(2)


def agree(problem: str | None, timeout_minutes: int = 30) -> None:
    """Ends the program on every rank if one of them has a problem before they meet. Once on each rank; collective.

    A rank may see what others do not: a folder that only its node lacks, an argument that only it was given.
    """
    if world_size() == 1 or "MASTER_ADDR" not in os.environ:  # no launcher
        return
    from r1engine import ranks

    found = ranks.common_problem(problem, timeout_minutes)
    if found is None:
        return
    if is_first():
        typer.echo(f"error: {found}", err=True)
    ranks.stop()
    raise typer.Exit(2)
