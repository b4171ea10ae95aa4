"""`LambdaCallback`: functions in the place of a subclass of `Callback`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from nnx_fit.callbacks.callback import Callback
from nnx_fit.errors import ConfigurationError

# The other methods of a callback, `state_dict` and the like, are not given the trainer.
HOOKS: tuple[str, ...] = tuple(
    name
    for name, method in vars(Callback).items()
    if inspect.isfunction(method) and list(inspect.signature(method).parameters)[1:3] == ["trainer", "module"]
)


class LambdaCallback(Callback):
    """A callback made of functions, each called in the place of a hook.

    A function takes what the hook of `Callback` takes, without `self`: the trainer, the module, and whatever else is
    in the hook's signature, by position. Hooks that are not given cost nothing. As with any callback, the module's
    Variables are up to date when a function is called, and it may write them.

    Args:
        **hooks: Functions by name of hook, for example `on_train_epoch_end=...`; `None` leaves a hook out.

    Raises:
        ConfigurationError: There is no hook of that name, or its function is none or does not take its arguments.

    Example:
        >>> from nnx_fit.callbacks.lambda_callback import LambdaCallback
        >>> epochs = []
        >>> callback = LambdaCallback(on_train_epoch_end=lambda trainer, module: epochs.append(trainer.current_epoch))
        >>> sorted(vars(callback))
        ['on_train_epoch_end']
    """

    def __init__(self, **hooks: Callable[..., Any] | None):
        for name, function in hooks.items():
            _check_name(name)
            if function is not None:
                _check_function(name, function)
                setattr(self, name, function)


def _check_name(name: str) -> None:
    if name not in HOOKS:
        near = difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.0)[0]
        raise ConfigurationError(
            f"LambdaCallback({name}=...): there is no hook of that name. Did you mean {near!r}?\n"
            f"Fix: use one of {', '.join(HOOKS)}."
        )


def _check_function(name: str, function: Any) -> None:
    wanted = list(inspect.signature(getattr(Callback, name)).parameters)[1:]
    expected = f"Fix: pass a function of ({', '.join(wanted)})."
    if not callable(function):
        raise ConfigurationError(f"LambdaCallback({name}={function!r}): that is no function.\n{expected}")
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # a built-in that does not tell
    try:
        signature.bind(*wanted)
    except TypeError as error:
        raise ConfigurationError(
            f"LambdaCallback({name}=...): its function has the arguments {signature}, which the hook does not fit: "
            f"{error}.\n{expected}"
        ) from None
