"""A disk that fills up, a directory that goes, a permission that is lost: said once, and the bits are the same.

What could not be saved is not there afterwards, so which checkpoints are kept is not compared.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from faults import Job, tried
from full_disk import file_size_limit, small_disk

from nnx_fit.checkpoint.store import find_checkpoints

pytestmark = pytest.mark.slow
SAID = "could not be written"
SAME = "the same bits as without it"
WENT_ON = f"training went on, the next attempts were made; {SAME}"
# Without them, root is refused as anybody else is.
CAPABILITIES = "-dac_override,-dac_read_search"
UNPRIVILEGED = ("setpriv", f"--bounding-set={CAPABILITIES}", f"--inh-caps={CAPABILITIES}") if os.geteuid() == 0 else ()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Job:
    """The run that nobody touches."""
    job = Job(tmp_path_factory.mktemp("whole"))
    job.finish()
    return job


def assert_same_training(job: Job, whole: Job) -> None:
    """Compares all but which checkpoints there are."""
    mine, theirs = job.result, whole.result
    for part in ("arrays", "average", "history", "steps"):
        assert mine[part] == theirs[part], part


def get_over(job: Job, fault: Callable[[int], AbstractContextManager[None]], until_reported: bool = True) -> None:
    """Puts a run through a fault: for a while once there are checkpoints, and it ends by itself."""
    assert job.start()
    job.waits_for(lambda: len(find_checkpoints(job.checkpoints)) >= 2)
    with fault(job.pid):
        if until_reported:
            job.waits_for(lambda: SAID in job.said)
    assert job.ends() == 0, job.said
    assert job.said.count(SAID) == (1 if until_reported else 0), job.said
    assert find_checkpoints(job.checkpoints)[0].name.startswith("last"), "the state it ended in was saved after all"


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    return tmp_path / "checkpoints"


def test_a_disk_that_is_full_for_a_while(tmp_path, whole, checkpoints):
    with small_disk(checkpoints, 4 * 2**20) as full:
        job = Job(tmp_path / "run", checkpoints)
        get_over(job, full)
        assert_same_training(job, whole)
    tried("a full disk under the checkpoints, for a while", "once", f"said once; {WENT_ON}")


def test_a_run_that_is_killed_while_its_disk_is_full_continues_from_the_last_good_checkpoint(
    tmp_path, whole, checkpoints
):
    with small_disk(checkpoints, 4 * 2**20) as full:
        job = Job(tmp_path / "run", checkpoints)
        assert job.start()
        job.waits_for(lambda: len(find_checkpoints(job.checkpoints)) >= 2)
        with full(job.pid):
            job.waits_for(lambda: SAID in job.said)
            job.gets(signal.SIGKILL)
        assert find_checkpoints(job.checkpoints)
        job.finish()
        assert_same_training(job, whole)
        assert job.curves == whole.curves
        assert job.rows == whole.rows
    tried("SIGKILL while the disk is full", "once", f"continued from the last good checkpoint; {SAME}")


def test_no_file_can_grow_for_a_while(tmp_path, whole):
    """Not only checkpoints: what TensorBoard and the CSV would have got in that time is lost, and they say so."""
    job = Job(tmp_path / "run")
    get_over(job, lambda process: file_size_limit(64, process))
    assert_same_training(job, whole)
    assert "TensorBoardLogger" in job.said and "CSVLogger" in job.said
    tried("a full disk under everything, for a while", "once", f"said once by each that writes; {WENT_ON}")


def test_the_directory_is_deleted(tmp_path, whole):
    job = Job(tmp_path / "run")

    @contextmanager
    def deleted(process: int) -> Iterator[None]:
        gone = job.checkpoints.with_name("gone")
        job.checkpoints.rename(gone)
        shutil.rmtree(gone)
        yield

    get_over(job, deleted, until_reported=False)
    assert_same_training(job, whole)
    tried("the directory of the checkpoints is deleted", "once", f"it is made anew; {SAME}")


def test_the_directory_may_not_be_written_for_a_while(tmp_path, whole):
    job = Job(tmp_path / "run", prefix=UNPRIVILEGED)

    @contextmanager
    def forbidden(process: int) -> Iterator[None]:
        job.checkpoints.chmod(0o555)
        yield
        job.checkpoints.chmod(0o755)

    get_over(job, forbidden)
    assert_same_training(job, whole)
    tried("permission to write checkpoints is lost, for a while", "once", f"said once; {WENT_ON}")
