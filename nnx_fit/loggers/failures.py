"""What happens when a logger fails while a run is under way: it is reported once, and the run goes on.

`Logger` puts every method that records through `guarded`. Where no Trainer uses the logger, an exception is raised as
from any object; a Trainer gives its loggers a `Failures`, which takes it instead.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from nnx_fit.errors import NnxFitError

_log = logging.getLogger(__name__)


class Failures:
    """Reports what one logger could not record.

    Each cause is reported once for each method until that method works again, which is reported as well: a full disk
    is two lines, not one for each step.

    Args:
        name: What the logger is called in messages.
    """

    def __init__(self, name: str):
        self.name = name
        self.lost: Counter[str] = Counter()
        self._causes: dict[str, set[Any]] = {}
        self._since: Counter[str] = Counter()
        self._inside = threading.local()

    def call(self, method: Callable[..., Any], logger: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a method; what it raises is reported, unless it is the mistake of whoever called it."""
        if getattr(self._inside, "method", None):  # a method of the logger called another: the outer one answers
            return method(logger, *args, **kwargs)
        self._inside.method = method
        try:
            result = method(logger, *args, **kwargs)
        except NnxFitError:
            raise
        except Exception as error:
            if isinstance(error, TypeError) and _never_entered(error):
                raise
            self._note(method, args, kwargs, error)
            return None
        finally:
            self._inside.method = None
        if method.__name__ in self._causes:
            self._works(method.__name__)
        return result

    def close(self) -> None:
        """Says in the end what is missing."""
        missing = ", ".join(f"{count} of {name}" for name, count in sorted(self.lost.items()))
        if missing:
            _log.warning("%s: calls that failed in this run, and whose records are lost: %s.", self.name, missing)
        self.lost.clear()
        self._causes.clear()
        self._since.clear()

    def _note(
        self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
    ) -> None:
        name = method.__name__
        self.lost[name] += 1
        self._since[name] += 1
        cause = (type(error), getattr(error, "errno", None))
        causes = self._causes.setdefault(name, set())
        if cause in causes:
            return
        causes.add(cause)
        step = inspect.signature(method).bind(None, *args, **kwargs).arguments.get("step")
        _log.error(
            "%s failed in %s%s: %s: %s\nThe run goes on, and so do its other loggers. Later records are still tried; "
            "this failure is not reported again.",
            self.name,
            name,
            f" at step {step}" if step is not None else "",
            type(error).__name__,
            error,
            exc_info=error if _log.isEnabledFor(logging.DEBUG) else None,
        )

    def _works(self, name: str) -> None:
        del self._causes[name]
        _log.warning("%s works again; %d calls of %s were lost.", self.name, self._since.pop(name), name)


def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a logger whose exceptions go to the logger's `failures`, where it has one."""
    if getattr(method, "is_guarded", False):
        return method

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        failures = self.failures
        return method(self, *args, **kwargs) if failures is None else failures.call(method, self, args, kwargs)

    setattr(call, "is_guarded", True)  # noqa: B010  a function has no such attribute to a type checker
    return call


def _never_entered(error: BaseException) -> bool:
    """Whether a call did not fit the method's signature: only the frame that made the call is in the traceback."""
    return error.__traceback__ is not None and error.__traceback__.tb_next is None
