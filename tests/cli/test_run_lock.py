"""One process at a time in a run directory, and no lock outlives its process."""

import subprocess
import sys
from pathlib import Path

import pytest

from nnx_fit.cli import main, run_lock
from nnx_fit.errors import ConfigurationError

# Holds the lock, has a forked worker that would hold what it inherits, and waits for its end.
HOLDER = """
import os, sys
from pathlib import Path
from nnx_fit.cli import run_lock

with run_lock.held(Path(sys.argv[1])):
    if os.fork() != 0:
        print(os.getpid(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run_dir(folder: Path) -> Path:
    run = folder / "outputs" / "a"
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "config.yaml").write_text("model: {_target_: x.Y}\ndata: {_target_: x.Z}\n")
    return run


def test_directory_is_refused_while_another_process_lives_and_free_once_it_is_killed(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(Path(main.__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": root},
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        owner = f"outputs/a is being written to by process {holder.pid} on "
        with pytest.raises(ConfigurationError, match=owner), run_lock.held(run_dir):
            pass
        before = sorted(run_dir.rglob("*"))
        assert main.run(["resume", "outputs/a"]) == 1
        assert f"process {holder.pid} on " in capsys.readouterr().err
        assert [path for path in sorted(run_dir.rglob("*")) if path.name != "run.log"] == before
        holder.kill()
        holder.wait()
        with run_lock.held(run_dir):
            assert (run_dir / ".hydra" / "lock").read_text().startswith("process ")
    with run_lock.held(run_dir):
        pass
