"""Where callbacks show things: a live terminal through rich, or plain lines where there is none."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_log = logging.getLogger("nnx_fit.progress")
_record = logging.getLogger("nnx_fit.record")


def live_console() -> Console | None:
    """A console that can redraw what it shows, or `None`: standard output is a file, a pipe or a dumb terminal."""
    from rich.console import Console

    console = Console()
    if console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal):
        return console
    return None


def say(text: str) -> None:
    """Writes plain lines: through logging where that is set up to show them, to standard output otherwise."""
    if _log.isEnabledFor(logging.INFO):
        _log.info("%s", text)
    else:
        print(text, flush=True)


def record(text: str) -> None:
    """Keeps, in the run's log alone, what a live terminal shows in another form."""
    _record.info("%s", text)
