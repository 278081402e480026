"""The generator whose sampling is done by SGLang servers; the same calls as rollout/local/generator.py.

Every rank of the trainer sends its own prompts, and its share of the weights. Which servers there are, which of them
are usable and which weights they hold is agreed on by all ranks in every refresh.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from r1engine.batch import Completion, PackedBatch, Prompt, RowShape, Sequence, pack
from r1engine.config import RlConfig
from r1engine.data.question import Question
from r1engine.hf.architecture import DynamicScaling, is_fp8_folder, read_architecture
from r1engine.hf.formats import Precision, store
from r1engine.hf.tokenizer import load_tokenizer, stop_tokens
from r1engine.ranks import World
from r1engine.rollout.draft import Draft, Sampling, StepEnds, check_prompts, completions, end_at_step
from r1engine.rollout.generator import Logprobs
from r1engine.rollout.sglang.delivery import ServerLayout
from r1engine.rollout.sglang.digest import CpuDigest, CudaDigest
from r1engine.rollout.sglang.disk import WeightFolder
from r1engine.rollout.sglang.dispatch import Dispatcher, Endpoint, agree
from r1engine.rollout.sglang.fleet import Fleet
from r1engine.rollout.sglang.refresh import Refresher, Report
from r1engine.rollout.sglang.server import check_nccl

CANARY_PROMPT, CANARY_TOKENS, CANARIES = 24, 8, 4  # tokens of a fixed prompt, tokens drawn after it, how many prompts
CANARY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # nats; the largest of a few tokens, not a mean
CANARY_TOLERANCE_FP8 = 1.0  # the servers' matrices are rounded to FP8, the policy's are not


class SglangGenerator:
    """Samples through SGLang servers that it starts, finds or is given; see `rollout.sglang` in the configuration."""

    def __init__(self, cfg: RlConfig, world: World, *, dtype: torch.dtype, note: Callable[[str], None]) -> None:
        """Starts or meets the servers and checks that they serve this model.

        Args:
            cfg:   of the run.
            world: its ranks.
            dtype: of the servers' weights.
            note:  shows a line to the user.

        Raises:
            ValueError: no usable SGLang, a server of another model, version or context, or an unreachable URL.
            RuntimeError: a server does not start; the last lines of its log are in the message.
        """
        self._cfg, self._world, self._dtype, self._note = cfg, world, dtype, note
        s, is_gpu = cfg.rollout.sglang, world.device.type == "cuda"
        if cfg.rollout.max_staleness and s.mode == "colocated" and is_gpu:
            raise ValueError(
                f"rollout.max_staleness: found {cfg.rollout.max_staleness}, required 0 with rollout.sglang.mode "
                "colocated: servers on the trainer's GPUs give their memory back while it trains"
            )
        self._arch = read_architecture(cfg.model.folder)
        if isinstance(self._arch.rope_scaling, DynamicScaling):
            raise ValueError(
                f"{cfg.model.folder / 'config.json'}: rope_type 'dynamic', required is another one with rollout.engine "
                "sglang: SGLang stretches short sequences too, the trainer does not"
            )
        # The servers get the tensors that are in the model's folder: FP8 and scales, if these are there.
        self._precision: Precision = "float32" if dtype == torch.float32 else "bfloat16"
        self._store = None
        if is_fp8_folder(cfg.model.folder):
            self._precision, self._store = "fp8", partial(store, precision="fp8")
        self._tokenizer = load_tokenizer(cfg.model.folder)
        self._stop_tokens = sorted(stop_tokens(cfg.model.folder, self._tokenizer))
        if is_gpu and s.route == "distributed" and s.python is not None and s.python.is_file():
            check_nccl(s.python, torch.cuda.nccl.version())
        self._fleet = Fleet(cfg, world, dtype=dtype, note=note)
        self.endpoints = self._fleet.endpoints
        self._dispatcher = self._new_dispatcher(self.endpoints)
        self._refresher = Refresher(
            self.endpoints,
            self._arch,
            world,
            layout=ServerLayout((range(s.tensor),), self._arch.moe.num_experts if self._arch.moe else 0, s.expert),
            route="handle" if s.route == "tensor" and s.mode == "colocated" and is_gpu else s.route,
            bucket_bytes=s.bucket_mib * 2**20,
            folder=WeightFolder(cfg.run_dir / "sglang" / "weights", cfg.model.folder),
            digest=self._digest(),
        )
        self._refresher.ports = s.port_range
        self._refresher.precision = self._precision
        self.takes_shares = self._refresher.takes_shares
        self.weight_version = 0
        self.tokens_run: int | None = None  # the servers' own radix cache decides
        self._cut = [0, 0]  # tokens drawn step by step, and of them behind a step's end
        self.report: Report | None = None  # of the last refresh

    def _digest(self) -> type[CpuDigest] | type[CudaDigest] | None:
        """The servers' hash of a tensor; None: it is not wanted, or not known."""
        is_gpu = self._world.device.type == "cuda"
        if not self._cfg.rollout.sglang.verify:
            return None
        # Kernels for GPUs may want another layout of the experts than the one known here, and SGLang hashes FP8
        # matrices dequantized.
        if self._store is not None or (is_gpu and (self._arch.mla is not None or self._arch.moe is not None)):
            if self._world.is_first:
                self._note(
                    "refresh: the digests of this model's tensors are not known; the fixed prompts are the proof"
                )
            return None
        return CudaDigest if is_gpu else CpuDigest

    # ------------------------------------------------------------------ weights

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor | None]]) -> None:
        """Refresh every server with these weights and verify that they arrived. Collective.

        Args:
            weights: full tensors under their Hugging Face names, of each rank its share (None: another rank has it) or
                     all (`takes_shares`).

        Raises:
            BrokenOff: give the same weights again.
            RuntimeError: a server holds other weights than were sent, naming the tensors; or none is left.
        """
        version = self.weight_version + 1
        self._fleet.recover()
        agree(self.endpoints, self._world)
        self._fleet.wake(weights_only=True)
        agree(self.endpoints, self._world)
        self.report = self._refresher.refresh(self._stored(weights), version)
        for url, reason in self._fleet.left_out():
            self._note(f"{url} left out: {reason}")
        self.weight_version += 1

    def _stored(self, weights: Iterable[tuple[str, torch.Tensor | None]]) -> Iterable[tuple[str, torch.Tensor | None]]:
        """The tensors as the servers have them."""
        if self._store is None:
            return weights
        return self._quantized(self._store, weights)

    def _quantized(self, store: Callable, weights: Iterable[tuple[str, torch.Tensor | None]]) -> Iterator:
        for name, tensor in weights:
            if tensor is None:  # another rank sends it
                yield name, None
            else:
                yield from store(name, tensor)

    def verify(self, logprobs: Logprobs, *, row_multiple: int) -> None:
        """`check_canaries`, unless `rollout.sglang.verify` is false. Collective."""
        if self._cfg.rollout.sglang.verify:
            self.check_canaries(logprobs, row_multiple=row_multiple)

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
        with self.awake():
            drawn = self._world.from_first(
                lambda: [(e.client.url, self._draw_canaries(e)) for e in self.endpoints if self._is_current(e)]
            )
        rows: list[PackedBatch] = []
        for _, sequences in drawn:
            room = sum(len(s.tokens) for s in sequences) + row_multiple
            ((row,),) = pack(sequences, RowShape(room, multiple=row_multiple))
            rows.append(row.to(self._world.device))
        worst, where = 0.0, ""
        for (url, _), row, logp in zip(drawn, rows, logprobs(rows) if rows else [], strict=True):
            weighted = row.loss_weight != 0
            difference = float((logp - row.rollout_logp)[weighted].abs().max())
            if difference > worst:
                worst, where = difference, url
        if self.report is not None:
            self.report.canary_difference = worst
        most = CANARY_TOLERANCE_FP8 if self._store is not None else CANARY_TOLERANCE[self._dtype]
        if worst > most:
            raise RuntimeError(
                f"refresh: {where} gives tokens after fixed prompts log-probabilities that are off by {worst:.2e}, at "
                f"most {most:.0e} is rounding (weights {self.weight_version}; a stale cache, "
                "or a model that is computed otherwise)"
            )
        return worst

    def _draw_canaries(self, endpoint: Endpoint) -> list[Sequence]:
        """What one server draws after the fixed prompts, as sequences whose drawn tokens carry a weight."""
        dispatcher = self._new_dispatcher([endpoint])
        length = min(CANARY_PROMPT, self._arch.max_positions - CANARY_TOKENS - 1)
        fixed = torch.Generator().manual_seed(0)
        prompts = torch.randint(self._arch.vocab_size, (CANARIES, length), generator=fixed).tolist()
        drafts = [
            Draft(Prompt(i, tokens, "", Question("")), 0, -1, 0, CANARY_TOKENS) for i, tokens in enumerate(prompts)
        ]
        dispatcher.run(drafts, self._request(Sampling(self._cfg.rollout.temperature)), version=self.weight_version)
        return [
            Sequence(d.prompt.tokens + d.tokens, len(d.prompt.tokens), 1.0, logp=d.logp, experts=d.experts)
            for d in drafts
        ]

    def _new_dispatcher(self, endpoints: list[Endpoint]) -> Dispatcher:
        replays = self._arch.moe is not None and self._cfg.model.routing_replay
        return Dispatcher(
            endpoints,
            vocab_size=self._arch.vocab_size,
            stall_seconds=self._cfg.rollout.sglang.stall_seconds,
            replays=self._arch if replays else None,
        )

    # ------------------------------------------------------------------ generation

    def draw(
        self,
        drafts: list[Draft],
        sampling: Sampling,
        *,
        on_tokens: Callable[[int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        stop_after: StepEnds | None = None,
        on_ended: Callable[[Draft], None] | None = None,
    ) -> None:
        """See `Generator.draw`. Not collective; `should_stop` is asked twenty times a second.

        SGLang has a random stream of its own: a draft's `step` does not choose the samples. What is interrupted keeps
        the tokens that have arrived, and the servers are told to drop it. A server stops at tokens alone: what it draws
        behind a mark of several tokens is cut off.
        """
        if self.weight_version == 0:
            raise RuntimeError("generate: the servers hold no weights of this run, required is a load_weights")
        check_prompts(drafts, self._arch)
        request = self._request(sampling)
        if stop_after is not None:
            request["stop_token_ids"] = sorted({*self._stop_tokens, *stop_after.token_ids})
        left, ended = drafts, on_ended if stop_after is None else None  # with steps, only here is known what has ended
        while left:
            incidents = self._dispatcher.run(
                left, request, version=self.weight_version, on_tokens=on_tokens, should_stop=should_stop, on_ended=ended
            )
            for incident in incidents:
                self._note(incident)
            self._fleet.restart_failed()
            if stop_after is None or (should_stop is not None and should_stop()):
                break
            for draft in left:
                end_at_step(draft, stop_after, frozenset(self._stop_tokens))
                if draft.finish and on_ended is not None:
                    on_ended(draft)
            left = [draft for draft in left if not draft.finish]  # stopped at a mark that ends no step
        if stop_after is not None:
            self._count_cut(drafts)

    def _count_cut(self, drafts: list[Draft]) -> None:
        """Tells once where marks of several tokens cost more than a hundredth of what is drawn."""
        was_told = self._cut[1] * 100 > self._cut[0]
        self._cut[0] += sum(len(draft.tokens) + draft.cut for draft in drafts)
        self._cut[1] += sum(draft.cut for draft in drafts)
        if not was_told and self._cut[1] * 100 > self._cut[0]:
            self._note(
                f"steps: {self._cut[1] / self._cut[0]:.0%} of the drawn tokens are behind the end of a step: servers "
                "cannot stop at a mark of several tokens; a mark that is one token costs nothing"
            )

    def keep_steps(self, max_bytes: int) -> None:
        """Nothing to do: the servers keep keys and values themselves (radix cache)."""

    def forget(self, question: int) -> None:
        """Nothing to do, see `keep_steps`."""

    def completions(self, drafts: list[Draft]) -> list[Completion]:
        """Ended drafts as completions, in order."""
        return completions(drafts, self._tokenizer)

    def _request(self, sampling: Sampling) -> dict[str, Any]:
        """Sampling parameters of a request."""
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,  # SGLang's way to say all
            "stop_token_ids": self._stop_tokens,
        }

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
        if self.report is None or not self._world.is_first:
            return {}
        return {
            "refresh/gigabytes": self.report.num_bytes / 1e9,
            "refresh/gigabytes_busiest": self.report.most_bytes / 1e9,
            "refresh/gigabytes_received": self.report.most_received / 1e9,
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
        return endpoint.is_usable and endpoint.version == self.weight_version
