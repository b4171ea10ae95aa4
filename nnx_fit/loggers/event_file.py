"""TensorBoard's event file: records written so that a failed write or a kill leaves all earlier ones readable.

A record is its length, a checksum of it, the data, and a checksum of that (the TFRecord format). Each is one write to
the operating system: nothing waits in a buffer of this process. A write that fails half-way is taken back, since
readers stop at the first damaged record.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


class EventFile:
    """A new event file.

    Args:
        path: Where; its directory exists, the file does not.
        head: The first records.

    Raises:
        OSError: It cannot be created.
    """

    def __init__(self, path: Path, head: Sequence[bytes]):
        self.path = path
        self._file = path.open("xb", buffering=0)  # `x`: a file that exists is never truncated
        self._end = 0
        try:
            for record in head:
                self.write(record)
        except BaseException:
            self.close()
            raise

    def write(self, data: bytes) -> None:
        """Appends a record.

        Raises:
            OSError: It cannot be written; the file is as it was, unless it is gone.
        """
        from tensorboardX.record_writer import masked_crc32c

        length = struct.pack("<Q", len(data))
        record = length + _FOOTER.pack(masked_crc32c(length)) + data + _FOOTER.pack(masked_crc32c(data))
        require_on_disk(self._file, self.path)
        try:
            write_all(self._file, record)
        except OSError:
            self._file.truncate(self._end)
            self._file.seek(self._end)
            raise
        self._end += len(record)

    @property
    def size(self) -> int:
        """Bytes written."""
        return self._end

    def sync(self) -> None:
        """Waits for the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def write_all(file: Any, data: bytes) -> None:
    """Writes to an unbuffered file, which may take less than all at once.

    Raises:
        OSError: Not all of it could be written.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def require_on_disk(file: Any, path: Path) -> None:
    """Refuses to write to a file that was removed, where everything would go nowhere without an error.

    Raises:
        FileNotFoundError: It has no name any more.
    """
    if os.fstat(file.fileno()).st_nlink == 0:
        raise FileNotFoundError(errno.ENOENT, "the file was removed while the run writes to it", str(path))


def records(path: Path, start: int = 0) -> Iterator[bytes]:
    """The data of a file's whole records, from a byte on at which one begins."""
    with path.open("rb") as file:
        file.seek(start)
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            length = _HEADER.unpack(header)[0]
            record = file.read(length + _FOOTER.size)
            if len(record) < length + _FOOTER.size:
                break
            yield record[:length]


def drop_ending(path: Path, mark: bytes) -> None:
    """Removes a file's last record if it holds a mark.

    Args:
        path: An event file that nobody writes to.
        mark: Part of the record's data.
    """
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = end = 0
        while end + _HEADER.size <= size:
            file.seek(end)
            following = end + _HEADER.size + _HEADER.unpack(file.read(_HEADER.size))[0] + _FOOTER.size
            if following > size:
                break
            start, end = end, following
        file.seek(start)
        if mark in file.read(end - start):
            file.truncate(start)
