"""Reads the tensors of a local Hugging Face folder, as much of each as is asked for; FP8 is dequantized on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from r1engine.hf.architecture import Architecture, read_json
from r1engine.model.state.rules import hf_shapes, mtp_shapes

BLOCK = 128  # rows and columns that share a scale in DeepSeek's FP8 checkpoints
SCALE = "_scale_inv"  # what the name of a weight's scales ends in
INDEX = "model.safetensors.index.json"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Folder:
    """The tensors of a folder: checked against the model when opened, read when asked for.

    Opening reads the headers only. Reading maps one tensor's file for the time of the call, so that a rank's host
    memory never holds more than what it asked for.
    """

    def __init__(self, path: Path, model: Architecture) -> None:
        """
        Raises:
            ValueError: a file is missing or cut off, or tensors are missing, unexpected, misshaped, of a type that is
                not computed with, or FP8 without scales; every one is named (the first five of each kind).
        """
        self.path = path
        self._files: dict[str, Path] = {}
        self._types: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in _files(path):
            for name, kind, shape in _header(file):
                self._files[name], self._types[name], shapes[name] = file, kind, shape
        if model.is_tied:
            shapes.pop("lm_head.weight", None)  # some exporters write the tied copy as well
        self.is_fp8 = "F8_E4M3" in self._types.values()
        mtp = {name: shape for name, shape in mtp_shapes(model).items() if name in shapes}  # may be absent altogether
        self.mtp_names = tuple(mtp)
        required = hf_shapes(model) | mtp
        problems = self._type_problems(set(required))
        for name in [n for n in required if self._types.get(n) == "F8_E4M3"]:
            required[name + SCALE] = tuple(math.ceil(size / BLOCK) for size in required[name])
        if self.is_fp8:
            self._check_blocks()
        check_tensors(f"model.path: {path}", shapes, required, problems)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> torch.Tensor:
        """A tensor, or the part of it that `index` takes; FP8 as float32."""
        if self._types[name] != "F8_E4M3":
            return self._raw(name, index)
        weight = self._raw(name, index)
        shape = (weight.shape[0], weight.shape[1])
        starts = [(index[d].start or 0) if d < len(index) else 0 for d in range(2)]
        blocks = tuple(slice(a // BLOCK, -(-(a + n) // BLOCK)) for a, n in zip(starts, shape, strict=True))
        scales = self._raw(name + SCALE, blocks)
        return dequantize(weight, scales, offset=(starts[0] % BLOCK, starts[1] % BLOCK))

    def stored(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) as the file has it; for an FP8 weight, its scales too."""
        yield name, self._raw(name)
        if self._types[name] == "F8_E4M3":
            yield name + SCALE, self._raw(name + SCALE)

    def dtype(self, name: str) -> torch.dtype:
        """What the file has."""
        return FLOATS.get(self._types[name], torch.float8_e4m3fn)

    def _raw(self, name: str, index: tuple[slice, ...] = ()) -> torch.Tensor:
        with safe_open(self._files[name], "pt") as f:
            return (f.get_slice(name)[index] if index else f.get_tensor(name)).clone()

    def _type_problems(self, weights: set[str]) -> list[str]:
        found = {name: self._types[name] for name in sorted(weights & self._types.keys())}
        wrong = [f"{name} is {kind}" for name, kind in found.items() if kind not in (*FLOATS, "F8_E4M3")]
        bare = [n for n, kind in found.items() if kind == "F8_E4M3" and n + SCALE not in self._types]
        wrong += [
            f"{n}{SCALE} is {self._types[n + SCALE]}" for n in found if self._types.get(n + SCALE, "F32") != "F32"
        ]
        required = ", ".join((*FLOATS, "F8_E4M3 with F32 scales"))
        problems = [_listed(wrong, f"of a type other than {required}")] if wrong else []
        return problems + ([_listed(bare, f"in FP8 without {SCALE}")] if bare else [])

    def _check_blocks(self) -> None:
        found = (read_json(self.path / "config.json").get("quantization_config") or {}).get("weight_block_size")
        if found != [BLOCK, BLOCK]:
            raise ValueError(
                f"{self.path / 'config.json'}: quantization_config.weight_block_size is {found}, and the folder has "
                f"FP8 weights; required is [{BLOCK}, {BLOCK}]"
            )


def dequantize(weight: torch.Tensor, scales: torch.Tensor, *, offset: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """FP8 times the scale of its 128 x 128 block.

    Args:
        weight: [N, K] float8_e4m3fn.
        scales: [blocks of N, blocks of K] float32.
        offset: where in the first block `weight` begins.

    Returns:
        [N, K] float32.
    """
    rows = (torch.arange(weight.shape[0]) + offset[0]) // BLOCK
    columns = (torch.arange(weight.shape[1]) + offset[1]) // BLOCK
    return weight.float() * scales[rows[:, None], columns]


def _files(path: Path) -> list[Path]:
    """The safetensors files, all that the index names."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"model.path: {path} has no *.safetensors file")
    if (path / INDEX).is_file():
        named = set(read_json(path / INDEX)["weight_map"].values())
        if missing := sorted(named - {file.name for file in files}):
            raise ValueError(f"model.path: {path}: {INDEX} names {_listed(missing, 'missing files')}")
        files = [path / name for name in sorted(named)]
    return files


def _header(file: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    try:
        with safe_open(file, "pt") as f:
            for name in f.keys():  # noqa: SIM118 (safe_open is no dict)
                part = f.get_slice(name)
                yield name, part.get_dtype(), tuple(part.get_shape())
    except SafetensorError as error:
        size = file.stat().st_size
        raise ValueError(
            f"model.path: {file} of {size} bytes is no whole safetensors file ({error}); copy it again"
        ) from error


def _listed(names: list[str], what: str) -> str:
    return f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def check_tensors(
    who: str, found: dict[str, tuple[int, ...]], required: dict[str, tuple[int, ...]], problems: list[str]
) -> None:
    """Compare tensor names and shapes with what the model needs.

    Raises:
        ValueError: naming every missing, unexpected and misshaped tensor (the first five of each), and `problems`.
    """
    missing, extra = sorted(required.keys() - found.keys()), sorted(found.keys() - required.keys())
    shaped = [f"{n} is {found[n]}, required {s}" for n, s in required.items() if n in found and found[n] != s]
    kinds = (("missing", missing), ("unexpected", extra), ("misshaped", shaped))
    problems = [_listed(names, what) for what, names in kinds if names] + problems
    if problems:
        raise ValueError(f"{who}: tensors do not fit config.json: {'; '.join(problems)}")
