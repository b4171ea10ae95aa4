"""Nothing is lost: a run that is killed again and again ends with the same bits as one that was never touched.

`make test` kills a few times, `make nightly` more often (`NNX_FIT_KILLS`) and everywhere. Where a kill hits is random;
the seed of a failing run is in its message, and `NNX_FIT_SEED` runs it again.
"""

from __future__ import annotations

import random
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from faults import BETWEEN_BATCHES, KILLS, NIGHTLY, SEED, TRAINING, Job, assert_same, tried

from nnx_fit.checkpoint.store import find_checkpoints

pytestmark = pytest.mark.slow
SAME = "the same bits as without it"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Job:
    """The run that nobody touches."""
    job = Job(tmp_path_factory.mktemp("whole"))
    job.finish()
    return job


def test_a_run_that_is_killed_at_random_ends_with_the_same_bits(tmp_path, whole):
    chance, kills, runs = random.Random(SEED), 0, 0
    while kills < KILLS:
        job = Job(tmp_path / str(runs))
        runs += 1
        while kills < KILLS:
            if not job.start():
                break
            time.sleep(chance.uniform(0, TRAINING / 2))
            if job.gets(signal.SIGKILL) == 0:
                break
            kills += 1
        job.finish()
        assert_same(job, whole)
    tried("SIGKILL at a random moment", f"{kills} kills", f"continued each time from its newest checkpoint; {SAME}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_continues_where_it_was(tmp_path, whole, number):
    job, status = Job(tmp_path / "run"), {signal.SIGTERM: 143, signal.SIGINT: -signal.SIGINT}[number]
    assert job.start()
    time.sleep(random.Random(SEED).uniform(0, TRAINING / 2))
    assert job.gets(number) == status, f"{job.said} (seed {SEED})"
    assert not (job.directory / "result.json").exists()
    job.finish()
    assert_same(job, whole)
    tried(number.name, "once, at a random moment", f"saved after its step and ended; {SAME}")


def test_a_second_signal_ends_at_once_and_leaves_the_checkpoint_before(tmp_path, whole):
    job = Job(tmp_path / "run")
    assert job.start()
    job.waits_for(lambda: find_checkpoints(job.checkpoints))
    assert job.gets(signal.SIGTERM, signal.SIGTERM, pause=BETWEEN_BATCHES / 3) == 143
    assert find_checkpoints(job.checkpoints)
    job.finish()
    assert_same(job, whole)
    tried("SIGTERM twice", "once", f"ended at once, its checkpoints whole; {SAME}")


def test_a_preemption_that_jax_announces_is_a_signal_to_end(tmp_path, whole):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    job = Job(tmp_path / "run")
    assert job.start("--address", f"127.0.0.1:{port}", pace=4 * BETWEEN_BATCHES)  # the notice takes up to a second
    job.waits_for(lambda: find_checkpoints(job.checkpoints))
    assert job.gets(signal.SIGTERM) == 143, job.said
    assert "SIGTERM caught" in job.said, "JAX's own handler takes it"
    assert find_checkpoints(job.checkpoints)[0].name.startswith("last")
    job.finish()
    assert_same(job, whole)
    tried("a notice of JAX's preemption service", "once", f"saved after the step that was agreed on and ended; {SAME}")


def test_a_run_that_is_killed_while_it_saves_has_the_checkpoint_before(tmp_path, whole):
    times = 3 if NIGHTLY else 1
    for number in range(times):
        job = Job(tmp_path / str(number))
        assert job.start()
        job.waits_for(lambda job=job: any("writing" in path.name for path in job.checkpoints.glob("*")))
        job.gets(signal.SIGKILL)
        job.finish()
        assert_same(job, whole)
    tried("SIGKILL during a save", f"{times} kills", f"continued from the checkpoint before, or anew; {SAME}")


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGES = {"truncated": truncated, "bit-flipped": flipped, "missing": Path.unlink}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_checkpoint_costs_nothing_but_the_way_from_the_one_before(tmp_path, whole, kind):
    job, untouched = Job(tmp_path / "run"), tmp_path / "untouched"
    assert job.start()
    job.waits_for(lambda: len(find_checkpoints(job.checkpoints)) >= 2)
    job.gets(signal.SIGKILL)
    newest = find_checkpoints(job.checkpoints)[0]
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    shutil.copytree(job.directory, untouched)
    for file in files if NIGHTLY else [random.Random(SEED).choice(files)]:
        DAMAGES[kind](file)
        job.finish()
        marks_the_end = kind == "missing" and file.name in ("commit_success.txt", "meta.json")
        named = str(newest) in job.said and file.relative_to(newest).as_posix() in job.said
        assert named or marks_the_end, job.said
        assert_same(job, whole)
        shutil.rmtree(job.directory)
        shutil.copytree(untouched, job.directory)
    times = f"each of its {len(files)} files" if NIGHTLY else "a file at random"
    tried(f"a {kind} file in the newest checkpoint", times, f"named, and continued from the one before; {SAME}")
