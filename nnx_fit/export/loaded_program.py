"""Running an exported program where neither the module's class nor a Trainer is: JAX, NumPy and safetensors only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from nnx_fit.data.batches import to_arrays
from nnx_fit.errors import CheckpointError, ConfigurationError
from nnx_fit.export import files, structure


@dataclasses.dataclass(frozen=True)
class Input:
    """One array of a batch that a program takes.

    Attributes:
        path: What leads to it, the same whichever class holds it.
        shown: How Python writes that: `batch['x']`.
        shape: Its shape; `None` is the size of the batch.
        dtype: Its dtype.
    """

    path: tuple[str, ...]
    shown: str
    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.shown}: {self.dtype}[{', '.join('batch' if size is None else str(size) for size in self.shape)}]"


class LoadedProgram:
    """What `load_program` gives: a module's `predict_step` with its weights, as a function of a batch.

    It may be called inside `jax.jit`, and by several threads at once.

    Args:
        file: The file's contents.

    Attributes:
        inputs: What it looks at of a batch. Anything with such arrays at the same keys, names and indices will do, and
            what else is there, such as labels, is left aside.
        platforms: What it runs on, of `"cpu"`, `"cuda"`, `"rocm"` and `"tpu"`.
        batch_size: The size that every batch has, or `None` for any.
        module: Name of the class it was made of.
    """

    def __init__(self, file: files.File):
        about = file.about
        exported = _deserialized(file)
        self.inputs = tuple(Input(tuple(i["path"]), i["shown"], tuple(i["shape"]), i["dtype"]) for i in about["inputs"])
        self.platforms: tuple[str, ...] = tuple(exported.platforms)
        self.batch_size: int | None = about["batch_size"]
        self.module: str = about["module"]
        self._path = file.path
        self._output = about["output"]
        self._weights = [_on_device(file, name) for name in about["weights"]]
        self._start = [*(_on_device(file, name) for name in about["state"]), jnp.array(about["counters"], jnp.int32)]
        self._call = jax.jit(exported.call)

    def __repr__(self) -> str:
        inputs = "".join(f"\n    {each}" for each in self.inputs)
        return f"LoadedProgram of {self.module} for {', '.join(self.platforms)}, taking{inputs}"

    def __call__(self, batch: Any) -> Any:
        """The outputs for one batch, as the first one of a prediction: the same batch always gives the same.

        Args:
            batch: The batch; see `inputs`.

        Returns:
            What `predict_step` returned, as JAX arrays.

        Raises:
            ConfigurationError: The batch is not what the program was made for.
        """
        return self._step(self._start, batch)[0]

    def predict(self, batches: Iterable[Any]) -> list[Any]:
        """The outputs for each of some batches, as `Trainer.predict` gives them.

        What goes from batch to batch in a prediction (random streams, caches, the index of the batch) does so here.

        Args:
            batches: The batches.

        Returns:
            What `predict_step` returned for each, as NumPy arrays.
        """
        outputs: list[Any] = []
        state = self._start
        for batch in batches:
            output, state = self._step(state, batch)
            outputs.append(output)
            if len(outputs) > 1:  # one late, so that the copy to the host overlaps with the next step
                outputs[-2] = jax.device_get(outputs[-2])
        return jax.device_get(outputs)

    def _step(self, state: list[Any], batch: Any) -> tuple[Any, list[Any]]:
        outputs, state = self._call(self._weights, state, self._arrays(batch))
        return structure.rebuilt(self._output, iter(outputs)), state

    def _arrays(self, batch: Any) -> list[Any]:
        """The arrays that the program takes, out of a batch."""
        given = structure.leaves_by_path(to_arrays(batch).numeric)
        problems: list[str] = []
        sizes: set[int] = set()
        for each in self.inputs:
            if each.path not in given:
                held = ", ".join(f"batch{shown}" for shown, _ in given.values())
                problems.append(f"{each}: missing; there is {held}")
            elif not _fits(leaf := jnp.asarray(given[each.path][1]), each, sizes):
                problems.append(f"{each}: got {leaf.dtype}{list(leaf.shape)}")
        if 0 in sizes:
            problems.append("at least one example: got none")
        if len(sizes) > 1:
            problems.append(f"batches of one size: got {', '.join(map(str, sorted(sizes)))}")
        if problems:
            raise ConfigurationError(
                f"The batch is not what the program {self._path} of {self.module} was made for:\n    "
                + "\n    ".join(problems)
                + "\nFix: give it what it takes, or save the program again with such a batch."
            )
        return [jnp.asarray(given[each.path][1]) for each in self.inputs]


def load_program(path: str | Path) -> LoadedProgram:
    """Loads a program that `save_program` wrote. Nothing of the module's class, of Flax or of a Trainer is needed.

    Args:
        path: The file.

    Returns:
        The program, to be called with a batch.

    Raises:
        CheckpointError: The file is damaged, no program, or needs another JAX.
    """
    file = files.read(path, ("program",))
    try:
        return LoadedProgram(file)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} describes no program that this nnx_fit knows ({error}).") from error


def _deserialized(file: files.File) -> jax.export.Exported:
    try:
        return jax.export.deserialize(bytearray(file.entries[files.PROGRAM].array.tobytes()))
    except ImportError as error:
        raise files.not_installed("flatbuffers") from error
    except Exception as error:  # JAX has no class of its own for it
        raise CheckpointError(
            f"The program in {file.path} was saved with jax {file.about.get('jax')}, and jax {jax.__version__} cannot "
            f"read it ({type(error).__name__}: {error}).\nFix: use that version of JAX, or save the program again."
        ) from error


def _on_device(file: files.File, name: str) -> jax.Array:
    array = file.entries[name].array
    value = jnp.asarray(array)
    if value.dtype != array.dtype:
        raise CheckpointError(
            f"{file.path}: `{name}` is {array.dtype}, which JAX does not take here.\n"
            'Fix: `jax.config.update("jax_enable_x64", True)`, as where the program was saved.'
        )
    return value


def _fits(leaf: Any, wanted: Input, sizes: set[int]) -> bool:
    """Whether an array is what a program takes; notes the size of the batch."""
    if str(leaf.dtype) != wanted.dtype or np.ndim(leaf) != len(wanted.shape):
        return False
    sizes.update(size for size, fixed in zip(leaf.shape, wanted.shape, strict=True) if fixed is None)
    return all(fixed in (None, size) for size, fixed in zip(leaf.shape, wanted.shape, strict=True))
