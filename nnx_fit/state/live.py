"""`Live`: the one place where a module's values are, while a run goes on.

Programs take a flat list of arrays and donate it; users look at Variables. `Live` keeps the arrays in the program's
hands (*held*), writes them into the module when somebody may look (*shown*), takes back what was changed there, and
copies what was shown before it is donated, so that an array once seen stays valid. A Variable read while its value is
held raises instead of showing something stale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nnx_fit.errors import StateError
from nnx_fit.state import graph
from nnx_fit.state.keys import data_of, is_key
from nnx_fit.state.layout import Layout, Slot, sketch


class Withheld:
    """Stands in a Variable while a running program has its value; any use of it is a `StateError`."""

    __slots__ = ("_name",)

    def __init__(self, name: str):
        object.__setattr__(self, "_name", name)

    def __repr__(self) -> str:
        return f"<{object.__getattribute__(self, '_name')}: in the training program's hands>"

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise StateError(self._message())

    @property
    def __jax_array__(self) -> Any:
        # JAX looks for it on whatever it takes for an array, and would complain of it in words of its own.
        return self._refuse()

    def __getattr__(self, name: str) -> Any:
        # Python and JAX probe unknown objects for protocols; only a use of the value is an error.
        if name.startswith("__"):
            raise AttributeError(name)
        raise WithheldAttributeError(self._message())

    def _message(self) -> str:
        return (
            f"`{object.__getattribute__(self, '_name')}` was read while the training program has its value.\n"
            "Between two steps the values live in the program's buffers, and the module holds none.\n"
            "Fix: read it in a hook of the module or of a callback (there it is up to date), or after `fit`."
        )


class WithheldAttributeError(StateError, AttributeError):
    """The `StateError` of an attribute such as `shape`, in a form that lets a module be printed."""


# Python looks these up on the class, where `__getattr__` does not see them. `__reduce__` is what copies and pickles.
_BINARY = "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or"
_OTHERS = (
    "eq ne lt le gt ge hash neg pos abs invert round bool int float complex index format "
    "len iter contains getitem setitem delitem array reduce"
)
for _name in [*_BINARY.split(), *(f"r{name}" for name in _BINARY.split()), *_OTHERS.split()]:
    setattr(Withheld, f"__{_name}__", Withheld._refuse)


class Live:
    """The values of a module's leaves, and who has them.

    Attributes:
        layout: Where each leaf is in the flat list.
        arrays: The current flat list. While the values are held by a program this is what it returned last.
    """

    def __init__(self, module: nnx.Module, layout: Layout):
        self.layout = layout
        self._module = module
        _, leaves = graph.flatten(module)
        self._leaves = [leaf for _, leaf in leaves]
        self._variables = [leaf if isinstance(leaf, nnx.Variable) else None for leaf in self._leaves]
        self._withheld = [Withheld(slot.name) for slot in layout.slots]
        self._shown: list[Any] | None = [_NOTHING] * len(self._leaves)
        self._edges = list(_edges(module))
        self.arrays: list[Any] = [None] * layout.size
        self.collect()

    @property
    def leaves(self) -> list[Any]:
        """The module's Variables and bare arrays, in the layout's order."""
        return self._leaves

    @property
    def held(self) -> bool:
        """Whether the module's Variables are withheld."""
        return self._shown is None

    def collect(self) -> list[Any]:
        """Takes over what was written into the module since its values were shown; returns the current arrays."""
        if self._shown is None:
            return self.arrays
        self._check_same_variables()
        for index, (slot, variable) in enumerate(zip(self.layout.slots, self._variables, strict=True)):
            raw = self._raw(slot, variable)
            seen = raw if slot.single else _Pytree(raw)
            if seen is not self._shown[index] and (slot.single or seen != self._shown[index]):
                self.arrays[slot.start : slot.stop] = _accept(raw, slot)
                self._shown[index] = seen
        return self.arrays

    def take(self) -> list[Any]:
        """Hands the values to a program that donates them: fresh buffers, and nothing left in the module to read."""
        if self._shown is not None:
            self.collect()
            self.arrays = copied(self.arrays)
            for slot, variable, withheld in zip(self.layout.slots, self._variables, self._withheld, strict=True):
                self._put(slot, variable, withheld)
            self._shown = None
        return self.arrays

    def show(self) -> None:
        """Writes the current values into the module, if they are not there already.

        Raises:
            StateError: The program that had the values failed on the device and took them with it, or somebody wrote
                into the module meanwhile.
        """
        if self._shown is not None:
            return
        lost = [slot.name for slot in self.layout.slots if _any_deleted(self.arrays[slot.start : slot.stop])]
        if lost:
            raise StateError(
                f"The values of {len(lost)} Variables ({', '.join(lost[:3])}, ...) were lost in a step that failed on "
                "the device after its inputs had been donated.\nFix: continue from the last checkpoint."
            )
        slots = zip(self.layout.slots, self._variables, self._withheld, strict=True)
        written = [slot.name for slot, variable, withheld in slots if self._raw(slot, variable) is not withheld]
        self._write()
        if written:
            raise StateError(
                f"`{written[0]}` was written while the training program has its value, so the write was lost.\n"
                "Fix: write it in a hook of the module or of a callback, or before or after `fit`."
            )

    def _write(self) -> None:
        self._shown = []
        for slot, variable in zip(self.layout.slots, self._variables, strict=True):
            raw = slot.value(self.arrays[slot.start : slot.stop])
            self._put(slot, variable, raw)
            self._shown.append(raw if slot.single else _Pytree(raw))

    def replace(self, arrays: Sequence[Any]) -> None:
        """Puts other values in place of the current ones, wherever they are."""
        self.arrays = list(arrays)
        if self._shown is not None:
            self._write()

    def _check_same_variables(self) -> None:
        """Refuses a Variable that a hook replaced or removed; comparing who holds whom is what every call pays."""
        if all(_held(holder, name) is child for holder, name, child in self._edges):
            return
        now = {id(leaf) for _, leaf in graph.flatten(self._module)[1]}
        for slot, variable in zip(self.layout.slots, self._variables, strict=True):
            if variable is not None and id(variable) not in now:
                raise _gone(slot)
        self._edges = list(_edges(self._module))

    def _raw(self, slot: Slot, variable: nnx.Variable | None) -> Any:
        return variable._raw_value if variable is not None else self._bare(slot)

    def _bare(self, slot: Slot) -> Any:
        node = self._module
        for key in slot.path:
            held = dict(graph.children(node))
            if key not in held:
                raise _gone(slot)
            node = held[key]
        return node

    def _put(self, slot: Slot, variable: nnx.Variable | None, raw: Any) -> None:
        if variable is not None:
            # Plain assignment checks the trace each time and costs 15 times as much.
            object.__setattr__(variable, "_raw_value", raw)
        else:
            graph.replace_array(self._module, slot.path, raw)


def _gone(slot: Slot) -> StateError:
    return StateError(
        f"`{slot.name}` was replaced or removed while a run goes on; the step is compiled for what was there.\n"
        "Fix: write into it (`variable[...] = value`, or `nnx.update`); build layers in `__init__` or `setup`."
    )


_NOTHING = object()


class _Pytree:
    """A value of several parts, the same one as long as each part is: a dict may be written in place."""

    __slots__ = ("parts",)

    def __init__(self, raw: Any):
        self.parts = (jax.tree.structure(raw), *jax.tree.leaves(raw))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Pytree) or len(self.parts) != len(other.parts) or self.parts[0] != other.parts[0]:
            return False
        return all(mine is theirs for mine, theirs in zip(self.parts[1:], other.parts[1:], strict=True))


def _edges(module: nnx.Module) -> Iterator[tuple[dict[Any, Any] | list[Any], Any, Any]]:
    """Who holds which Variable, object or container of them: (attributes or container, name or place, held)."""
    for _, node in graph.modules(module, nnx.Pytree):
        data = node._pytree__nodes
        yield from _below(vars(node), [(name, child) for name, child in vars(node).items() if data.get(name, False)])


def _below(holder: Any, items: list[tuple[Any, Any]]) -> Iterator[tuple[Any, Any, Any]]:
    for name, child in items:
        if isinstance(child, nnx.Variable | nnx.Pytree):
            yield holder, name, child
        elif isinstance(child, dict | list | tuple):
            inside = list(_below(child, list(child.items() if isinstance(child, dict) else enumerate(child))))
            yield from inside
            if inside:
                yield holder, name, child


def _held(holder: Any, name: Any) -> Any:
    if isinstance(holder, dict):
        return holder.get(name)
    return holder[name] if name < len(holder) else None


@jax.jit
def _copy(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(array) for array in arrays]


def copied(arrays: Sequence[Any]) -> list[jax.Array]:
    """The same values in buffers of their own."""
    return _copy(list(arrays))


def _any_deleted(arrays: Sequence[Any]) -> bool:
    return any(array.is_deleted() for array in arrays)


def _accept(raw: Any, slot: Slot) -> list[jax.Array]:
    arrays = slot.parts(raw)
    if arrays is None:
        raise StateError(
            f"`{slot.name}` was given a value of another structure:\n    was {slot.sketch}\n    is  {sketch(raw)}\n"
            "Fix: keep the value's keys, types and plain entries the same while a run goes on."
        )
    accepted = []
    for value, shape in zip(arrays, slot.shapes, strict=True):
        if jnp.shape(value) != shape.shape:
            raise StateError(
                f"`{slot.name}` was given a value of shape {jnp.shape(value)}; it has shape {shape.shape}.\n"
                "Fix: write a value of the Variable's own shape while a run goes on."
            )
        if is_key(shape):
            accepted.append(data_of(value))
        else:
            accepted.append(jax.lax.convert_element_type(jnp.asarray(value), shape.dtype))
    return accepted
