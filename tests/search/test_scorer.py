"""Scores of steps in this process: transformers' on whole prefixes, each token run once, heads of released models."""

import json
import math
import random
import shutil

import pytest
import torch
import transformers
from model_folders import save_model, save_scored
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from r1engine.batch import Prompt
from r1engine.config import StepScorerSection
from r1engine.data.question import Question
from r1engine.hf.score_folder import read_trunk
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.rollout.local.heads import ScoreTensors
from r1engine.search.scorer import LocalScorer, _batches, _Part, _rows, _Run, open_scorer
from r1engine.search.tree import StepPath

CPU = torch.device("cpu")


def with_score(folder, family):
    """A folder of a family with a score, as exported; returns what gives the probability of each prefix of tokens."""
    model, weight = save_scored(folder, family)

    @torch.no_grad()
    def of(tokens):
        hidden = model.model(torch.tensor([tokens])).last_hidden_state[0]
        return torch.sigmoid(hidden @ weight[0]).tolist()

    return of


def prompt(tokens, number=0, text="What?"):
    return Prompt(number, tokens, text, Question(text, "", "math", "here"))


def steps(rng, count):
    return tuple(tuple(rng.randrange(2, 96) for _ in range(rng.randint(1, 5))) for _ in range(count))


def whole(of, path):
    """Scores of the steps of a path, each read at its last token, of one pass over the whole."""
    tokens = path.prompt.tokens + [token for step in path.steps for token in step if token != 1]
    values, at, found = of(tokens), len(path.prompt.tokens), []
    for step in path.steps:
        at += sum(token != 1 for token in step)
        found.append(values[at - 1])
    return found[path.scored :]


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3", "deepseek", "qwen3-moe"])
def test_scores_of_a_tree_are_those_of_whole_prefixes_and_every_token_runs_once(tmp_path, family):
    of, rng = with_score(tmp_path / family, family), random.Random(2)
    cfg = StepScorerSection(path=tmp_path / family, batch_tokens=96)
    scorer = open_scorer(cfg, CPU, load_tokenizer(tmp_path / family))
    assert scorer.labels == "correctness"
    prompts = [prompt([5, 6, 7], 0), prompt([8, 9], 1)]
    live, count = [StepPath(one, (), 0) for one in prompts], sum(len(one.tokens) for one in prompts)
    for _ in range(3):  # a tree of three children a step
        children = [
            StepPath(one.prompt, (*one.steps, *steps(rng, 1)), len(one.steps)) for one in live for _ in range(3)
        ]
        children = list({(one.prompt.id, one.steps): one for one in children}.values())
        count += sum(len(one.steps[-1]) for one in children)
        for path, found in zip(children, scorer.score(children), strict=True):
            assert found == pytest.approx(whole(of, path), abs=1e-5)
        live = rng.sample(children, 4)
    assert scorer.tokens_run == count
    if scorer._decoder._is_compiled:
        alone = LocalScorer(tmp_path / family, "own", load_tokenizer(tmp_path / family), cfg, CPU)
        for path in live:  # not in company, and not behind what is kept: the same in every bit
            alone.clear()
            assert alone.score([path._replace(scored=0)]) == scorer.score([path._replace(scored=0)])
    ended = [one._replace(steps=(*one.steps, (1,)), scored=0) for one in live]  # the stop token alone is no step
    for path, found in zip(ended, scorer.score(ended), strict=True):
        assert found == pytest.approx(whole(of, path), abs=1e-5) and found[-1] == found[-2]
    assert scorer.tokens_run == count


def test_with_little_memory_what_went_is_run_again(tmp_path):
    of, rng = with_score(tmp_path, "qwen3"), random.Random(3)
    token_bytes = 4 * 2 * 2 * 16 * 4  # layers, keys and values, heads, dimensions, float32
    cfg = StepScorerSection(path=tmp_path, cache_gib=12 * token_bytes / 2**30)
    scorer = LocalScorer(tmp_path, "own", load_tokenizer(tmp_path), cfg, CPU)
    for _ in range(12):
        paths = [StepPath(prompt([5, 6, 7], 0), steps(rng, rng.randint(1, 4))) for _ in range(3)]
        scores = scorer.score(paths)
        for path, found in zip(paths, scores, strict=True):
            assert found == pytest.approx(whole(of, path), abs=1e-5)
        assert scorer.num_bytes <= 12 * token_bytes
        again = scorer.score(paths[::-1])[::-1]
        assert again == [pytest.approx(whole(of, path), abs=1e-5) for path in paths]
        assert again == scores or not scorer._decoder._is_compiled


def test_what_is_computed_at_once_has_at_most_so_many_tokens():
    past = [torch.empty(1, 2, 1, 60, 1)]
    runs = [_Run(past, b"before", [_Part(bytes([n]), (5,) * 10, 9)]) for n in range(7)]
    rows = _rows(runs, 96)
    assert [len(row) for row in rows] == [3, 3, 1]
    assert [len(row) for row in _rows(runs, 1000)] == [6, 1]  # no more new tokens than before them
    assert [[len(row) for row in batch] for batch in _batches(rows, 96)] == [[1], [3], [3]]


def test_what_the_model_cannot_run_is_refused(tmp_path):
    with_score(tmp_path, "qwen2")
    scorer = LocalScorer(tmp_path, "own", load_tokenizer(tmp_path), StepScorerSection(path=tmp_path), CPU)
    with pytest.raises(ValueError, match="found a solution of 130 tokens, required at most 128: "):
        scorer.score([StepPath(prompt([5] * 100), ((6,) * 30,))])
    with pytest.raises(ValueError, match="found token 96, required below 96"):
        scorer.score([StepPath(prompt([5]), ((96,),))])


# ------------------------------------------------------------------ released models


def test_heads_by_hand():
    hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    two = ScoreTensors(
        {"score.weight": torch.tensor([[0.0, 1.0], [3.0, 0.0]]), "score.bias": torch.tensor([0.0, -1.0])}
    )
    assert two.logits(hidden).tolist() == [[0.0, 2.0], [2.0, -1.0]]
    expected = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(3))]
    assert two.probabilities(hidden).tolist() == pytest.approx(expected)
    # A probability of exactly 0 keeps its place.
    extreme = ScoreTensors({"score.weight": torch.tensor([[0.0, 200.0], [200.0, 0.0]])})
    assert extreme.probabilities(hidden).tolist() == [1.0, 0.0]
    layers = {"score.0.weight": torch.eye(2), "score.0.bias": torch.tensor([0.0, -3.0])}
    layers |= {"score.2.weight": torch.tensor([[0.0, 0.0], [1.0, 5.0]]), "score.2.bias": torch.zeros(2)}
    assert ScoreTensors(layers).probabilities(hidden).tolist() == pytest.approx([1 / (1 + math.exp(-1)), 0.5])
    value = {"v_head.summary.weight": torch.tensor([[2.0, 0.0]]), "v_head.summary.bias": torch.tensor([-2.0])}
    assert ScoreTensors(value).probabilities(hidden).tolist() == pytest.approx([0.5, 1 / (1 + math.exp(2))])
    pair = ScoreTensors({"lm_head.weight": torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0]])}, (1, 2))
    assert pair.probabilities(hidden).tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))])
    with pytest.raises(ValueError, match="found a head of 3 labels, required 1 or 2"):
        ScoreTensors({"score.weight": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match=r"found the head \[\], required score.weight"):
        ScoreTensors({})


WORDS = ["<unk>", "<|end|>", "<extra_0>", "\n", " \u043a\u0438", "+", "-", "<|im_start|>", "<|im_end|>"]
WORDS += ["Q", "a", "b", "c", "system", "user", "assistant", " ", "Please", ".", "reason"]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder with a tokenizer in which every mark is a token."""
    folder = tmp_path_factory.mktemp("released") / "model"
    save_model(folder, "qwen2")
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.add_special_tokens(["<|end|>", "<extra_0>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens(WORDS[3:7])
    made.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    made.decoder = decoders.Fuse()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "bos_token": "<|im_start|>"}))
    return folder


def as_released(folder, target, architecture, drop=("lm_head.weight",), **head):
    shutil.copytree(folder, target)
    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if k not in drop}
    save_file(weights | head, target / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [architecture]}
    (target / "config.json").write_text(json.dumps(config))
    return target


def hidden_of(folder, tokens):
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.model(torch.tensor([tokens])).last_hidden_state[0], model.lm_head.weight


def path_of(tokenizer):
    letters = {letter: tokenizer.token_to_id(letter) for letter in "abc"}
    stop = tokenizer.token_to_id("<|end|>")
    return StepPath(prompt([9], text="Q"), ((letters["a"],), (letters["c"], stop)))


def test_qwen_math_prm_and_skywork_folders(released, tmp_path):
    random_numbers = torch.Generator().manual_seed(5)
    tokenizer = load_tokenizer(released)
    path, ids = path_of(tokenizer), lambda *words: [WORDS.index(word) for word in words]
    sizes = {"score.0.weight": (32, 32), "score.0.bias": (32,), "score.2.weight": (2, 32), "score.2.bias": (2,)}
    head = {name: torch.randn(size, generator=random_numbers) * 0.3 for name, size in sizes.items()}
    folder = as_released(released, tmp_path / "qwen", "Qwen2ForProcessRewardModel", (), **head)
    scorer = open_scorer(StepScorerSection(path=folder), CPU, tokenizer)
    assert scorer.labels == "correctness"
    asked = tokenizer.encode(
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    ).ids
    tokens = [*asked, *ids("a", "<extra_0>", "c", "<extra_0>")]
    hidden, _ = hidden_of(released, tokens)
    inner = torch.relu(hidden @ head["score.0.weight"].T + head["score.0.bias"])
    wanted = torch.softmax(inner @ head["score.2.weight"].T + head["score.2.bias"], -1)[:, 1]
    at = [index for index, token in enumerate(tokens) if token == WORDS.index("<extra_0>")]
    assert scorer.score([path])[0] == pytest.approx(wanted[at].tolist(), abs=1e-5)

    value = {
        "v_head.summary.weight": torch.randn(1, 32, generator=random_numbers),
        "v_head.summary.bias": torch.ones(1),
    }
    folder = as_released(released, tmp_path / "skywork", "Qwen2ForCausalLM", (), **value)
    scorer = open_scorer(StepScorerSection(path=folder, format="skywork"), CPU, tokenizer)
    tokens = ids("<|im_start|>", "Q", "\n", "a", "\n", "c", "\n")
    hidden, _ = hidden_of(released, tokens)
    wanted = torch.sigmoid(hidden @ value["v_head.summary.weight"][0] + 1)[[4, 6]]
    assert scorer.score([path])[0] == pytest.approx(wanted.tolist(), abs=1e-5) and scorer.labels == ""


def test_math_shepherd_and_rlhflow_folders(released, tmp_path):
    tokenizer = load_tokenizer(released)
    path, ids = path_of(tokenizer), lambda *words: [WORDS.index(word) for word in words]
    scorer = open_scorer(StepScorerSection(path=released, format="math_shepherd"), CPU, tokenizer)
    assert scorer.labels == "value"
    tokens = ids("Q", " ", "a", " \u043a\u0438", "c", " \u043a\u0438")
    hidden, output = hidden_of(released, tokens)
    wanted = torch.softmax(hidden @ output[ids("+", "-")].T, -1)[:, 0]
    assert scorer.score([path])[0] == pytest.approx(wanted[[3, 5]].tolist(), abs=1e-5)

    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    folder = as_released(released, tmp_path / "rlhflow", "Qwen2ForCausalLM", ())
    cfg = StepScorerSection(path=folder, format="rlhflow")
    with pytest.raises(
        ValueError, match=r"scorer\.format: found rlhflow, which is asked by a chat template: .* has no"
    ):
        open_scorer(cfg, CPU, tokenizer)
    (folder / "chat_template.jinja").write_text(template)
    scorer = open_scorer(cfg, CPU, tokenizer)
    turn = ("<|im_end|>", "<|im_start|>", "assistant", "\n")
    tokens = ids("<|im_start|>", "user", "\n", "Q", " ", "a", *turn, "+", "<|im_end|>")
    tokens += ids("<|im_start|>", "user", "\n", "c", *turn, "+", "<|im_end|>")
    hidden, output = hidden_of(released, tokens)
    probability = torch.softmax(hidden @ output[ids("+", "-")].T, -1)[:, 0]
    # As its makers read it: the third token from the end, after each answer.
    wanted = [probability[11 - 2].item(), probability[len(tokens) - 3].item()]
    assert scorer.score([path])[0] == pytest.approx(wanted, abs=1e-5)


def test_folders_that_are_no_scorer_are_refused(released, tmp_path):
    tokenizer = load_tokenizer(released)
    with pytest.raises(ValueError, match=r"is Qwen2ForCausalLM without good and bad tokens; required a score head, or"):
        open_scorer(StepScorerSection(path=released), CPU, tokenizer)
    with pytest.raises(ValueError, match=r"required score.weight.*scorer.format must tell which"):
        open_scorer(StepScorerSection(path=released, format="skywork"), CPU, tokenizer)
    folder = as_released(released, tmp_path / "a", "BertModel")
    with pytest.raises(ValueError, match="architecture 'BertModel', required is one of"):
        read_trunk(folder)
    folder = as_released(released, tmp_path / "b", "Qwen2ForTokenClassification", ("model.norm.weight",))
    with pytest.raises(ValueError, match=r"without 1 of the decoder such as model.norm.weight"):
        open_scorer(StepScorerSection(path=folder, format="own"), CPU, tokenizer)
    with pytest.raises(ValueError, match=r"does not say how it is asked; required scorer.format"):
        open_scorer(StepScorerSection(path=folder), CPU, tokenizer)
