"""Exact duplicates, and questions that are nearly the same; what is kept does not depend on the order of the rows."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from r1engine.data.contamination import units

SHINGLE = 5  # units
BANDS, BAND_ROWS = 24, 5  # of a signature: at a Jaccard index of 0.8 one pair in ten thousand is not compared
_COMPARED = 64  # of the questions that share a band, each is compared with so many


def rank(seed: int, source: str) -> int:
    """A number that orders rows at random, from the row alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{source}".encode(), digest_size=8).digest(), "big")


def shingles(text: str) -> np.ndarray:
    """[number of different 5-grams] uint64, their hashes, sorted; of a text with fewer units the whole one's."""
    found = units(text)
    grams = {" ".join(found[i : i + SHINGLE]) for i in range(max(1, len(found) - SHINGLE + 1))}
    digests = b"".join(hashlib.blake2b(gram.encode(), digest_size=8).digest() for gram in grams)
    return np.sort(np.frombuffer(digests, np.uint64))


def clusters(questions: dict[str, np.ndarray], threshold: float) -> dict[str, str]:
    """Name of a question -> the name that stands for all that are nearly the same, directly or through others.

    Args:
        questions: name -> `shingles` of the text.
        threshold: Jaccard index from which two are nearly the same.

    Raises:
        RuntimeError: the package rensa is not installed.
    """
    names = sorted(questions)
    parents = list(range(len(names)))

    def top(i: int) -> int:
        while parents[i] != i:
            parents[i] = i = parents[parents[i]]
        return i

    for a, b in _candidates([questions[name] for name in names]):
        if (first := top(a)) != (second := top(b)) and _jaccard(questions[names[a]], questions[names[b]]) >= threshold:
            parents[max(first, second)] = min(first, second)
    return {name: names[top(i)] for i, name in enumerate(names)}


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def _candidates(sets: Sequence[np.ndarray]) -> Iterable[tuple[int, int]]:
    """Pairs whose MinHash signatures agree in a band."""
    if len(sets) < 2:
        return
    signatures = _signatures(sets)
    for band in range(BANDS):
        rows = np.ascontiguousarray(signatures[:, band * BAND_ROWS : (band + 1) * BAND_ROWS])
        _, group = np.unique(rows, axis=0, return_inverse=True)
        together: dict[int, list[int]] = defaultdict(list)
        for i, number in enumerate(group.ravel().tolist()):
            others = together[number]
            yield from ((other, i) for other in others)
            if len(others) < _COMPARED:
                others.append(i)


def _signatures(sets: Sequence[np.ndarray]) -> np.ndarray:
    """[len(sets), BANDS * BAND_ROWS] uint32, MinHash of each set."""
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise RuntimeError(
            "near_duplicate: found no package rensa, required to compare questions; pip install 'r1engine[curate]', or "
            "near_duplicate=null"
        ) from error
    size = BANDS * BAND_ROWS
    signatures = np.zeros((len(sets), size), np.uint32)
    for start in range(0, len(sets), 4096):
        part = sets[start : start + 4096]
        offsets = np.concatenate([[0], np.cumsum([len(one) for one in part])]).astype(np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(part), offsets, size, 0)
        signatures[start : start + len(part)] = matrix.to_rows()
    return signatures
