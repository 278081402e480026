"""Policy: the Megatron model with its optimizer, behind the few calls that a training step needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from r1engine.batch import PackedBatch
from r1engine.config import Config
from r1engine.config_checks import has_sequence_parallelism
from r1engine.hf.architecture import read_architecture
from r1engine.hf.folder import Folder
from r1engine.hf.formats import Precision, begin_export, finish_export, put, store
from r1engine.hf.layout import check_layout, fp8_problem
from r1engine.hf.tensors import mtp_copies, mtp_shapes
from r1engine.model.cpu import runs_on_cpu
from r1engine.model.layers import fp8
from r1engine.model.layers.gpt import build
from r1engine.model.megatron_config import transformer_config
from r1engine.model.parallel import World
from r1engine.model.state import dist_checkpoint
from r1engine.model.state.offload import Offloader, lent_weights
from r1engine.model.state.optimizer_state import held, move_to_host
from r1engine.model.state.sharded_weights import ShardedWeights

# (logp [T], entropy [T], row) -> (loss scalar, metrics: sums over the row)
LossFn = Callable[[torch.Tensor, torch.Tensor, PackedBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class Policy:
    """A model with an optimizer. It owns the micro-batch loop, so that a pipeline schedule can run it; the loss
    sees log-probabilities only, so that a vocabulary split over ranks stays inside. All calls are collective."""

    def __init__(self, cfg: Config, world: World) -> None:
        """Build the model of `cfg.model.path` in the layout of `world` and load its weights.

        Raises:
            ValueError: the folder is not a supported model, or the parallel sizes do not divide it.
            ConfigError: `model.fp8` on a machine that cannot.
        """
        assert cfg.model.path is not None
        self.world, self.folder = world, cfg.model.path
        self.shape = read_architecture(self.folder)
        if self.shape.has_output_bias:
            raise ValueError(f"{self.folder}: attention_bias is true; the trainer computes o_proj without bias only")
        check_layout(self.shape, cfg.parallel)
        if cfg.model.fp8:
            fp8.check_machine()
            is_shared = has_sequence_parallelism(cfg.parallel)
            problem = fp8_problem(self.shape, cfg.parallel.tensor, cfg.model.experts, is_sequence_parallel=is_shared)
            if problem:
                raise ValueError(problem)
        self._source = Folder(self.folder, self.shape)
        self.dtype = model_dtype(cfg, world)
        self._mtp_weight = cfg.model.mtp_loss_weight
        if self.trains_mtp and not self._source.mtp_names:
            raise ValueError(
                f"model.mtp_loss_weight: found {self._mtp_weight}, required 0: {self.folder} has no MTP module"
            )
        self._build(cfg)
        modules = [chunk.module for chunk in self.chunks]
        self._weights = ShardedWeights(modules, self.shape, world, with_mtp=self.trains_mtp)
        self._load()
        self._offloader = Offloader(self._storages, is_on=cfg.parallel.offload and world.device.type == "cuda")

    @property
    def trains_mtp(self) -> bool:
        """Whether the multi-token-prediction modules learn; else they are kept as they are in the folder."""
        return self._mtp_weight > 0

    @runs_on_cpu
    def _build(self, cfg: Config) -> None:
        # inference_rng_tracker: forking the tracker does nothing, so no CUDA generator is needed; dropout is 0.
        tensor_parallel.model_parallel_cuda_manual_seed(cfg.seed, inference_rng_tracker=True)
        par, opt = cfg.parallel, cfg.optimizer
        on_cpu = self.world.device.type == "cpu"
        config = transformer_config(self.shape, cfg, dtype=self.dtype, on_cpu=on_cpu)
        self.row_multiple = cfg.row_multiple
        # The interleaved schedule takes micro-batches in rounds of one a stage.
        self.num_rows_multiple = par.pipeline if par.virtual > 1 else 1
        config.finalize_model_grads_func = finalize_model_grads
        replicas = max(self.world.replicas, self.world.expert_dp_size if self.shape.moe is not None else 1)
        use_distributed = par.distributed_optimizer and replicas > 1
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            check_for_nan_in_grad=True,  # stops with the rank's name before the weights are touched
            use_distributed_optimizer=use_distributed,
        )
        self.chunks = [DistributedDataParallel(config, ddp, self._chunk(config, cfg, i)) for i in range(par.virtual)]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=opt.lr,
                weight_decay=opt.weight_decay,
                adam_beta1=opt.beta1,
                adam_beta2=opt.beta2,
                adam_eps=opt.eps,
                clip_grad=opt.clip_grad,
                bf16=self.dtype == torch.bfloat16,
                params_dtype=self.dtype,
                use_distributed_optimizer=use_distributed,
            ),
            self.chunks,
            use_gloo_process_groups=False,
        )
        if opt.offload:
            move_to_host(self.optimizer)
        self._schedule = get_forward_backward_func()

    def _chunk(self, config: TransformerConfig, cfg: Config, chunk: int) -> torch.nn.Module:
        where = {"stage": self.world.pp_rank, "chunk": chunk}
        options = {"experts": cfg.model.experts, "with_mtp": self.trains_mtp}
        return build(self.shape, config, cfg.rollout.temperature, **options, **where)

    @runs_on_cpu
    @torch.no_grad()
    def _load(self) -> None:
        self._weights.load(self._source)
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
        self._set_training(False)
        results = self._run(rows, _take_logp, forward_only=True)
        if self.world.pp_size == 1:
            return results
        results = [logp[: len(row.tokens)].contiguous() for logp, row in zip(results, rows, strict=False)]
        if not results:
            results = [torch.empty(len(row.tokens), device=self.world.device) for row in rows]
        for logp in results:
            dist.broadcast(logp, ps.get_pipeline_model_parallel_last_rank(), ps.get_pipeline_model_parallel_group())
        return results

    @runs_on_cpu
    def update(self, rows: list[PackedBatch], loss_fn: LossFn, lr: float) -> dict[str, float]:
        """One optimizer step on the sum of `loss_fn` over all rows of all ranks.

        Args:
            rows:    of this data-parallel rank; every data-parallel rank passes equally many.
            loss_fn: called on the last pipeline stage, once a row.
            lr:      learning rate of this step.

        Returns:
            Sums over all rows of `loss` and of what loss_fn reports, `mtp_loss` (nats a token, before its weight)
            where MTP modules are trained, and `grad_norm` before clipping.
        """
        self._set_training(True)
        if self.trains_mtp:
            self._bring_embedding()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._run(rows, partial(_loss, loss_fn, self._mtp_weight), forward_only=False)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _, grad_norm, _ = self.optimizer.step()
        return self._reduce(sums) | {"grad_norm": float(grad_norm)}

    def _run(self, rows: list[PackedBatch], finish: Callable, forward_only: bool) -> list:
        """Megatron's schedule over the rows; what `finish` makes of each row, on the last stage."""

        longest = max(len(row.tokens) for row in rows)
        if len(self.chunks) > 1:  # interleaved stages send tensors of one shape
            rows = [row.padded(longest) for row in rows]

        def forward_step(iterator: Iterator[PackedBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
            row = next(iterator)
            return model(row), partial(finish, row=row)

        results = self._schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(rows) for _ in self.chunks] if len(self.chunks) > 1 else iter(rows),
            model=self.chunks,
            num_microbatches=len(rows),
            seq_length=longest,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        fp8.forget_copies(self.chunks)
        return results

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
        message: list = [None]
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
    def weights(self, skip: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """Full parameters under their Hugging Face names, one at a time, on every rank; see `ShardedWeights.full`.

        MTP modules are left out.
        """
        yield from self._weights.full({*skip, *mtp_shapes(self.shape)})

    def export(
        self,
        target: Path,
        *,
        precision: Precision | None = None,
        identity: dict[str, Any] | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        """Write the model as a Hugging Face folder, MTP modules included. Collective; the first rank writes.

        Args:
            target:    folder to write; it gets the config and the tokenizer of the model's folder.
            precision: number format; None: that of the weights here.
            identity:  what is exported; an interrupted export of the same goes on. None: it starts from nothing.
            on_bytes:  told of the bytes written.
        """
        precision = precision or ("bfloat16" if self.dtype == torch.bfloat16 else "float32")
        export, done = None, set()
        if self.world.is_first:
            export, done = begin_export(self._source, self.shape, target, precision, identity)
        message = [done]
        if self.world.size > 1:
            dist.broadcast_object_list(message, src=0)
        for name, tensor in self._exported(message[0]):
            if export is not None:
                put(export, store(name, tensor, precision), on_bytes)
        if export is not None:
            finish_export(export, self._source, precision, on_bytes, copies_mtp=not self.trains_mtp)

    @runs_on_cpu
    @torch.no_grad()
    def _exported(self, done: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """What a folder holds, but for the tensors in `done` and for MTP modules that are not trained."""
        if not self.trains_mtp:
            yield from self.weights(done)
            return
        copies = mtp_copies(self.shape)
        needed = {name for name, others in copies.items() if not {name, *others} <= {*done}}
        for name, tensor in self._weights.full({*done} - needed):
            for stored_name in (name, *copies.get(name, ())):
                yield stored_name, tensor

    # ------------------------------------------------------------------ reference, memory, checkpoints

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Copies of this rank's shards in host memory: the frozen reference policy."""
        return {
            name: torch.empty_like(p, device="cpu", pin_memory=p.is_cuda).copy_(p.detach())
            for name, p in self._weights.local.items()
        }

    def reference_logprobs(self, snapshot: dict[str, torch.Tensor], rows: list[PackedBatch]) -> list[torch.Tensor]:
        """`logprobs` under the weights of a snapshot; the policy's own weights are not written."""
        on_device = {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in snapshot.items()}
        with lent_weights(self._weights.local, on_device):
            return self.logprobs(rows)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Weights, gradients and optimizer state are in device memory inside, in host memory outside (GPU)."""
        self._offloader.restore()
        try:
            yield
        finally:
            self._offloader.offload()

    def _storages(self) -> Iterator[torch.Tensor]:
        yield from (tensor.data for tensor in self._weights.local.values())
        for chunk in self.chunks:
            for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
                yield buffer.grad_data
                if buffer.param_data is not None:
                    yield buffer.param_data
        for item in held(self.optimizer):
            if item.main is not None and not item.is_on_host:
                yield item.main.data
                yield from (x for x in item.inner.state.get(item.main, {}).values() if torch.is_tensor(x))

    def state_bytes(self) -> int:
        """Upper bound of the bytes that `save` writes for this rank (weights, fp32 master and moments, reference).

        Ranks with the same parameters share the writing.
        """
        total = 0.0
        for name, p in self._weights.local.items():
            copies = self.world.expert_dp_size if ".local_experts." in name else self.world.replicas
            total += p.numel() * (2 * p.element_size() + 12) / copies
        return int(total) + 2**20

    def _model(self) -> dist_checkpoint.Saved:
        return dist_checkpoint.Saved([chunk.module for chunk in self.chunks], self._weights.local)

    @runs_on_cpu
    def save(self, folder: Path, snapshot: dict[str, torch.Tensor] | None) -> None:
        """Write model, optimizer and reference into `folder` as a Megatron distributed checkpoint."""
        dist_checkpoint.save(folder, self._model(), self.optimizer, snapshot)

    @runs_on_cpu
    @torch.no_grad()
    def load(self, folder: Path, has_snapshot: bool) -> dict[str, torch.Tensor] | None:
        """Read back what `save` wrote; returns the reference's snapshot if there is one."""
        template = self.snapshot() if has_snapshot else None
        return dist_checkpoint.load(folder, self._model(), self.optimizer, template)


def _take_logp(out: torch.Tensor, row: PackedBatch, non_loss_data: bool) -> torch.Tensor:
    """What the schedule collects of a forward-only row."""
    return out[0].contiguous()


def _loss(
    loss_fn: LossFn, mtp_weight: float, out: torch.Tensor, row: PackedBatch
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """In Megatron's triple form. A token count of 0 says: the loss is a sum already, divide by nothing."""
    loss, metrics = loss_fn(out[0], out[1].detach(), row)
    metrics = {"loss": loss.detach(), **metrics}
    if mtp_weight > 0:  # DeepSeek-V3, eq. 24-25
        mtp_loss = -(out[2] * row.loss_weight).sum()
        metrics["mtp_loss"] = mtp_loss.detach()
        loss = loss + mtp_weight * mtp_loss
    return loss, torch.zeros([], dtype=torch.int, device=loss.device), metrics


def model_dtype(cfg: Config, world: World) -> torch.dtype:
    """dtype of the weights: as configured, or float32 on CPUs and bfloat16 on GPUs."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return names.get(cfg.model.dtype) or (torch.bfloat16 if world.device.type == "cuda" else torch.float32)
