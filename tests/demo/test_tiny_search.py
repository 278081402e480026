"""The table of the miniature search in docs/search.md has the shape that the paper and others report."""

from pathlib import Path

from pages import rows_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "search.md"
Rates = dict[str, tuple[float, ...]]


def measured() -> tuple[Rates, dict[str, int]]:
    """Search -> (vote, best, majority) of 100 questions, and the tokens that it drew a question."""
    rates, drawn = {}, {}
    for cells in rows_of(PAGE.read_text()):
        if len(cells) == 6 and cells[0].rpartition("_")[2].isdigit():
            rates[cells[0]] = tuple(float(part) for part in cells[2].split("/"))
            drawn[cells[0]] = int(cells[3].replace(",", ""))
    return rates, drawn


def test_the_measured_searches_have_the_reported_shape():
    rates, drawn = measured()
    vote, best, majority = ({name: found[i] for name, found in rates.items()} for i in range(3))
    assert len(rates) == 14
    assert vote["best_of_16"] >= majority["best_of_16"] + 0.2  # a verifier's votes against counting
    assert vote["beam_4"] > vote["best_of_4"] and drawn["beam_4"] <= drawn["best_of_4"] + 1
    assert best["best_of_64"] < best["best_of_16"]  # searched against harder, the verifier is hacked (Gao et al.)
    assert vote["beam_64"] < vote["beam_16"] < vote["beam_4"]
    assert vote["best_of_1"] < min(vote[name] for name in ("best_of_16", "beam_4", "dvts_16", "mcts_16"))
