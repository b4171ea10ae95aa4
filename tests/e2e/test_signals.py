"""The command line under signals: its exit status, what it prints, and what it leaves."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = "import sys; from nnx_fit.cli.main import main; sys.exit(main())"


def interrupted(folder: Path, *signals: signal.Signals, pause: float = 0.2) -> tuple[int, str]:
    """Starts the main job, sends signals once it trains; returns its exit status and what it printed."""
    words = [sys.executable, "-c", COMMAND, "trainer.max_epochs=200", "trainer.enable_progress_bar=false"]
    with subprocess.Popen(
        words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, restore_signals=True
    ) as process:
        # The first checkpoint tells that training goes on.
        deadline = time.monotonic() + 120
        while not any(folder.glob("outputs/**/checkpoints/*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        for number in signals:
            process.send_signal(number)
            time.sleep(pause)
        output, _ = process.communicate(timeout=120)
    return process.returncode, output


@pytest.mark.parametrize(
    ("signals", "status"),
    [
        ((signal.SIGINT,), 130),
        ((signal.SIGTERM,), 143),
        ((signal.SIGINT, signal.SIGINT), 130),
        ((signal.SIGTERM, signal.SIGTERM), 143),
    ],
    ids=["ctrl-c", "term", "ctrl-c twice", "term twice"],
)
def test_signals_end_the_job_with_their_status_and_without_noise(tmp_path, signals, status):
    code, output = interrupted(tmp_path, *signals)
    assert code == status, output
    # What writes in the background does not tell that it was cut off.
    assert not any(words in output for words in ("RuntimeError", "never awaited", "Commit operations")), output
    # The exception of a second signal may come while JAX is called by the garbage collector, where Python reports it.
    rest = re.sub(r"Exception ignored in: <function _xla_gc_callback.*?\n(Traceback.*\n(?: .*\n)+\w+.*\n)?", "", output)
    assert "Traceback" not in rest and "Exception ignored" not in rest, output
    if len(signals) == 1:
        assert rest == output and any(tmp_path.glob("outputs/**/checkpoints/last*")), output
