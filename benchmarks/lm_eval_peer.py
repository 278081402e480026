"""The lm-evaluation-harness side of bench_evaluate.py: one evaluation by its hf backend for each line on stdin.

Runs under the Python of an environment that has lm-eval (`make lm-eval`) and imports nothing of r1engine. Answers on
stdout with one line of JSON: versions when ready, then the CPU seconds and the drawn tokens of each evaluation.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import time
from typing import Any


def main() -> None:
    job = json.loads(sys.argv[1])
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to stderr
    with tempfile.TemporaryDirectory(prefix="lm-eval-peer-") as cache:
        os.environ |= {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        evaluate = make_evaluate(job)
        packages = ("lm_eval", "transformers", "torch")
        print(json.dumps({name: importlib.metadata.version(name) for name in packages}), file=stream, flush=True)
        while sys.stdin.readline():
            before = time.process_time()
            tokens = evaluate()
            found = {"cpu_seconds": time.process_time() - before, "tokens": tokens}
            print(json.dumps(found), file=stream, flush=True)


def make_evaluate(job: dict[str, Any]) -> Any:
    """A function that evaluates once and returns the drawn tokens, those that end a reply included.

    `job`: `folder` of the model, `file` with lines of JSON (question, answer), `samples` of each, `max_tokens`, `slots`
    sequences of a batch, `stops` token ids, `threads`.
    """
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    torch.set_num_threads(job["threads"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job["folder"])
    lengths = {"batch_size": job["slots"], "max_length": job["max_length"]}
    model = HFLM(pretrained=job["folder"], tokenizer=tokenizer, device="cpu", dtype="float32", **lengths)
    stops, drawn = torch.tensor(job["stops"]), [0]
    generate = model._model_generate

    def counted(context: Any, *args: Any, **kwargs: Any) -> Any:
        whole = generate(context, *args, **kwargs)
        is_stop = torch.isin(whole[:, context.shape[1] :], stops).long()
        drawn[0] += int((is_stop.cumsum(dim=1) - is_stop == 0).sum())
        return whole

    model._model_generate = counted
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": job["file"]}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "output_type": "generate_until",
        "repeats": job["samples"],
        "generation_kwargs": {
            "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_gen_toks": job["max_tokens"],
            "until": [],
        },
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip

    def evaluate() -> int:
        drawn[0] = 0
        lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0, log_samples=True)
        return drawn[0]

    return evaluate


if __name__ == "__main__":
    main()
