"""A predict step in the portable form of JAX, for any batch size and several platforms, with what it needs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from nnx_fit.errors import ConfigurationError
from nnx_fit.export.files import not_installed
from nnx_fit.export.predict_step import PredictStep

_EXTENDED = jax.dtypes.extended  # of PRNG keys, of which there are no zeros


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step in JAX's own portable form, and what it looks at.

    Attributes:
        program: It.
        weights: Places of the weights that it takes, among all.
        leaves: Places of the arrays of a batch that it takes.
    """

    program: bytes
    weights: list[int]
    leaves: list[int]


def compiled_step(
    predict: PredictStep, shapes: list[jax.ShapeDtypeStruct], batch_size: int | str, platforms: tuple[str, ...]
) -> CompiledStep:
    """The step compiled as far as it can be without knowing the machine.

    Args:
        predict: The step.
        shapes: What the arrays of a batch look like.
        batch_size: The size of batches, or `"dynamic"`.
        platforms: What it shall run on.

    Raises:
        ConfigurationError: It cannot be compiled for any batch size, or not for all platforms.
    """
    step = jax.jit(predict)
    arguments = predict.arguments(shapes)
    try:
        traced = step.trace(*arguments)
    except Exception as error:
        if batch_size == "dynamic":
            jax.eval_shape(predict, *predict.arguments(predict.shapes(None)))  # the user's own mistake comes first
            raise _needs_a_size(predict, error) from error
        raise
    try:
        weights, leaves = _needed(arguments, _looked_at(traced.jaxpr.jaxpr))
        needed = jax.jit(_of_what_is_needed(traced.jaxpr, arguments, weights, leaves))
        taken = ([arguments[0][i] for i in weights], arguments[1], [shapes[i] for i in leaves])
        program = bytes(jax.export.export(needed, platforms=platforms)(*taken).serialize())
    except ImportError as error:
        raise not_installed("flatbuffers") from error
    except Exception as error:
        raise ConfigurationError(
            f"predict_step cannot be saved as a program for {', '.join(platforms)} ({type(error).__name__}: "
            f"{_first_line(error)}).\n"
            "A program in a file calls no Python (`jax.debug.print`, `jax.pure_callback`), and holds only what each of "
            'its platforms has.\nFix: leave such calls out, or pass the one platform you need, platforms=("cpu",).'
        ) from error
    return CompiledStep(program, weights, leaves)


def _looked_at(jaxpr: Any) -> frozenset[int]:
    """Places of the arguments of a traced function that its results or its effects depend on."""
    alive = {id(each) for each in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(id(each) in alive for each in equation.outvars):
            alive |= {id(each) for each in equation.invars}
    return frozenset(i for i, each in enumerate(jaxpr.invars) if id(each) in alive)


def _needed(arguments: Any, used: frozenset[int]) -> tuple[list[int], list[int]]:
    """Places of the weights and of the leaves of a batch that a program has to be given."""
    weights, state, shapes = arguments
    first = len(weights) + len(state)
    leaves = [i for i, shape in enumerate(shapes) if first + i in used or jnp.issubdtype(shape.dtype, _EXTENDED)]
    sized = [i for i, shape in enumerate(shapes) if not all(isinstance(size, int) for size in shape.shape)]
    if sized and not set(sized) & set(leaves):
        leaves = sorted([*leaves, sized[0]])  # nothing else would say how large the batch is
    return [i for i in range(len(weights)) if i in used], leaves


def _of_what_is_needed(jaxpr: Any, arguments: Any, weights: list[int], leaves: list[int]) -> Any:
    """A traced step as a function of the weights and leaves that it looks at: it is not traced another time."""
    all_weights, _, all_leaves = arguments
    run = jaxpr_as_fun(jaxpr)

    def step(given: list[Any], state: list[Any], batch: list[Any]) -> tuple[list[Any], list[Any]]:
        found = _filled(all_weights, weights, given) + state + _filled(all_leaves, leaves, batch)
        returned = run(*found)
        return returned[: -len(state)], returned[-len(state) :]

    return step


def _filled(shapes: list[Any], places: list[int], values: list[Any]) -> list[Any]:
    given = dict(zip(places, values, strict=True))
    return [given[i] if i in given else jnp.zeros(shape.shape, shape.dtype) for i, shape in enumerate(shapes)]


def _needs_a_size(predict: PredictStep, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"predict_step cannot be compiled for any batch size ({type(error).__name__}: {_first_line(error)}).\n"
        "It computes with the size of the batch as a Python number (`len(x)`, `range`, a comparison), or reshapes to "
        "what not every size gives.\n"
        f"Fix: save it for one size, batch_size={predict.size}, or use `x.shape[0]` and the functions of `jax.numpy`."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
