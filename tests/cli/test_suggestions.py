"""Nearest names."""

import pytest

from nnx_fit.cli.suggestions import did_you_mean, listing, nearest

NAMES = ["max_epochs", "max_steps", "learning_rate", "weight_decay"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("max_epoch", "max_epochs"), ("MAX_STEPS", "max_steps"), ("lr", "learning_rate"), ("banana", None), ("x", None)],
)
def test_nearest_finds_what_was_meant_and_nothing_else(typed: str, meant: str | None) -> None:
    assert nearest(typed, NAMES) == meant


def test_no_candidate_gives_no_sentence() -> None:
    assert did_you_mean("banana", NAMES) == ""
    assert did_you_mean("max_epoch", []) == ""


def test_listing_is_sorted_and_without_repetition() -> None:
    assert listing(["b", "a", "b"]) == "a, b"
