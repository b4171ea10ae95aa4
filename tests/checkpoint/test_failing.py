"""What is said when a save fails: one line of why, whatever the library below it raised, and nothing of its own."""

import errno
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from full_disk import file_size_limit

from nnx_fit.checkpoint.failing import not_written, quiet_orbax, why
from nnx_fit.checkpoint.store import CheckpointStore
from nnx_fit.errors import NotWrittenError


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("RESOURCE_EXHAUSTED: Error writing [...]: No space left on device [tensorstore_spec='{...}']"),
    ],
)
def test_one_cause_has_one_reason_whoever_tells_of_it(error):
    assert why(error) == "No space left on device"
    assert not_written(Path("c"), error).reason == "No space left on device"


def test_an_unknown_cause_is_told_in_a_line():
    assert why(ValueError("NOT_FOUND: gone [tensorstore_spec='{...}']\nmore")) == "ValueError: NOT_FOUND: gone"
    assert why(RuntimeError()) == "RuntimeError: no message"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_many_writes_that_fail_are_one_error_and_no_noise(tmp_path, caplog, capfd, asynchronous):
    arrays = {"params": {f"a{i}": np.random.default_rng(i).normal(size=3000) for i in range(60)}}
    store = CheckpointStore()
    with file_size_limit(4096), pytest.raises(NotWrittenError, match=r"could not be written: File too large\."):
        store.save(tmp_path / "c", arrays, {"global_step": 1}, asynchronous=asynchronous)
        store.wait()
    assert os.listdir(tmp_path) == []
    store.save(tmp_path / "c", arrays, {"global_step": 1}, asynchronous=False)
    store.close()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert capfd.readouterr().err == ""


def test_what_others_cannot_catch_is_still_reported(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    quiet_orbax()
    quiet_orbax()
    lost = [RuntimeError("Event loop is closed"), RuntimeError("another"), ValueError("Event loop is closed")]
    for error in lost:
        sys.unraisablehook(SimpleNamespace(exc_value=error))
    assert [each.exc_value for each in seen] == lost[1:]
