"""A disk that is full: for one process, or for everything below a directory."""

from __future__ import annotations

import contextlib
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def file_size_limit(size: int, process: int = 0) -> Iterator[None]:
    """Makes every write beyond a size fail, as a full disk does: what fits is written.

    Args:
        size: Of a file, in bytes.
        process: Whose files; 0 is this process.
    """
    old = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, old[1]))
    yield
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        resource.prlimit(process, resource.RLIMIT_FSIZE, old)


@contextlib.contextmanager
def small_disk(directory: Path, size: int) -> Iterator[Callable[[int], contextlib.AbstractContextManager[None]]]:
    """Gives a directory a disk of its own, where that is allowed.

    Args:
        directory: Mount point.
        size: Of the disk, in bytes.

    Yields:
        What fills the disk for a while, given the number of the process that writes to it. Where nothing can be
        mounted, it is a limit on the size of that process's files, wherever they are.
    """
    directory.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        yield lambda process: file_size_limit(64, process)
        return
    try:
        yield lambda process: _filled(directory)
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@contextlib.contextmanager
def _filled(directory: Path) -> Iterator[None]:
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()
