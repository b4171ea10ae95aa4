"""The guard: sees in a step's trace which Variables it wrote, and names the mistake when it should not have.

What a step wrote shows for free: its output is not the object that went in. Nested transforms (`jit`, `remat`, `scan`,
`cond`) replace every object and prove nothing, so where objects differ the step's jaxpr tells whether the output is the
forwarded input. A compiled step pays nothing for any of this.
"""

from __future__ import annotations

import typing
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.extend.core import Literal

from nnx_fit.errors import StateError
from nnx_fit.state import graph
from nnx_fit.state.call_flags import flags_of
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
    jaxpr = jax.make_jaxpr(again)(abstract).jaxpr
    changed = [slot for slot, i in differing if not _is_input(jaxpr, jaxpr.outvars[i], jaxpr.invars[i])]
    return list({slot.start: slot for slot in changed}.values())


def _is_input(jaxpr: Any, output: Any, input_: Any) -> bool:
    """Whether a jaxpr's output is one of its inputs, handed through unchanged."""
    producers = {var: (equation, i) for equation in jaxpr.eqns for i, var in enumerate(equation.outvars)}
    current = output
    while current is not input_:
        if isinstance(current, Literal) or current not in producers:
            return False
        equation, index = producers[current]
        source = _source(equation, index)
        if source is None:
            return False
        current = equation.invars[source]
    return True


def _source(equation: Any, index: int) -> int | None:
    """Which operand of an equation its output `index` is, unchanged; `None` if it is computed."""
    name, parameters = equation.primitive.name, equation.params
    if name in ("copy", "copy_p", "optimization_barrier", "sharding_constraint"):
        return index
    if name == "cond":
        sources = {_inner_source(branch.jaxpr, index) for branch in parameters["branches"]}
        source = sources.pop() if len(sources) == 1 else None
        return None if source is None else source + 1  # the first operand chooses the branch
    if name == "while":
        body = parameters["body_jaxpr"].jaxpr
        constants, skipped = parameters["body_nconsts"], parameters["cond_nconsts"]
        source = _inner_source(body, index)
        return skipped + constants + index if source == constants + index else None
    if name == "scan":
        return _scan_source(parameters, index)
    inner = parameters.get("jaxpr") or parameters.get("call_jaxpr") or parameters.get("fun_jaxpr")
    return None if inner is None else _inner_source(getattr(inner, "jaxpr", inner), index)


def _scan_source(parameters: Any, index: int) -> int | None:
    body = parameters["jaxpr"].jaxpr
    constants, carry = parameters["num_consts"], parameters["num_carry"]
    source = _inner_source(body, index)
    if source is None:
        return None
    if index < carry:
        return source if source == constants + index else None
    # A slice of each step put together again is the whole, read in the same order.
    return source if source >= constants + carry else None


def _inner_source(jaxpr: Any, index: int) -> int | None:
    output = jaxpr.outvars[index]
    for position, variable in enumerate(jaxpr.invars):
        if _is_input(jaxpr, output, variable):
            return position
    return None


def by_design(module: nnx.Module, slot: Slot) -> bool:
    """Whether a Variable belongs to a layer of Flax's own that overwrites it in every call."""
    return any(isinstance(owner, WRITES_BY_DESIGN) for owner in _owners(module, slot.path))


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
    layers = list(dict.fromkeys(graph.path_name(slot.path[:-1]) for slot in slots))
    where = f"`{layers[0]}`" if len(layers) == 1 else f"`{layers[0]}` and {len(layers) - 1} more"
    noun = "layer" if len(layers) == 1 else "layers"
    owner = _owners(module, slots[0].path)[-1]
    if slots[0].role != "stats":
        cause = f"{_stage(hook).capitalize()} must leave the model as it is, and these were assigned in the step."
        fix = "assign them in training_step (frozen ones) or in a hook such as on_train_batch_end."
    elif any(name in vars(owner) for name in ATTRIBUTES):
        cause = (
            f"The {noun} {where} ran in training mode during {_stage(hook)}, so evaluation data leaked into the model."
        )
        fix = "pass `use_running_average=not self.training`, or let the module follow train()/eval()."
    elif flags := flags_of(type(owner)):
        cause = (
            f"The {noun} {where} ({type(owner).__name__}) was told to train by an explicit `{flags[0]}`, so evaluation "
            "data leaked into the model."
        )
        fix = f"leave `{flags[0]}` out of the call: it is filled in for the mode."
    else:
        cause = (
            f"The {noun} {where} ({type(owner).__name__}) wrote without looking at the mode, so evaluation data leaked "
            "into the model."
        )
        fix = "take a `train` argument in `__call__` and write only when it is True, or name it in `eval_mutable`."
    names = ", ".join(slot.name for slot in slots)
    _say(f"{hook} changed {_count(len(slots), one)}:\n    {names}\n{cause}\nFix: {fix}\n", guard)


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
        if isinstance(node, nnx.Module):
            owners.append(node)
    return owners
