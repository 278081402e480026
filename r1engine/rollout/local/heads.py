"""The heads of process reward models, told apart by the names of their tensors: hidden states become probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

from r1engine.hf.architecture import Architecture
from r1engine.hf.tensors import SCORE, hf_shapes
from r1engine.rollout.local.compiled import linear

LINEAR = ("score.weight", "score.bias")  # of one or two labels; sequence and token classification, ours
TWO_LAYERS = ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias")  # Qwen2.5-Math-PRM
VALUE = ("v_head.summary.weight", "v_head.summary.bias")  # Skywork-o1-PRM
OUTPUT = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


class ScoreTensors:
    """A head: what it computes follows from which tensors there are."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], pair: tuple[int, int] | None = None) -> None:
        """
        Args:
            tensors: of one head, under the names above, float32.
            pair:    tokens of "good" and "bad" where the head is a language model's output matrix.

        Raises:
            ValueError: they are of none of the heads, or have another shape.
        """
        self._tensors = dict(tensors)
        if pair is not None:
            matrix = tensors.get(OUTPUT, tensors.get(EMBEDDING))
            if matrix is None or max(pair) >= len(matrix):
                raise ValueError(f"found no output matrix with the tokens {pair}, required {OUTPUT}")
            good, bad = matrix[pair[0]], matrix[pair[1]]
            self._tensors = {SCORE: (good - bad).unsqueeze(0)}  # P(good) of the two is sigmoid of the difference
        if not self._tensors.keys() & {SCORE, TWO_LAYERS[0], VALUE[0]}:
            raise ValueError(f"found the head {sorted(tensors)}, required {SCORE}, {TWO_LAYERS[0]} or {VALUE[0]}")
        labels = self.logits(torch.zeros(1, self._width(), device=self._first().device)).shape[1]
        if labels not in (1, 2):
            raise ValueError(f"found a head of {labels} labels, required 1 or 2")

    def probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T] float32 of [T, D]: the softmax's second of two labels, "right"; of one the logit of the other is 0.

        That is a sigmoid, but PyTorch's rounds by where a number stands. All rows of a softmax are computed alike.
        """
        logits = self.logits(hidden.float())
        return F.pad(logits, (2 - logits.shape[1], 0)).softmax(-1)[:, 1]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, labels] float32 of [T, D] float32."""
        t = self._tensors
        if TWO_LAYERS[0] in t:
            inner = F.relu(linear(hidden, t[TWO_LAYERS[0]], t[TWO_LAYERS[1]]))
            return linear(inner, t[TWO_LAYERS[2]], t[TWO_LAYERS[3]])
        names = VALUE if VALUE[0] in t else LINEAR
        return linear(hidden, t[names[0]], t.get(names[1]))

    def _first(self) -> torch.Tensor:
        return next(iter(self._tensors.values()))

    def _width(self) -> int:
        name = next(name for name in (SCORE, TWO_LAYERS[0], VALUE[0]) if name in self._tensors)
        return self._tensors[name].shape[1]


def read_scored(
    folder: Path, arch: Architecture, pair: tuple[int, int] | None, device: torch.device
) -> tuple[Iterator[tuple[str, torch.Tensor]], ScoreTensors]:
    """(name, tensor) of the decoder of a folder for `Decoder.weights.load`, and its head.

    Args:
        folder: with *.safetensors.
        arch:   of `read_trunk`.
        pair:   as of `ScoreTensors`; of other folders None.
        device: of the head.

    Raises:
        ValueError: tensors are missing, or the head is none of those that are known.
    """
    files = {name: file for file in sorted(folder.glob("*.safetensors")) for name in _names(file)}
    trunk = [name for name in hf_shapes(arch) if name != SCORE]
    if lost := [name for name in trunk if name not in files]:
        raise ValueError(f"{folder}: found {len(files)} tensors, without {len(lost)} of the decoder such as {lost[0]}")
    output = OUTPUT if OUTPUT in files else EMBEDDING
    of_head = (output,) if pair is not None else (*LINEAR, *TWO_LAYERS, *VALUE)
    found = {name: _read(files[name], name).float().to(device) for name in of_head if name in files}
    try:
        head = ScoreTensors(found, pair)
    except ValueError as error:
        hint = "" if pair else "; of a language model with good and bad tokens scorer.format must tell which"
        raise ValueError(f"{folder}: {error}{hint}") from error

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in trunk:
            yield name, _read(files[name], name)
        yield SCORE, torch.zeros(1, arch.hidden_size)  # the decoder's own head is not used

    return tensors(), head


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)
