"""How completions are drawn: by which engine, with which limits, how far ahead of the trainer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from r1engine.config.addresses import address_problem
from r1engine.config.section import Count, LocalPath, Positive, Section

Seconds = Annotated[float, Field(gt=0)]
# Of sglang.launch_server: whom a server listens to and what it asks for is not for a configuration to say.
OWN_ARGUMENTS = (
    "--host",
    "--port",
    "--api-key",
    "--admin-api-key",
    "--config",
    "--model-path",
    "--tp-size",
    "--ep-size",
)


class Sglang(Section):
    """Generation by SGLang servers (rollout.engine: sglang); docs/sglang.md shows each mode."""

    mode: Literal["colocated", "disaggregated", "remote"] = "colocated"
    """colocated: one server on each block of `tensor` ranks' GPUs, started by the trainer; disaggregated: servers on
    their own machines, started by `r1engine serve`; remote: any servers, by their URLs."""
    python: LocalPath | None = None
    """Interpreter of the environment that sglang is installed in."""
    urls: list[str] = Field(default=[])
    """remote: http://host:port (or https://...) of each server."""
    receivers: list[str] = Field(default=[])
    """remote, route receivers: http://host:port of the process beside each GPU of each server, in the order of urls and
    of the ranks; `python -m r1engine.rollout.sglang.receiver` starts one."""
    key_variable: str = ""
    """remote: environment variable that holds the servers' key; "": they ask for none. Servers that a run starts have a
    key of their own, in a file of the run folder that only its owner can read."""
    servers: Positive = 1
    """disaggregated: servers that must have registered before the run starts."""
    tensor: Positive = 1
    """GPUs of one server."""
    expert: Positive = 1
    """Groups of a server's GPUs that the routed experts are spread over; 1: every GPU has a part of each expert."""
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Share of GPU memory for weights and KV pool."""
    route: Literal["tensor", "distributed", "receivers", "disk"] = "tensor"
    """How weights travel: docs/sglang.md compares the routes."""
    bucket_mib: Positive = 512
    """MiB of weights that are sent at once."""
    verify: bool = True
    """After each refresh, compare checksums of all tensors and log-probabilities of fixed prompts."""
    stall_seconds: Seconds = 15.0
    """A server that is silent for so long has failed."""
    start_seconds: Seconds = 900.0
    """A server that does not answer for so long after its start has failed."""
    stream_interval: Positive = 16
    """Tokens that a server sends at once."""
    deterministic: bool = False
    """SGLang's batch-invariant kernels; about a third slower."""
    cpu_tokens: Positive = 16_384
    """KV pool of a server on CPUs (tokens)."""
    ports: Annotated[str, Field(pattern=r"^(\d+-\d+)?$")] = ""
    """Ports of the servers that a run starts, of their receivers and of the trainer's transfers, such as 30000-30099;
    "": free ones."""
    args: list[str] = Field(default=[])
    """More arguments of sglang.launch_server."""

    @property
    def port_range(self) -> range | None:
        """Of `ports`; None: any."""
        first, _, last = self.ports.partition("-")
        return range(int(first), int(last) + 1) if self.ports else None

    def receivers_of(self, server: int) -> list[str]:
        """Of the server of this place in `urls`."""
        return self.receivers[server * self.tensor : (server + 1) * self.tensor]

    def problems(self) -> list[str]:
        """What the servers lack."""
        if self.tensor % self.expert:
            return [
                f"rollout.sglang.expert: found {self.expert}, required a divisor of rollout.sglang.tensor {self.tensor}"
            ]
        if self.route == "receivers" and self.mode == "colocated":
            return [
                "rollout.sglang.route: found receivers with mode colocated, required tensor: its ranks share the GPUs"
            ]
        wanted = len(self.urls) * self.tensor if self.mode == "remote" and self.route == "receivers" else 0
        if len(self.receivers) != wanted:
            return [
                f"rollout.sglang.receivers: found {len(self.receivers)}, required {wanted} (mode, route, urls, tensor)"
            ]
        if (ports := self.port_range) is not None and not (ports and ports[0] >= 1024 and ports[-1] < 65536):
            return [f"rollout.sglang.ports: found {self.ports}, required FIRST-LAST within 1024-65535"]
        if owned := [word for word in self.args if word.split("=")[0] in OWN_ARGUMENTS]:
            return [f"rollout.sglang.args: found {', '.join(owned)}, required are others: r1engine gives these itself"]
        if self.mode == "remote" and not self.urls:
            return ["rollout.sglang.urls: found none, required the http://host:port of each server (mode remote)"]
        if self.mode != "remote" and self.python is None:
            return [
                "rollout.sglang.python: found null, required the Python of an environment with sglang "
                f"(mode {self.mode}): python3.12 -m venv sglang-env && sglang-env/bin/pip install sglang==0.5.23"
            ]
        wrong = [(url, problem) for url in (*self.urls, *self.receivers) if (problem := address_problem(url))]
        return [f"rollout.sglang.urls: found {url}, required {problem}" for url, problem in wrong]


class Rollout(Section):
    """How completions are drawn."""

    engine: Literal["local", "sglang"] = "local"
    """local: in this process; sglang: by servers."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits. v2: "temperature to 1"."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest set of tokens with this probability; 1: all."""
    top_k: Count = 0
    """The likeliest so many tokens; 0: all."""
    max_tokens: Positive | dict[int, Positive] = Field(default={0: 32_768, 8_200: 65_536})
    """Tokens of a completion: a number, or limits from optimizer steps on. v2: from step 8,200 on 65,536."""
    slots: Positive = 64
    """Sequences that the embedded generator decodes at once; on a GPU fewer while their keys and values do not fit."""
    max_staleness: Count = 0
    """Versions of the weights that a token may be behind when it is trained on. 0: on-policy, as the paper; from 1 on,
    the next rollout is drawn while the trainer works on this one."""
    oversample: Annotated[float, Field(ge=1, le=2)] = 1.0
    """Questions on their way for each that a rollout takes."""
    sglang: Sglang = Sglang()

    def max_tokens_at(self, step: int) -> int:
        """Completion limit (tokens) in force at an optimizer step."""
        limit = self.max_tokens
        return limit if isinstance(limit, int) else limit[max(s for s in limit if s <= step)]

    def limits(self, steps: int) -> dict[int, int]:
        """Optimizer step -> completion limit (tokens) from there on, of those that so many optimizer steps reach."""
        limit = self.max_tokens
        return {0: limit} if isinstance(limit, int) else {s: limit[s] for s in limit if s < steps}

    def longest_completion(self, steps: int) -> int:
        """Largest completion limit (tokens) that a run of so many optimizer steps reaches."""
        return max(self.limits(steps).values())

    def problems(self) -> list[str]:
        """What does not fit together."""
        limit = self.max_tokens
        if isinstance(limit, dict) and 0 not in limit:
            return ["rollout.max_tokens: a schedule needs an entry for step 0"]
        if isinstance(limit, dict) and min(limit) < 0:
            return [f"rollout.max_tokens: found step {min(limit)}, required steps >= 0"]
        if self.oversample > 1 and self.max_staleness < 2:
            return [
                f"rollout.oversample: found {self.oversample:g} with max_staleness {self.max_staleness}, required "
                "max_staleness >= 2: what is not finished is carried over, and dropping it would favour short "
                "completions"
            ]
        return []
