"""The Megatron-core model: its layers, and a GPTModel that maps a packed row to log-probabilities or scores."""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from r1engine.batch import PackedBatch, TokenOutputs
from r1engine.hf.architecture import Architecture, Mla
from r1engine.hf.rotary import rotary_frequencies
from r1engine.model.layers.attention import RowLayout, packed_attention, rotate, row_layout
from r1engine.model.layers.context import share_of_row
from r1engine.model.layers.fp8 import linears
from r1engine.model.layers.latent import latent_attention_spec
from r1engine.model.layers.mtp import Mtp
from r1engine.model.layers.pointwise import rms_norm, swiglu
from r1engine.model.layers.replay_router import ExpertsLayer, ReplayRouter
from r1engine.model.layers.score import ScoreHead, scores
from r1kernels import GrpoObjective, LogProb, linear_grpo_loss, linear_logprob


class RMSNorm(torch.nn.Module):
    """RMSNorm whose weight is marked for sequence parallelism (Megatron's own without TE refuses it)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's mark
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedMLP(MLP):
    """Megatron's MLP with one operation between its products. (Its own adds an offset of 0 to all of `up`.)"""

    def __init__(self, config: TransformerConfig) -> None:
        column, row = linears(config)
        super().__init__(config, MLPSubmodules(linear_fc1=column, linear_fc2=row))

    def forward(self, hidden_states: torch.Tensor, padding_mask: None = None) -> tuple[torch.Tensor, None]:
        gate_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(gate_up))


class LatentNorm(RMSNorm):
    """The norm of MLA's latents, whose epsilon is not the model's."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, Mla.norm_eps)


class PackedAttention(torch.nn.Module):
    """Megatron's core_attention over a packed row."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None,
        softmax_scale: float | None,
        pg_collection: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = config.softmax_scale

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention_mask: None,
        /,
        *,
        attn_mask_type: AttnMaskType,
        attention_bias: None,
        packed_seq_params: RowLayout,
    ) -> torch.Tensor:
        q, k = rotate(q, packed_seq_params), rotate(k, packed_seq_params)
        if packed_seq_params.share is not None:
            k, v = packed_seq_params.gather(torch.cat([k, v], dim=-1)).chunk(2, dim=-1)
        return packed_attention(q, k, v, packed_seq_params, scale=self.softmax_scale).flatten(1)


class PackedGPT(GPTModel):
    """A GPTModel whose last stage returns log-probabilities, or scores; the logits never leave it."""

    def __init__(self, model: Architecture, temperature: float, mtp: list[ModuleSpec], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model, self.temperature = model, temperature
        self.frequencies = rotary_frequencies(model).to(torch.cuda.current_device())
        self.drafts = Mtp(self.config, mtp, RMSNorm, self.vp_stage, self.pg_collection) if mtp else None
        if mtp and not self.pre_process:  # the first stage's matrix, brought here before each update
            matrix = torch.empty_like(self.output_layer.weight, requires_grad=False)
            self.register_buffer("mtp_embedding", matrix, persistent=False)
        if model.head == "score" and self.post_process:
            del self.output_layer
            self.score = ScoreHead(self.config)
        self.lent_score: torch.Tensor | None = None  # [1, D] of a reward model, while its weights are lent

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's description of the shards; what it adds for language models is of the output matrix."""
        if self.model.head == "tokens":
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)

    def forward(self, row: PackedBatch, objective: GrpoObjective | None = None) -> TokenOutputs | torch.Tensor:
        """One packed row through this pipeline stage: its outputs from the last, hidden states from the others.

        With an objective whose slopes are known token by token the last stage computes the loss, too: see `_with_loss`.
        """
        cp, dtype = self.pg_collection.cp, self.config.params_dtype
        share = share_of_row(row.cu_seqlens, cp.rank(), cp.size(), cp) if cp.size() > 1 else None
        layout = row_layout(row, self.frequencies, dtype, magnitude=self.model.rope_magnitude, share=share)
        tokens, positions = layout.held(row.tokens), layout.held(row.positions)
        hidden = self.embedding(tokens[None], positions[None]) if self.pre_process else None
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=layout)
        if not self.post_process:
            return hidden
        if self.model.head == "score" or self.lent_score is not None:
            weight = self.score.weight if self.lent_score is None else self.lent_score
            score = layout.whole(scores(hidden, weight, self.config.sequence_parallel))
            return TokenOutputs(torch.zeros_like(score), torch.zeros_like(score), score=score)
        is_tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if is_tied else self.output_layer.weight
        is_known = row.behaviour_logp is not None or row.stale is None  # what the ratios are against
        if objective is not None and not objective.needs_sequences and is_known:
            outputs = self._with_loss(hidden, weight, row, layout, objective)
        else:
            predicted = self._predict(hidden, weight, layout.held(row.tokens.roll(-1)))
            outputs = _by_token(predicted.logp, predicted.entropy, row, layout)
        if self.drafts is None or not self.training:
            return outputs
        matrix = self.embedding.word_embeddings.weight if self.pre_process else self.mtp_embedding
        draft_logp = self.drafts(
            hidden,
            row.tokens,
            row.positions,
            matrix.detach(),
            layout,
            lambda further, labels: self._predict(further, weight.detach(), labels).logp,
        )
        return outputs._replace(draft_logp=draft_logp)

    def _with_loss(
        self, hidden: torch.Tensor, weight: torch.Tensor, row: PackedBatch, layout: RowLayout, objective: GrpoObjective
    ) -> TokenOutputs:
        """Outputs with the loss of the row.

        Its gradient is made here, from the logits while they are there: three products with the matrix in place of
        four. The matrix's own goes straight into Megatron's buffer, for a loss gradient of 1.
        """

        def ahead(of_row: torch.Tensor) -> torch.Tensor:
            return layout.held(of_row.roll(-1))

        old, ref = (None if x is None else ahead(x) for x in (row.behaviour_logp, row.ref_logp))
        found = linear_grpo_loss(
            hidden.squeeze(1),
            weight,
            ahead(row.tokens),
            old,
            ahead(row.advantage),
            ahead(row.loss_weight),
            objective,
            ref_logp=ref,
            rollout_logp=ahead(row.rollout_logp),
            **self._head(weight),
        )
        loss, *sums = layout.total(torch.stack([found.loss.detach(), *found.metrics])).unbind()
        metrics = dict(zip(found.metrics._fields, sums, strict=True))
        # The value is that of the row, the gradient that of the tokens here.
        in_row = found.loss + (loss - found.loss.detach())
        return _by_token(found.logp, found.entropy, row, layout)._replace(loss=(in_row, metrics))

    def _predict(self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> LogProb:
        return linear_logprob(hidden.squeeze(1), weight, labels, **self._head(weight))

    def _head(self, weight: torch.Tensor) -> dict[str, Any]:
        """What the ops of the output layer are told of it."""
        bias = None
        if padding := self._padding_rows():
            bias = weight.new_zeros(len(weight))
            bias[-padding:] = -1e30
        return {
            "bias": bias,
            "temperature": self.temperature,
            "tp_group": self.pg_collection.tp if self.pg_collection.tp.size() > 1 else None,
            "sequence_parallel": self.config.sequence_parallel,
            "main_grad": getattr(weight, "main_grad", None),
        }

    def _padding_rows(self) -> int:
        """How many rows of this rank's part of the output matrix are no tokens."""
        rank, ranks = self.pg_collection.tp.rank(), self.pg_collection.tp.size()
        local = self.vocab_size // ranks
        return min(local, max(0, (rank + 1) * local - self.model.vocab_size))


def _by_token(logp: torch.Tensor, entropy: torch.Tensor | None, row: PackedBatch, layout: RowLayout) -> TokenOutputs:
    """Position t predicts token t+1; entry t of the result belongs to token t."""
    assert entropy is not None  # as the ops give by default
    out = layout.whole(torch.stack([logp, entropy])).roll(1, dims=1)
    logp, entropy = out.masked_fill(row.positions == 0, 0.0).unbind()
    return TokenOutputs(logp, entropy)


def build(
    model: Architecture,
    config: TransformerConfig,
    temperature: float,
    *,
    experts: Literal["megatron", "fused", "fused_fp8"] = "megatron",
    with_mtp: bool = False,
    stage: int = 0,
    chunk: int = 0,
) -> PackedGPT:
    """One chunk of layers of a pipeline stage, weights not yet set.

    Args:
        model:       the whole model.
        config:      of `transformer_config`.
        temperature: divides the logits.
        experts:     who computes the layers with experts: Megatron's MoELayer, or model/layers/moe.py.
        with_mtp:    whether the last stage has the MTP modules, to be trained.
        stage:       pipeline stage of this rank.
        chunk:       which of the stage's chunks (0 without virtual pipelining).
    """
    pp, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size or 1
    vp_stage = chunk if chunks > 1 else None
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=stage)
    mlps = {False: GatedMLP, True: _experts_spec(config, experts) if model.moe is not None else None}
    layers = [_layer_spec(model, config, mlps[model.has_experts(i)], i) for i in range(first, first + count)]
    post_process = stage == pp - 1 and chunk == chunks - 1
    behind = range(model.num_layers, model.num_layers + model.num_mtp_layers if with_mtp and post_process else 0)
    gpt = PackedGPT(
        model,
        temperature,
        [_layer_spec(model, config, mlps[model.has_experts(i)], i) for i in behind],
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm),
        vocab_size=padded_vocabulary(model.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=model.max_positions,
        pre_process=stage == 0 and chunk == 0,
        post_process=post_process,
        share_embeddings_and_output_weights=model.is_tied,
        position_embedding_type="none",  # the rotary embedding is part of the attention
        vp_stage=vp_stage,
    )
    for name, parameter in gpt.named_parameters():
        if ".experts." in name:
            # Reduce its gradient over the ranks that hold the same expert. Megatron takes it for a dense parameter
            # where expert = 1, and leaves out the tensor-parallel ranks, which see other tokens.
            parameter.allreduce = False
    if torch.get_default_device().type == "meta":  # for its shapes alone
        return gpt
    return gpt.to(torch.cuda.current_device())  # Megatron makes a router's weight on the host


def padded_vocabulary(size: int, tensor: int) -> int:
    """Rows of the embedding: the vocabulary, filled up to a multiple of the tensor-parallel size."""
    return -(-size // tensor) * tensor


def _experts_spec(config: TransformerConfig, experts: str) -> ModuleSpec | type:
    if experts != "megatron":
        from r1engine.model.layers.moe import moe_layer_spec

        return moe_layer_spec(config, is_fp8=experts == "fused_fp8")
    column, row = linears(config)
    mlp = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    submodules = MoESubmodules(
        router=ReplayRouter,
        experts=ModuleSpec(SequentialMLP, submodules=mlp),
        shared_experts=ModuleSpec(SharedExpertMLP, submodules=mlp),
    )
    return ModuleSpec(MoELayer, submodules=submodules)


def _layer_spec(model: Architecture, config: TransformerConfig, mlp: ModuleSpec | type, layer: int) -> ModuleSpec:
    column, row = linears(config)
    if model.mla is not None:
        attention = latent_attention_spec(model, linears(config), LatentNorm)
    else:
        qk_norm = RMSNorm if model.has_qk_norm else IdentityOp
        attention = ModuleSpec(
            SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=column,
                core_attention=PackedAttention,
                linear_proj=row,
                q_layernorm=qk_norm,
                k_layernorm=qk_norm,
            ),
        )
    submodules = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNorm,
        mlp=mlp,
        mlp_bda=get_bias_dropout_add,
    )
    return ModuleSpec(ExpertsLayer if model.has_experts(layer) else TransformerLayer, submodules=submodules)
