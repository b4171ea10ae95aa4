"""JAX's preemption service with several processes: a notice to one ends all of them, after the same batch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest
from programs import REPOSITORY

PROGRAM = REPOSITORY / "tests" / "support" / "preempted_run.py"


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_all_processes_end_after_the_batch_that_they_agree_on(told):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, f"127.0.0.1:{port}", "2", str(index)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert any("training" in line for line in process.stdout)
        processes[told].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [143, 143], said
    ends = [next(line for line in each.splitlines() if line.startswith("ended after")) for each in said]
    assert ends[0] == ends[1] and ends[0].endswith("True")
