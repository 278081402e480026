"""Multiple choice: MMLU, MMLU-Redux, MMLU-Pro, GPQA Diamond, C-Eval, CLUEWSC. No torch.

A letter that cannot be read is wrong, never guessed. What is stored and voted on is the letter of the file's order,
also where a sample was shown another one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.data.question import Question
from r1engine.evaluation.benchmark import Benchmark, Item, Marked, Reply
from r1engine.evaluation.choice_order import shown_order
from r1engine.evaluation.files import FileRow, digest, folder_files, object_rows, table_rows, unique, zipped_tables
from r1engine.evaluation.prompts import FOLDER, prompt
from r1engine.evaluation.reading import LETTERS, letter

_PLAIN = ("question", "A", "B", "C", "D", "answer")  # columns of MMLU's files, which name none
_SIMPLE_EVALS = ("Question", "A", "B", "C", "D", "Answer", "Subject")
_GPQA = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_GPQA_PASSWORD = "deserted-untie-orchid"  # its owners' own, public: it keeps the texts from crawlers
# Of MMLU-Redux's kinds of errors, those after which a question still has a right option.
_USABLE_ERRORS = ("ok", "expert", "bad question clarity", "bad options clarity")


# ---- asking and grading --------------------------------------------------------------------------------------------


def _item(row: FileRow, text: str, options: list[str], right: Sequence[int], **texts: str) -> Item:
    answer = ",".join(LETTERS[option] for option in right)
    question = Question(text, answer, "choice", place=row.place)
    return Item(digest(text, *options), question, data={"options": options, "right": list(right), **texts})


def _with_ids(items: Iterable[Item], ids: Iterable[str] | None = None) -> list[Item]:
    listed = list(items)
    own = unique(ids if ids is not None else (item.id for item in listed))
    return [replace(item, id=one) for item, one in zip(listed, own, strict=True)]


def _right_letter(row: FileRow, name: str, options: int) -> int:
    """The index of the option that a field names by its letter."""
    value = row.text(name).strip().upper()
    if value not in LETTERS[:options] or len(value) != 1:
        raise ValueError(f"{row.place}: {name} is {value!r:.80}, required a letter from A to {LETTERS[options - 1]}")
    return LETTERS.index(value)


def _lettered(options: Sequence[str], form: str) -> str:
    return "\n".join(form.format(*pair) for pair in zip(LETTERS, options, strict=False))


def _order(item: Item, sample: int, is_turned: bool) -> list[int]:
    options = len(item.data["options"])
    return shown_order(item.id, options, sample) if is_turned else list(range(options))


def ask_simple_evals(item: Item, sample: int, is_turned: bool = False) -> str:
    """simple-evals' prompt for four options."""
    shown = [item.data["options"][option] for option in _order(item, sample, is_turned)]
    return prompt("multiple_choice", Question=item.question.text, **dict(zip("ABCD", shown, strict=True)))


def ask_redux(item: Item, sample: int) -> str:
    """Zero-Eval's prompt, which asks for JSON."""
    return prompt("mmlu_redux", question=item.question.text, choices=_lettered(item.data["options"], "- {}) {}"))


def ask_pro(item: Item, sample: int) -> str:
    """MMLU-Pro's own prompt without examples."""
    shown = _lettered(item.data["options"], "{}. {}")
    return prompt("mmlu_pro", question=item.question.text, options=shown, category=item.data["category"])


def ask_c_eval(item: Item, sample: int) -> str:
    """C-Eval's own prompt without examples, which lets the model think."""
    options = dict(zip("ABCD", item.data["options"], strict=True))
    return prompt("c_eval", question=item.question.text, subject=item.data["subject"], **options)


def ask_wsc(item: Item, sample: int) -> str:
    """OpenCompass' prompt; its quotation marks are as they stand there."""
    return prompt("cluewsc", text=item.question.text, span1=item.data["span1"], span2=item.data["span2"])


def grade_choice(item: Item, sample: int, reply: Reply, is_turned: bool = False) -> Marked:
    """The letter that was read, as a letter of the file's order."""
    shown, why_none = letter(reply.text, len(item.data["options"]))
    if shown is None:
        return Marked("wrong", 0.0, None, why_none)
    option = _order(item, sample, is_turned)[LETTERS.index(shown)]
    found = LETTERS[option]
    is_right = option in item.data["right"]
    where = f" (shown as {shown})" if is_turned else ""
    reason = f"chose {found}{where}" + ("" if is_right else f", required {item.question.answer}")
    return Marked("right" if is_right else "wrong", float(is_right), found, reason)


# ---- loading -------------------------------------------------------------------------------------------------------


def load_mmlu(settings: BenchmarkSettings) -> list[Item]:
    """The owners' zip, a folder of its test files, or simple-evals' one table."""
    path = settings.file
    if path.suffix == ".zip":
        tables = zipped_tables(path, "_test.csv", _PLAIN, header=_PLAIN)
    elif path.is_dir() or path.name.endswith("_test.csv"):
        tables = {file.name: table_rows(file, _PLAIN, header=_PLAIN) for file in folder_files(path, "_test.csv")}
    else:
        rows = table_rows(path, _SIMPLE_EVALS)
        return _with_ids(_four_options(row, "Question", "Answer", subject=row.text("Subject")) for row in rows)
    subjects = ((Path(name).name.removesuffix("_test.csv"), rows) for name, rows in tables.items())
    return _with_ids(
        _four_options(row, "question", "answer", subject=subject) for subject, rows in subjects for row in rows
    )


def _four_options(row: FileRow, question: str, answer: str, **texts: str) -> Item:
    options = [row.text(name) for name in "ABCD"]
    return _item(row, row.text(question), options, [_right_letter(row, answer, 4)], **texts)


def load_redux(settings: BenchmarkSettings) -> list[Item]:
    """The corrected labels. A question of which its reviewers say that no option is right, or whose correction names
    none, is left out: 5,700 questions are reviewed, and some 300 fewer are asked."""
    items = []
    for path in folder_files(settings.file, ".csv", ".parquet", ".jsonl"):
        required = ("question", "choices", "answer", "error_type", "correct_answer")
        for row in table_rows(path, required) if path.suffix == ".csv" else object_rows(path, required):
            options = row.texts("choices")
            if right := _corrected(row, options):
                items.append(_item(row, row.text("question"), options, right))
    return _with_ids(items)


def _corrected(row: FileRow, options: list[str]) -> list[int]:
    """The options that are right after the review; none if there are none."""
    kind = row.text("error_type").strip().lower().replace("_", " ")
    label = row.text("answer").strip()
    if not label.isdigit() or int(label) >= len(options):
        raise ValueError(f"{row.place}: answer is {label!r:.80}, required a number from 0 to {len(options) - 1}")
    corrected = str(row.fields.get("correct_answer") or "").strip()
    if kind in _USABLE_ERRORS:
        return [int(label)]
    if kind == "no correct answer":
        return []
    if kind not in ("wrong groundtruth", "multiple correct answers"):
        raise ValueError(f"{row.place}: error_type is {kind!r:.80}, required a kind of MMLU-Redux")
    named = [
        _named_option(one.strip(), options) for one in ([corrected] if corrected in options else corrected.split(","))
    ]
    return [] if None in named else sorted({one for one in named if one is not None})


def _named_option(text: str, options: list[str]) -> int | None:
    """The index of an option that is given by number, letter or text."""
    if text in options:
        return options.index(text)
    if text.isdigit() and int(text) < len(options):
        return int(text)
    return LETTERS.index(text) if len(text) == 1 and text in LETTERS[: len(options)] else None


def load_pro(settings: BenchmarkSettings) -> list[Item]:
    """Up to ten options; what fills up shorter lists ("N/A") is no option."""
    items, ids = [], []
    for row in object_rows(settings.file, ("question_id", "question", "options", "answer", "category")):
        options = [option for option in row.texts("options") if option.strip() != "N/A"]
        right = _right_letter(row, "answer", len(options))
        items.append(_item(row, row.text("question"), options, [right], category=row.text("category")))
        ids.append(row.text("question_id"))
    return _with_ids(items, ids)


def load_gpqa(settings: BenchmarkSettings) -> list[Item]:
    """gpqa_diamond.csv, or the owners' zip with it. The file's order is: the right answer, then three wrong ones."""
    path = settings.file
    if path.suffix == ".zip":
        (rows,) = zipped_tables(path, "gpqa_diamond.csv", _GPQA, password=_GPQA_PASSWORD).values()
    else:
        rows = table_rows(path, _GPQA)
    items = [
        _item(row, row.text("Question").strip(), [row.text(name).strip() for name in _GPQA[1:]], [0]) for row in rows
    ]
    ids = (
        row.text("Record ID") if row.fields.get("Record ID") else item.id for row, item in zip(rows, items, strict=True)
    )
    return _with_ids(items, list(ids))


@cache
def _c_eval_subjects() -> dict[str, str]:
    return json.loads((FOLDER / "c_eval_subjects.json").read_text(encoding="utf-8"))


def load_c_eval(settings: BenchmarkSettings) -> list[Item]:
    """The owners' zip, the folder that it makes, or its folder val: what is asked about follows from a file's name."""
    path, columns = settings.file, ("id", *_PLAIN)
    if path.suffix == ".zip":
        tables = zipped_tables(path, "_val.csv", columns)
    else:
        folder = path / "val" if (path / "val").is_dir() else path
        tables = {str(file): table_rows(file, columns) for file in folder_files(folder, "_val.csv")}
    items, ids = [], []
    for place, rows in tables.items():
        name = Path(place).name.removesuffix("_val.csv")
        if name not in _c_eval_subjects():
            raise ValueError(f"{place}: found the subject {name}, required the name of one of C-Eval's, as law_val.csv")
        for row in rows:
            items.append(_four_options(row, "question", "answer", subject=_c_eval_subjects()[name]))
            ids.append(f"{name}/{row.text('id')}")
    return _with_ids(items, ids)


def load_wsc(settings: BenchmarkSettings) -> list[Item]:
    """Whether a pronoun means a noun; the labels are texts, true and false."""
    items = []
    for row in object_rows(settings.file, ("target", "label", "text")):
        label, target = str(row.fields["label"]).lower(), row.fields["target"]
        if label not in ("true", "false") or not isinstance(target, dict):
            raise ValueError(f"{row.place}: label is {row.fields['label']!r:.40}, required true or false, and a target")
        spans = FileRow(row.place, target)
        texts = {name: spans.text(f"{name}_text") for name in ("span1", "span2")}
        found = _item(row, row.text("text"), [texts["span1"], texts["span2"]], [0 if label == "true" else 1], **texts)
        items.append(found)
    return _with_ids(items)


MMLU = Benchmark(
    "mmlu",
    "MMLU",
    load_mmlu,
    ask_simple_evals,
    grade_choice,
    grader="choice/1",
    wanted="data.zip or a folder of *_test.csv (question, A, B, C, D, answer), or simple-evals' mmlu.csv",
    licence="MIT",
    published=14042,
)
CHOICE_SETS = (
    MMLU,
    replace(
        MMLU,
        name="mmlu_redux",
        title="MMLU-Redux",
        load=load_redux,
        ask=ask_redux,
        metric="EM",
        wanted="a folder of .csv, .parquet or .jsonl: question, choices, answer, error_type, correct_answer",
        licence="CC BY 4.0",
        published=None,
    ),
    replace(
        MMLU,
        name="mmlu_pro",
        title="MMLU-Pro",
        load=load_pro,
        ask=ask_pro,
        metric="EM",
        wanted=".parquet or .jsonl: question_id, question, options, answer, category",
        published=12032,
    ),
    replace(
        MMLU,
        name="gpqa_diamond",
        title="GPQA Diamond",
        load=load_gpqa,
        ask=partial(ask_simple_evals, is_turned=True),
        grade=partial(grade_choice, is_turned=True),
        wanted="the owners' zip, or gpqa_diamond.csv: Question, Correct Answer, Incorrect Answer 1 to 3, Record ID",
        licence="CC BY 4.0; its owners ask that no example is shown in plain text",
        published=198,
        private=True,
    ),
    replace(
        MMLU,
        name="c_eval",
        title="C-Eval",
        load=load_c_eval,
        ask=ask_c_eval,
        metric="EM",
        wanted="ceval-exam.zip or a folder of its *_val.csv: id, question, A, B, C, D, answer; the answers of its test"
        " files are not public",
        licence="CC BY-NC-SA 4.0",
        published=1346,
    ),
    replace(
        MMLU,
        name="cluewsc",
        title="CLUEWSC",
        load=load_wsc,
        ask=ask_wsc,
        metric="EM",
        wanted="test_public.json of FewCLUE or dev.json of CLUE: target (span1_text, span2_text), label, text",
        licence="none stated",
        published=None,
    ),
)
