"""The generator whose sampling is done by SGLang servers; the same calls as rollout/local.py.

Every rank of the trainer sends its own prompts; the first rank refreshes the servers. Which servers there are, which of
them are usable and which weights they hold is agreed on by all ranks in every refresh.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist

from r1engine.architecture import load_tokenizer, read_architecture
from r1engine.batch import Completion, PackedBatch, Prompt, Sequence, pack_sequences
from r1engine.config import Config
from r1engine.rollout.local import stop_tokens
from r1engine.rollout.sglang.fleet import Fleet
from r1engine.rollout.sglang.refresh import Refresher, Report
from r1engine.rollout.sglang.router import Endpoint, Job, Router

CANARY_PROMPT, CANARY_TOKENS, CANARIES = 24, 8, 4  # tokens of a fixed prompt, tokens drawn after it, how many prompts
CANARY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # nats; the largest of a few tokens, not a mean

WriteFolder = Callable[..., None]  # (weights, target=folder)
Logprobs = Callable[[list[PackedBatch]], list[torch.Tensor]]


class SglangGenerator:
    """Samples through SGLang servers that it starts, finds or is given; see `rollout.sglang` in the configuration."""

    def __init__(
        self,
        cfg: Config,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        dtype: torch.dtype,
        write_folder: WriteFolder,
        note: Callable[[str], None],
    ) -> None:
        """Starts or meets the servers and checks that they serve this model.

        Args:
            cfg:          of the run.
            rank:         of this process.
            world_size:   number of processes.
            device:       of this process.
            dtype:        of the servers' weights.
            write_folder: writes weights as a Hugging Face folder, on the first rank (route disk).
            note:         shows a line to the user.

        Raises:
            ValueError: no usable SGLang, a server of another model, version or context, an unreachable URL, or routing
                replay of a mixture of experts.
            RuntimeError: a server does not start; the last lines of its log are in the message.
        """
        assert cfg.model.path is not None
        self._cfg, self._rank, self._size, self._device, self._dtype = cfg, rank, world_size, device, dtype
        self._write_folder, self._note = write_folder, note
        self._arch = read_architecture(cfg.model.path)
        if self._arch.moe is not None and cfg.model.routing_replay:
            raise ValueError(
                "model.routing_replay: found true, required false with rollout.engine sglang: the servers are not "
                "asked for the experts that they chose"
            )
        self._tokenizer = load_tokenizer(cfg.model.path)
        self._stop_tokens = sorted(stop_tokens(cfg.model.path, self._tokenizer))
        self._fleet = Fleet(cfg, rank=rank, world_size=world_size, device=device, dtype=dtype, note=note)
        self.endpoints = self._fleet.endpoints
        s = cfg.rollout.sglang
        has_digests = device.type == "cpu" and self._arch.mla is None and self._arch.moe is None
        if s.verify and not has_digests and rank == 0:
            note("refresh: digests are computed for dense models on CPU servers; here the fixed prompts are the proof")
        self._router = Router(self.endpoints, vocab_size=self._arch.vocab_size, stall_seconds=s.stall_seconds)
        self._refresher = Refresher(
            self.endpoints,
            self._arch,
            ranks=s.tensor,
            route=s.route,
            bucket_bytes=s.bucket_mib * 2**20,
            folder=cfg.run_dir / "sglang" / "weights",
            verify=s.verify and has_digests,
        )
        self.weight_version = 0
        self.report: Report | None = None  # of the last refresh; first rank only

    # ------------------------------------------------------------------ weights

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Refresh every server with these weights and verify that they arrived. Collective.

        Args:
            weights: full tensors under their Hugging Face names; every rank consumes them, as gathering is collective.

        Raises:
            RuntimeError: a server holds other weights than were sent, naming the tensors; or none is left.
        """
        version = str(self.weight_version + 1)
        self._fleet.recover()
        self._fleet.agree()
        self._fleet.wake(weights_only=True)
        problem: list = [None]
        if self._rank == 0:
            try:
                self.report = self._refresher.refresh(weights, version, write_folder=self._write_folder)
            except RuntimeError as error:
                problem = [str(error)]
        for _ in weights:  # the other ranks take part in the gathering; the first has no tensor left
            pass
        if self._size > 1:
            dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise RuntimeError(problem[0])
        self._fleet.agree()
        for url, reason in self._fleet.left_out():
            self._note(f"{url} left out: {reason}")
        self.weight_version += 1

    def check_canaries(self, logprobs: Logprobs, *, row_multiple: int) -> float:
        """Let every server continue fixed prompts, and compare its log-probabilities with the policy's. Collective.

        The prompts are the same every time, so a server that still has old keys and values for them is caught.

        Args:
            logprobs:     the policy's, at the rollout's temperature.
            row_multiple: tokens of a row must be a multiple of this.

        Returns:
            The largest |difference| (nats).

        Raises:
            RuntimeError: it is beyond what rounding explains.
        """
        drawn: list = [None]
        if self._rank == 0:
            drawn = [[(e.client.url, self._draw_canaries(e)) for e in self.endpoints if self._is_current(e)]]
        if self._size > 1:
            dist.broadcast_object_list(drawn, src=0)
        worst, where = 0.0, ""
        for url, sequences in drawn[0]:
            room = sum(len(s.tokens) for s in sequences) + row_multiple
            (packed,) = pack_sequences(sequences, max_tokens=room, multiple=row_multiple)
            rows = [row.to(self._device) for row in packed]
            for row, logp in zip(rows, logprobs(rows), strict=True):
                weighted = row.loss_weight != 0
                difference = float((logp - row.rollout_logp)[weighted].abs().max())
                if difference > worst:
                    worst, where = difference, url
        if self.report is not None:
            self.report.canary_difference = worst
        if worst > CANARY_TOLERANCE[self._dtype]:
            raise RuntimeError(
                f"refresh: {where} gives tokens after fixed prompts log-probabilities that are off by {worst:.2e}, at "
                f"most {CANARY_TOLERANCE[self._dtype]:.0e} is rounding (weights {self.weight_version}; a stale cache, "
                "or a model that is computed otherwise)"
            )
        return worst

    def _draw_canaries(self, endpoint: Endpoint) -> list[Sequence]:
        """What one server draws after the fixed prompts, as sequences whose drawn tokens carry a weight."""
        router = Router([endpoint], vocab_size=self._arch.vocab_size, stall_seconds=self._router.stall_seconds)
        jobs = [Job(i, prompt, CANARY_TOKENS) for i, prompt in enumerate(self._canary_prompts())]
        router.run(jobs, self._sampling(1.0, 0), version=str(self.weight_version))
        return [Sequence(job.prompt + job.drawn.tokens, len(job.prompt), 1.0, logp=job.drawn.logp) for job in jobs]

    def _canary_prompts(self) -> list[list[int]]:
        """Fixed token sequences spread over the vocabulary."""
        length = min(CANARY_PROMPT, self._arch.max_positions - CANARY_TOKENS - 1)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self._arch.vocab_size, (CANARIES, length), generator=generator).tolist()

    # ------------------------------------------------------------------ generation

    def generate(
        self,
        prompts: list[Prompt],
        *,
        num_samples: int,
        step: int,
        max_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Samples `num_samples` completions of each prompt; see LocalGenerator.generate.

        SGLang has a random stream of its own: `step` does not choose the samples. As with the embedded generator,
        `logp` is that of softmax(logits / temperature) over the whole vocabulary, not renormalized by top_p and top_k.

        Raises:
            ValueError: a prompt is too long for the servers.
            RuntimeError: no server with the current weights is left, or a sample failed again and again.
        """
        if self.weight_version == 0:
            raise RuntimeError("generate: the servers hold no weights of this run, required is a load_weights")
        for prompt in prompts:
            total, most = len(prompt.tokens) + max_tokens, self._arch.max_positions
            if total > most:
                raise ValueError(
                    f"generate: prompt {prompt.id} has {len(prompt.tokens)} tokens, with max_tokens={max_tokens} that "
                    f"is {total}; the model has max_position_embeddings={most}"
                )
        jobs = [Job(i, prompt.tokens, max_tokens) for i, prompt in enumerate(prompts) for _ in range(num_samples)]
        sampling = self._sampling(top_p, top_k) | {"temperature": temperature}
        for incident in self._router.run(jobs, sampling, version=str(self.weight_version), on_tokens=on_tokens):
            self._note(incident)
        self._fleet.restart_failed()
        return self._completions(prompts, jobs, num_samples)

    def _sampling(self, top_p: float, top_k: int) -> dict:
        return {
            "temperature": self._cfg.rollout.temperature,
            "top_p": top_p,
            "top_k": top_k or -1,  # SGLang's way to say all
            "stop_token_ids": self._stop_tokens,
        }

    def _completions(self, prompts: list[Prompt], jobs: list[Job], num_samples: int) -> list[Completion]:
        truncated = [job.drawn.finish == "length" for job in jobs]
        spoken = [job.drawn.tokens if cut else job.drawn.tokens[:-1] for job, cut in zip(jobs, truncated, strict=True)]
        texts = self._tokenizer.decode_batch(spoken, skip_special_tokens=True)
        return [
            Completion(
                prompt=prompts[i // num_samples],
                sample=i % num_samples,
                tokens=job.drawn.tokens,
                logp=job.drawn.logp,
                text=texts[i],
                truncated=truncated[i],
                weight_version=self.weight_version,
            )
            for i, job in enumerate(jobs)
        ]

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Inside, the servers have their KV pools; colocated ones give GPU memory back at the exit. Collective."""
        self._fleet.wake()
        try:
            yield
        finally:
            self._fleet.sleep()

    def metrics(self) -> dict[str, float]:
        """Of the last refresh: bytes, seconds of its parts, largest canary difference. Empty but on the first rank."""
        if self.report is None:
            return {}
        return {
            "refresh/gigabytes": self.report.num_bytes / 1e9,
            "refresh/seconds_send": self.report.seconds.get("send", 0.0),
            "refresh/seconds_verify": self.report.seconds.get("verify", 0.0),
            "refresh/canary_difference": self.report.canary_difference,
            "refresh/servers": sum(self._is_current(e) for e in self.endpoints),
        }

    def close(self) -> None:
        """Stop the servers that this process started."""
        self._refresher.close()
        self._fleet.close()

    def _is_current(self, endpoint: Endpoint) -> bool:
        return endpoint.is_usable and endpoint.version == str(self.weight_version)
