"""A merged module inside a transform of its own step: its values go in and come out as arrays, as in any pure function.

A function that closes over a module cannot be given another one. Flax refuses to write a Variable, or to set a layer's
attribute, in another trace than the one it was made in, because the value would leak; here it cannot, since every value
is taken out again. The only file that touches Flax's record of the trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flax import nnx
from flax.nnx import tracers

from nnx_fit.state import graph
from nnx_fit.state.layout import Layout


@contextmanager
def in_this_trace(module: nnx.Module) -> Iterator[None]:
    """Makes a module one of the current trace while the block runs."""
    outer = module._pytree__state.trace_state
    _move(module, tracers.TraceState())
    try:
        yield
    finally:
        _move(module, outer)  # also what a transform put in the place of what was there


def _move(module: nnx.Module, trace: tracers.TraceState) -> None:
    holders: list[Any] = [leaf for _, leaf in graph.flatten(module)[1] if isinstance(leaf, nnx.Variable)]
    holders += [node._pytree__state for _, node in graph.modules(module, nnx.Pytree)]
    for holder in holders:
        object.__setattr__(holder, "_trace_state", trace)


def is_of_this_trace(module: nnx.Module) -> bool:
    """Whether a module may be written where we are, and not only outside of a transform we are in."""
    return module._pytree__state.trace_state.is_valid()


def write(module: nnx.Module, layout: Layout, arrays: Sequence[Any]) -> None:
    """Puts arrays into a module.

    Args:
        module: A module merged from the layout.
        layout: Where each leaf is in the flat list.
        arrays: The flat list.
    """
    for slot, (_, leaf) in zip(layout.slots, graph.flatten(module)[1], strict=True):
        value = slot.value(arrays[slot.start : slot.stop])
        if isinstance(leaf, nnx.Variable):
            object.__setattr__(leaf, "_raw_value", value)
        else:
            graph.replace_array(module, slot.path, value)
