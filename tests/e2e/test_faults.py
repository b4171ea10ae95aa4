"""Nothing is lost: a run that is killed again and again ends with the same bits as one that was never touched.

`make test` kills a few times, `make nightly` more often (`NNX_FIT_KILLS`). Where a kill hits is random; the seed of a
failing run is in its message, and `NNX_FIT_SEED` runs it again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from programs import REPOSITORY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nnx_fit.checkpoint.store import find_checkpoints

KILLS = int(os.environ.get("NNX_FIT_KILLS", "5"))
SEED = int(os.environ.get("NNX_FIT_SEED", str(random.randrange(10**6))))
PROGRAM = REPOSITORY / "tests" / "support" / "fault_run.py"
BETWEEN_BATCHES = 0.03  # seconds
TRAINING = 39 * BETWEEN_BATCHES


def start(directory: Path, seconds: float = BETWEEN_BATCHES) -> subprocess.Popen[str]:
    """The training process, from where it is."""
    directory.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(directory), str(seconds)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def trains(process: subprocess.Popen[str]) -> bool:
    """Waits until a process begins to train; whether it does."""
    assert process.stdout is not None
    return "training" in process.stdout.readline()


def finish(directory: Path) -> dict[str, Any]:
    """Lets the run come to its end, and reads what it ended with."""
    process = start(directory, 0.0)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads((directory / "result.json").read_text())


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows; what `ThroughputMonitor` and clocks measure is no part of the run."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in sorted(events.Tags()["scalars"])}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The run that nobody touches: its result, its curves, its CSV."""
    directory = tmp_path_factory.mktemp("whole")
    return finish(directory), scalars(directory), (directory / "metrics.csv").read_text()


def assert_same(directory: Path, whole: tuple[dict[str, Any], dict[str, Any], str]) -> None:
    """Compares a run with the one that nobody touched: bits, History, best checkpoints, curves, rows."""
    result, curves, rows = whole
    mine = json.loads((directory / "result.json").read_text())
    for part in result:
        assert mine[part] == result[part], f"{part} differs (seed {SEED})"
    assert scalars(directory) == curves, f"TensorBoard's curves differ (seed {SEED})"
    assert (directory / "metrics.csv").read_text() == rows, f"the CSV differs (seed {SEED})"


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_ends_with_the_same_bits(tmp_path, whole):
    chance, kills = random.Random(SEED), 0
    while kills < KILLS:
        process = start(tmp_path)
        if not trains(process):  # it had come to its end before, and has nothing left to do
            process.communicate(timeout=300)
            break
        time.sleep(chance.uniform(0, TRAINING / 2))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)
        kills += 1
        if process.returncode == 0:
            break
    finish(tmp_path)
    assert_same(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_continues_where_it_was(tmp_path, whole, number):
    process = start(tmp_path)
    assert trains(process)
    time.sleep(random.Random(SEED).uniform(0, TRAINING / 2))
    process.send_signal(number)
    process.communicate(timeout=300)
    assert process.returncode in (143, 130, -signal.SIGINT), f"{process.returncode} (seed {SEED})"
    assert not (tmp_path / "result.json").exists()
    finish(tmp_path)
    assert_same(tmp_path, whole)


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves_has_the_checkpoint_before(tmp_path, whole):
    process = start(tmp_path)
    assert trains(process)
    deadline = time.monotonic() + 60
    while not any("writing" in path.name or "tmp" in path.name for path in tmp_path.glob("checkpoints/*")):
        assert process.poll() is None and time.monotonic() < deadline, "no save was seen"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    finish(tmp_path)
    assert_same(tmp_path, whole)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGES = {"truncated": truncated, "flipped": flipped, "missing": Path.unlink}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3 if KILLS >= 30 else 1))
def test_a_damaged_newest_checkpoint_costs_nothing_but_the_way_from_the_one_before(tmp_path, whole, number):
    damage = list(DAMAGES)[(SEED + number) % len(DAMAGES)]
    process = start(tmp_path)
    assert trains(process)
    deadline = time.monotonic() + 60
    while len(complete := find_checkpoints(tmp_path / "checkpoints")) < 2:
        assert process.poll() is None and time.monotonic() < deadline, "no two checkpoints were seen"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    complete = find_checkpoints(tmp_path / "checkpoints")
    files = [path for path in complete[0].rglob("*") if path.is_file() and path.stat().st_size > 8]
    DAMAGES[damage](random.Random(SEED).choice(sorted(files)))
    finish(tmp_path)
    assert_same(tmp_path, whole)
