"""In which number formats an exported folder holds its tensors: all in one, or the matrices in FP8 with scales."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from r1engine.hf.architecture import Architecture, Head
from r1engine.hf.export import Export, Stored
from r1engine.hf.files import read_json
from r1engine.hf.folder import Folder
from r1engine.hf.headers import BLOCK, SCALE
from r1engine.hf.score_folder import is_served_with_bias, score_files
from r1engine.hf.tensors import SCORE_BIAS, hf_shapes, is_float32, mtp_shapes
from r1kernels import fp8_quantize

Precision = Literal["float32", "bfloat16", "fp8"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What DeepSeek-V3's own checkpoint has in FP8: all projections of attention, experts and MLPs.
QUANTIZED = re.compile(r"\.(self_attn|mlp)\.(.*\.)?[a-z_]+_proj(_with_mqa)?\.weight$")


def stored(name: str, shape: tuple[int, ...], precision: Precision) -> dict[str, Stored]:
    """What a tensor becomes in the file: itself, or FP8 values and their scales."""
    if is_float32(name):
        return {name: Stored(shape, torch.float32)}
    if precision != "fp8":
        return {name: Stored(shape, DTYPES[precision])}
    if not QUANTIZED.search(name):
        return {name: Stored(shape, torch.bfloat16)}
    blocks = tuple(-(-size // BLOCK) for size in shape)
    return {name: Stored(shape, torch.float8_e4m3fn), name + SCALE: Stored(blocks, torch.float32)}


def store(name: str, tensor: torch.Tensor, precision: Precision) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that `stored` announces."""
    if precision == "fp8" and QUANTIZED.search(name):
        values, scale = fp8_quantize(tensor.contiguous(), block=(BLOCK, BLOCK))
        yield name, values
        yield name + SCALE, scale
        return
    for stored_name, form in stored(name, tuple(tensor.shape), precision).items():
        yield stored_name, tensor.to(form.dtype)


def config_json(config: dict[str, Any], precision: Precision) -> dict[str, Any]:
    """config.json of a folder in this precision."""
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    name = "bfloat16" if precision == "fp8" else precision
    config |= {key: name for key in ("dtype", "torch_dtype") if key in config}
    if precision == "fp8":
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }
    return config


def begin_export(
    source: Folder, model: Architecture, target: Path, precision: Precision, identity: dict[str, Any] | None
) -> tuple[Export, set[str]]:
    """The export of a whole model, its MTP modules behind the rest, and the tensors that need not come again."""
    mtp = mtp_shapes(model)
    shapes = hf_shapes(model) | {name: mtp[name] for name in source.mtp_names if name in mtp}
    parts = {name: stored(name, shape, precision) for name, shape in shapes.items()}
    tensors = {n: s for part in parts.values() for n, s in part.items()}
    if model.head == "score" and is_served_with_bias(source.path):
        tensors |= stored(SCORE_BIAS, (1,), precision)
    if identity is None:
        identity = {"unique": time.time_ns()}
    export = Export(target, tensors, source.path, identity=identity | {"precision": precision})
    return export, {name for name, part in parts.items() if part.keys() <= export.done}


def put(
    export: Export, tensors: Iterable[tuple[str, torch.Tensor]], on_bytes: Callable[[int], None] | None = None
) -> None:
    """Write tensors in their stored form."""
    for name, tensor in tensors:
        export.write(name, tensor)
        if on_bytes is not None:
            on_bytes(tensor.numel() * tensor.element_size())


def finish_export(
    export: Export,
    source: Folder,
    precision: Precision,
    on_bytes: Callable[[int], None] | None = None,
    *,
    head: Head = "tokens",
    copies_mtp: bool = True,
    card: str | None = None,
) -> None:
    """Copy the MTP modules from the source, where they were not trained; then the index and the other files."""
    for name in source.mtp_names if copies_mtp else ():
        if precision == "fp8" and source.dtype(name) == torch.float8_e4m3fn:
            put(export, source.stored(name), on_bytes)  # the very bytes
        else:
            put(export, store(name, source.read(name), precision), on_bytes)
    config = config_json(read_json(source.path / "config.json"), precision)
    if head == "tokens":
        export.finish({"config.json": config}, card)
    else:
        if is_served_with_bias(source.path):
            put(export, store(SCORE_BIAS, torch.zeros(1), precision))
        export.finish(score_files(source.path, config), card)


def model_dtype(setting: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """dtype of weights on a device: as `model.dtype` says, or float32 on CPUs and bfloat16 on GPUs."""
    if setting == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[setting]
