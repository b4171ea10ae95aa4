"""What a checkpoint holds: every array of the module and of its optimizer by path, and where the run was.

`store.py` puts it on disk. Here it is decided what belongs in it and whether it fits the module it comes back to.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nnx_fit.errors import CheckpointError
from nnx_fit.programs.precision import Precision
from nnx_fit.programs.window import empty_window
from nnx_fit.state.keys import data_of, is_key
from nnx_fit.state.layout import ROLES, Layout, Slot

Arrays = dict[str, dict[str, Any]]


def module_arrays(layout: Layout, arrays: Sequence[Any]) -> Arrays:
    """The module's arrays by role and path. A Variable with several arrays has one entry for each."""
    groups: Arrays = {role: {} for role in ROLES}
    for slot in layout.slots:
        values = slot.typed(arrays[slot.start : slot.stop])
        groups[slot.role] |= dict(zip(names(slot), values, strict=True))
    return groups


def optimizer_arrays(opt_state: Any) -> dict[str, Any]:
    """The arrays of an optimizer's state by their place in it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(opt_state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def window_arrays(layout: Layout, window: Sequence[Any]) -> dict[str, Any]:
    """The arrays of an accumulation window: the sum of each gradient by path, and what goes with them."""
    entries = [*(f"gradient of {name}" for name in layout.names("params")), "loss", "weight", "metrics"]
    return dict(zip(entries, window, strict=True))


def restore_window(path: Any, layout: Layout, saved: Mapping[str, Any] | None) -> list[Any]:
    """An accumulation window from a checkpoint; empty where it has none.

    Raises:
        CheckpointError: The checkpoint's is of other parameters.
    """
    if saved is None:
        return []
    shapes = empty_window(jax.tree.leaves(layout.state("params", layout.shapes)), saved["metrics"].shape[1])
    expected = window_arrays(layout, shapes)
    problems = differences(saved, expected)
    if problems:
        fix = "let the same Variables be trained as when it was saved"
        raise mismatch(path, "accumulation window", problems, fix)
    return [_device_array(saved[name], like) for name, like in expected.items()]


def by_name(saved: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The module's arrays in a checkpoint by path.

    Which role a Variable had when it was saved does not matter: what trains may have changed since.
    """
    return {name: array for role in ROLES for name, array in saved.get(role, {}).items()}


def check_module(
    path: Any, layout: Layout, saved: Mapping[str, Mapping[str, Any]], shapes: Sequence[Any] | None = None
) -> None:
    """Compares a checkpoint with a module.

    Args:
        path: The checkpoint, for messages.
        layout: The layout of the module.
        saved: The checkpoint's arrays.
        shapes: Shapes and dtypes that are expected, where they are not the layout's.

    Raises:
        CheckpointError: The checkpoint is of another module; every path that differs is named.
    """
    shapes = layout.shapes if shapes is None else shapes
    problems = differences(by_name(saved), {name: shapes[i] for i, name in enumerate(all_names(layout))})
    if problems:
        fix = "build the module with the arguments it was saved with, and pass the Trainer's `precision` of that time"
        raise mismatch(path, "module", problems, fix)


def restore_module(path: Any, layout: Layout, saved: Mapping[str, Mapping[str, Any]]) -> list[jax.Array]:
    """The flat list of a module's arrays from a checkpoint.

    Raises:
        CheckpointError: The checkpoint is of another module; every path that differs is named.
    """
    check_module(path, layout, saved)
    found = by_name(saved)
    named = zip(all_names(layout), layout.shapes, strict=True)
    return [data_of(_device_array(found[name], shape)) for name, shape in named]


def check_optimizer(path: Any, opt_state: Any, saved: Mapping[str, Any]) -> None:
    """Compares a checkpoint with an optimizer's state, or with its shapes and dtypes.

    Raises:
        CheckpointError: The checkpoint is of another optimizer; everything that differs is named.
    """
    problems = differences(saved, optimizer_arrays(opt_state))
    if problems:
        raise mismatch(path, "optimizer", problems, "build the optimizer with the arguments it was saved with")


def restore_optimizer(path: Any, opt_state: Any, saved: Mapping[str, Any]) -> Any:
    """An optimizer's state from a checkpoint.

    Args:
        path: The checkpoint, for messages.
        opt_state: A state of the structure that is wanted.
        saved: The checkpoint's arrays of the optimizer.

    Raises:
        CheckpointError: The checkpoint is of another optimizer.
    """
    check_optimizer(path, opt_state, saved)
    expected = optimizer_arrays(opt_state)
    return jax.tree.unflatten(
        jax.tree.structure(opt_state), [_device_array(saved[name], leaf) for name, leaf in expected.items()]
    )


def names(slot: Slot) -> list[str]:
    """The name of each array of a slot."""
    return [slot.name] if len(slot.shapes) == 1 else [f"{slot.name}[{i}]" for i in range(len(slot.shapes))]


def all_names(layout: Layout) -> list[str]:
    """The name of each array of a module, in the order of the flat list."""
    return [name for slot in layout.slots for name in names(slot)]


def kept(precision: Precision, layout: Layout, saved: Mapping[str, Any]) -> list[Any]:
    """Shape and dtype of each of a module's arrays as a precision has them.

    Args:
        precision: The precision.
        layout: The layout of the module.
        saved: A checkpoint's arrays by name. Whether a Variable that is no `Param` is kept short depends on the
            optimizers; here it may be, if it is there.
    """
    shapes: list[Any] = list(layout.shapes)
    if not precision.true:
        return shapes
    short = jax.eval_shape(precision.batch, shapes)
    for slot in layout.slots:
        for i, name in zip(range(slot.start, slot.stop), names(slot), strict=True):
            certain = issubclass(slot.type, nnx.Param) or slot.role == "params"
            if certain or (name in saved and saved[name].dtype == short[i].dtype):
                shapes[i] = short[i]
    return shapes


def on_device(layout: Layout, saved: Mapping[str, Any], wanted: Collection[str]) -> dict[int, jax.Array]:
    """Saved arrays by their position in a module's flat list.

    Args:
        layout: The layout of the module.
        saved: A checkpoint's arrays by name.
        wanted: Those to take.
    """
    return {i: data_of(jnp.asarray(saved[name])) for i, name in enumerate(all_names(layout)) if name in wanted}


def alike(one: Any, other: Any) -> bool:
    """Whether two arrays have one shape and one dtype."""
    return tuple(one.shape) == tuple(other.shape) and one.dtype == other.dtype


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """One line for each array that is not in a checkpoint as it is expected."""
    problems = []
    for name, shape in expected.items():
        if name not in found:
            near = difflib.get_close_matches(name, [other for other in found if other not in expected], n=1)
            hint = f" (it has {near[0]})" if near else ""
            problems.append(f"{name}: not in the checkpoint{hint}")
        elif not alike(found[name], shape):
            problems.append(
                f"{name}: {found[name].dtype}{tuple(found[name].shape)} in the checkpoint, "
                f"{shape.dtype}{tuple(shape.shape)} here"
            )
    problems.extend(f"{name}: only in the checkpoint" for name in found if name not in expected)
    return problems


def listed(problems: Sequence[str]) -> str:
    """Lines of a message, not too many."""
    more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
    return "\n".join(f"    {problem}" for problem in [*problems[:20], *more])


def mismatch(path: Any, what: str, problems: Sequence[str], fix: str) -> CheckpointError:
    """The error for a checkpoint of something else."""
    return CheckpointError(
        f"The checkpoint {path} is of another {what}:\n{listed(problems)}\nNothing was loaded. Fix: {fix}."
    )


def _device_array(value: Any, like: Any) -> jax.Array:
    if is_key(like):
        return value
    return jnp.asarray(value, like.dtype)
