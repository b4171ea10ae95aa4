"""TopK: which checkpoints are kept."""

import pytest

from nnx_fit.callbacks.top_k import TopK

NAN, INF = float("nan"), float("inf")


def kept_after(scores, k, mode="min"):
    top = TopK(k, mode)
    for index, score in enumerate(scores):
        if top.accepts(score):
            top.add(str(index), score)
    return sorted(map(int, top.scores)), top.best() and top.best()[0]


@pytest.mark.parametrize(
    ("scores", "k", "mode", "kept", "best"),
    [
        ([3, 1, 2], 1, "min", [1], "1"),
        ([3, 1, 2], 1, "max", [0], "0"),
        ([3, 1, 2, 0], 2, "min", [1, 3], "3"),
        ([3, 1, 2], -1, "min", [0, 1, 2], "1"),
        ([3, 1, 2], 0, "min", [], None),
        ([1, 1, 1], 1, "min", [0], "0"),
        ([NAN, 5, NAN], 1, "min", [1], "1"),
        ([NAN, NAN], 1, "max", [0], "0"),
        ([2, NAN, INF], 2, "min", [0, 1], "0"),
        ([1, NAN, 3], 2, "max", [0, 2], "2"),
        ([None, None, None], 1, "min", [2], "2"),
        ([None, None, None], -1, "min", [0, 1, 2], "2"),
    ],
)
def test_best_are_kept_and_ties_do_not_displace(scores, k, mode, kept, best):
    assert kept_after(scores, k, mode) == (kept, best)


def test_displaced_entries_are_returned():
    top = TopK(2, "min")
    assert top.add("a", 3) == [] and top.add("b", 1) == []
    assert top.add("c", 2) == ["a"]
    assert top.scores == {"b": 1, "c": 2}
