"""Precision: which dtype a step computes in, which its state has, and the scale of the loss that float16 needs.

`mixed`: parameters and the optimizer stay in float32; a step sees floating parameters and batches in the short dtype,
and the gradients that come out are float32. `true`: the parameters themselves are short, and so is the optimizer's
state. Running statistics are float32 in either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx_fit.state import graph
from nnx_fit.state.guard import written
from nnx_fit.state.layout import Layout, is_array, raw_value

# The loss scale of float16, as PyTorch's GradScaler moves it: halved when a gradient overflows, doubled after so many
# updates without one. It starts where the largest float16 is not reached by the scale itself.
FIRST_SCALE, LEAST_SCALE, GROWTH_INTERVAL = 2.0**15, 2.0**-14, 2000


@dataclasses.dataclass(frozen=True)
class Precision:
    """What a `precision` argument means.

    Attributes:
        name: The argument.
        compute: Short dtype that steps compute in, or `None` for the dtypes that are there.
        true: Whether parameters are kept in it, too.
    """

    name: str
    compute: Any = None
    true: bool = False

    @property
    def scaled(self) -> bool:
        """Whether the loss is scaled."""
        return self.compute == jnp.float16

    def convert(self, module: Any, trainable: Any) -> None:
        """Makes a module's floating parameters short, if they are kept so.

        Args:
            module: The module.
            trainable: NNX filter of what trains.
        """
        if not self.true:
            return
        for slot, (_, leaf) in zip(Layout.of(module, trainable).slots, graph.flatten(module)[1], strict=True):
            if slot.role in ("params", "frozen"):
                raw = jax.tree.map(lambda value: self._short(value) if is_array(value) else value, raw_value(leaf))
                leaf.set_raw_value(raw)

    def batch(self, batch: Any) -> Any:
        """A batch as a step sees it."""
        return batch if self.compute is None else jax.tree.map(self._short, batch)

    def arrays(self, layout: Layout, arrays: Sequence[Any], but: frozenset[int] = frozenset()) -> list[Any]:
        """A module's arrays as a step sees them: floating parameters short, all else as it is.

        Args:
            layout: Where each leaf is in the list.
            arrays: The list.
            but: Positions to leave as they are.
        """
        if self.compute is None or self.true:
            return list(arrays)
        short = {i for role in ("params", "frozen") for i in layout.positions(role)} - but
        return [self._short(array) if i in short else array for i, array in enumerate(arrays)]

    def written_short(
        self,
        layout: Layout,
        exact: Sequence[Any],
        given: Sequence[Any],
        after: Sequence[Any],
        again: Callable[[list[Any]], list[Any]],
    ) -> frozenset[int]:
        """Positions of frozen arrays that a step sees in a short dtype and writes, such as a target network's mean.

        What is written so is too fine for a short dtype: the step is to see these as they are.

        Args:
            layout: Where each leaf is in the list.
            exact: The arrays as they are kept.
            given: The same as the step saw them.
            after: The same after the step.
            again: The step as a function of the list.
        """
        short = {i for i, (one, other) in enumerate(zip(given, exact, strict=True)) if one is not other}
        frozen = [slot for slot in layout.slots if slot.role == "frozen" and slot.start in short]
        found = written(frozen, given, after, again) if frozen else []
        return frozenset(i for slot in found for i in range(slot.start, slot.stop))

    @staticmethod
    def restored(exact: Sequence[Any], given: Sequence[Any], after: Sequence[Any]) -> list[Any]:
        """The arrays after a step in the dtypes they are kept in; those the step left alone as they were.

        Args:
            exact: The arrays as they are kept.
            given: The same as the step saw them.
            after: The same after the step.
        """
        return [
            new if seen is kept else kept if new is seen else jax.lax.convert_element_type(new, kept.dtype)
            for kept, seen, new in zip(exact, given, after, strict=True)
        ]

    def _short(self, array: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating) or jnp.result_type(array).itemsize <= 2:
            return array
        return jax.lax.convert_element_type(array, self.compute)


PRECISIONS: dict[str, Precision] = {
    "32": Precision("32"),
    "bf16-mixed": Precision("bf16-mixed", jnp.bfloat16),
    "bf16-true": Precision("bf16-true", jnp.bfloat16, true=True),
    "16-mixed": Precision("16-mixed", jnp.float16),
}


def first_scale() -> list[jax.Array]:
    """The scale of the loss and the number of updates since it last changed."""
    return [jnp.float32(FIRST_SCALE), jnp.int32(0)]


def all_finite(tree: Any) -> jax.Array:
    """Whether no value is NaN or infinite."""
    checks = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack(checks).all() if checks else jnp.bool_(True)


def next_scale(scale: Sequence[Any], finite: jax.Array) -> list[jax.Array]:
    """The scale after an update, or after one that was skipped because its gradients overflowed."""
    value, since = scale
    grown = finite & (since + 1 >= GROWTH_INTERVAL)
    value = jnp.where(finite, jnp.where(grown, value * 2, value), jnp.maximum(value / 2, LEAST_SCALE))
    return [value, jnp.where(finite & ~grown, since + 1, 0).astype(jnp.int32)]


def kept_unless(finite: jax.Array, new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
    """The new arrays, or the old ones where an update is skipped."""
    return [jnp.where(finite, one, other) for one, other in zip(new, old, strict=True)]
