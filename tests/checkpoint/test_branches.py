"""The note that a run went back, as a file."""

import pytest

from nnx_fit.checkpoint import branches


def test_note_comes_back_and_the_latest_counts(tmp_path):
    assert branches.noted(tmp_path / "nowhere") == branches.noted(tmp_path) == ("", 0)
    branches.note(tmp_path / "epoch=0-step=5", 2)
    branches.note(tmp_path / "epoch=0-step=10", 3)
    assert branches.noted(tmp_path) == ("epoch=0-step=10", 3)
    assert len(list(tmp_path.iterdir())) == 1
    branches.note(tmp_path / "nowhere" / "x", 4)  # a directory that cannot be written to is no reason to end a run


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"to": 5, "life": 1}', '{"to": "a", "life": "1"}', "\0\0"])
def test_damaged_note_is_as_good_as_none(tmp_path, text):
    branches.note(tmp_path / "a", 1)
    next(tmp_path.iterdir()).write_text(text)
    assert branches.noted(tmp_path) == ("", 0)


def test_a_life_with_a_checkpoint_of_its_own_needs_no_note(tmp_path):
    branches.note(tmp_path / "a", 3)
    branches.forget(tmp_path, 2)
    assert branches.noted(tmp_path) == ("a", 3)
    branches.forget(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []
    branches.forget(tmp_path, 3)
