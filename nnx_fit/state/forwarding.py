"""Which outputs of a traced function are its inputs, handed through unchanged.

A walk from the output back through the equations, into nested `jit`, `remat`, `scan`, `while` and `cond`. Where a
choice depends on a Python bool, as in `jnp.where(train, new, old)`, the branch that is taken is the one that counts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import numpy as np
from jax.extend.core import Literal

# Operations that give back what they are given, operand by operand.
_IDENTITIES = {"copy", "copy_p", "optimization_barrier", "sharding_constraint", "stop_gradient"}

# Operations that take back what another one did: a typed key is stored as the integers in it.
_INVERSES = {"random_unwrap": "random_wrap", "random_wrap": "random_unwrap"}

# Operations on scalars that say which branch of a choice is taken.
_LOGIC = {"not", "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge", "clamp", "convert_element_type", "sign"}

# Operations that keep a value that is the same everywhere.
_SPREADS = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims", *_IDENTITIES}


class Frame:
    """A jaxpr and what it is called on.

    Args:
        closed: The jaxpr, closed or open.
        outer: The frame of the equation that calls it; `None` for the outermost.
        operands: What each of its inputs is in the outer frame; `None` where that differs from call to call.
        opaque: Whether its inputs are where a walk ends.
    """

    def __init__(self, closed: Any, outer: Frame | None = None, operands: Any = (), opaque: bool = False):
        self.jaxpr = getattr(closed, "jaxpr", closed)
        self.outer = outer
        self.operands = operands
        self.ends = opaque or outer is None
        self.consts = dict(zip(self.jaxpr.constvars, getattr(closed, "consts", ()), strict=False))
        self.inputs = {variable: i for i, variable in enumerate(self.jaxpr.invars)}
        self.producers = {variable: (e, i) for e in self.jaxpr.eqns for i, variable in enumerate(e.outvars)}
        self._inner: dict[tuple[int, int], Frame] = {}

    def forwards(self, index: int) -> bool:
        """Whether output `index` is input `index`, unchanged."""
        return self.origin(index) == index

    def origin(self, index: int) -> int | None:
        """The input that output `index` is, unchanged; `None` if it is computed."""
        frame, atom = self, self.jaxpr.outvars[index]
        axes = tuple(range(len(atom.aval.shape)))
        while True:
            if isinstance(atom, Literal):
                return None
            if atom in frame.inputs:
                position = frame.inputs[atom]
                if frame.ends:
                    return position if frame is self and axes == tuple(range(len(axes))) else None
                assert frame.outer is not None
                frame, atom = frame.outer, frame.operands[position]
                continue
            if atom not in frame.producers:
                return None
            equation, place = frame.producers[atom]
            if equation.primitive.name == "transpose":
                axes = tuple(equation.params["permutation"][axis] for axis in axes)
                atom = equation.invars[0]
                continue
            source = frame._source(equation, place)
            if source is None:
                return None
            frame, atom = source

    def inner(self, equation: Any, jaxpr: Any, operands: Any, *, branch: int = 0, opaque: bool = False) -> Frame:
        """The frame of a jaxpr that an equation calls."""
        key = (id(equation), branch)
        if key not in self._inner:
            self._inner[key] = Frame(jaxpr, self, operands, opaque)
        return self._inner[key]

    def _source(self, equation: Any, index: int) -> tuple[Frame, Any] | None:
        """One step back from an equation's output `index`, which it hands through; `None` if it computes it."""
        name, operands = equation.primitive.name, equation.invars
        if name in _IDENTITIES:
            return self, operands[index]
        if name in _INVERSES:
            inner = self.producers.get(operands[0])
            return (self, inner[0].invars[0]) if inner and inner[0].primitive.name == _INVERSES[name] else None
        if name == "select_n":
            which = self.known(operands[0])
            return None if which is None else (self, operands[1 + int(which)])
        if name == "cond":
            return self._branch(equation, index)
        position = None
        if name == "while":
            position = self._while(equation, index)
        elif name == "scan":
            position = self._scan(equation, index)
        elif (called := _called(equation)) is not None:
            frame = self.inner(equation, called, operands)
            return frame, frame.jaxpr.outvars[index]
        return None if position is None else (self, operands[position])

    def _branch(self, equation: Any, index: int) -> tuple[Frame, Any] | None:
        which, operands = self.known(equation.invars[0]), equation.invars[1:]
        branches = equation.params["branches"]
        if which is not None:
            chosen = min(max(int(which), 0), len(branches) - 1)
            frame = self.inner(equation, branches[chosen], operands)
            return frame, frame.jaxpr.outvars[index]
        frames = [self.inner(equation, b, operands, branch=1 + i, opaque=True) for i, b in enumerate(branches)]
        origins = {frame.origin(index) for frame in frames}
        position = origins.pop() if len(origins) == 1 else None
        return None if position is None else (self, operands[position])

    def _while(self, equation: Any, index: int) -> int | None:
        skipped, constants = equation.params["cond_nconsts"], equation.params["body_nconsts"]
        carried = [None] * (len(equation.invars) - skipped - constants)
        operands = [*equation.invars[skipped : skipped + constants], *carried]
        body = self.inner(equation, equation.params["body_jaxpr"], operands, opaque=True)
        return skipped + constants + index if body.origin(index) == constants + index else None

    def _scan(self, equation: Any, index: int) -> int | None:
        constants, carry = _scanned(equation.params)
        operands = [*equation.invars[:constants], *[None] * (len(equation.invars) - constants)]
        source = self.inner(equation, equation.params["jaxpr"], operands, opaque=True).origin(index)
        if source is None:
            return None
        if index < carry:
            return source if source == constants + index else None
        # A slice of each step put together again is the whole, read in the same order.
        return source if source >= constants + carry else None

    def known(self, atom: Any) -> Any:
        """The value of an atom that is one constant everywhere; `None` if the trace does not tell."""
        if isinstance(atom, Literal):
            return _scalar(atom.val)
        if atom in self.inputs:
            operand = None if self.outer is None else self.operands[self.inputs[atom]]
            return None if operand is None or self.outer is None else self.outer.known(operand)
        if atom not in self.producers:
            return _scalar(self.consts.get(atom))
        equation, index = self.producers[atom]
        name = equation.primitive.name
        if name in _SPREADS:
            return self.known(equation.invars[index])
        if name in _LOGIC:
            values = [self.known(operand) for operand in equation.invars]
            return None if any(value is None for value in values) else _computed(equation, values)
        if (called := _called(equation)) is not None and name != "scan":
            frame = self.inner(equation, called, equation.invars)
            return frame.known(frame.jaxpr.outvars[index])
        return None


def _called(equation: Any) -> Any:
    """The jaxpr that an equation does nothing but call, such as that of a nested `jit` or `remat`."""
    parameters = equation.params
    called = parameters.get("jaxpr") or parameters.get("call_jaxpr") or parameters.get("fun_jaxpr")
    if called is None or equation.primitive.name.startswith("reduce"):
        return None
    inner = getattr(called, "jaxpr", called)
    fits = len(inner.invars) == len(equation.invars) and len(inner.outvars) == len(equation.outvars)
    return called if fits else None


def _scanned(parameters: Any) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many go from step to step."""
    if "num_consts" in parameters:
        return parameters["num_consts"], parameters["num_carry"]
    constants, carry, _ = parameters["ft_in"].unpack()  # since JAX 0.12
    return len(constants), len(carry)


def _scalar(value: Any) -> Any:
    if value is None or isinstance(value, jax.core.Tracer) or np.size(value) != 1:
        return None
    return np.asarray(value).reshape(())


def _computed(equation: Any, values: list[Any]) -> Any:
    with jax.ensure_compile_time_eval():
        typed = [np.asarray(value, atom.aval.dtype) for value, atom in zip(values, equation.invars, strict=True)]
        return np.asarray(equation.primitive.bind(*typed, **equation.params))
