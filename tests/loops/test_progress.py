"""`Progress` is saved as it is and comes back as it was."""

import dataclasses
import json

import pytest

from nnx_fit.loops.progress import Control, Interrupted, Progress


def test_a_record_comes_back_through_json_with_its_types():
    progress = Progress(global_step=7, epoch=2, batch_idx=1, batches=9, validated_step=5, in_epoch=True)
    loaded = Progress(global_step=100, epoch_recorded=True)
    loaded.load_state_dict(json.loads(json.dumps(progress.state_dict())))
    assert loaded == progress
    assert [type(getattr(loaded, f.name)) for f in dataclasses.fields(loaded)] == [int] * 6 + [bool] * 2 + [int]


def test_an_incomplete_record_is_not_taken_for_one():
    with pytest.raises(KeyError):
        Progress().load_state_dict({"global_step": 3})


def test_a_new_run_stands_at_the_beginning_and_nobody_wants_to_stop_it():
    assert Progress().state_dict() == {
        "global_step": 0,
        "epoch": 0,
        "batch_idx": 0,
        "batches": 0,
        "window": 0,
        "validated_step": -1,
        "in_epoch": False,
        "epoch_recorded": False,
        "ended_step": -1,
    }
    asked = {"accumulate": 1, "should_stop": False, "stop_reason": None, "signal": None}
    assert dataclasses.asdict(Control()).items() >= asked.items()


def test_a_record_from_before_early_ends_were_noted_is_taken():
    state = Progress(global_step=3).state_dict()
    del state["ended_step"]
    loaded = Progress(ended_step=2)
    loaded.load_state_dict(state)
    assert loaded == Progress(global_step=3)


def test_a_step_counts_when_it_updates_and_as_a_batch_of_its_window_otherwise():
    progress = Progress(global_step=3)
    assert [progress.advance(updates) for updates in (False, False, True, True)] == [3, 3, 4, 5]
    assert progress.window == 0 and progress.advance(False) == 5 and progress.window == 1


def test_an_interrupt_is_not_caught_as_an_error():
    assert Interrupted(2).signal == 2 and not isinstance(Interrupted(2), Exception)
