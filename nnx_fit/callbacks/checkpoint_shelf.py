"""`CheckpointShelf`: the checkpoints of one run in their directory: their names, which stay, and when the others go.

It writes nothing itself: it says under which path the next checkpoint is to be saved, and deletes what that one
displaces once it is complete. What the run was resumed from is never deleted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnx_fit.callbacks import checkpoint_names as names
from nnx_fit.callbacks.monitor import better
from nnx_fit.callbacks.top_k import TopK
from nnx_fit.checkpoint.directories import delete_checkpoint, is_complete, load_meta


class CheckpointShelf:
    """The checkpoints of a run.

    Args:
        directory: Where they are.
        template: Template of their names.
        top: Which of them are kept.
        insert_names: Whether fields of the template become `name=value`, or the value alone.
        versions: Whether a name that is taken is counted up; otherwise the new checkpoint replaces what has it.

    Attributes:
        origin: The checkpoint that the run was resumed from, or `None`.
        last: Path of the `last` checkpoint, or `None` while there is none.
    """

    def __init__(self, directory: Path, template: str, top: TopK, *, insert_names: bool = True, versions: bool = True):
        self.directory = directory
        self.origin: Path | None = None
        self.last: Path | None = None
        self._template = template
        self._top = top
        self._insert_names = insert_names
        self._versions = versions
        self._inherited: tuple[str, float] | None = None
        self._doomed: list[tuple[Path, Path]] = []
        self._continued = False
        self._placed: Path | None = None
        self._before: tuple[dict[str, float | None], Path | None, list[tuple[Path, Path]]] = ({}, None, [])

    @property
    def waiting(self) -> bool:
        """Whether something is to be deleted once its successor is complete."""
        return bool(self._doomed)

    @property
    def best(self) -> tuple[str, float | None]:
        """Path and score of the best checkpoint; `""` and `None` if there is none."""
        best = self._top.best()
        found = ("", None) if best is None else (str(self.directory / best[0]), best[1])
        if self._inherited is not None and is_complete(self._inherited[0]):
            path, score = self._inherited
            if best is None or better(self._top.mode, score, self._top.rank(best[1])):
                return path, score
        return found

    def place(self, score: float | None, values: Mapping[str, float]) -> Path | None:
        """Where to save a state under a name of its own.

        Args:
            score: Its score; `None` where nothing is monitored.
            values: `epoch`, `step` and metrics, for the name.

        Returns:
            The path, or `None` when the state is not among those to keep.
        """
        self._note()
        if not self._top.accepts(score):
            return None
        path = self.directory / names.format_name(self._template, values, insert_names=self._insert_names)
        if self._versions:
            path = names.free_path(path, self._taken)
        else:
            path = names.free_path(path, self._is_origin)
            if not self._top.replaces(path.name, score):
                return None
        # Whatever had the name and was to be deleted is replaced, and nothing else must be deleted in its place.
        self._doomed = [(successor, victim) for successor, victim in self._doomed if victim != path]
        victims = [self.directory / name for name in self._top.add(path.name, score)]
        if self.last is not None:
            # It is older than what is being saved, so it cannot be the state the run ends in.
            victims.append(self.last)
            self.last = None
        self._doomed += [(path, victim) for victim in victims]
        self._placed = path
        return path

    def place_last(self) -> Path:
        """Where to save the state that the run may end in."""
        self._note()
        if self.last is None:
            path = self.directory / names.LAST
            self.last = path if self._continued else names.free_path(path)
        if self._is_origin(self.last):
            # What the run came from stays, under a name that does not claim to be the run's end.
            step = load_meta(self.last).get("global_step", "unknown")
            aside = names.free_path(self.directory / f"resumed-step={step}")
            self.last.rename(aside)
            self.origin = aside
        self._placed = self.last
        return self.last

    def settle(self, failed: bool) -> None:
        """Once no save is under way: takes the last place back if nothing was saved there.

        What it displaced has its own again.

        Args:
            failed: Whether a save has just failed, which may be that of another callback.
        """
        placed, self._placed = self._placed, None
        if placed is None or is_complete(placed) or not (failed or placed.parent.is_dir()):
            return
        # As it was, also where nothing of it can be seen just now: a directory that is gone may come back.
        self._top.scores, self.last, self._doomed = self._before

    def _note(self) -> None:
        self._before = (dict(self._top.scores), self.last, list(self._doomed))

    def tidy(self) -> None:
        """Deletes what was displaced by checkpoints that are complete by now."""
        still = []
        for successor, victim in self._doomed:
            if not is_complete(successor):
                still.append((successor, victim))
            elif not self._is_origin(victim):
                delete_checkpoint(victim)
        self._doomed = still

    def state_dict(self) -> dict[str, Any]:
        """What a run that continues needs to know."""
        path, score = self.best
        return {
            "directory": str(self.directory),
            "kept": dict(self._top.scores),
            "doomed": [victim.name for _, victim in self._doomed],
            "best": [path, score],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the checkpoints of the run that is continued, if they are in this directory.

        Those elsewhere are left alone; the best of them stays the best until this run has a better one.
        """
        kept = {name: score for name, score in state["kept"].items() if _is_bare(name)}
        there = {name: score for name, score in kept.items() if is_complete(self.directory / name)}
        last = self.directory / names.LAST
        same = os.path.abspath(state["directory"]) == os.path.abspath(self.directory)
        self._continued = same or bool(there) or is_complete(last)
        if self._continued:
            self._top.scores = there
            self.last = last if is_complete(last) else None
            leftovers = [self.directory / name for name in state["doomed"] if _is_bare(name) and name not in there]
            self._doomed = [(path, path) for path in leftovers if is_complete(path)]
        else:
            path, score = state["best"]
            self._inherited = None if score is None else (path, score)

    def _taken(self, path: Path) -> bool:
        # A run that continues here replaces what its first life had saved at a step it now reaches again.
        if path.name in self._top.scores or self._is_origin(path):
            return True
        return path.exists() and not self._continued

    def _is_origin(self, path: Path) -> bool:
        return self.origin is not None and os.path.realpath(path) == os.path.realpath(self.origin) and path.exists()


def _is_bare(name: str) -> bool:
    """Whether a name is one in this directory: a stranger's checkpoint must not lead to a deletion anywhere else."""
    return name not in ("", ".", "..") and Path(name).name == name
