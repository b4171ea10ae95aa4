"""`Trainer(profiler="simple")` and `"advanced"`: where the host's time goes in a verb, as a table and a file.

A profile times what it is given: hooks, steps, loaders. `Profile` itself is the one that is off: it hands back what it
is given, so that a run without a profiler has nothing of it in its loops. What the device does is in the trace of a
`ProfilerCallback`; here its time shows where the host waits for it.
"""

from __future__ import annotations

import cProfile
import functools
import io
import pstats
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from nnx_fit.callbacks.terminal import say
from nnx_fit.errors import ConfigurationError

_Function = TypeVar("_Function", bound=Callable[..., Any])
# Functions in the table of the advanced profiler.
_ROWS = 40


class Profile:
    """No profile."""

    def timed(self, action: str, function: _Function) -> _Function:
        """A function like the given one, whose calls are measured as an action."""
        del action
        return function

    def steps(self, action: str, program: Any) -> Any:
        """A program like the given one, whose `run` is measured as an action."""
        del action
        return program

    def batches(self, action: str, batches: Any) -> Any:
        """A pass over a loader like the given one, whose waiting for the next batch is measured as an action."""
        del action
        return batches

    @contextmanager
    def of(self, verb: str, directory: Callable[[], Path | None]) -> Iterator[None]:
        """Profiles a verb.

        Args:
            verb: Its name.
            directory: Called at the end: where to save the table, or `None` to only print it.
        """
        del verb, directory
        yield


class SimpleProfile(Profile):
    """Seconds and calls of each action.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._calls: dict[str, int] = {}

    def timed(self, action: str, function: _Function) -> _Function:
        """A function like the given one, whose calls are measured as an action."""
        clock, add = self._clock, self._add

        @functools.wraps(function, updated=())
        def measured(*args: Any, **kwargs: Any) -> Any:
            begin = clock()
            try:
                return function(*args, **kwargs)
            finally:
                add(action, clock() - begin)

        return measured  # type: ignore[return-value]

    def steps(self, action: str, program: Any) -> Any:
        """A program like the given one, whose `run` is measured as an action."""
        return _Steps(program, self.timed(action, program.run))

    def batches(self, action: str, batches: Any) -> Any:
        """A pass over a loader like the given one, whose waiting for the next batch is measured as an action."""
        return _Batches(batches, self.timed(action, batches.__next__))

    @contextmanager
    def of(self, verb: str, directory: Callable[[], Path | None]) -> Iterator[None]:
        """Measures a verb, prints the table and saves it as `profile-<verb>.txt`."""
        self._seconds, self._calls = {}, {}
        begin = self._clock()
        try:
            yield
        finally:
            _publish(self.table(verb, self._clock() - begin), f"profile-{verb}.txt", directory)

    def table(self, verb: str, total: float) -> str:
        """The actions by time, most first. An action that happens within another one is part of both.

        Args:
            verb: What was measured.
            total: Its duration in seconds.
        """
        rows = [(verb, 1, total), *((name, self._calls[name], spent) for name, spent in self._seconds.items())]
        rows[1:] = sorted(rows[1:], key=lambda row: -row[2])
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{'Action':<{width}}  {'Calls':>9}  {'Mean (ms)':>11}  {'Total (s)':>10}  {'Share':>7}"]
        for name, calls, seconds in rows:
            mean, share = 1e3 * seconds / calls, seconds / total if total else 1.0
            lines.append(f"{name:<{width}}  {calls:>9}  {mean:>11.4g}  {seconds:>10.4g}  {share:>7.1%}")
        return "\n".join(lines)

    def _add(self, action: str, seconds: float) -> None:
        self._seconds[action] = self._seconds.get(action, 0.0) + seconds
        self._calls[action] = self._calls.get(action, 0) + 1


class AdvancedProfile(Profile):
    """Seconds and calls of each Python function, by `cProfile`, of the thread that runs the verb."""

    @contextmanager
    def of(self, verb: str, directory: Callable[[], Path | None]) -> Iterator[None]:
        """Measures a verb, prints the table and saves it, with the numbers in `profile-<verb>.prof` for `pstats`."""
        profile = cProfile.Profile()
        try:
            profile.enable()
        except ValueError as error:
            raise ConfigurationError(
                f'Trainer(profiler="advanced"): {verb} cannot be profiled ({error}).\n'
                "Fix: end the other profiler first; a thread has one."
            ) from error
        try:
            yield
        finally:
            profile.disable()
            text = io.StringIO()
            pstats.Stats(profile, stream=text).sort_stats("cumulative").print_stats(_ROWS)
            where = _publish(text.getvalue().strip(), f"profile-{verb}.txt", directory)
            if where is not None:
                profile.dump_stats(where.with_suffix(".prof"))


class _Steps:
    """A program whose `run` is replaced."""

    def __init__(self, program: Any, run: Callable[..., Any]):
        self._program = program
        self.run = run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)


class _Batches:
    """A pass over a loader whose `__next__` is replaced."""

    def __init__(self, batches: Any, advance: Callable[[], Any]):
        self._batches = batches
        self._advance = advance

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Any:
        return self._advance()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def _publish(table: str, name: str, directory: Callable[[], Path | None]) -> Path | None:
    """Prints a table and saves it; returns its path, or `None` where it cannot or should not be saved."""
    say(table)
    folder = directory()
    if folder is None:
        return None
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(table + "\n")
    except OSError as error:  # it is printed, and what ended the run must not be hidden
        say(f"The profile could not be saved in {folder}: {error}")
        return None
    return path
