"""CheckpointShelf: names, what is displaced, and what a continued run takes over."""

import json

import pytest

from nnx_fit.callbacks.checkpoint_shelf import CheckpointShelf
from nnx_fit.callbacks.top_k import TopK
from nnx_fit.checkpoint.directories import is_complete


def complete(path, step=0):
    """What a finished save leaves, as far as the shelf can tell."""
    (path / "meta").mkdir(parents=True)
    document = {"format": 1, "index": {}, "meta": {"global_step": step}}
    (path / "meta" / "meta.json").write_text(json.dumps(document))
    (path / "commit_success.txt").write_text("")
    return path


def shelf(directory, k=1):
    return CheckpointShelf(directory, "{step}", TopK(k, "min"))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_nothing_is_deleted_before_its_successor_is_complete(tmp_path):
    mine = shelf(tmp_path)
    complete(mine.place(2.0, {"step": 1}))
    new = mine.place(1.0, {"step": 2})
    mine.tidy()
    assert names(tmp_path) == ["step=1"] and mine.waiting
    complete(new)
    mine.tidy()
    assert names(tmp_path) == ["step=2"] and not mine.waiting


def test_last_goes_when_a_newer_checkpoint_is_complete(tmp_path):
    mine = shelf(tmp_path)
    complete(mine.place(1.0, {"step": 1}))
    assert mine.place(2.0, {"step": 2}) is None
    complete(mine.place_last())
    assert mine.place_last() == tmp_path / "last"
    complete(mine.place(0.5, {"step": 3}))
    mine.tidy()
    assert names(tmp_path) == ["step=3"] and mine.last is None


def test_origin_is_not_deleted_when_it_is_displaced(tmp_path):
    first = shelf(tmp_path)
    origin = complete(first.place(2.0, {"step": 1}))
    second = shelf(tmp_path)
    second.load_state_dict(first.state_dict())
    second.origin = origin
    complete(second.place(1.0, {"step": 2}))
    second.tidy()
    assert names(tmp_path) == ["step=1", "step=2"]


def test_continued_run_replaces_what_it_reaches_again(tmp_path):
    first = shelf(tmp_path, k=-1)
    complete(first.place(2.0, {"step": 1}))
    state = first.state_dict()
    complete(first.place(1.0, {"step": 2}))
    second = shelf(tmp_path, k=-1)
    second.load_state_dict(state)
    second.origin = tmp_path / "step=1"
    assert second.place(1.0, {"step": 2}) == tmp_path / "step=2"
    assert second.place(1.0, {"step": 1}) == tmp_path / "step=1-v1"


def test_continued_run_deletes_what_the_first_had_no_time_to(tmp_path):
    first = shelf(tmp_path)
    complete(first.place(2.0, {"step": 1}))
    new = first.place(1.0, {"step": 2})
    state = first.state_dict()
    complete(new)
    second = shelf(tmp_path)
    second.load_state_dict(state)
    second.tidy()
    assert names(tmp_path) == ["step=2"]
    assert second.best == (str(tmp_path / "step=2"), 1.0)


@pytest.mark.parametrize("with_best", [True, False])
def test_run_directory_may_have_moved(tmp_path, with_best):
    first = shelf(tmp_path / "old")
    best = complete(first.place(1.0, {"step": 1}))
    complete(first.place_last(), step=5)
    state = first.state_dict()
    (tmp_path / "old").rename(tmp_path / "new")
    if not with_best:
        (tmp_path / "new" / best.name / "commit_success.txt").unlink()
    second = shelf(tmp_path / "new")
    second.load_state_dict(state)
    assert second.last == tmp_path / "new" / "last"
    assert second.best[1] == (1.0 if with_best else None)


def test_best_of_another_directory_counts_while_it_exists(tmp_path):
    first = shelf(tmp_path / "a")
    best = complete(first.place(1.0, {"step": 1}))
    second = shelf(tmp_path / "b")
    second.load_state_dict(first.state_dict())
    complete(second.place(2.0, {"step": 2}))
    assert second.best == (str(best), 1.0)
    complete(second.place(0.5, {"step": 3}))
    second.tidy()
    assert second.best == (str(tmp_path / "b" / "step=3"), 0.5)
    assert is_complete(best) and names(tmp_path / "b") == ["step=3"]


def test_origin_that_is_last_makes_room_once(tmp_path):
    mine = shelf(tmp_path)
    complete(tmp_path / "last", step=7)
    mine.load_state_dict(shelf(tmp_path).state_dict())
    mine.origin = tmp_path / "last"
    complete(mine.place_last(), step=8)
    assert mine.place_last() == tmp_path / "last"
    assert names(tmp_path) == ["last", "resumed-step=7"]


def test_a_name_that_is_taken_again_before_its_old_owner_is_deleted_stays(tmp_path):
    mine = CheckpointShelf(tmp_path, "{val}", TopK(1, "min"))
    complete(tmp_path / "val=2")
    mine.load_state_dict({"directory": str(tmp_path), "kept": {"val=2": 2.0}, "doomed": [], "best": ["", None]})
    first = mine.place(1.0, {"val": 1})
    assert first == tmp_path / "val=1" and mine.waiting
    # While the first is still being written, a better one takes the name of what is to be deleted.
    assert mine.place(0.5, {"val": 2}) == tmp_path / "val=2"
    complete(first)
    mine.tidy()
    assert names(tmp_path) == ["val=2"]


def test_without_versions_a_name_goes_to_what_is_not_worse_and_never_from_the_origin(tmp_path):
    mine = CheckpointShelf(tmp_path, "best", TopK(2, "min"), versions=False)
    assert mine.place(2.0, {}) == tmp_path / "best"
    complete(tmp_path / "best")
    assert mine.place(3.0, {}) is None
    assert mine.place(1.0, {}) == tmp_path / "best"
    assert mine.best == (str(tmp_path / "best"), 1.0) and not mine.waiting
    mine.origin = tmp_path / "best"
    assert mine.place(0.5, {}) == tmp_path / "best-v1"


@pytest.mark.parametrize("entry", ["doomed", "kept"])
@pytest.mark.parametrize("absolute", [False, True])
def test_the_state_of_a_stranger_deletes_nothing_outside_of_the_directory(tmp_path, entry, absolute):
    precious = complete(tmp_path / "elsewhere" / "precious")
    name = str(precious) if absolute else "../elsewhere/precious"
    state = {"directory": str(tmp_path / "mine"), "kept": {}, "doomed": [], "best": ["", None]}
    state[entry] = [name] if entry == "doomed" else {name: 5.0}
    mine = shelf(tmp_path / "mine")
    mine.load_state_dict(state)
    mine.tidy()
    complete(mine.place(1.0, {"step": 1}))
    mine.tidy()
    assert is_complete(precious)


def test_the_origin_is_known_by_another_path_as_well(tmp_path):
    origin = complete(tmp_path / "run" / "step=1", step=1)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    mine = shelf(tmp_path / "link")
    mine.origin = origin
    mine.load_state_dict(
        {"directory": str(tmp_path / "run"), "kept": {"step=1": 2.0}, "doomed": [], "best": ["", None]}
    )
    complete(mine.place(1.0, {"step": 2}))
    mine.tidy()
    assert is_complete(origin)
