"""Real training processes (`fault_run.py`) that faults are tried on, and the table of what came of it.

`docs/checkpoints.md` has the table. A test compares its row with what it saw; with `NNX_FIT_FAULTS_TABLE=write`, as in
`make nightly`, the row is written instead.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from programs import REPOSITORY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

KILLS = int(os.environ.get("NNX_FIT_KILLS", "5"))
NIGHTLY = KILLS >= 30
SEED = int(os.environ.get("NNX_FIT_SEED", str(random.randrange(10**6))))
PROGRAM = REPOSITORY / "tests" / "support" / "fault_run.py"
TABLE = REPOSITORY / "docs" / "checkpoints.md"
BETWEEN_BATCHES = 0.03  # seconds
TRAINING = 39 * BETWEEN_BATCHES


class Job:
    """One training run, however many processes it takes, one after the other.

    Args:
        directory: Where it logs, and saves unless `checkpoints` says otherwise.
        checkpoints: Directory of the checkpoints.
        prefix: Words before the command of each process.

    Attributes:
        said: What the latest process has reported so far.
    """

    def __init__(self, directory: Path, checkpoints: Path | None = None, prefix: Iterable[str] = ()):
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.checkpoints = checkpoints or directory / "checkpoints"
        self.said = ""
        self._prefix = [*prefix]
        self._process: Any = None
        self._reader: Any = None

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def start(self, *more: str, pace: float = BETWEEN_BATCHES) -> bool:
        """Starts a process where the run is; returns once it trains, or `False` if nothing is left to train."""
        words = [sys.executable, PROGRAM, self.directory, "--checkpoints", self.checkpoints, "--pace", pace, *more]
        self._process = subprocess.Popen(
            [*self._prefix, *map(str, words)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read, args=[self._process.stdout])
        self._reader.start()
        try:
            self.waits_for(lambda: "training\n" in self.said)
        except AssertionError:
            if self._process.returncode:
                raise
            return False
        return True

    def _read(self, output: IO[str]) -> None:
        with output:
            for line in output:
                self.said += line

    def waits_for(self, what: Callable[[], Any]) -> None:
        """Waits until something is there, while the process lives."""
        deadline = time.monotonic() + 100
        while not what():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                self.ends()
                raise AssertionError(f"it did not happen:\n{self.said}")
            time.sleep(0.001)

    def gets(self, *signals: signal.Signals, pause: float = 0.0) -> int:
        """Sends signals to the process, waits for its end, and returns its status."""
        for number in signals:
            self._process.send_signal(number)
            time.sleep(pause)  # two at the same moment are one
        return self.ends()

    def ends(self) -> int:
        """Waits until the process ends; returns its status."""
        status = self._process.wait(timeout=300)
        self._reader.join()
        return status

    def finish(self) -> None:
        """Lets the run come to its end in a process of its own."""
        self.start(pace=0.0)
        assert self.ends() == 0, self.said

    @property
    def result(self) -> dict[str, Any]:
        """What it ended with: arrays, average, History, best checkpoints."""
        return json.loads((self.directory / "result.json").read_text())

    @property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """What TensorBoard shows."""
        events = EventAccumulator(str(self.directory), size_guidance={"scalars": 0})
        events.Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in sorted(events.Tags()["scalars"])}

    @property
    def rows(self) -> str:
        """The CSV."""
        return (self.directory / "metrics.csv").read_text()


def assert_same(job: Job, whole: Job) -> None:
    """Compares a run with the one that nobody touched: bits, History, best checkpoints, curves, rows."""
    mine, theirs = job.result, whole.result
    for part in theirs:
        assert mine[part] == theirs[part], f"{part} differs (seed {SEED})"
    mine, theirs = job.curves, whole.curves
    for tag in mine | theirs:
        assert mine.get(tag) == theirs.get(tag), f"TensorBoard's curve {tag} differs (seed {SEED})"
    assert job.rows == whole.rows, f"the CSV differs (seed {SEED})"


def tried(fault: str, how: str, outcome: str) -> None:
    """Notes a fault that a run got over, as a row of the table.

    Args:
        fault: What was done to it.
        how: How often; not compared, since there are more of them at night.
        outcome: What came of it, with the run compared bit by bit.
    """
    text = TABLE.read_text()
    row = f"| {fault} | {how} | {outcome} |"
    found = re.search(rf"^\| {re.escape(fault)} \| [^|]* \| ([^|]*) \|$", text, re.MULTILINE)
    if os.environ.get("NNX_FIT_FAULTS_TABLE") == "write":
        start, end = found.span() if found else (text.index("<!-- faults end -->"),) * 2
        TABLE.write_text(f"{text[:start]}{row}{'' if found else chr(10)}{text[end:]}")
    else:
        assert found and found[1] == outcome, f"docs/checkpoints.md does not have the row\n{row}"
