"""What the headers of a folder's safetensors files say, checked against the model. Without torch, and no tensor is
read but the bias of a score."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from r1engine.hf.architecture import Architecture, is_fp8_folder, quantization
from r1engine.hf.files import read_json
from r1engine.hf.tensors import SCORE_BIAS, hf_shapes, mtp_shapes

BLOCK = 128  # rows and columns that share a scale in DeepSeek's FP8 checkpoints
SCALE = "_scale_inv"  # what the name of a weight's scales ends in
BUFFERS = "rotary_emb."  # in the names of what old checkpoints store and everybody computes: inv_freq, cos_cached
INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16")


class Headers:
    """The files and types of a folder's tensors, by name; all are there, and of the shapes that they must have."""

    def __init__(self, path: Path, model: Architecture) -> None:
        """
        Raises:
            ValueError: a file is missing or cut off; there are two sets of weights; or tensors are missing, unexpected,
                misshaped, of a type that is not computed with, or FP8 without scales; every one is named (the first
                five of each kind).
        """
        self.path = path
        self.files: dict[str, Path] = {}
        self.types: dict[str, str] = {}  # as safetensors spells them
        shapes: dict[str, tuple[int, ...]] = {}
        for file, header in _read_files(path).items():
            for name, kind, shape in header:
                if BUFFERS not in name:
                    self.files[name], self.types[name], shapes[name] = file, kind, shape
        if model.is_tied:
            shapes.pop("lm_head.weight", None)  # some exporters write the tied copy as well
        if model.head == "score" and shapes.pop(SCORE_BIAS, None) is not None:
            self._check_bias()
        mtp = {name: shape for name, shape in mtp_shapes(model).items() if name in shapes}  # may be absent altogether
        self.mtp_names = tuple(mtp)
        required = hf_shapes(model) | mtp
        problems = self._type_problems(set(required))
        for name in [n for n in required if self.types.get(n) == "F8_E4M3"]:
            required[name + SCALE] = tuple(math.ceil(size / BLOCK) for size in required[name])
        self._check_fp8()
        check_tensors(f"model.path: {path}", shapes, required, problems)

    def _check_bias(self) -> None:
        """The score has no bias here: one of 0, as exports have it for servers, says the same."""
        with safe_open(self.files[SCORE_BIAS], "pt") as f:  # the only tensor that is read, of one number
            bias = f.get_tensor(SCORE_BIAS).float().tolist()
        if any(bias):
            raise ValueError(f"model.path: {self.path}: {SCORE_BIAS} is {bias}, required is 0 or none")

    def _type_problems(self, weights: set[str]) -> list[str]:
        found = {name: self.types[name] for name in sorted(weights & self.types.keys())}
        wrong = [f"{name} is {kind}" for name, kind in found.items() if kind not in (*FLOATS, "F8_E4M3")]
        bare = [n for n, kind in found.items() if kind == "F8_E4M3" and n + SCALE not in self.types]
        wrong += [f"{n}{SCALE} is {self.types[n + SCALE]}" for n in found if self.types.get(n + SCALE, "F32") != "F32"]
        required = ", ".join((*FLOATS, "F8_E4M3 with F32 scales"))
        problems = [_listed(wrong, f"of a type other than {required}")] if wrong else []
        return problems + ([_listed(bare, f"in FP8 without {SCALE}")] if bare else [])

    def _check_fp8(self) -> None:
        """config.json says FP8 where there are FP8 weights, in the blocks that are read here, and nowhere else."""
        path, has_fp8 = self.path / "config.json", "F8_E4M3" in self.types.values()
        found = quantization(self.path)
        if is_fp8_folder(self.path) != has_fp8:
            raise ValueError(
                f"{path}: quantization_config.quant_method is {found.get('quant_method')!r}, and the folder has "
                f"{'' if has_fp8 else 'no '}FP8 weights; required is 'fp8' with FP8 weights and only with them"
            )
        if has_fp8 and found.get("weight_block_size") != [BLOCK, BLOCK]:
            raise ValueError(
                f"{path}: quantization_config.weight_block_size is {found.get('weight_block_size')}, and the folder "
                f"has FP8 weights; required is [{BLOCK}, {BLOCK}]"
            )


Header = list[tuple[str, str, tuple[int, ...]]]  # (name, type, shape) of each tensor


def _read_files(path: Path) -> dict[Path, Header]:
    """The safetensors files, all that the index names, with their headers.

    Raises:
        ValueError: a file is missing or cut off, or there are two sets of weights.
    """
    files = sorted(path.glob("*.safetensors"))
    if not files:
        others = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in path.glob(kind))
        found = f", only {', '.join(others[:3])}: loading a pickle runs what it says" if others else ""
        raise ValueError(f"model.path: {path} has no *.safetensors file{found}")
    named = {file.name for file in files}
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{path / INDEX}: weight_map is {weight_map!r:.60}, required is an object of file names")
        named = set(weight_map.values())
        if missing := sorted(named - {file.name for file in files}):
            raise ValueError(f"model.path: {path}: {INDEX} names {_listed(missing, 'missing files')}")
    headers = {file: list(_header(file)) for file in files}
    _refuse_second_set(path, headers, named)
    return {file: header for file, header in headers.items() if file.name in named}


def _refuse_second_set(path: Path, headers: dict[Path, Header], named: set[str]) -> None:
    """Which of two sets is the newer one cannot be seen; transformers reads model.safetensors, others the index."""
    whole, problem = "model.safetensors", ""
    if whole not in named and path / whole in headers:
        problem = f"{whole}, and {min(named)} and others that {INDEX} names"
    where: dict[str, str] = {}  # tensor -> file
    for file, header in headers.items():
        for name, *_ in header:
            if where.setdefault(name, file.name) != file.name:
                problem = problem or f"{name} is in {where[name]} and in {file.name}"
    if problem:
        raise ValueError(
            f"model.path: {path} holds two sets of weights: {problem}; required is one, remove the files of the other"
        )


def _header(file: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    try:
        with safe_open(file, "np") as f:
            for name in f.keys():  # noqa: SIM118 (safe_open is no dict)
                part = f.get_slice(name)
                yield name, part.get_dtype(), tuple(part.get_shape())
    except OSError as error:
        raise ValueError(f"model.path: {file} cannot be read: {error}") from error
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
