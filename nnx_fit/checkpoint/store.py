"""Checkpoints as directories on disk: named arrays and plain values go in, the same come out.

Orbax writes the arrays, in the background if asked. A checkpoint appears under its name only when it is complete, and
takes the place of an older one of that name only then. What belongs into a checkpoint, and how a run continues from
it, is decided elsewhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np

from nnx_fit.checkpoint.directories import (
    FORMAT,
    check_files,
    complete,
    delete_checkpoint,
    discard_unfinished,
    find_checkpoints,
    is_complete,
    load_meta,
    read_document,
    settle,
    take_place,
    unreadable,
    writing_place,
)
from nnx_fit.checkpoint.failing import not_written, quiet_orbax
from nnx_fit.errors import CheckpointError

__all__ = [
    "CheckpointStore",
    "delete_checkpoint",
    "find_checkpoints",
    "is_complete",
    "load_arrays",
    "load_meta",
]


class CheckpointStore:
    """Writes checkpoints, one at a time, and knows whether they have reached the disk.

    Nothing is created before the first save.
    """

    def __init__(self) -> None:
        self._checkpointer: Any = None
        self._worker: ThreadPoolExecutor | None = None
        self._pending: tuple[Path, Future[None]] | None = None

    def save(
        self, path: Path, arrays: Mapping[str, Mapping[str, Any]], meta: Mapping[str, Any], *, asynchronous: bool
    ) -> None:
        """Writes a checkpoint.

        An earlier save that is still under way is waited for. A complete checkpoint at `path` is replaced once the
        new one is complete; until then it stays.

        Args:
            path: Directory of the checkpoint.
            arrays: Groups of arrays by name: JAX or NumPy arrays of any shape and dtype, scalars, typed PRNG keys.
                Names may hold any character; a group may be empty.
            meta: Plain values: what JSON can hold.
            asynchronous: Return once the arrays are copied to the host, and write in the background.

        Raises:
            CheckpointError: The checkpoint, or an earlier asynchronous one, could not be written.
        """
        self.wait()
        path = Path(os.path.abspath(path))
        groups, index = _encode(arrays)
        try:
            document = json.loads(json.dumps({"format": FORMAT, "index": index, "meta": dict(meta)}))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"The checkpoint {path} was not written: its plain values are not JSON ({error}).\n"
                "Fix: return numbers, strings, booleans, lists and dicts from `state_dict`, and add only those in "
                "`on_save_checkpoint`."
            ) from error
        target = settle(path)
        try:
            self._start(writing_place(target), groups)
        except Exception as error:
            raise not_written(path, error) from error
        assert self._worker is not None
        self._pending = (path, self._worker.submit(self._finish, target, path, document, bool(groups)))
        if not asynchronous:
            self.wait()

    def wait(self) -> None:
        """Blocks until the save under way, if any, is on disk.

        Raises:
            CheckpointError: It failed; nothing is left under its name but what was there before.
        """
        if self._pending is not None:
            path, future = self._pending
            try:
                future.result()
            except Exception as error:
                self._pending = None
                raise not_written(path, error) from error
            self._pending = None

    def close(self) -> None:
        """Waits for the save under way and frees threads."""
        try:
            self.wait()
        finally:
            if self._worker is not None:
                self._worker.shutdown()
                self._checkpointer.close()
                self._worker = self._checkpointer = None

    def _start(self, target: Path, groups: dict[str, dict[str, Any]]) -> None:
        import orbax.checkpoint as ocp

        if self._checkpointer is None:
            quiet_orbax()
            # Directories made in the background would keep a save into an impossible place waiting for minutes.
            options = ocp.AsyncOptions(create_directories_asynchronously=False)
            self._checkpointer = ocp.AsyncCheckpointer(_handler(), async_options=options)
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        target.parent.mkdir(parents=True, exist_ok=True)
        if groups:
            self._checkpointer.save(target, args=ocp.args.Composite(arrays=ocp.args.PyTreeSave(groups)))

    def _finish(self, target: Path, path: Path, document: dict[str, Any], has_arrays: bool) -> None:
        try:
            if has_arrays:
                self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                complete(target, document)
        except Exception:
            discard_unfinished(target)
            raise
        if target != path and jax.process_index() == 0:
            take_place(target, path)


def load_arrays(
    path: str | Path, groups: Iterable[str] | None = None, *, checked: bool = False
) -> dict[str, dict[str, Any]]:
    """The arrays of a checkpoint, on the host.

    Args:
        path: Directory of the checkpoint.
        groups: Names of the groups to read; `None` reads all of them.
        checked: Whether its files were compared with their checksums a moment ago.

    Returns:
        Groups of NumPy arrays by name, in the order they were saved; PRNG keys come back as typed keys.

    Raises:
        CheckpointError: There is no complete, undamaged checkpoint at `path`, or it lacks a group.
    """
    path = Path(os.path.abspath(path))
    if not checked:
        check_files(path)
    index: dict[str, list[dict[str, Any]]] = read_document(path)["index"]
    wanted = list(index) if groups is None else list(groups)
    missing = [group for group in wanted if group not in index]
    if missing:
        raise CheckpointError(
            f"The checkpoint {path} does not hold {', '.join(missing)}; it holds {', '.join(index) or 'no arrays'}.\n"
            "A checkpoint of weights alone cannot continue a run. Fix: use one saved with `save_weights_only=False`."
        )
    stored = {
        _group_key(group): {_key(entry["name"]): 0 for entry in index[group] if "empty" not in entry}
        for group in wanted
    }
    stored = {group: entries for group, entries in stored.items() if entries}
    try:
        read = _read(path, stored) if stored else {}
        return {
            group: {e["name"]: _decode(e, read.get(_group_key(group), {})) for e in index[group]} for group in wanted
        }
    except Exception as error:
        raise unreadable(path, error) from error


def _encode(arrays: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, dict[str, Any]], dict[str, list[Any]]]:
    """What Orbax is given to store, and the index that leads back: names, PRNG implementations, arrays of size 0."""
    groups: dict[str, dict[str, Any]] = {}
    index: dict[str, list[dict[str, Any]]] = {}
    for group, entries in arrays.items():
        index[group] = []
        for name, value in entries.items():
            entry: dict[str, Any] = {"name": name}
            if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
                entry["prng"] = str(jax.random.key_impl(value))
                value = jax.random.key_data(value)
            if not isinstance(value, jax.Array):
                value = np.asarray(value)
            if value.size == 0:
                # Orbax refuses arrays without elements; their shape and dtype say everything about them.
                entry["empty"] = [list(value.shape), str(value.dtype)]
            else:
                groups.setdefault(_group_key(group), {})[_key(name)] = value
            index[group].append(entry)
    return groups, index


def _decode(entry: Mapping[str, Any], stored: Mapping[str, np.ndarray]) -> Any:
    if "empty" in entry:
        shape, dtype = entry["empty"]
        value = np.zeros(shape, jnp.dtype(dtype))
    else:
        value = stored[_key(entry["name"])]
    return jax.random.wrap_key_data(jnp.asarray(value), impl=entry["prng"]) if "prng" in entry else value


def _key(name: str) -> str:
    return quote(name, safe=".-_") or "%"


def _group_key(name: str) -> str:
    # Orbax joins the keys of a tree with dots, so a dot in a group's name could make two names one.
    return _key(name).replace(".", "%2E")


def _handler() -> Any:
    import orbax.checkpoint as ocp

    return ocp.CompositeCheckpointHandler(arrays=ocp.PyTreeCheckpointHandler())


def _read(path: Path, stored: dict[str, dict[str, int]]) -> dict[str, dict[str, np.ndarray]]:
    import orbax.checkpoint as ocp

    quiet_orbax()
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
    args = ocp.args.PyTreeRestore(item=stored, restore_args=as_numpy, partial_restore=True)
    with ocp.Checkpointer(_handler()) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.Composite(arrays=args)).arrays
