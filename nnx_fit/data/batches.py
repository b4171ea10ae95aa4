"""What a loader yields, turned into what a program takes: `to_arrays`, `batch_size`.

A batch is any pytree. Its numeric leaves become arrays; the others (strings, objects) stay for the host hooks and are
replaced by `HostOnly` in what goes into a program. Copying arrays and placing them on a device is for `prefetch`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from nnx_fit.errors import ConfigurationError

# Puts the arrays of a batch, its leaves in order, on the device or devices.
Place = Callable[[list[Any]], list[Any]]


class HostOnly:
    """Stands in a program for a leaf that is not numeric. A pytree without leaves; any use of it is an error."""

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __repr__(self) -> str:
        return f"HostOnly(batch{self._path})"

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigurationError(
            f"leaf batch{self._path} is not numeric and is not available inside a step: a compiled program takes "
            "numbers only.\nFix: read it in a host hook (`on_train_batch_start`, `on_train_batch_end` and the like get "
            "the whole batch), or let the loader encode it as an array."
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # copy, pickle and debuggers probe for these
            raise AttributeError(name)
        self._refuse()

    __hash__ = None  # type: ignore[assignment]
    __array__ = __jax_array__ = __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = __call__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __int__ = __float__ = __index__ = _refuse  # type: ignore[assignment]
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __matmul__ = __rmatmul__ = _refuse
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __neg__ = __invert__ = __abs__ = _refuse


jax.tree_util.register_pytree_node(HostOnly, lambda leaf: ((), leaf._path), lambda path, _: HostOnly(path))


class Batch(NamedTuple):
    """One item of a loader, in its two forms. They are the same object when every leaf is numeric.

    Attributes:
        full: What host hooks see: the item's structure, numeric leaves as arrays, other leaves untouched.
        numeric: What goes into a program: the same with `HostOnly` in the place of leaves that are not numeric.
    """

    full: Any
    numeric: Any


class _Plan(NamedTuple):
    """How the leaves of one kind of batch become arrays; `None` stands for "as they are", and "all are numeric"."""

    converters: tuple[Callable[[Any], Any] | None, ...] | None
    host_only: tuple[HostOnly | None, ...] | None


_AS_IS = _Plan(None, None)

# Analysing a batch takes tens of microseconds, and nearly every batch is like the one before it.
_plans: dict[Any, _Plan] = {}
_MAX_PLANS = 64


def to_arrays(item: Any, place: Place | None = None) -> Batch:
    """Turns one item of a loader into arrays.

    NumPy and JAX arrays stay as they are; Python numbers and NumPy scalars become 0-d arrays; PyTorch tensors become
    NumPy arrays that share their memory (bfloat16 and float8 included). Nothing is copied that need not be.

    Args:
        item: Any pytree: dicts, tuples, lists, named tuples, registered dataclasses, nested at will.
        place: What puts the arrays on a device; without it they stay where they are.

    Returns:
        The batch for the host and for the program.

    Raises:
        ConfigurationError: If no leaf is numeric.

    Example:
        >>> import numpy as np
        >>> batch = to_arrays({"image": np.zeros((2, 8)), "file": ["a.png", "b.png"]})
        >>> batch.full["file"], batch.numeric["file"]
        (['a.png', 'b.png'], [HostOnly(batch['file'][0]), HostOnly(batch['file'][1])])
    """
    leaves, treedef = jax.tree.flatten(item)
    plan = _plan_of(leaves, treedef, item)
    if plan == _AS_IS and place is None:
        return Batch(item, item)
    if plan.converters is not None:
        leaves = [leaf if to is None else to(leaf) for leaf, to in zip(leaves, plan.converters, strict=True)]
    if plan.host_only is None:
        full = treedef.unflatten(leaves if place is None else place(leaves))
        return Batch(full, full)
    arrays = [leaf for leaf, host in zip(leaves, plan.host_only, strict=True) if host is None]
    placed = iter(arrays if place is None else place(arrays))
    leaves = [next(placed) if host is None else leaf for leaf, host in zip(leaves, plan.host_only, strict=True)]
    numeric = [leaf if host is None else host for leaf, host in zip(leaves, plan.host_only, strict=True)]
    return Batch(treedef.unflatten(leaves), treedef.unflatten(numeric))


def is_plain(treedef: Any, leaves: list[Any]) -> bool:
    """Whether a batch of this structure is numeric throughout and needs no conversion."""
    return _plan_of(leaves, treedef, treedef.unflatten(leaves)) == _AS_IS


def batch_size(batch: Any) -> int:
    """The common length of the leading axes of a batch; scalars have none and are ignored.

    Args:
        batch: A pytree of arrays or tracers; only shapes are looked at.

    Raises:
        ConfigurationError: If the lengths disagree, or no leaf has a leading axis.
    """
    size = None
    for leaf in jax.tree.leaves(batch):
        shape = getattr(leaf, "shape", None)
        if not shape:
            continue
        if size is None:
            size = shape[0]
        elif shape[0] != size:
            raise _size_error(batch)
    if size is None:
        raise _size_error(batch)
    return int(size)


def _size_error(batch: Any) -> ConfigurationError:
    shapes = {
        f"batch{jax.tree_util.keystr(path)}": tuple(getattr(leaf, "shape", ()))
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    found = "\n".join(f"    {name}: {f'length {s[0]}, shape {s}' if s else 'a scalar'}" for name, s in shapes.items())
    fix = (
        "Fix: give every array of the batch the same leading axis, pass `batch_size=` to `self.log`, or define "
        "`batch_size(self, batch)` on the module."
    )
    if any(shapes.values()):
        return ConfigurationError(f"The size of a batch is needed, and its leaves disagree:\n{found}\n{fix}")
    return ConfigurationError(f"The size of a batch is needed, and no leaf has a leading axis:\n{found}\n{fix}")


def _plan_of(leaves: list[Any], treedef: Any, item: Any = None) -> _Plan:
    # `dtype` is part of the signature: an object array and a float array have the same type.
    signature = (treedef, *map(type, leaves), *[getattr(leaf, "dtype", None) for leaf in leaves])
    plan = _plans.get(signature)
    if plan is None:
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        plan = _plans[signature] = _analyse(leaves, treedef, item)
    return plan


def _analyse(leaves: list[Any], treedef: Any, item: Any) -> _Plan:
    converters: list[Callable[[Any], Any] | None] = []
    host_only: list[HostOnly | None] = []
    paths = jax.tree_util.tree_leaves_with_path(treedef.unflatten(leaves))
    for leaf, (path, _) in zip(leaves, paths, strict=True):
        numeric, converter = _converter(leaf)
        converters.append(converter)
        host_only.append(None if numeric else HostOnly(jax.tree_util.keystr(path)))
    if all(host is not None for host in host_only):
        raise _nothing_numeric(item, leaves)
    mixed = any(host is not None for host in host_only)
    return _Plan(tuple(converters) if any(converters) else None, tuple(host_only) if mixed else None)


def _converter(leaf: Any) -> tuple[bool, Callable[[Any], Any] | None]:
    """Whether a leaf is numeric, and what makes it an array."""
    if isinstance(leaf, jax.Array):
        return True, None
    if isinstance(leaf, bool | int | float | complex) and not isinstance(leaf, np.generic):
        return True, np.asarray
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(leaf, torch.Tensor):
        return True, _torch_converter(str(leaf.dtype).removeprefix("torch."), torch)
    if not isinstance(leaf, np.ndarray | np.generic) and not hasattr(leaf, "__array__"):
        return False, None
    dtype = np.asarray(leaf).dtype
    if not (jnp.issubdtype(dtype, np.number) or dtype == np.bool_):
        # A loader may fill the same object array again for its next item, and hooks see this one later.
        return False, np.copy if isinstance(leaf, np.ndarray) else None
    if not dtype.isnative:
        return True, lambda array: np.asarray(array).astype(dtype.newbyteorder("="))
    return True, None if type(leaf) is np.ndarray else np.asarray


def _torch_converter(name: str, torch: Any) -> Callable[[Any], np.ndarray]:
    def host(tensor: Any) -> Any:
        return tensor.detach().cpu().resolve_conj().resolve_neg()

    # NumPy has no name of its own for these; the same bits are read through an integer type of the same width.
    dtype = getattr(ml_dtypes, name, None)
    if dtype is None:
        return lambda tensor: host(tensor).numpy()
    bits = {1: torch.uint8, 2: torch.int16}[np.dtype(dtype).itemsize]
    return lambda tensor: host(tensor).view(bits).numpy().view(dtype)


def _nothing_numeric(item: Any, leaves: list[Any]) -> ConfigurationError:
    kinds = sorted({type(leaf).__name__ for leaf in leaves})
    found = f"a {type(item).__name__}" + (f" whose leaves are {', '.join(kinds)}" if kinds else " without leaves")
    if len(leaves) == 1 and leaves[0] is item:
        found = f"a {type(item).__name__}, which JAX takes for a single leaf"
    return ConfigurationError(
        f"The loader yielded {found}: a batch needs at least one numeric array.\n"
        "Fix: yield a dict, tuple or dataclass of arrays (register a class of your own with "
        "`jax.tree_util.register_dataclass`)."
    )
