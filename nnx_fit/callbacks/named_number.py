"""`NamedNumber`: a number that an object keeps under a name, as a finder reads and sets it."""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping
from typing import Any

import numpy as np

from nnx_fit.errors import ConfigurationError


@dataclasses.dataclass(frozen=True)
class NamedNumber:
    """A number that an object keeps as an attribute, as a hyperparameter (`hparams`), or as both.

    Attributes:
        label: What the user calls it: `"module.learning_rate"`.
        owner: The object that has it.
        name: Its name there.
    """

    label: str
    owner: Any
    name: str

    @property
    def value(self) -> Any:
        """The number; the attribute's where there are both."""
        held = _attribute(self.owner, self.name)
        return held if is_number(held) else self._hparams[self.name]

    def set(self, value: Any) -> None:
        """Sets it wherever it is kept.

        Raises:
            ConfigurationError: The attribute cannot be set.
        """
        hparams = self._hparams
        if _attribute(self.owner, self.name) is not None:
            try:
                setattr(self.owner, self.name, value)
            except AttributeError as error:
                raise ConfigurationError(f"{self.label} cannot be set: {error}. Fix: make it an attribute.") from error
        if self.name in hparams:
            hparams[self.name] = value

    @property
    def _hparams(self) -> MutableMapping[str, Any]:
        hparams = getattr(self.owner, "hparams", None)
        return hparams if isinstance(hparams, MutableMapping) else {}


def find_number(root: Any, label: str, path: str) -> NamedNumber | None:
    """The number that an object, or one below it, keeps under a name; `None` if there is none.

    Args:
        root: The object.
        label: What the user calls it, such as `"module"`.
        path: A name, or a dotted path of attributes.
    """
    *parents, name = path.split(".")
    owner = root
    for parent in parents:
        owner = getattr(owner, parent, None)
    number = NamedNumber(f"{label}.{path}", owner, name)
    return number if is_number(_attribute(owner, name)) or is_number(number._hparams.get(name)) else None


def is_number(value: Any) -> bool:
    """Whether a value is a plain number; a `bool` is none."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _attribute(owner: Any, name: str) -> Any:
    held = getattr(owner, name, None)
    # A method of that name, such as a module's `batch_size(batch)`, is not what is looked for.
    return None if callable(held) and not isinstance(held, type) and hasattr(held, "__func__") else held
