"""FAKE, see the package: a linear layer with tensor and sequence parallelism, in FP8 inside `fp8_autocast`."""

import math

import torch
import torch.distributed as dist

from transformer_engine.common.recipe import Float8BlockScaling, Format
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

LARGEST = 448.0  # of E4M3
BLOCK = 128


def quantize(x, rows, columns):
    """The values of a matrix on the grid of E4M3, each block of rows x columns scaled by a power of two."""
    height, width = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -width % columns, 0, -height % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scale = torch.where(amax > 0, torch.exp2(torch.floor(torch.log2(LARGEST / amax))), 1.0)
    rounded = (blocks * scale).to(torch.float8_e4m3fn).float() / scale
    return rounded.flatten(2, 3).flatten(0, 1)[:height, :width]


def check_shape(x, weight):
    """What the cast and the three products demand: the inner side of each a multiple of 16."""
    tokens = math.prod(x.shape[:-1])
    if tokens % 16 or any(side % 16 for side in weight.shape):
        raise ValueError(f"FP8 execution: {tokens} tokens, weight {tuple(weight.shape)}, required multiples of 16")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, copy, layer):
        ctx.layer, ctx.shape, ctx.is_fp8 = layer, x.shape, copy is not None
        flat = x.flatten(0, -2)
        gathers = layer.parallel_mode == "column" and layer.sequence_parallel
        flat = gather(flat, layer, ctx.is_fp8) if gathers else flat
        ctx.save_for_backward(flat, weight if copy is None else copy)
        if copy is None:
            out = flat @ weight.t()
        else:
            out = (quantize(flat, 1, BLOCK) @ copy.t()).to(x.dtype)
        if layer.parallel_mode == "row":
            out = scatter(out, layer) if layer.sequence_parallel else reduce(out, layer)
        return out.view(-1, *x.shape[1:-1], out.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        (x, weight), layer = ctx.saved_tensors, ctx.layer
        grad = grad.flatten(0, -2)
        if layer.parallel_mode == "row" and layer.sequence_parallel:
            grad = gather(grad, layer, ctx.is_fp8)
        if ctx.is_fp8:
            grad_x = (quantize(grad, 1, BLOCK) @ weight).to(grad.dtype)
            grad_weight = (quantize(grad, BLOCK, 1).t() @ quantize(x, BLOCK, 1)).to(grad.dtype)
        else:
            grad_x, grad_weight = grad @ weight, grad.t() @ x
        if layer.parallel_mode == "column":
            grad_x = scatter(grad_x, layer) if layer.sequence_parallel else reduce(grad_x, layer)
        return grad_x.view(ctx.shape), grad_weight, None, None


def gather(x, layer, is_fp8):
    if is_fp8 and (len(x) % BLOCK or x.shape[1] % BLOCK):
        raise AssertionError(f"All-gather requires quantizable tensor, got {tuple(x.shape)}")
    whole = x.new_empty(len(x) * layer.tp_size, x.shape[1])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=layer.tp_group)
    return whole


def scatter(x, layer):
    part = x.new_empty(len(x) // layer.tp_size, x.shape[1])
    dist.reduce_scatter_tensor(part, x.contiguous(), group=layer.tp_group)
    return part


def reduce(x, layer):
    if layer.tp_size > 1:
        dist.all_reduce(x, group=layer.tp_group)
    return x


class Linear(TransformerEngineBaseModule):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        save_original_input=False,
        name=None,
    ):
        super().__init__()
        assert not (fuse_wgrad_accumulation or parameters_split or delay_wgrad_compute or symmetric_ar_type)
        self.tp_group, self.tp_size = tp_group, tp_size if tp_group is None else dist.get_world_size(tp_group)
        self.parallel_mode, self.use_bias, self.return_bias = parallel_mode, bias, return_bias
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.save_original_input = save_original_input
        like = {"device": device, "dtype": params_dtype or torch.get_default_dtype()}
        self.weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, **like))
        init_method(self.weight)
        self._mark(self.weight, 1 if parallel_mode == "row" else 0)
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(self.out_features, **like))
            if parallel_mode == "column":
                self._mark(self.bias, 0)
        else:
            self.bias = torch.empty(0, **like)

    def _mark(self, parameter, dim):
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        copy = self._copy(inp, is_first_microbatch) if FP8GlobalStateManager.is_fp8_enabled() else None
        out = _Linear.apply(inp, self.weight, copy, self)
        if self.return_bias:
            return out, self.bias
        return out + self.bias if self.use_bias else out

    @torch.no_grad()
    def _copy(self, inp, is_first_microbatch):
        """The quantized weight, made anew at the first micro-batch and kept for the others."""
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        assert isinstance(recipe, Float8BlockScaling) and recipe.fp8_format == Format.E4M3
        check_shape(inp, self.weight)
        self.fp8_meta = {"recipe": recipe}
        copy = self._fp8_workspaces.get("weight")
        if copy is None or is_first_microbatch is not False:
            copy = quantize(self.weight, BLOCK, BLOCK)
        if is_first_microbatch is not None:
            self._fp8_workspaces["weight"] = copy
        return copy
