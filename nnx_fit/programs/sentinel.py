"""The recompilation sentinel: says that a program is compiled again, and what changed.

A compiled program's Python body runs only while it is traced, so the sentinel costs a running step nothing.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax

logger = logging.getLogger("nnx_fit")

Signature = dict[str, tuple[tuple[int, ...], str]]


@dataclasses.dataclass
class Sentinel:
    """Watches one program.

    Attributes:
        program: What the program is, for messages.
        causes: Why each compilation happened, the first one included.
    """

    program: str
    causes: list[str] = dataclasses.field(default_factory=list)
    _seen: list[Signature] = dataclasses.field(default_factory=list)
    _expected: str | None = None

    def expect(self, cause: str) -> None:
        """Makes the next compilation one that was announced, and the start of a new count of shapes."""
        if self.causes:
            self._expected = cause

    def traced(self, batch: Any, state: list[Any]) -> None:
        """Called in the trace: notes the signature and reports a second one."""
        signature = _signature("batch", batch) | _signature("state", state)
        if self._expected is not None:
            self.causes.append(self._expected)
            self._expected, self._seen = None, []
        elif not self._seen:
            self.causes.append("first call")
        elif signature in self._seen:
            self.causes.append("the same shapes again: a static value of the step changed")
            logger.warning("%s is compiled again although no shape changed: a static value did.", self.program)
        else:
            changes = _changes(min(self._seen, key=lambda seen: len(_changes(seen, signature))), signature)
            self.causes.append("; ".join(changes))
            ragged = all(_only_leading_axis(change, signature, self._seen[0]) for change in changes)
            level = logging.INFO if ragged and len(self._seen) < 3 else logging.WARNING
            logger.log(
                level,
                "%s is compiled again (%d times now): %s.%s",
                self.program,
                len(self._seen) + 1,
                self.causes[-1],
                "" if level == logging.INFO else " Fix: give all batches one shape (pad them, or drop the last one).",
            )
        self._seen.append(signature)


def _signature(root: str, tree: Any) -> Signature:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {f"{root}{jax.tree_util.keystr(path)}": (leaf.shape, str(leaf.dtype)) for path, leaf in leaves}


def _changes(old: Signature, new: Signature) -> list[str]:
    changes = []
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in new:
            changes.append(f"{name}: gone")
        elif name not in old:
            changes.append(f"{name}: new")
        elif old[name] != new[name]:
            (old_shape, old_dtype), (new_shape, new_dtype) = old[name], new[name]
            if old_shape != new_shape:
                changes.append(f"{name}: {old_shape} -> {new_shape}")
            else:
                changes.append(f"{name}: {old_dtype} -> {new_dtype}")
    return changes


def _only_leading_axis(change: str, new: Signature, old: Signature) -> bool:
    name = change.rsplit(": ", 1)[0]
    if name not in new or name not in old:
        return False
    return new[name][0][1:] == old[name][0][1:] and new[name][1] == old[name][1]
