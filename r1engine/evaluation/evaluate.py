"""An evaluation from beginning to end: `r1engine evaluate`, the pipeline's stage, and a call for programs.

suite = load_suite(Path("configs/eval_r1.yaml"), ["out=runs/evals/mine"])
summaries = evaluate("runs/demo", suite)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1engine import __version__
from r1engine.config import ConfigError
from r1engine.config.evaluation import Suite
from r1engine.config.read import flat, plain
from r1engine.evaluation.entries import Entry, cautions, file_sha256, load_entries
from r1engine.evaluation.marking import Judge
from r1engine.evaluation.results import Summary
from r1engine.evaluation.runner import Grading, draw_and_grade
from r1engine.evaluation.store import Store
from r1engine.evaluation.target import EvaluationTarget, export_checkpoint, find_target
from r1engine.observe.starts import version
from r1engine.rewards.from_config import make_scorer
from r1engine.rewards.rules import rule_of
from r1engine.rewards.sandbox import probe

if TYPE_CHECKING:
    from r1engine.evaluation.samplers import Sampler
    from r1engine.ranks import World

# Keys of a suite that change no reply.
FREE = {"out", "slots", "endpoint", "sglang", "rewards", "benchmarks"}
WAIT_MINUTES = 24 * 60  # ranks end their shares at different times
SHOWN_CHARACTERS, SHOWN_TOKENS = 200, 5  # of the first prompt to each benchmark
GRADERS = ("math-verify", "sympy", "py3langid")  # packages whose version is noted


def evaluate(
    target: str | Path,
    suite: Suite,
    world: World | None = None,
    *,
    note: Callable[[str], None] = print,
    is_fresh: bool = False,
) -> dict[str, Summary]:
    """Evaluates a model on a suite of benchmarks. Collective; the same call again goes on where it was.

    Results lie in `suite.out`, or where `evaluate_into` says.

    Args:
        target:   a Hugging Face folder, a run folder (`@100` for a checkpoint), or the URL of a server.
        suite:    benchmarks, sampling, who draws and grades; see `load_suite`.
        world:    the ranks that share the work, as `ranks.start` gives them; None: `ranks.start` is called.
        note:     told what the user should know. First rank only.
        is_fresh: results that are in the folder are removed first.

    Returns:
        Benchmark -> summary, as in summary.json: `score` holds `mean`, `low`, `high` (95 % interval over questions) in
        [0, 1], and is None if nothing could be decided. See `results.summarize`; `table_rows` makes rows of it.

    Raises:
        ConfigError: the target, the suite or its files cannot be used, or the folder holds results of something else.
        RuntimeError: nobody draws any more, or the server refused some; what ended is stored, and the same call goes
            on.
    """
    return evaluate_into(target, suite, world, note=note, is_fresh=is_fresh)[0]


def evaluate_into(
    target: str | Path,
    suite: Suite,
    world: World | None = None,
    *,
    note: Callable[[str], None] = print,
    is_fresh: bool = False,
) -> tuple[dict[str, Summary], Path]:
    """As `evaluate`; also returns the folder of the results."""
    from r1engine import ranks

    world = world or ranks.start(WAIT_MINUTES)
    say = note if world.is_first else _say_nothing
    try:
        found = find_target(str(target))
        suite = suite if suite.template or not found.template else suite.model_copy(update={"template": found.template})
        entries = load_entries(suite.benchmarks, has_judge=suite.rewards.judge is not None)
        check_graders(suite, found, entries, say)
        store = Store(suite.out or default_out(found, suite))
        return _run(found, suite, entries, store, world, say, is_fresh), store.folder
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError.of(error) from error


def table_rows(summaries: dict[str, Summary]) -> list[dict[str, Any]]:
    """One flat row a benchmark: name, metric, questions, samples, mean, low, high (None: nothing is decided)."""
    rows = []
    for name, summary in summaries.items():
        score = summary.get("score") or {}
        kept = {key: summary[key] for key in ("metric", "questions", "samples")}
        rows.append({"benchmark": name, **kept, **{key: score.get(key) for key in ("mean", "low", "high")}})
    return rows


def _say_nothing(text: str) -> None:
    """Of ranks other than the first."""


def _run(
    target: EvaluationTarget,
    suite: Suite,
    entries: list[Entry],
    store: Store,
    world: World,
    say: Callable[[str], None],
    is_fresh: bool,
) -> dict[str, Summary]:
    from r1engine.run_lock import held

    with held(store.folder, world):
        for caution in cautions(entries):
            say(f"warning: {caution}")
        if target.checkpoint is not None:
            export_checkpoint(target, world)
        sampler, served = _prepared(target, suite, entries, world, store.folder, say)

        def begin() -> None:
            if is_fresh:
                clear(store.folder)
            store.begin(manifest_of(target, suite, entries, served))

        world.from_first(begin)
        with make_scorer(suite.rewards) as scorer:
            judge = Judge(suite.rewards.judge) if suite.rewards.judge is not None else None
            return draw_and_grade(store, entries, suite.seed, world, sampler, Grading(scorer, judge), say)


def _prepared(
    target: EvaluationTarget,
    suite: Suite,
    entries: Sequence[Entry],
    world: World,
    out: Path,
    say: Callable[[str], None],
) -> tuple[Callable[[], Sampler], dict[str, str]]:
    """What makes the sampler of this rank, and who serves, for the manifest."""
    from r1engine.evaluation.samplers import LocalSampler, shows_of

    if target.url:
        from r1engine.evaluation.endpoint import EndpointSampler

        asked = suite.endpoint
        if asked.mode == "tokens" and asked.tokenizer is None:
            raise ConfigError("endpoint.tokenizer: found null, required by endpoint.mode tokens: a Hugging Face folder")
        shows = shows_of(asked.tokenizer, suite) if asked.mode == "tokens" and asked.tokenizer else None
        server = EndpointSampler(target.url, suite, shows)
        names = world.from_first(server.models)
        return lambda: server, {"model": asked.model, "served": ", ".join(names)}
    folder = target.folder
    assert folder is not None
    tell_prompts(folder, suite, entries, say)  # what is wrong with the template is told before the weights are read
    if suite.generator == "sglang":
        from r1engine.evaluation.served import ServedSampler

        return lambda: ServedSampler(folder, suite, world.size, out, say), {}
    return lambda: LocalSampler(folder, suite, world.device), {}


def tell_prompts(folder: Path, suite: Suite, entries: Sequence[Entry], say: Callable[[str], None]) -> None:
    """Tells how each benchmark's first question is shown to the model, and whether replies end before `max_tokens`.

    Raises:
        ValueError: the folder has no tokenizer, no end token or no such template, or holds no model.
    """
    from r1engine.evaluation.samplers import shows_of
    from r1engine.hf.architecture import read_architecture

    shows, context = shows_of(folder, suite), read_architecture(folder).max_positions
    if suite.max_tokens >= context:
        say(f"warning: the model's context has {context:,} tokens: replies end there, not at {suite.max_tokens:,}")
    for entry in entries:
        (shown,) = shows.all([next(iter(entry.asks(suite.seed)))])
        end = "" if entry.is_private else f", ends in {shown.text[-SHOWN_CHARACTERS:]!r}"
        ids = ", ".join(map(str, shown.tokens[:SHOWN_TOKENS]))
        say(f"{entry.name}: first prompt, {len(shown.tokens)} tokens ({ids}, ...){end}")


def check_graders(suite: Suite, target: EvaluationTarget, entries: Sequence[Entry], say: Callable[[str], None]) -> None:
    """That this machine can grade what is asked.

    Raises:
        ConfigError: programs would be run, and too little protects from them.
    """
    rewards = {item.question.reward for entry in entries for item in entry.items}
    if any(rule_of(reward, "evaluate").runs_code for reward in rewards):
        try:
            probe().require(unsafe=suite.rewards.unsafe)
        except RuntimeError as error:
            raise ConfigError(str(error)) from None
    judge = suite.rewards.judge
    if judge is not None and target.url in judge.urls and judge.model == suite.endpoint.model:
        say("warning: the model grades itself")


def default_out(target: EvaluationTarget, suite: Suite) -> Path:
    """runs/evals/<target>-<benchmarks>: the same for the same target and benchmarks."""
    named = re.sub(r"[^A-Za-z0-9_.-]+", "-", target.name.removeprefix("http://").removeprefix("https://")).strip("-.")
    digest = hashlib.sha256(" ".join(sorted(suite.benchmarks)).encode()).hexdigest()[:6]
    return Path("runs/evals") / f"{named[-60:]}-{digest}"


def clear(folder: Path) -> None:
    """Removes the results of an evaluation, and nothing else."""
    for pattern in ("manifest.json", "summary.json", "report.html", "samples/*.jsonl", "grades/*.jsonl"):
        for path in folder.glob(pattern):
            path.unlink()


def manifest_of(
    target: EvaluationTarget, suite: Suite, entries: Sequence[Entry], served: dict[str, str]
) -> dict[str, Any]:
    """What is evaluated and how: `same` is what must not change while it goes on."""
    settings = plain(suite.model_dump(mode="json"))
    same: dict[str, Any] = {"target": target.name if target.url else "a folder"}
    same |= {key: value for key, value in flat(settings).items() if key.partition(".")[0] not in FREE}
    same |= {f"target {name}": digest for name, digest in target.identity.items()}
    same |= {f"endpoint {name}": value for name, value in served.items()}
    if target.url:
        same |= {"endpoint.mode": suite.endpoint.mode}
    benchmarks = {}
    for entry in entries:
        first = entry.asks(suite.seed)
        shown = next(iter(first)).text
        asked = {
            "kind": entry.row.name,
            "file": file_sha256(entry.settings.file),
            "prompt": hashlib.sha256(shown.encode("utf-8", "surrogatepass")).hexdigest(),
        }
        days = {"first_day": str(entry.settings.first_day), "last_day": str(entry.settings.last_day)}
        same |= {f"benchmarks.{entry.name}.{key}": value for key, value in (asked | days).items()}
        benchmarks[entry.name] = asked | {
            "questions": len(entry.items),
            "samples": entry.samples,
            "grader": entry.row.grader,
            "settings": settings["benchmarks"][entry.name],
        }
    return {
        "target": target.name,
        "r1engine": __version__,
        "packages": {name: version(name) for name in GRADERS},
        "settings": settings,
        "same": same,
        "benchmarks": benchmarks,
    }
