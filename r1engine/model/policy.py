"""Policy: the Megatron model with its optimizer, behind the few calls that a training step needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from r1engine.batch import Packed, PackedBatch, RowShape, TokenOutputs
from r1engine.config import Model, Optimizer, Parallel
from r1engine.config.stage import row_multiple
from r1engine.hf.architecture import Head, architecture_of, read_architecture
from r1engine.hf.folder import Folder
from r1engine.hf.formats import Precision, model_dtype
from r1engine.hf.layout import check_trained
from r1engine.hf.tensors import SCORE, mtp_shapes
from r1engine.model.collected import LossFn, loss_of_row, take_logp, take_score
from r1engine.model.cpu import runs_on_cpu
from r1engine.model.gradients import make_optimizer, with_gradient_buffers
from r1engine.model.layers import fp8
from r1engine.model.layers.gpt import build
from r1engine.model.layers.score import initial_score
from r1engine.model.megatron_config import transformer_config
from r1engine.model.rating import lent_reward_model, read_reward_model
from r1engine.model.state import dist_checkpoint
from r1engine.model.state.offload import Offloader, gradients, lent_weights, moved
from r1engine.model.state.sharded_weights import ShardedWeights
from r1engine.model.state.written_folder import write_folder
from r1engine.ranks import World
from r1kernels import GrpoObjective


class Updated(NamedTuple):
    """The result of an optimizer step."""

    metrics: dict[str, float]  # sums over all rows of all ranks, and grad_norm
    logp: list[torch.Tensor]  # [T] float32 a row, before the step; empty on all but the last pipeline stage


class Policy:
    """A model with an optimizer. It owns the micro-batch loop, so that a pipeline schedule can run it; the loss
    sees log-probabilities only, so that a vocabulary split over ranks stays inside. All calls are collective."""

    def __init__(
        self,
        model: Model,
        layout: Parallel,
        optimizer: Optimizer,
        world: World,
        *,
        seed: int = 0,
        temperature: float = 1.0,
        head: Head = "tokens",
    ) -> None:
        """Build the model of the folder `model.path` in the layout of `world` and load its weights.

        Args:
            model:       which model, and how it is computed.
            layout:      parallel sizes.
            optimizer:   its constants; the learning rate comes with each update.
            world:       as `join(layout)` gives it.
            seed:        of the run.
            temperature: divides the logits: that of the sampling in RL, 1 in supervised training.
            head:        score: a reward model, whose score begins at random unless the folder is one already.

        Raises:
            ValueError: the folder is not a supported model, or the parallel sizes do not divide it.
            ConfigError: `model.fp8` on a machine that cannot.
        """
        self.world, self.folder = world, model.folder
        self._settings, self._layout, self._temperature = model, layout, temperature
        found = read_architecture(self.folder)
        if found != architecture_of(model):
            raise ValueError(
                f"{self.folder}: model.max_positions and model.rope_theta take a folder made by hf.prepared"
            )
        self.shape = found if head == "tokens" else found.scoring()
        self.dtype = model_dtype(model.dtype, world.device)
        check_trained(self.folder, found, model, layout, head)
        self._check_machine()
        self._source = Folder(self.folder, found)
        if self.trains_mtp and not self._source.mtp_names:
            weight = f"model.mtp_loss_weight: found {model.mtp_loss_weight}"
            raise ValueError(f"{weight}, required 0: {self.folder} has no MTP module")
        # inference_rng_tracker: forking the tracker does nothing, so no CUDA generator is needed; dropout is 0.
        tensor_parallel.model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True)
        self._build(optimizer)
        modules = [chunk.module for chunk in self.chunks]
        self._weights = ShardedWeights(modules, self.shape, world, with_mtp=self.trains_mtp)
        self._fresh = {SCORE: initial_score(found.hidden_size, seed)} if head != found.head else {}
        self._load()
        movable = partial(moved, self._weights.local, self.chunks, self.optimizer)
        scratch = partial(gradients, self.chunks)
        self._offloader = Offloader(movable, world.device, is_on=layout.offload, scratch=scratch)

    def _check_machine(self) -> None:
        """Refuse a model that is not computed here."""
        if self.dtype == torch.float32 and self.world.device.type == "cuda":
            raise ValueError("model.dtype: found float32 on a GPU, required bfloat16: FlashAttention takes no float32")
        if self.shape.moe is not None and self._settings.experts == "fused" and self.world.device.type == "cuda":
            sizes = self.shape.hidden_size, self.shape.moe.intermediate_size
            if any(size % 8 for size in sizes):  # rows of 16 bytes
                what = f"found hidden_size {sizes[0]} and moe_intermediate_size {sizes[1]}"
                raise ValueError(f"model.experts=fused: {what}, required multiples of 8 on a GPU, or experts: megatron")
        if self._settings.fp8:
            fp8.check_machine()

    def row_shape(self, max_tokens: int) -> RowShape:
        """How rows of at most `max_tokens` tokens must look for this policy to take them."""
        layout = self._layout
        # The interleaved schedule takes micro-batches in rounds of one a stage.
        rounds = layout.pipeline if layout.virtual > 1 else 1
        return RowShape(max_tokens, self.world.dp_size, self.row_multiple, rounds)

    def computed_tokens(self, shards: Packed) -> int:
        """Tokens that all ranks compute for the rows of an update, padding included."""
        lengths = shards.row_lengths()
        if self._layout.virtual == 1:
            return sum(map(sum, lengths))
        return sum(len(rows) * max(rows) for rows in lengths)  # see `_run`

    @property
    def row_multiple(self) -> int:
        """Tokens that the length of a row is a multiple of."""
        return row_multiple(self._settings, self._layout)

    @property
    def trains_mtp(self) -> bool:
        """Whether the multi-token-prediction modules learn; else they are kept as they are in the folder."""
        return self._settings.mtp_loss_weight > 0

    @runs_on_cpu
    def _build(self, optimizer: Optimizer) -> None:
        on_cpu = self.world.device.type == "cpu"
        config = transformer_config(self.shape, self._settings, self._layout, dtype=self.dtype, on_cpu=on_cpu)
        modules = [
            build(
                self.shape,
                config,
                self._temperature,
                experts=self._settings.experts,
                with_mtp=self.trains_mtp,
                stage=self.world.pp_rank,
                chunk=chunk,
            )
            for chunk in range(self._layout.virtual)
        ]
        replicas = max(self.world.replicas, self.world.expert_dp_size if self.shape.moe is not None else 1)
        is_sharded = self._layout.distributed_optimizer and replicas > 1
        self.chunks = with_gradient_buffers(modules, config, is_sharded=is_sharded)
        self.optimizer = make_optimizer(self.chunks, optimizer, self.dtype, is_sharded=is_sharded)
        self._schedule = get_forward_backward_func()

    @runs_on_cpu
    @torch.no_grad()
    def _load(self) -> None:
        self._weights.load(self._source, self._fresh.keys())
        for name in self._fresh.keys() & self._weights.local.keys():  # on the last pipeline stage
            self._weights.local[name].copy_(self._fresh[name])
        self.optimizer.reload_model_params()  # the master weights follow

    # ------------------------------------------------------------------ forward and update

    @runs_on_cpu
    @torch.no_grad()
    def logprobs(self, rows: list[PackedBatch]) -> list[torch.Tensor]:
        """Log-probability of every token, at the sampling temperature.

        Args:
            rows: of this data-parallel rank; all its tensor-, context- and pipeline-parallel ranks pass the same.

        Returns:
            [T] float32 a row, on every rank of the model, without gradient.
        """
        return self._of_tokens(rows, take_logp)

    @runs_on_cpu
    @torch.no_grad()
    def scores(
        self, rows: list[PackedBatch], reward_model: dict[str, torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Score of every token, of its sequence up to and with it: under `reward_model`, of `read_reward_model`, or the
        policy's own, whose head is a score then. Else as `logprobs`."""
        if reward_model is None:
            return self._of_tokens(rows, take_score)
        with lent_reward_model(self._weights.local, self.chunks, reward_model, self.world.device):
            return self._of_tokens(rows, take_score)

    def read_reward_model(self, folder: Path) -> dict[str, torch.Tensor]:
        """This rank's part of a reward model of the same architecture, in host memory, for `scores`; see there."""
        return read_reward_model(self._weights, folder)

    def _of_tokens(self, rows: list[PackedBatch], take: Callable) -> list[torch.Tensor]:
        """What `take` finds in the outputs of each row, [T] float32, on every rank of the model."""
        self._set_training(False)
        results = self._run(rows, take, forward_only=True)
        if self.world.pp_size == 1:
            return results
        if results:
            results = [values[: len(row.tokens)].contiguous() for values, row in zip(results, rows, strict=True)]
        else:  # not the last stage
            results = [torch.empty(len(row.tokens), device=self.world.device) for row in rows]
        for values in results:
            dist.broadcast(values, ps.get_pipeline_model_parallel_last_rank(), ps.get_pipeline_model_parallel_group())
        return results

    @runs_on_cpu
    def update(
        self, rows: list[PackedBatch], loss_fn: LossFn, lr: float, objective: GrpoObjective | None = None
    ) -> Updated:
        """One optimizer step on the sum of `loss_fn` over all rows of all ranks.

        Args:
            rows:    of this data-parallel rank; every data-parallel rank passes equally many.
            loss_fn: called on the last pipeline stage, once a row.
            lr:      learning rate of this step.
            objective: what loss_fn computes, of tokens; it may then find the loss in the outputs.

        Returns:
            metrics: sums over all rows of `loss` and of what loss_fn reports, `mtp_loss` (nats a token, before its
            weight) where MTP modules are trained, and `grad_norm` before clipping; logp: before it, of trained tokens.
        """
        self._set_training(True)
        if self.trains_mtp:
            self._bring_embedding()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._run(rows, partial(loss_of_row, loss_fn, self._settings.mtp_loss_weight), False, objective)
        logp = [sums_of_row.pop("logp")[: len(row.tokens)] for sums_of_row, row in zip(sums, rows, strict=False)]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _, grad_norm, _ = self.optimizer.step()
        return Updated(self._reduce(sums) | {"grad_norm": float(grad_norm)}, logp)

    def _run(self, rows: list[PackedBatch], finish: Callable, forward_only: bool, objective: Any = None) -> list:
        """Megatron's schedule over the rows; what `finish` makes of each row, on the last stage."""
        self._offloader.check_awake()
        longest = max(len(row.tokens) for row in rows)
        if len(self.chunks) > 1:  # interleaved stages send tensors of one shape
            rows = [row.padded(longest) for row in rows]

        def forward_step(iterator: Iterator[PackedBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
            row = next(iterator)
            outputs = model(row, objective)
            if not isinstance(outputs, TokenOutputs):
                return outputs, finish  # not the last stage: never called
            # The schedule wants one tensor, and hands it to what finishes the row.
            return outputs.logp, lambda _, non_loss_data=False: finish(outputs, row)

        with fp8.copies_of_weights(self.chunks):
            return self._schedule(
                forward_step_func=forward_step,
                data_iterator=[iter(rows) for _ in self.chunks] if len(self.chunks) > 1 else iter(rows),
                model=self.chunks,
                num_microbatches=len(rows),
                seq_length=longest,
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )

    @torch.no_grad()
    def _bring_embedding(self) -> None:
        """From the first pipeline stage to the last, whose MTP modules read it."""
        if self.world.pp_size == 1:
            return
        group = ps.get_pipeline_model_parallel_group()
        if self.world.pp_rank == 0:
            matrix = self.chunks[0].module.embedding.word_embeddings.weight
            dist.send(matrix.detach(), ps.get_pipeline_model_parallel_last_rank(), group=group)
        elif self.world.pp_rank == self.world.pp_size - 1:
            matrix = self.chunks[-1].module.mtp_embedding
            dist.recv(matrix, ps.get_pipeline_model_parallel_first_rank(), group=group)

    def _set_training(self, is_training: bool) -> None:
        for chunk in self.chunks:
            chunk.train(is_training)

    def _reduce(self, sums: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Add the rows' metrics over the data-parallel ranks and tell every pipeline stage."""
        message: list[Any] = [None]
        if sums:
            total = torch.stack([torch.stack([s[k].float() for k in sums[0]]) for s in sums]).sum(0)
            if self.world.dp_size > 1:
                dist.all_reduce(total, group=ps.get_data_parallel_group())
            message = [dict(zip(sums[0], total.tolist(), strict=True))]
        if self.world.pp_size > 1:
            last = ps.get_pipeline_model_parallel_last_rank()
            dist.broadcast_object_list(message, last, ps.get_pipeline_model_parallel_group())
        return message[0]

    # ------------------------------------------------------------------ weights

    @runs_on_cpu
    @torch.no_grad()
    def weights(self, skip: Collection[str] = (), *, dealt: bool = False) -> Iterator[tuple[str, Any]]:
        """Full parameters under their Hugging Face names, one at a time. Collective. MTP modules are left out.

        Args:
            skip:  names that nobody needs.
            dealt: each rank gets its share, None for what others have (`ShardedWeights.dealt`); else all (`full`).
        """
        self._offloader.check_awake()
        weights = self._weights.dealt if dealt else self._weights.full
        yield from weights({*skip, *mtp_shapes(self.shape)})

    def export(
        self,
        target: Path,
        *,
        precision: Precision | None = None,
        identity: dict[str, Any] | None = None,
        on_bytes: Callable[[int], None] | None = None,
        card: str | None = None,
    ) -> None:
        """Write the model as a Hugging Face folder, MTP modules included. Collective; the first rank writes.

        Args:
            target:    folder to write; it gets the config and the tokenizer of the model's folder.
            precision: number format; None: that of the weights here.
            identity:  what is exported; an interrupted export of the same goes on. None: it starts from nothing.
            on_bytes:  told of the bytes written.
            card:      text of the model card; None: there is none.
        """
        precision = precision or ("bfloat16" if self.dtype == torch.bfloat16 else "float32")
        self._offloader.check_awake()
        write_folder(self._weights, self._source, target, precision, identity, on_bytes, card)

    # ------------------------------------------------------------------ reference, memory, checkpoints

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Copies of this rank's shards in host memory: the frozen reference policy."""
        self._offloader.check_awake()
        copies = {
            name: torch.empty_like(p, device="cpu", pin_memory=p.is_cuda).copy_(p.detach(), non_blocking=True)
            for name, p in self._weights.local.items()
        }
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return copies

    def reference_logprobs(self, snapshot: dict[str, torch.Tensor], rows: list[PackedBatch]) -> list[torch.Tensor]:
        """`logprobs` under the weights of a snapshot; the policy's own weights are not written."""
        self._offloader.check_awake()
        on_device = {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in snapshot.items()}
        with lent_weights(self._weights.local, on_device):
            return self.logprobs(rows)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Weights, gradients and optimizer state are in device memory inside, in host memory outside (GPU).

        Before the first call they are where they were built. All other calls but `state_bytes` are for inside.
        """
        self._offloader.restore()
        try:
            yield
        finally:
            self._offloader.offload()

    def state_bytes(self) -> int:
        """Upper bound of the bytes that `save` writes for this rank (weights, fp32 master and moments, reference);
        ranks with the same parameters share the writing."""
        total = 0.0
        for name, p in self._weights.local.items():
            copies = self.world.expert_dp_size if ".experts." in name else self.world.replicas
            total += p.numel() * (2 * p.element_size() + 12) / copies
        return int(total) + 2**20

    def _model(self) -> dist_checkpoint.Saved:
        return dist_checkpoint.Saved([chunk.module for chunk in self.chunks], self._weights.local)

    @runs_on_cpu
    def save(self, folder: Path, snapshot: dict[str, torch.Tensor] | None = None) -> None:
        """Write model, optimizer and reference into `folder` as a Megatron distributed checkpoint."""
        self._offloader.check_awake()
        dist_checkpoint.save(folder, self._model(), self.optimizer, snapshot)

    @runs_on_cpu
    @torch.no_grad()
    def load(self, folder: Path, has_snapshot: bool = False) -> dict[str, torch.Tensor] | None:
        """Read back what `save` wrote; returns the reference's snapshot if there is one."""
        self._offloader.check_awake()
        template = self.snapshot() if has_snapshot else None
        return dist_checkpoint.load(folder, self._model(), self.optimizer, template)

    @runs_on_cpu
    def load_weights(self, folder: Path) -> None:
        """Read back the model alone: to export it, not to go on. Inside `awake`."""
        dist_checkpoint.load_weights(folder, self._model())
