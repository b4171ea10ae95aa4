"""Checksums: what every file of a checkpoint was when it was written, so that damage is found, and found by name.

A directory is summed up once all of its files are there. The document that holds the sums is sealed with its own,
which stands at its end.
"""

from __future__ import annotations

import errno
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A file by its path from the checkpoint's directory: its size in bytes, and the CRC-32 of its content in hexadecimal.
# Not CRC-32C, although it is faster: Orbax ends its files with their own, and of such a file it is always the same.
Sums = dict[str, tuple[int, str]]

_PIECE = 1 << 20
_SEAL = re.compile(rb', "checksum": "([0-9a-f]{8})"\}\Z')


def sums_of(directory: Path) -> Sums:
    """Sums up every file below a directory, and sees to it that they are on the disk."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): _sum(path, flush=True) for path in files}


def damage(directory: Path, sums: Mapping[str, Any]) -> list[str]:
    """What is wrong with the files of a directory: one line for each that is not as it was.

    Args:
        directory: The directory.
        sums: What `sums_of` gave when it was written. Other files are none of its business.
    """
    found = ((name, _wrong(directory / name, size, content)) for name, (size, content) in sums.items())
    return [f"{name} {wrong}" for name, wrong in found if wrong]


def sealed(document: Mapping[str, Any]) -> bytes:
    """A document as JSON, with a checksum of all that stands before it at its end."""
    body = json.dumps(document).encode()
    return body[:-1] + b', "checksum": "%08x"}' % zlib.crc32(body)


def unsealed(text: bytes) -> dict[str, Any]:
    """The document that `sealed` wrote; one from before there were checksums is taken as it is.

    Raises:
        ValueError: It is not what was written.
    """
    seal = _SEAL.search(text)
    if seal is None:
        document = _from_json(text)
        if not isinstance(document, dict):
            raise ValueError("it holds no document")
        if "files" in document or "checksum" in document:
            raise ValueError("its own checksum is missing")
        return document
    body = text[: seal.start()] + b"}"
    if zlib.crc32(body) != int(seal[1], 16):
        raise ValueError("its content changed")
    return _from_json(body)


def _from_json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError("it is cut off, or no JSON") from error
    except RecursionError as error:
        raise ValueError("it is nested deeper than anything that is written") from error


def _wrong(path: Path, size: int, content: str) -> str:
    try:
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != size:
            return f"has {path.stat().st_size} bytes, {size} were written"
        return "" if _sum(path)[1] == content else "has changed: its checksum is another one"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _sum(path: Path, *, flush: bool = False) -> tuple[int, str]:
    value = size = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            value, size = zlib.crc32(piece, value), size + len(piece)
        if flush:
            flushed(file.fileno())
    return size, f"{value:08x}"


def write_at_once(file: Path, text: str) -> None:
    """Writes a small file in one go: killed at any moment, also by a power cut, it is as it was or as it is to be."""
    unfinished = file.with_name(f"{file.name}.part")
    with unfinished.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        flushed(opened.fileno())
    os.replace(unfinished, file)


def flushed(descriptor: int) -> None:
    """Waits until a file is on the disk; some file systems cannot say when it is."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
