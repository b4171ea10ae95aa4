"""`Construction`: the call that makes a module again, from what a checkpoint recorded of the one that was saved."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from nnx_fit.errors import CheckpointError, ConfigurationError
from nnx_fit.hparams import Hyperparameters

RNGS = "rngs"


def recorded(hparams: Hyperparameters) -> dict[str, Any]:
    """What a checkpoint keeps of a module's arguments; JSON, which knows no tuples, is told where they are."""
    return {
        "hparams": dict(hparams),
        "hparams_tuples": [list(place) for place in _tuples(dict(hparams), ())],
        "hparams_left_out": list(hparams.not_recorded),
    }


@dataclasses.dataclass(frozen=True)
class Construction:
    """A class and the arguments to call it with.

    Attributes:
        cls: The class.
        arguments: Its arguments, bound.
    """

    cls: type
    arguments: inspect.BoundArguments

    @classmethod
    def of(
        cls, made: type, path: Path, meta: Mapping[str, Any], overrides: Mapping[str, Any], *, strict: bool
    ) -> Construction:
        """The call that makes the module of a checkpoint.

        Args:
            made: The class.
            path: The checkpoint, for messages.
            meta: Its plain values.
            overrides: Arguments that take the place of recorded ones.
            strict: Whether a recorded argument that the constructor does not take is an error.

        Raises:
            CheckpointError: It was saved with an argument that the constructor does not take.
            ConfigurationError: An override is no argument, or an argument is not known.
        """
        # Of `__init__`, since Flax's metaclass has a `__call__` that takes anything.
        signature = inspect.Signature(list(inspect.signature(made.__init__).parameters.values())[1:])
        takes = signature.parameters
        rest = next((name for name, each in takes.items() if each.kind is each.VAR_KEYWORD), None)
        known = dict(_with_tuples(meta["hparams"], meta.get("hparams_tuples", ())))
        for name in overrides:
            if name not in takes and rest is None:
                raise _unknown_override(made, name, list(takes))
        alien = [name for name in known if name not in takes and rest is None and name not in overrides]
        if alien and strict:
            raise CheckpointError(
                f"The checkpoint {path} was saved with {', '.join(f'{name}={known[name]!r}' for name in alien)}, which "
                f"{made.__name__} does not take.\nFix: load it with the class it was saved with, "
                f"{meta.get('module')}, or pass strict=False to leave out what is not taken."
            )
        values = {name: value for name, value in known.items() if name not in alien} | dict(overrides)
        if RNGS in takes:
            values.setdefault(RNGS, nnx.Rngs(0))
        _check_known(made, path, takes, values, meta.get("hparams_left_out", ()))
        bound = signature.bind_partial()
        for name, each in takes.items():
            if name in values and each.kind is not each.VAR_KEYWORD:
                value = values.pop(name)
                bound.arguments[name] = tuple(value) if each.kind is each.VAR_POSITIONAL else value
        if rest is not None:
            bound.arguments[rest] = values
        return Construction(made, bound)

    def run(self) -> Any:
        """Makes the module."""
        # Rngs that are used up by a first call would give a second one other values.
        arguments = {name: _copied(value) for name, value in self.arguments.kwargs.items()}
        return self.cls(*map(_copied, self.arguments.args), **arguments)


def _copied(value: Any) -> Any:
    return nnx.clone(value) if isinstance(value, nnx.Rngs) else value


def _check_known(
    made: type, path: Path, takes: Mapping[str, inspect.Parameter], values: Mapping[str, Any], left_out: Any
) -> None:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [name for name, each in takes.items() if each.default is each.empty and each.kind not in variable]
    open_ended = any(each.kind is each.VAR_KEYWORD for each in takes.values())
    wanted = [*required, *(name for name in left_out if name in takes or open_ended)]
    missing = [name for name in dict.fromkeys(wanted) if name not in values and name != RNGS]
    if missing:
        call = ", ".join(f"{name}=..." for name in missing)
        raise ConfigurationError(
            f"{made.__name__}.load_from_checkpoint: {path} does not say what {' and '.join(missing)} "
            f"{'was' if len(missing) == 1 else 'were'}: checkpoints hold plain arguments only (numbers, strings, lists "
            f"and dicts of them).\nFix: {made.__name__}.load_from_checkpoint(path, {call})."
        )


def _unknown_override(made: type, name: str, takes: list[str]) -> ConfigurationError:
    near = difflib.get_close_matches(name, takes, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(takes) or 'none'}."
    return ConfigurationError(f"{made.__name__}.load_from_checkpoint({name}=...): no such argument; {hint}")


def _tuples(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The places of all tuples in a plain value, those inside before those around them."""
    if isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tuples(item, (*place, key))
    if isinstance(value, tuple):
        yield place


def _with_tuples(hparams: Mapping[str, Any], places: Any) -> Mapping[str, Any]:
    for *above, last in places:
        holder: Any = hparams
        for key in above:
            holder = holder[key]
        holder[last] = tuple(holder[last])
    return hparams
