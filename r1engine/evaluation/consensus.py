"""cons@k: the answer that most of k samples of a question agree on (paper, section 2.2.4: "majority voting")."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

MOST_DISTINCT = 64  # answers of one question that are compared with each other


def consensus(
    answers: Sequence[str | None], are_right: Sequence[bool], is_same: Callable[[str, str], bool] = str.__eq__
) -> float:
    """Whether the answer of most samples is right, in [0, 1].

    Equal texts vote together, and texts that `is_same` finds equal in either direction. A class of them is right if
    its most frequent text is. If several classes have most votes, the result is the share of them that is right: what
    a random choice among them would give on average, without being random.

    Args:
        answers:   of each sample; None: none could be read, the sample does not vote.
        are_right: whether each sample was graded right.
        is_same:   of two different texts; compared among the 64 most frequent.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    right = {answer for answer, is_right in zip(answers, are_right, strict=True) if is_right}
    classes = equal_answers(votes, is_same)
    sizes = [sum(votes[text] for text in one) for one in classes]
    leading = [one for one, size in zip(classes, sizes, strict=True) if size == max(sizes)]
    return sum(one[0] in right for one in leading) / len(leading)


def equal_answers(votes: Counter[str], is_same: Callable[[str, str], bool]) -> list[list[str]]:
    """The texts in classes of equal answers, the most frequent text of each first.

    Args:
        votes:   text -> how often it was given.
        is_same: of two different texts, asked in either direction; compared among the 64 most frequent.
    """
    classes: list[list[str]] = []
    for answer, _ in votes.most_common():
        others = classes if len(classes) < MOST_DISTINCT else []
        agreeing = [one for one in others if any(is_same(answer, x) or is_same(x, answer) for x in one)]
        classes = [one for one in classes if one not in agreeing]
        classes.append([text for one in agreeing for text in one] + [answer])
    return classes
