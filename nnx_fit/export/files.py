"""Named arrays and a JSON document in one safetensors file, written whole or not at all, and checked when read.

The document stands in the file's metadata: the role of each array, a checksum of each, and what safetensors itself has
no words for. Any other reader of safetensors sees the arrays by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from nnx_fit.errors import CheckpointError, ConfigurationError

FORMAT = 1

# Name of a compiled program among the arrays of its file; no path of a Variable looks like it.
PROGRAM = "<program>"

_DOCUMENT, _CHECKSUM = "nnx_fit", "nnx_fit_crc32"

# What every reader of safetensors for NumPy knows. Arrays of another dtype are stored as bytes, and the document says
# what they are.
_NATIVE = {"bool", "bfloat16", "float16", "float32", "float64"} | {
    f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a file.

    Attributes:
        array: It: the data of a PRNG key where `prng` is given.
        role: Role of its Variable, or what else it is; `None` in a file of somebody else's.
        prng: Name of the generator whose keys it holds.
    """

    array: np.ndarray
    role: str | None
    prng: str | None = None

    @classmethod
    def of(cls, value: Any, role: str) -> Entry:
        """The entry of an array or of typed PRNG keys."""
        prng = None
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            prng = str(jax.random.key_impl(value))
            value = jax.random.key_data(value)
        return cls(np.asarray(jax.device_get(value), order="C"), role, prng)

    @property
    def value(self) -> Any:
        """The array, or the typed keys."""
        return self.array if self.prng is None else jax.random.wrap_key_data(jnp.asarray(self.array), impl=self.prng)


@dataclasses.dataclass(frozen=True)
class File:
    """What a file holds.

    Attributes:
        path: The file.
        entries: Its arrays by name.
        about: What else was saved with them; empty in a file of somebody else's.
    """

    path: Path
    entries: dict[str, Entry]
    about: dict[str, Any]


def write(path: str | Path, kind: str, entries: Mapping[str, Entry], about: Mapping[str, Any]) -> None:
    """Writes a file. Whatever happens meanwhile, a file that was there before is there whole, or the new one is.

    Args:
        path: The file; its directory is made.
        kind: What the file is.
        entries: Its arrays by name.
        about: Plain values to save with them.

    Raises:
        CheckpointError: It could not be written; what was there before still is.
        ConfigurationError: safetensors is not installed.
    """
    safetensors = _safetensors()
    import nnx_fit

    path = Path(path)
    stored = {name: _stored(entry.array) for name, entry in entries.items()}
    index = {name: _described(entry, stored[name]) for name, entry in entries.items()}
    document = json.dumps(
        {"format": FORMAT, "kind": kind, "nnx_fit": nnx_fit.__version__, "arrays": index, "about": dict(about)}
    )
    metadata = {_DOCUMENT: document, _CHECKSUM: str(zlib.crc32(document.encode()))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path) as temporary:
            safetensors.numpy.save_file(stored, temporary, metadata=metadata)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path} could not be written ({type(error).__name__}: {_first_line(error)}).\n"
            "Nothing was left under that name but what was there before. Fix: check that the disk has space and that "
            "the directory is writable."
        ) from error


def read(path: str | Path, kinds: tuple[str | None, ...]) -> File:
    """Reads a file.

    Args:
        path: The file.
        kinds: The kinds that will do; `None` stands for a safetensors file of somebody else's.

    Raises:
        CheckpointError: There is none, it is damaged, of another kind, or of a newer format.
        ConfigurationError: safetensors is not installed.
    """
    safetensors = _safetensors()
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} {'is a directory' if path.is_dir() else 'does not exist'}; expected a file.")
    try:
        with safetensors.safe_open(path, framework="np") as opened:
            metadata = opened.metadata() or {}
            document = _document(path, metadata)
            kind = document.get("kind")
            if kind not in kinds:
                raise _of_another_kind(path, kind, kinds)
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return File(path, _entries(path, arrays, document.get("arrays")), document.get("about", {}))
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        _damaged(path, f"{type(error).__name__}: {_first_line(error)}")


def _document(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if _DOCUMENT not in metadata:
        return {}
    text = metadata[_DOCUMENT]
    if str(zlib.crc32(text.encode())) != metadata.get(_CHECKSUM):
        _damaged(path, "its description is not what was written")
    document = json.loads(text)
    if document["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {document['format']} and was written by nnx_fit {document['nnx_fit']}; this nnx_fit "
            f"reads up to {FORMAT}.\nFix: update nnx_fit."
        )
    return document


def _entries(path: Path, arrays: dict[str, np.ndarray], index: Mapping[str, Any] | None) -> dict[str, Entry]:
    if index is None:
        return {name: Entry(array, None) for name, array in arrays.items()}
    if set(arrays) != set(index):
        _damaged(path, "its arrays are not those it describes")
    entries = {}
    for name, described in index.items():  # in the order in which they were written
        array = arrays[name]
        if _checksum(array) != described["crc32"]:
            _damaged(path, f"`{name}` is not what was written")
        if "raw" in described:
            shape, dtype = described["raw"]
            array = array.view(jnp.dtype(dtype)).reshape(shape)
        entries[name] = Entry(array, described["role"], described.get("prng"))
    return entries


def _stored(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.name in _NATIVE else _bytes(array)


def _described(entry: Entry, stored: np.ndarray) -> dict[str, Any]:
    described: dict[str, Any] = {"role": entry.role, "crc32": _checksum(stored)}
    if stored is not entry.array:
        described["raw"] = [list(entry.array.shape), entry.array.dtype.name]
    if entry.prng is not None:
        described["prng"] = entry.prng
    return described


def _bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of an array, as a vector."""
    return array.reshape(-1).view(np.uint8)


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(_bytes(array).data)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write instead of the one at `path`, whose place it takes once it is on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise not_installed("safetensors") from error
    return safetensors


def not_installed(package: str) -> ConfigurationError:
    """The error for a package that is missing."""
    return ConfigurationError(
        f'nnx_fit.export needs {package}, which is not installed. Fix: pip install "nnx-fit[export]"'
    )


def _of_another_kind(path: Path, kind: str | None, kinds: tuple[str | None, ...]) -> CheckpointError:
    what = f"a {kind} file of nnx_fit" if kind else "a safetensors file that nnx_fit did not write"
    wanted = " or ".join(each for each in kinds if each)
    return CheckpointError(f"{path} is {what}; expected one of kind {wanted}.\nFix: write it with save_{kinds[0]}.")


def _damaged(path: Path, why: str) -> NoReturn:
    raise CheckpointError(
        f"{path} is damaged, or no safetensors file: it cannot be read ({why}).\nFix: use another copy of it."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
