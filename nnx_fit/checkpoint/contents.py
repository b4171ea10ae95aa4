"""What a checkpoint holds: every array of the module and of its optimizer by path, and where the run was.

`store.py` puts it on disk. Here it is decided what belongs in it and whether it fits the module it comes back to.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx_fit.errors import CheckpointError
from nnx_fit.programs.window import empty_window
from nnx_fit.state.keys import data_of, is_key
from nnx_fit.state.layout import ROLES, Layout

Arrays = dict[str, dict[str, Any]]


def module_arrays(layout: Layout, arrays: Sequence[Any]) -> Arrays:
    """The module's arrays by role and path. A Variable with several arrays has one entry for each."""
    groups: Arrays = {role: {} for role in ROLES}
    for slot in layout.slots:
        values = slot.typed(arrays[slot.start : slot.stop])
        groups[slot.role] |= dict(zip(_names(slot), values, strict=True))
    return groups


def optimizer_arrays(opt_state: Any) -> dict[str, Any]:
    """The arrays of an optimizer's state by their place in it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(opt_state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def window_arrays(layout: Layout, window: Sequence[Any]) -> dict[str, Any]:
    """The arrays of an accumulation window: the sum of each gradient by path, and what goes with them."""
    names = [*(f"gradient of {name}" for name in layout.names("params")), "weight", "metrics"]
    return dict(zip(names, window, strict=True))


def restore_window(path: Any, layout: Layout, saved: Mapping[str, Any] | None) -> list[Any]:
    """An accumulation window from a checkpoint; empty where it has none.

    Raises:
        CheckpointError: The checkpoint's is of other parameters.
    """
    if saved is None:
        return []
    shapes = empty_window(jax.tree.leaves(layout.state("params", layout.shapes)), saved["metrics"].shape[1])
    expected = window_arrays(layout, shapes)
    problems = _differences(saved, expected)
    if problems:
        raise _mismatch(path, "accumulation window", problems)
    return [_device_array(saved[name], like) for name, like in expected.items()]


def restore_module(path: Any, layout: Layout, saved: Mapping[str, Mapping[str, Any]]) -> list[jax.Array]:
    """The flat list of a module's arrays from a checkpoint.

    Which role a Variable had when it was saved does not matter: what trains may have changed since.

    Raises:
        CheckpointError: The checkpoint is of another module; every path that differs is named.
    """
    found = {name: array for role in ROLES for name, array in saved.get(role, {}).items()}
    expected = {name: (slot.start + i, slot.shapes[i]) for slot in layout.slots for i, name in enumerate(_names(slot))}
    problems = _differences(found, {name: shape for name, (_, shape) in expected.items()})
    if problems:
        raise _mismatch(path, "module", problems)
    arrays: list[Any] = [None] * layout.size
    for name, (index, shape) in expected.items():
        arrays[index] = data_of(_device_array(found[name], shape))
    return arrays


def restore_optimizer(path: Any, opt_state: Any, saved: Mapping[str, Any]) -> Any:
    """An optimizer's state from a checkpoint.

    Args:
        path: The checkpoint, for messages.
        opt_state: A state of the structure that is wanted.
        saved: The checkpoint's arrays of the optimizer.

    Raises:
        CheckpointError: The checkpoint is of another optimizer.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(opt_state)
    expected = {jax.tree_util.keystr(place): leaf for place, leaf in leaves}
    problems = _differences(saved, expected)
    if problems:
        raise _mismatch(path, "optimizer", problems)
    return jax.tree.unflatten(treedef, [_device_array(saved[name], leaf) for name, leaf in expected.items()])


def _names(slot: Any) -> list[str]:
    return [slot.name] if len(slot.shapes) == 1 else [f"{slot.name}[{i}]" for i in range(len(slot.shapes))]


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, shape in expected.items():
        if name not in found:
            near = difflib.get_close_matches(name, [other for other in found if other not in expected], n=1)
            hint = f" (it has {near[0]})" if near else ""
            problems.append(f"{name}: not in the checkpoint{hint}")
        elif tuple(found[name].shape) != tuple(shape.shape) or found[name].dtype != shape.dtype:
            problems.append(
                f"{name}: {found[name].dtype}{tuple(found[name].shape)} in the checkpoint, "
                f"{shape.dtype}{tuple(shape.shape)} here"
            )
    problems.extend(f"{name}: only in the checkpoint" for name in found if name not in expected)
    return problems


def _mismatch(path: Any, what: str, problems: list[str]) -> CheckpointError:
    shown = "\n".join(f"    {problem}" for problem in problems[:20])
    more = f"\n    ... and {len(problems) - 20} more" if len(problems) > 20 else ""
    return CheckpointError(
        f"The checkpoint {path} is of another {what}:\n{shown}{more}\n"
        f"Nothing was loaded. Fix: build the {what} with the arguments it was saved with."
    )


def _device_array(value: Any, like: Any) -> jax.Array:
    if is_key(like):
        return value
    return jnp.asarray(value, like.dtype)
