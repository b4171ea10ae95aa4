"""One process at a time in a run directory.

The lock is the operating system's, on the file `.hydra/lock`: it ends with the process that holds it, however that
ends, so that there are no stale ones; and forked workers do not inherit it. The file says who holds it. A file system
without locks is gone without.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnx_fit.cli.run_directory import shown_path
from nnx_fit.cli.saved_run import record
from nnx_fit.errors import ConfigurationError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Holds the lock of a run directory while the block runs.

    Args:
        run_dir: The directory, which has a `.hydra/`.

    Raises:
        ConfigurationError: Another process is at work there.
    """
    file = record(run_dir).with_name("lock")
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if _taken(descriptor):
            owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            raise ConfigurationError(
                f"{shown_path(run_dir)} is being written to by {owner}, which is still running.\n"
                "Wait until it is done, or end it."
            )
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    """Takes the lock; whether another process has it."""
    if fcntl is None:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # this file system knows no locks
        return False
    return False
