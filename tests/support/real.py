"""Real SGLang servers on CPUs and generators that use them, for the tests beside this file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from r1engine.batch import Prompt
from r1engine.config import Model, QuestionData, RlConfig, Rollout, Sglang
from r1engine.data.question import Question
from r1engine.ranks import World
from r1engine.rollout.sglang import launch
from r1engine.rollout.sglang.checksum import Expected
from r1engine.rollout.sglang.generator import SglangGenerator
from r1engine.rollout.sglang.key import NAME, private_file
from r1engine.rollout.sglang.server import Server, free_port, free_ports

START_SECONDS = 900.0
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # tokens of `add_tokenizer`
KEY, KEY_VARIABLE = "of-the-tests", "R1_SERVERS_KEY"


def python() -> Path:
    """Of the environment that the servers run in."""
    found = os.environ.get("R1_SGLANG_PYTHON")
    assert found, "R1_SGLANG_PYTHON: required the Python of the environment that `make sglang-cpu` makes"
    return Path(found)


def settings(model: Path, run_dir: Path, ranks: int = 1, expert: int = 1) -> RlConfig:
    """Of a server of a model folder."""
    sglang = Sglang(python=python(), cpu_tokens=4096, stream_interval=4, tensor=ranks, expert=expert)
    return RlConfig(run_dir=run_dir, model=Model(path=model), rollout=Rollout(engine="sglang", sglang=sglang))


def serve(
    model: Path, run_dir: Path, name: str = "server", port: int | None = None, *, ranks: int = 1, expert: int = 1
) -> Server:
    """Begins to start a server of a model folder; `wait_ready(START_SECONDS)` waits for it."""
    cfg = settings(model, run_dir, ranks, expert)
    private_file(run_dir / "sglang" / NAME, KEY)  # the same for the servers of all folders
    return launch.start(cfg, name=name, host="127.0.0.1", port=port, devices=None, dtype="float32")


@contextmanager
def receivers(model: Path, run_dir: Path, ranks: int = 1) -> Iterator[list[str]]:
    """URLs of the processes beside the ranks of a server that `serve` has started with this folder for the run."""
    cfg = settings(model, run_dir, ranks)
    started = launch.start_receivers(cfg, name="server", host="127.0.0.1", ports=free_ports(ranks), devices=None)
    try:
        for one in started:
            one.wait_ready(START_SECONDS)
        yield [one.client.url for one in started]
    finally:
        for one in started:
            one.stop()


@contextmanager
def serving(folder: Path, log: Path, *flags: str) -> Iterator[str]:
    """URL of a server of the folder with a tokenizer of its own, as users start one for grading."""
    port = free_port("127.0.0.1")
    options = "--device cpu --attention-backend torch_native --sampling-backend pytorch --grammar-backend none"
    options += " --dtype float32 --max-total-tokens 4096 --sleep-on-idle --skip-server-warmup --host 127.0.0.1"
    launcher = [str(python()), "-m", "sglang.launch_server", "--model-path", str(folder)]
    server = Server(
        [*launcher, "--port", str(port), *options.split(), *flags],
        launch.environment(Sglang(), devices=None),
        url=f"http://127.0.0.1:{port}",
        log=log,
        stall_seconds=60.0,
    )
    try:
        server.wait_ready(START_SECONDS)
        yield server.client.url
    finally:
        server.stop()


def add_tokenizer(folder: Path) -> Tokenizer:
    """A token a byte. Of Qwen2's kind: SGLang takes the tokenizer's class from the model's."""
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": BYTES[1],
        "chat_template": "{% for message in messages %}{{ message['content'] }} {% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def generator(model: Path, urls: list[str], run_dir: Path, **changes) -> SglangGenerator:
    """A generator that uses these servers; `changes` of rollout.sglang."""
    os.environ[KEY_VARIABLE] = KEY
    changes = {"stall_seconds": 15.0, "key_variable": KEY_VARIABLE} | changes
    sglang = Sglang(mode="remote", urls=urls, bucket_mib=1, **changes)
    cfg = RlConfig(
        run_dir=run_dir,
        model=Model(path=model),
        data=QuestionData(max_prompt_tokens=32),
        rollout=Rollout(engine="sglang", sglang=sglang, max_tokens=64),
    )
    world = World(rank=0, size=1, device=torch.device("cpu"))
    return SglangGenerator(cfg, world, dtype=torch.float32, note=print)


def changed(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Other weights for the model, set in `module` as well."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def expected(engine: SglangGenerator, weights: dict[str, torch.Tensor]) -> Expected:
    """What a server of one rank must report of these weights."""
    collector = Expected(engine._arch, 1)
    for name, tensor in weights.items():
        collector.add(name, tensor)
    return collector


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, [5 + i, 6, 7, 8 + i], "", Question("")) for i in range(count)]


@torch.no_grad()
def logp_of(module: torch.nn.Module, drawn) -> torch.Tensor:
    """Of the sampled tokens of a draft or completion, by transformers."""
    tokens = torch.tensor([drawn.prompt.tokens + drawn.tokens])
    return module(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[-len(drawn.tokens) :, 0]


def difference(module: torch.nn.Module, completions) -> float:
    """Largest |logp - transformers' logp| of any sampled token."""
    return max(float((logp_of(module, c) - torch.tensor(c.logp)).abs().max()) for c in completions)
