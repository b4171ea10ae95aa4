"""Finding the first value of a step that is not finite: its loss, a metric, a gradient or a Variable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx_fit.errors import NonFiniteError


class Health:
    """Checks that a train program carries along when `detect_nonfinite` is on.

    The names are noted while the program is traced; what it returns is one boolean for each.
    """

    def __init__(self) -> None:
        self._names: list[str] = []

    def check(self, groups: Mapping[str, tuple[Sequence[str], Sequence[Any]]]) -> jax.Array:
        """Whether each value is finite, boolean, in the order given; called in the trace.

        Args:
            groups: For each kind of value (`"gradient"`): names and arrays.
        """
        self._names = []
        flags = []
        for kind, (names, arrays) in groups.items():
            for name, array in zip(names, arrays, strict=True):
                if jnp.issubdtype(array.dtype, jnp.inexact):
                    self._names.append(f"{kind} `{name}`")
                    flags.append(jnp.isfinite(array).all())
        return jnp.stack(flags)

    def raise_if_ill(self, finite: Any, step: int) -> None:
        """Waits for a step's flags.

        Args:
            finite: What `check` returned.
            step: `global_step` after the update.

        Raises:
            NonFiniteError: A value is NaN or infinite.
        """
        flags = np.asarray(finite)
        if flags.all():
            return
        bad = [name for name, good in zip(self._names, flags, strict=True) if not good]
        more = f" and {len(bad) - 1} more ({', '.join(bad[1:4])}{', ...' if len(bad) > 4 else ''})" if bad[1:] else ""
        raise NonFiniteError(
            f"Step {step}: the first value that is not finite is the {bad[0]}{more}.\n"
            "Fix: look at this step's batch; a smaller learning rate or gradient clipping often helps."
        )
