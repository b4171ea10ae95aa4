"""`LiveOptimizer`: an optimizer of a run as host hooks see it. What they set counts from the next update on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import jax
import numpy as np

from nnx_fit.errors import ConfigurationError
from nnx_fit.programs import opt_state as states
from nnx_fit.programs.parts import Part


class Hyperparameters(MutableMapping[str, Any]):
    """The injected hyperparameters of an optimizer by name, as Python numbers or NumPy arrays.

    Args:
        name: The optimizer's name, for messages.
        read: Gives its state.
        write: Takes another state.
    """

    def __init__(self, name: str, read: Callable[[], Any], write: Callable[[Any], None]):
        self._name = name
        self._read = read
        self._write = write

    def __getitem__(self, key: str) -> Any:
        found = states.injected(self._read())
        if key not in found:
            raise KeyError(_missing(self._name, key, list(found)))
        return np.asarray(jax.device_get(found[key])).tolist()

    def __setitem__(self, key: str, value: Any) -> None:
        state = self._read()
        found = states.injected(state)
        if key not in found:
            raise ConfigurationError(_missing(self._name, key, list(found)))
        if states.scheduled(state, key):
            raise ConfigurationError(
                f"The hyperparameter {key!r} of the optimizer follows a schedule, which would overwrite what is set.\n"
                "Fix: inject a number in place of the schedule, and set it in a hook."
            )
        if np.shape(value) not in ((), found[key].shape):
            raise ConfigurationError(
                f"The hyperparameter {key!r} of the optimizer has shape {found[key].shape}, but a value of shape "
                f"{np.shape(value)} was given. Fix: give a number."
            )
        self._write(states.with_injected(state, key, value))

    def __delitem__(self, key: str) -> None:
        raise ConfigurationError(f"The hyperparameter {key!r} of an optimizer cannot be removed.")

    def __iter__(self) -> Iterator[str]:
        return iter(states.injected(self._read()))

    def __len__(self) -> int:
        return len(states.injected(self._read()))

    def __repr__(self) -> str:
        return repr(dict(self))


class LiveOptimizer:
    """An optimizer of a run, between two steps.

    Args:
        part: The optimizer with what it trains.
        step: Gives the number of completed updates.
        read: Gives its state.
        write: Takes another state.
    """

    def __init__(self, part: Part, step: Callable[[], int], read: Callable[[], Any], write: Callable[[Any], None]):
        self._part = part
        self._step = step
        self._read = read
        self._write = write

    def __repr__(self) -> str:
        return f"LiveOptimizer({self.name!r}, learning_rate={self.learning_rate})"

    @property
    def name(self) -> str:
        """Its name, empty for a single unnamed one."""
        return self._part.optimizer.name

    @property
    def monitor(self) -> str | None:
        """Name of the metric that its plateaus are driven by, or `None`."""
        return self._part.optimizer.monitor

    def show(self, value: float, count: int) -> None:
        """Shows its plateaus a value of that metric, which is the `count`-th one, unless they were shown it before."""
        state = states.shown(self._read(), value, count)
        if state is not None:
            self._write(state)

    @property
    def state(self) -> Any:
        """Its Optax state: the live arrays, which the next step donates."""
        return states.bare(self._read())

    @property
    def params(self) -> list[str]:
        """Dotted paths of what it trains."""
        return list(dict.fromkeys(self._part.view.names))

    @property
    def hyperparams(self) -> Hyperparameters:
        """What `optax.inject_hyperparams` made readable and settable; setting a value compiles nothing."""
        return Hyperparameters(self.name, self._read, self._write)

    @property
    def learning_rate(self) -> float | None:
        """The learning rate of the next update, as far as it is known; `None` where it cannot be read."""
        rate = self._part.learning_rate(self._read(), self._step(), ahead=True)
        return None if rate is None else float(rate)

    def update(self, grads: Any) -> None:
        """Belongs into a `training_step` with `automatic_optimization = False`; here it is an error."""
        raise ConfigurationError(
            "self.optimizers(...).update was called in a host hook. Fix: call it in training_step, with "
            "`automatic_optimization = False`."
        )


def _missing(name: str, key: str, known: list[str]) -> str:
    whose = f"The optimizer {name!r}" if name else "The optimizer"
    return (
        f"{whose} has no hyperparameter {key!r}; it has: {', '.join(known) or 'none'}.\n"
        "Fix: wrap the optimizer, for example optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)."
    )
