"""The commands that run something until it is done: train, curate, pipeline, sample, label, search, iterate, serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from r1engine.cli.border import (
    ConfigPath,
    DryRun,
    DryRunStages,
    Join,
    Live,
    Overrides,
    Redo,
    Status,
    agree,
    fail,
    is_first,
    ranks_of_a_run,
    tell,
    world_size,
)
from r1engine.config import (
    ConfigError,
    CurateConfig,
    DrawingConfig,
    LabelConfig,
    RlConfig,
    SampleConfig,
    SearchConfig,
    StageConfig,
    load,
    to_yaml,
)

if TYPE_CHECKING:
    from r1engine.config.pipeline import Pipeline


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    live: Live = False,
) -> None:
    """Train as CONFIG says. Started by torchrun, every process is one rank."""
    from r1engine.hf.hub import fetched
    from r1engine.stages.check import check_start
    from r1engine.stages.check import dry_run as check_all

    try:
        cfg: StageConfig = fetched(load(config, overrides or []))
        if dry_run:
            notes = check_all(cfg, world_size(), is_live=live)
            agree(None)
            tell(notes, to_yaml(cfg))
            return
        check_start(cfg, world_size())
        if is_first():
            typer.echo(f"{cfg.run_dir}: the configuration is good; loading PyTorch and the model")
        from r1engine.run import train as run  # brings torch, so only once the config is known to be good

        with ranks_of_a_run(cfg.parallel.timeout_minutes) as ending:
            run(cfg, ending)
    except ValueError as error:
        fail(ConfigError.of(error))


def curate(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read every row, print the config, stop.")] = False,
) -> None:
    """Make the data of supervised training as CONFIG says: filter, refine, mix. One process; it starts its own."""
    from r1engine.pipeline import kinds
    from r1engine.pipeline.curate import check
    from r1engine.pipeline.curate import curate as run

    try:
        cfg = load(config, overrides or [], CurateConfig)
        if problems := kinds.input_problems(cfg):
            raise ConfigError(problems)
        if dry_run:
            tell(check(cfg), to_yaml(cfg))
            return
        run(cfg)
    except (ValueError, RuntimeError, OSError) as error:
        fail(ConfigError.of(error))


def pipeline(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: DryRunStages = False,
    live: Live = False,
    status: Status = False,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop when this one is done.")] = None,
    redo: Redo = None,
    join: Join = 0,
) -> None:
    """Run the stages of CONFIG in order; what is done is not run again. On ranks: torchrun -m r1engine pipeline ..."""
    from r1engine.config.pipeline import load_pipeline
    from r1engine.hf.hub import local_path

    try:
        stages = load_pipeline(config, overrides or [], local_path)
        _run_stages(stages.until(until) if until is not None else stages, dry_run, live, status, redo, join)
    except ConfigError as error:
        fail(error)


def iterate(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: DryRunStages = False,
    status: Status = False,
    redo: Redo = None,
    join: Join = 0,
) -> None:
    """Rounds of MCTS, actor and value model, beside rejection sampling; what is done is not run again."""
    from r1engine.config.iterate import load_rounds

    try:
        stages, file = load_rounds(config, overrides or [])
        _run_stages(stages, dry_run, False, status, redo, join)
        if not dry_run and is_first():
            from r1engine.sampling.rounds import write_rounds

            assert file.model.path is not None
            typer.echo(write_rounds(file.run_dir, file.iterate.rounds, file.model.path), nl=False)
    except ConfigError as error:
        fail(error)


def _run_stages(stages: Pipeline, dry_run: bool, live: bool, status: bool, redo: str | None, join: int) -> None:
    """What is missing of a pipeline.

    Raises:
        ConfigError: a stage cannot run.
    """
    from r1engine.pipeline import driver
    from r1engine.pipeline.companions import companions
    from r1engine.pipeline.status import print_plan, print_status

    if redo is not None and join:
        raise ConfigError("--redo: found processes that join, each of which would make it again; required one process")
    again = [*stages.after(redo)] if redo is not None else []  # refuses a name that is none
    if status:
        print_status(stages)
        return
    if redo is None:
        states = driver.check(stages, world_size())
        print_plan(states) if is_first() else None
        if world_size() == 1 and all(state == "done" for _, state in states):
            return
    if dry_run:
        if redo is not None:
            made = ", ".join([redo, *(stage.name for stage in again)])
            if is_first():
                typer.echo(f"--redo {redo} would make again: {made}")
            return
        notes = driver.dry_run(stages, world_size(), is_live=live)
        agree(None)
        tell(notes)
        return
    with companions(stages.run_dir, join), ranks_of_a_run(stages.timeout_minutes) as ending:
        driver.run_pipeline(stages, ending, redo=redo, joins=join > 0)


def sample(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Draw answers to questions as CONFIG says, and grade them; what is there is not drawn again."""
    _draw(config, overrides, dry_run, SampleConfig)


def label(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Draw solutions as CONFIG says, and label their steps by rollouts; what is there is not drawn again."""
    _draw(config, overrides, dry_run, LabelConfig)


def _draw(config: Path, overrides: list[str] | None, dry_run: bool, kind: type[DrawingConfig]) -> None:
    from r1engine.pipeline import kinds
    from r1engine.pipeline.driver import run_alone

    try:
        cfg = load(config, overrides or [], kind)
        notes = kinds.dry_run(cfg, world_size(), is_whole=True, is_live=False)
        agree(None)
        if dry_run:
            tell(notes, to_yaml(cfg))
            return
        with ranks_of_a_run(30) as ending:
            run_alone(cfg, ending)
    except ConfigError as error:
        fail(error)


def search(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="METHODS", help="best_of,beam,dvts,mcts: each at the sizes of search.curve."),
    ] = None,
    question: Annotated[
        int | None, typer.Option("--question", metavar="N", help="Print the tree of a question that was searched.")
    ] = None,
) -> None:
    """Search for answers as CONFIG says, step by step, valued by a process reward model; what is there is kept."""
    settings = [*(overrides or []), *([f"compare=[{compare}]"] if compare is not None else [])]
    if question is None:
        _draw(config, settings, dry_run, SearchConfig)
        return
    from r1engine.sampling.search_rows import print_tree

    try:
        print_tree(load(config, settings, SearchConfig).run_dir, question, typer.echo)
    except ConfigError as error:
        fail(error)


def serve(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="Of the run whose servers these are.")] = None,
    overrides: Overrides = None,
    servers: Annotated[int, typer.Option("--servers", min=1, help="SGLang servers on this machine.")] = 1,
    host: Annotated[str | None, typer.Option("--host", help="Address that the trainer reaches; default: name.")] = None,
    evaluated: Annotated[
        Path | None,
        typer.Option("--eval", metavar="FOLDER", help="Serve a Hugging Face folder with OpenAI's interface, instead."),
    ] = None,
    python: Annotated[Path | None, typer.Option("--python", help="With --eval: the Python that has sglang.")] = None,
    tensor: Annotated[int, typer.Option("--tensor", min=1, help="With --eval: GPUs of one server.")] = 1,
    reasoning: Annotated[
        str, typer.Option("--reasoning", metavar="PARSER", help="With --eval: SGLang's, such as deepseek-r1.")
    ] = "",
) -> None:
    """Run the SGLang servers of a disaggregated CONFIG, or of a folder that is evaluated, until Ctrl-C.

    Servers of a training run take token ids alone and have no OpenAI interface; those of --eval have.
    """
    try:
        if evaluated is not None:
            if config is not None:
                raise ConfigError(f"serve: found CONFIG {config} and --eval {evaluated}, required one of them")
            from r1engine.rollout.sglang.listening import listening_host

            address = listening_host(host) if host is not None else "127.0.0.1"
            how = {"servers": servers, "tensor": tensor, "reasoning": reasoning, "host": address}
            _serve_folder(evaluated, python, how)
            return
        if config is None:
            raise ConfigError("serve: found nothing, required CONFIG or --eval FOLDER")
        cfg = load(config, overrides or [], RlConfig)
        from r1engine.rollout.sglang.serve import serve as run

        run(cfg, servers, host)
    except (ValueError, OSError) as error:
        fail(ConfigError.of(error))
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def _serve_folder(folder: Path, python: Path | None, how: dict[str, Any]) -> None:
    """`how`: fields of OpenServers."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"serve --eval: found no config.json in {folder}, required a Hugging Face folder")
    if python is None:
        raise ConfigError("serve --eval: found no --python, required the Python of an environment with sglang")
    from r1engine.rollout.sglang.open_servers import OpenServers, serve_folder

    logs = Path("runs/serve") / folder.resolve().name
    try:
        serve_folder(OpenServers(folder, python, logs, **how))
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
