"""What the document of a checkpoint looks like: everything in it but the arrays.

Its seal says that it is what was written. That what wrote it was in order, and this library, is checked here, before
anybody relies on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from nnx_fit.checkpoint import checksums
from nnx_fit.loops.progress import Progress

# What a run cannot continue without, and of which type it is; the loader's position may be anything, also nothing.
_OF_TRAINING = {"callbacks": dict, "history": dict, "ledger": dict, "metric_names": object, "loader": object}
_GROUPS_OF_TRAINING = ("optimizer", "metrics")
_PLAIN = {
    "hparams": dict,
    "hparams_tuples": list,
    "hparams_left_out": list,
    "callback_arrays": list,
    "precision": str,
    "loggers": dict,
}


def read(text: bytes) -> tuple[int, dict[str, Any]]:
    """The document in a file, and the format it says it has.

    Args:
        text: The content of the file.

    Raises:
        ValueError: It is not what was written.
    """
    document = checksums.unsealed(text)
    version = document.get("format")
    if type(version) is not int:
        raise ValueError("it does not say which format it has")
    return version, document


def check(document: Mapping[str, Any]) -> None:
    """Checks a document of a format that is known.

    Raises:
        ValueError: Says which entry is not what it should be.
    """
    meta, index = (_entry(document, name, dict, name) for name in ("meta", "index"))
    for group, entries in index.items():
        sound = isinstance(entries, list) and all(isinstance(each, dict) for each in entries)
        if not sound or not all(isinstance(each.get("name"), str) for each in entries):
            raise ValueError(f"index.{group} names no arrays")
    for name, sums in _entry(document, "files", dict, "files", {}).items():
        if not isinstance(sums, list) or [type(each) for each in sums] != [int, str] or not _inside(name):
            raise ValueError(f"files has no sums for {name}")
    for name in ("global_step", "epoch", "life"):
        if type(meta.get(name, 0)) is not int:
            raise ValueError(f"meta.{name} is {meta[name]!r}")
    for name, kind in _PLAIN.items():
        if name in meta:
            _entry(meta, name, kind, f"meta.{name}")
    if "progress" in meta:
        _check_training(meta, index)


def _check_training(meta: Mapping[str, Any], index: Mapping[str, Any]) -> None:
    state = _entry(meta, "progress", dict, "meta.progress")
    progress = Progress()
    try:
        progress.load_state_dict(state)
    except KeyError as error:
        raise ValueError(f"meta.progress has no {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta.progress: {error}") from error
    for name, value in progress.state_dict().items():
        if name in state and type(state[name]) is not type(value):
            raise ValueError(f"meta.progress.{name} is {state[name]!r}")
    for name, kind in _OF_TRAINING.items():
        _entry(meta, name, kind, f"meta.{name}")
    for name, records in meta["history"].items():
        if not isinstance(records, list) or not all(_is_record(record) for record in records):
            raise ValueError(f"meta.history.{name} has other things than steps and values")
    if not isinstance(meta.get("stop"), str | None):
        raise ValueError("meta.stop is no reason")
    if (hook := meta.get("hook")) is not None and not _is_hook(hook):
        raise ValueError("meta.hook does not say who has not heard of it")
    for group in _GROUPS_OF_TRAINING:
        if group not in index:
            raise ValueError(f"index has no {group}")


_REQUIRED: Any = object()


def _entry(document: Mapping[str, Any], name: str, kind: type, shown: str, default: Any = _REQUIRED) -> Any:
    if name not in document and default is _REQUIRED:
        raise ValueError(f"{shown} is missing")
    value = document.get(name, default)
    if not isinstance(value, kind):
        raise ValueError(f"{shown} is {'nothing' if value is None else f'a {type(value).__name__}'}")
    return value


def _is_record(record: Any) -> bool:
    return isinstance(record, list) and len(record) == 2 and all(type(each) in (int, float) for each in record)


def _is_hook(hook: Any) -> bool:
    sound = isinstance(hook, list) and len(hook) == 2 and isinstance(hook[1], list)
    return sound and all(isinstance(name, str) for name in (hook[0], *hook[1]))


def _inside(name: str) -> bool:
    """Whether a path stays in the directory that it starts from."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
