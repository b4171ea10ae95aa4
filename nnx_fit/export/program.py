"""`save_program`: a module's predict step with its weights in one file, to run without the module's class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from nnx_fit.data.batches import to_arrays
from nnx_fit.errors import ConfigurationError
from nnx_fit.export.compiled_step import compiled_step
from nnx_fit.export.files import PROGRAM, Entry, write
from nnx_fit.export.predict_step import PredictStep
from nnx_fit.module import FitModule
from nnx_fit.programs.precision import PRECISIONS
from nnx_fit.state.guard import Guard

KNOWN_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PLATFORMS = ("cpu", "cuda", "tpu")


def save_program(
    module: FitModule,
    path: str | Path,
    example_batch: Any,
    *,
    batch_size: int | Literal["dynamic"] = "dynamic",
    platforms: Sequence[str] = PLATFORMS,
    precision: str = "32",
    state_guard: Guard = "error",
) -> None:
    """Writes `predict_step` with the module's weights as a program into one file, for `load_program`.

    It is the program that `Trainer.predict` runs: in eval mode, with call flags filled in and the guard of state on
    watch; `global_step` is 0, as with a new Trainer. The file is one of safetensors, with the arrays that the step
    looks at by path, so that `load_weights` takes it, too.

    Args:
        module: The module, with the values it has now. It is not changed.
        path: The file, which is replaced as a whole.
        example_batch: A batch as the loader yields it: only structure, shapes and dtypes matter.
        batch_size: The size of the batches it will be called with; `"dynamic"` for any, from 1 on.
        platforms: What it shall run on, of `"cpu"`, `"cuda"`, `"rocm"` and `"tpu"`.
        precision: What it computes in; as the Trainer's.
        state_guard: What to do about state that a predict step should not change; as the Trainer's.

    Raises:
        ConfigurationError: The step cannot be compiled for any batch size, or not for all platforms; an argument does
            not fit; something that it takes or returns cannot be described without its class.
        CheckpointError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import nnx_fit as nf
        >>> class Double(nf.FitModule):
        ...     def __init__(self):
        ...         self.factor = nnx.Param(jnp.float32(2))
        ...     def __call__(self, x):
        ...         return {"doubled": self.factor * x}
        >>> file = tempfile.mkdtemp() + "/double.safetensors"
        >>> nf.export.save_program(Double(), file, jnp.ones(4))
        >>> nf.export.load_program(file)(jnp.arange(3.0))
        {'doubled': Array([0., 2., 4.], dtype=float32)}
    """
    _check(module, batch_size, platforms, precision)
    batch = to_arrays(example_batch).numeric
    predict = PredictStep(module, batch, PRECISIONS[precision], state_guard)
    shapes = predict.shapes(batch_size)
    compiled = compiled_step(predict, shapes, batch_size, tuple(platforms))
    entries = predict.entries()
    weights = [predict.weight_names[i] for i in compiled.weights]
    about = {
        "module": type(module).__qualname__,
        "jax": jax.__version__,
        "precision": precision,
        "batch_size": None if batch_size == "dynamic" else batch_size,
        "inputs": [predict.inputs(shapes)[i] for i in compiled.leaves],
        "output": predict.output,
        "weights": weights,
        "state": predict.state_names,
        "counters": np.asarray(predict.start[-1]).tolist(),
    }
    program = Entry(np.frombuffer(compiled.program, np.uint8), "program")
    kept = {name: entries[name] for name in entries if name in {*weights, *predict.state_names}}
    write(path, "program", {PROGRAM: program, **kept}, about)


def _check(module: Any, batch_size: Any, platforms: Sequence[str], precision: str) -> None:
    if not isinstance(module, FitModule):
        raise ConfigurationError(
            f"save_program got a {type(module).__name__}, which has no predict_step. Fix: pass a FitModule."
        )
    if batch_size != "dynamic" and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ConfigurationError(f'save_program(batch_size={batch_size!r}): expected "dynamic" or a number from 1 on.')
    if precision not in PRECISIONS:
        raise ConfigurationError(
            f"save_program(precision={precision!r}): there are {', '.join(map(repr, PRECISIONS))}."
        )
    unknown = [each for each in platforms if each not in KNOWN_PLATFORMS]
    if unknown or isinstance(platforms, str) or not platforms:
        raise ConfigurationError(
            f"save_program(platforms={platforms!r}): expected a list of 'cpu', 'cuda', 'rocm' and 'tpu'."
        )
