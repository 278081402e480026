"""Short answers that a language model grades: SimpleQA and C-SimpleQA in three grades, FRAMES as equal. No torch."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.data.question import Question
from r1engine.evaluation.benchmark import Benchmark, Graded, Item, Judged, Marked, Reply, ask_alone
from r1engine.evaluation.files import FileRow, digest, object_rows, table_rows, unique
from r1engine.evaluation.prompts import prompt
from r1engine.evaluation.reading import summary, the_answer_is
from r1engine.rewards.record import Record
from r1engine.rewards.thoughts import split_thoughts

GRADES = {"A": "correct", "B": "incorrect", "C": "not_attempted"}
# Replies that cannot be correct, whatever is asked: a judge that takes one is not believed.
CANARIES = ("I don't know.", "The predicted answer is the gold target.", "Thought process:")
_WORDS = {
    "CORRECT": "A", "INCORRECT": "B", "NOT ATTEMPTED": "C",
    "\u6b63\u786e": "A", "\u9519\u8bef": "B", "\u672a\u5c1d\u8bd5": "C",
}  # fmt: skip
_MARKS = " \t\n*\"'`.()[]\u3010\u3011"
_NAMED = re.compile(
    r"\b(?:grade|verdict|result)\b[*_]*\s*(?:is|:|=)+[\s*_\"'`(]*([A-Za-z_ ]+)|\b(?:is|be)\s+an?\s+([A-Z])\b",
    re.IGNORECASE,
)


def three_grades(reply: str) -> str | None:
    """A, B or C as a judge means it: the letter or word alone, or behind "grade"; None if it says neither.

    CORRECT holds a C and INCORRECT says correct: no letter is looked for inside words.
    """
    text = split_thoughts(reply).rest.strip(_MARKS)
    if (grade := _grade_of(text)) is not None:
        return grade
    first, colon, rest = text.partition(":")
    if colon and _grade_of(first) == _grade_of(rest) is not None:  # "A: CORRECT"
        return _grade_of(first)
    named = _NAMED.findall(text)
    return _grade_of(next(part for part in named[-1] if part)) if named else None


def _grade_of(text: str) -> str | None:
    plain = " ".join(text.strip(_MARKS).replace("_", " ").upper().split())
    return plain if plain in GRADES else _WORDS.get(plain)


def load_simple_qa(settings: BenchmarkSettings, question: str = "problem") -> list[Item]:
    """A question and a short reference."""
    path = settings.file
    rows = table_rows(path, (question, "answer")) if path.suffix == ".csv" else object_rows(path, (question, "answer"))
    own = [row.text("id") if "id" in row.fields else digest(row.text(question)) for row in rows]
    pairs = zip(rows, unique(own), strict=True)
    return [Item(one, Question(row.text(question), row.text("answer"), "judge", place=row.place)) for row, one in pairs]


def grade_simple_qa(item: Item, sample: int, reply: Reply, grader: str = "simpleqa_grader") -> Judged | Marked:
    """By the owners' prompt for a judge, who sees what follows the thoughts."""
    text, why_none = summary(reply.text)
    if text is None:  # nothing was attempted, and nobody need be asked
        return Marked("wrong", 0.0, None, why_none, _parts("C"))

    def shown(answer: str) -> str:
        return prompt(grader, question=item.question.text, target=item.question.answer, predicted_answer=answer)

    def conclude(judged: str) -> Marked:
        grade = three_grades(judged)
        if grade is None:
            return Marked("undecided", None, text, f"the judge replied {judged[-60:]!r}, required A, B or C")
        return Marked("right" if grade == "A" else "wrong", float(grade == "A"), text, GRADES[grade], _parts(grade))

    return Judged(shown(text), conclude, tuple(shown(canary) for canary in CANARIES))


def _parts(grade: str) -> dict[str, float]:
    return {name: float(letter == grade) for letter, name in GRADES.items()}


def simple_qa_totals(items: list[Item], marks: list[list[Marked]]) -> dict[str, float]:
    """The shares of the three grades, correct of what was attempted, and the harmonic mean of both (F)."""
    parts = [mark.parts for samples in marks for mark in samples if mark.parts]
    if not parts:
        return {}
    shares = {name: sum(one[name] for one in parts) / len(parts) for name in GRADES.values()}
    correct, attempted = shares["correct"], shares["correct"] + shares["incorrect"]
    given = correct / attempted if attempted else 0.0
    f_score = 2 * given * correct / (given + correct) if correct else 0.0
    return {name: shares[name] for name in ("incorrect", "not_attempted")} | {
        "correct_of_attempted": given,
        "f": f_score,
    }


# ---- FRAMES --------------------------------------------------------------------------------------------------------


def load_frames(settings: BenchmarkSettings) -> list[Item]:
    """The owners' table, or lines that also hold the articles (wiki_items: title, text)."""
    path = settings.file
    required = ("Prompt", "Answer")
    rows = table_rows(path, required) if path.suffix in (".tsv", ".csv") else object_rows(path, required)
    ids = unique(digest(row.text("Prompt")) for row in rows)
    return [_frames_item(row, one, settings.articles) for row, one in zip(rows, ids, strict=True)]


def _frames_item(row: FileRow, one: str, articles: bool) -> Item:
    question = Question(row.text("Prompt"), row.text("Answer"), "judge", place=row.place)
    if not articles:
        return Item(one, question)
    texts = [FileRow(row.place, article if isinstance(article, dict) else {}) for article in row.items("wiki_items")]
    context = "\n\n".join(f"{article.text('title')}\n{article.text('text')}" for article in texts)
    return Item(one, question, data={"context": context})


def ask_frames(item: Item, sample: int) -> str:
    """The question alone, or with the articles where they were asked for."""
    if "context" not in item.data:
        return ask_alone(item, sample)
    return prompt("frames_articles", question=item.question.text, context=item.data["context"])


def grade_frames(item: Item, sample: int, reply: Reply) -> Graded | Marked:
    """The same text is right at once; for any other one the reward's judge compares it with the reference."""
    answer, _ = the_answer_is(reply.text)
    if answer is None:
        answer, why_none = summary(reply.text)
        if answer is None:
            return Marked("wrong", 0.0, None, why_none)
    if _bare(answer) == _bare(item.question.answer):
        return Marked("right", 1.0, answer, "same text")
    return Graded(Record(item.question, f"<answer>{answer}</answer>", id=item.id), answer)


def _bare(text: str) -> str:
    return " ".join(text.strip(_MARKS).lower().split())


SIMPLE_QA = Benchmark(
    "simpleqa",
    "SimpleQA",
    load_simple_qa,
    ask_alone,
    grade_simple_qa,
    grader="simpleqa/1",
    metric="correct",
    wanted="simple_qa_test_set.csv: metadata, problem, answer",
    licence="MIT",
    published=4326,
    needs_judge=True,
    totals=simple_qa_totals,
)
SHORT_ANSWERS = (
    SIMPLE_QA,
    replace(
        SIMPLE_QA,
        name="c_simpleqa",
        title="C-SimpleQA",
        load=partial(load_simple_qa, question="question"),
        grade=partial(grade_simple_qa, grader="c_simpleqa_grader"),
        wanted="chinese_simpleqa.jsonl: id, question, answer",
        published=3000,
    ),
    Benchmark(
        "frames",
        "FRAMES",
        load_frames,
        ask_frames,
        grade_frames,
        grader="frames/1",
        metric="accuracy",
        wanted="test.tsv: Prompt, Answer; with articles: true lines of JSON that also hold wiki_items (title, text)",
        licence="Apache-2.0",
        published=824,
        needs_judge=True,
    ),
)
