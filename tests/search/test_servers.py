"""Scores over servers: which requests are made of which server, and what is refused. The real ones are in
tests/rollout/sglang/test_real_scorers.py."""

import json
import math

import pytest
import real
from model_folders import SIZES, save_model
from model_server import ModelServer

from r1engine.batch import Prompt
from r1engine.config import StepScorerSection
from r1engine.data.question import Question
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.search.scored_folder import NAME, ScoredFolder
from r1engine.search.servers import ServerScorer
from r1engine.search.tree import StepPath


def logit(tokens) -> float:
    return sum(tokens) % 7 - 3.0


def probability(tokens) -> float:
    return 1 / (1 + math.exp(-logit(tokens)))


class Stand(ModelServer):
    """Answers as SGLang does, with a logit that is known."""

    def __init__(self, architecture="Qwen2ForSequenceClassification", ignores_positions=False, **settings):
        self.ignores_positions, self.meta = ignores_positions, {"cached_tokens": 1}
        self.model = {"architectures": [architecture], "is_generation": architecture.endswith("ForCausalLM")}
        self.settings = {"version": "0.5.23", "disable_radix_cache": False, "chunked_prefill_size": 2048} | settings
        super().__init__(lambda path, body: (200, json.dumps(self.answer(path, body)).encode()))

    def answer(self, path, body):
        if not body:
            return {"/model_info": self.model, "/server_info": self.settings}.get(path, "flushed")
        tokens, meta = body["input_ids"], self.meta
        if path == "/generate":
            start, (good, bad) = body["logprob_start_len"], body["token_ids_logprob"]
            rows = [[[0.0, bad, None], [logit(tokens[:i]), good, None]] for i in range(start, len(tokens))]
            return {"meta_info": meta | {"input_token_ids_logprobs": rows}}
        at = body.get("token_indices_to_pool")
        if at is None or self.ignores_positions:
            return {"embedding": [logit(tokens)], "meta_info": meta}
        return {"embedding": [[logit(tokens[: i + 1])] for i in at], "meta_info": meta}

    @property
    def asked(self):
        return [(path, body) for path, body, _ in self.seen if not path.endswith("_info")]


@pytest.fixture
def serve():
    begun = []

    def start(*args, **settings):
        begun.append(Stand(*args, **settings))
        return begun[-1]

    yield start
    for server in begun:
        server.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, "qwen2")
    (folder / NAME).write_text(ScoredFolder(("w9",), None, "value").to_text())
    return folder


def opened(folder, *urls, name="own", **keys) -> ServerScorer:
    cfg = StepScorerSection(path=folder, urls=list(urls), **keys)
    return ServerScorer(folder, name, load_tokenizer(folder), cfg)


def path(number=0, scored=0) -> StepPath:
    steps = ((5, 6), (7,), (8, 9), (1,))  # the last one is the token that ends the completion
    return StepPath(Prompt(number, [3, 4], "", Question("w2", "", "math", "here")), steps, scored)


WHOLE = {"disable_radix_cache": True, "chunked_prefill_size": -1}
EXPECTED = [probability([3, 4, 5, 6]), probability([3, 4, 5, 6, 7])] + [probability([3, 4, 5, 6, 7, 8, 9])] * 2


def test_with_a_radix_cache_a_step_is_a_request(folder, serve):
    server = serve()
    scorer = opened(folder, server.url)
    assert scorer.labels == "value" and scorer.score([path()]) == [pytest.approx(EXPECTED)]
    assert [body["input_ids"] for _, body in server.asked] == [[3, 4, 5, 6], [3, 4, 5, 6, 7], [3, 4, 5, 6, 7, 8, 9]]
    assert scorer.tokens_run == 3 + 4 + 6  # without those that the server says it had
    server.meta = {}
    server.seen.clear()
    assert scorer.score([path(scored=1), path(scored=4)]) == [pytest.approx(EXPECTED[1:]), []]
    assert len(server.asked) == 2 and scorer.tokens_run is None  # it says no more what it had
    scorer.clear()
    assert server.asked[-1][0] == "/flush_cache"


def test_without_one_a_path_is_a_request(folder, serve):
    server = serve(**WHOLE)
    scorer = opened(folder, server.url)
    server.seen.clear()
    assert scorer.score([path()]) == [pytest.approx(EXPECTED)]
    [(_, body)] = server.asked
    assert body == {"input_ids": [3, 4, 5, 6, 7, 8, 9], "token_indices_to_pool": [3, 4, 6]}


def test_two_answers_of_a_language_model(folder, serve, tmp_path):
    save_model(tmp_path, "qwen2", **SIZES | {"vocab_size": len(real.BYTES)})
    tokenizer = real.add_tokenizer(tmp_path)
    server = serve("Qwen2ForCausalLM")
    scorer = opened(tmp_path, server.url, name="math_shepherd")
    [found] = scorer.score([path(scored=2)])
    [(_, body)] = server.asked
    tokens, at = body["input_ids"], body["logprob_start_len"]
    assert body["token_ids_logprob"] == [tokenizer.token_to_id("+"), tokenizer.token_to_id("-")]
    assert found[0] == pytest.approx(probability(tokens[: at + 1]))
    assert len(found) == 2 and tokens[-1] == tokens[-2]  # the entry behind the last place
    with pytest.raises(ValueError, match=r"found Qwen2ForSequenceClassification .*, required a language model"):
        opened(tmp_path, serve().url, name="math_shepherd")
    with pytest.raises(ValueError, match=r"found token 0 for both \+ and -, required one for each"):
        opened(folder, server.url, name="math_shepherd")


def test_a_question_keeps_its_server_until_that_one_is_gone(folder, serve):
    first, second = serve(), serve()
    scorer = opened(folder, first.url, second.url, tries=1, timeout_seconds=5)
    scorer.score([path(0), path(1), path(2)])
    assert (len(first.asked), len(second.asked)) == (6, 3)
    second.stop()
    assert scorer.score([path(1)]) == [pytest.approx(EXPECTED)] and len(first.asked) == 9
    first.stop()
    with pytest.raises(RuntimeError, match=r"scorer http://127.0.0.1:\d+/classify: "):
        scorer.score([path(1)])


def test_servers_that_cannot_score_are_refused(folder, serve):
    llama = serve(architecture="LlamaForSequenceClassification", ignores_positions=True, **WHOLE)
    with pytest.raises(
        ValueError, match=r"1 score for 2 steps from LlamaForSequenceClassification \(sglang 0.5.23\), which ignores"
    ):
        opened(folder, llama.url)
    opened(folder, serve(architecture="LlamaForSequenceClassification", ignores_positions=True).url)  # one by one
    with pytest.raises(ValueError, match=r"found Qwen2ForCausalLM \(sglang 0.5.23\), required a model with a score"):
        opened(folder, serve(architecture="Qwen2ForCausalLM").url)
    scorer = opened(folder, serve().url)
    with pytest.raises(ValueError, match="found a solution of 128 tokens, required at most 127: "):
        scorer.score([path()._replace(steps=((5,) * 126,))])
    with pytest.raises(ValueError, match="found token 96, required below 96"):  # which may end a server on a GPU
        scorer.score([path()._replace(steps=((5, 96),))])


def test_what_a_server_does_not_score_is_no_score(folder, serve, tmp_path):
    server = serve()
    scorer = opened(folder, server.url)
    server.answer = lambda path, body: {"embedding": [float("nan")], "meta_info": {}}
    with pytest.raises(ValueError, match=r"found \[nan\] from Qwen2.* \(sglang 0.5.23\), required 1 or 2 finite"):
        scorer.score([path()])
    server.answer = lambda path, body: {"error": "no"}
    with pytest.raises(ValueError, match=r"found \{'error': 'no'\}, required a reply of /classify"):
        scorer.score([path()])
    save_model(tmp_path, "qwen2", **SIZES | {"vocab_size": len(real.BYTES)})
    good = real.add_tokenizer(tmp_path).token_to_id("+")
    server = serve("Qwen2ForCausalLM")
    scorer = opened(tmp_path, server.url, name="math_shepherd")
    row = [[-1.0, good, None]]  # nothing of the other answer
    server.answer = lambda path, body: {
        "meta_info": {"input_token_ids_logprobs": [row] * (len(body["input_ids"]) - body["logprob_start_len"])}
    }
    with pytest.raises(ValueError, match=r"found \[None, -1.0\] from Qwen2ForCausalLM"):
        scorer.score([path()])
    server.answer = lambda path, body: {"meta_info": {"input_token_ids_logprobs": [row]}}
    with pytest.raises(ValueError, match=r"1 log-probabilities from Qwen2ForCausalLM .*, required \d+"):
        scorer.score([path()])
