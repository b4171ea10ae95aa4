"""The guard: sees in a step's trace which Variables it wrote, and names the mistake when it should not have.

What a step wrote shows for free: its output is not the object that went in. Nested transforms (`jit`, `remat`, `scan`,
`cond`) replace every object and prove nothing, so where objects differ the step's jaxpr tells whether the output is the
forwarded input (`state/forwarding.py`). A compiled step pays nothing for any of this.
"""

from __future__ import annotations

import typing
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from nnx_fit.errors import StateError
from nnx_fit.state import bridged, graph
from nnx_fit.state.call_flags import flagged_methods, flags_of
from nnx_fit.state.forwarding import Frame
from nnx_fit.state.layout import Slot
from nnx_fit.state.modes import ATTRIBUTES

Guard = typing.Literal["error", "warn", "off"]

# Layers of Flax's own that overwrite their weights in every call, train or eval: that is how they are made.
WRITES_BY_DESIGN = (nnx.SpectralNorm, nnx.WeightNorm)


class StateWarning(UserWarning):
    """A step changed state that it should not change, and `state_guard="warn"` let it go on."""


def written(
    slots: Sequence[Slot], before: Sequence[Any], after: Sequence[Any], again: Callable[[list[Any]], list[Any]]
) -> list[Slot]:
    """Those of some slots that a step wrote.

    Args:
        slots: The slots to look at.
        before: The flat list that went into the step.
        after: The flat list that came out.
        again: The step as a function of the flat list, to trace it once more where objects prove nothing.
    """
    differing = [(slot, i) for slot in slots for i in range(slot.start, slot.stop) if after[i] is not before[i]]
    if not differing:
        return []
    abstract = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in before]
    traced = Frame(jax.make_jaxpr(again)(abstract))
    changed = [slot for slot, i in differing if not traced.forwards(i)]
    return list({slot.start: slot for slot in changed}.values())


def by_design(module: nnx.Module, slot: Slot) -> bool:
    """Whether a Variable belongs to a layer of Flax's own that overwrites it in every call."""
    return any(isinstance(owner, WRITES_BY_DESIGN) for owner in _owners(module, slot.path))


def always_draws(module: nnx.Module, slot: Slot) -> bool:
    """Whether a stream belongs to a Linen module in NNX, which draws a key of each in every call, used or not."""
    return any(bridged.is_bridged(owner) for owner in _owners(module, slot.path))


def report_eval(module: nnx.Module, slots: Sequence[Slot], hook: str, guard: Guard) -> None:
    """Names what an eval step wrote.

    Args:
        module: The module.
        slots: What it wrote and should not have.
        hook: The step hook.
        guard: What to do about it.

    Raises:
        StateError: `guard` is `"error"`.
    """
    kinds = {"params": "parameter", "frozen": "parameter", "stats": "running statistic"}
    one = kinds[slots[0].role] if len({kinds[slot.role] for slot in slots}) == 1 else "Variable"
    alike = [slot for slot in slots if slot.role == slots[0].role]
    layers = list(dict.fromkeys(graph.path_name(slot.path[:-1]) for slot in alike))
    who = f"The layer{'s' if layers[1:] else ''} `{layers[0]}`" if layers[0] else "The module itself"
    who += f" and {len(layers) - 1} more" if layers[1:] else ""
    if slots[0].role != "stats":
        cause = f"{_stage(hook).capitalize()} must leave the model as it is, and these were assigned in the step."
        fix = "assign them in training_step (frozen ones) or in a hook such as on_train_batch_end."
    else:
        why, fix = _cause(_owners(module, slots[0].path)[-1], _stage(hook))
        cause = f"{who}{why}, so evaluation data leaked into the model."
    names = ", ".join(slot.name for slot in slots)
    _say(f"{hook} changed {_count(len(slots), one)}:\n    {names}\n{cause}\nFix: {fix}\n", guard)


def _cause(owner: Any, stage: str) -> tuple[str, str]:
    """Why a layer wrote its statistics in an evaluation, as the end of a sentence about it, and what to do."""
    name = bridged.name_of(owner)
    if any(mode in vars(owner) for mode in ATTRIBUTES if mode != "training"):
        return (
            f" ran in training mode during {stage}",
            "pass `use_running_average=not self.training`, or let the module follow train()/eval().",
        )
    if flags := flags_of(owner):
        return (
            f" ({name}) was told to train by an explicit `{flags[0]}`, or wrote in spite of it",
            f"leave `{flags[0]}` out of the call: it is filled in for the mode; write only `if` it says training.",
        )
    if flagged := flagged_methods(owner):
        method, flag, value = flagged[0]
        return (
            f" ({name}) has `{flag}` in `{method}`, but only that of `__call__` is filled in",
            f"pass `{flag}={value}` to `{method}`, or take `{flag}` in `__call__` and hand it on.",
        )
    if isinstance(getattr(owner, "training", None), bool):
        return (
            f" ({name}) wrote in spite of its `training`",
            "write only `if self.training`, which train() and eval() set, or name it in `eval_mutable`.",
        )
    return (
        f" ({name}) wrote without looking at the mode",
        "take a `train` argument in `__call__` and write only when it is True, or name it in `eval_mutable`.",
    )


def report_train(slots: Sequence[Slot], guard: Guard) -> None:
    """Names the trained parameters that a training step wrote by hand.

    Raises:
        StateError: `guard` is `"error"`.
    """
    names = ", ".join(slot.name for slot in slots)
    _say(
        f"training_step wrote {_count(len(slots), 'trained parameter')} by hand:\n    {names}\n"
        "The optimizer updates the value that the step began with, so what was written would be lost.\n"
        f'Fix: leave it to the optimizer, or take it out of training (`self.freeze("{slots[0].name}")`) and write it '
        "yourself.\n",
        guard,
    )


def _say(message: str, guard: Guard) -> None:
    if guard == "error":
        raise StateError(f'{message}(Trainer(state_guard="warn") drops the change and goes on.)')
    if guard == "warn":
        warnings.warn(f"{message}The change is dropped.", StateWarning, stacklevel=2)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _stage(hook: str) -> str:
    return {"validation_step": "validation", "test_step": "the test", "predict_step": "prediction"}[hook]


def _owners(module: nnx.Module, path: graph.Path) -> list[nnx.Module]:
    """The modules along a path, the one that holds the Variable last."""
    owners: list[nnx.Module] = [module]
    node: Any = module
    for key in path[:-1]:
        node = dict(graph.children(node))[key]
        if graph.is_layer(node):
            owners.append(node)
    return owners
