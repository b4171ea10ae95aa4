"""The classic mistakes with state, each made on purpose, and what happens now.

    python examples/state/mistakes.py

In a loop written by hand all of them pass in silence, and the model is wrong. Each function here returns what the
library says instead; the first one shows that the most common mistake can no longer be made.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nnx_fit as nf

BATCHES = [{"x": np.random.default_rng(i).normal(size=(8, 2)).astype(np.float32)} for i in range(3)]


class Base(nf.FitModule):
    """What all of them share: a linear layer that learns to give ones."""

    def __init__(self) -> None:
        self.linear = nnx.Linear(2, 1, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)

    def training_step(self, batch: dict[str, jax.Array]) -> jax.Array:
        return jnp.square(self(batch["x"]) - 1).mean()

    def validation_step(self, batch: dict[str, jax.Array]) -> None:
        self.log("val/output", self(batch["x"]).mean())

    def configure_optimizers(self) -> optax.GradientTransformation:
        return optax.sgd(0.1)


def make_trainer(**options: object) -> nf.Trainer:
    return nf.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def answer(action: Callable[[], object]) -> str:
    """The error that an action raises, as Python prints it."""
    try:
        action()
    except nf.NnxFitError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing is wrong"


# --- the flag is forgotten -------------------------------------------------------------------------------------------


class RunningMean(nnx.Module):
    """Takes off a running mean; `train` says whether to update it, and is True where nobody says so."""

    def __init__(self) -> None:
        self.mean = nnx.Variable(jnp.zeros(2))

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        if train:
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * x.mean(0)
        return x - self.mean[...]


class ForgetsTheFlag(Base):
    """Never passes `train`, so that by itself every call would be one of training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RunningMean()

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(self.norm(x))


def flag_forgotten() -> str:
    """The flag gets the right value in every call that does not pass it: evaluation leaves the mean alone."""
    model = ForgetsTheFlag()
    make_trainer().fit(model, BATCHES)
    trained = np.asarray(model.norm.mean[...])
    make_trainer().validate(model, [{"x": batch["x"] + 100} for batch in BATCHES])
    unchanged = np.array_equal(trained, model.norm.mean[...])
    return (
        f"the flag is filled in: training moved the mean: {bool(trained.any())}, validation moved it: {not unchanged}"
    )


# --- evaluation changes the model ------------------------------------------------------------------------------------


class PassesTheWrongFlag(ForgetsTheFlag):
    """Says `train=True` always. A value that is passed wins, so that this one is wrong in validation."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(self.norm(x, train=True))


def evaluation_writes() -> str:
    """Validation data would leak into the running mean."""
    return answer(lambda: make_trainer().fit(PassesTheWrongFlag(), BATCHES, BATCHES))


# --- a parameter is written by hand ----------------------------------------------------------------------------------


class ClipsByHand(Base):
    """Writes a parameter that the optimizer updates as well; one of the two would be lost."""

    def training_step(self, batch: dict[str, jax.Array]) -> jax.Array:
        self.linear.kernel[...] = jnp.clip(self.linear.kernel[...], -1, 1)
        return super().training_step(batch)


def parameter_written() -> str:
    """Two hands on one value."""
    return answer(lambda: make_trainer().fit(ClipsByHand(), BATCHES))


class ClipsInAHook(Base):
    """The right way: between two steps the module is yours."""

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        self.linear.kernel[...] = jnp.clip(self.linear.kernel[...], -0.1, 0.1)


def parameter_written_in_a_hook() -> str:
    """A hook may write whatever it likes."""
    model = ClipsInAHook()
    make_trainer().fit(model, BATCHES)
    largest = float(jnp.abs(model.linear.kernel[...]).max())
    return f"a hook may write: the largest weight is {largest:.1f}"


# --- a Variable is made in a step ------------------------------------------------------------------------------------


class MakesVariablesLate(Base):
    """Keeps an activation in a Variable that is not there before the first step."""

    def training_step(self, batch: dict[str, jax.Array]) -> jax.Array:
        self.activation = nnx.Variable(self(batch["x"]))
        return super().training_step(batch)


def variable_made_late() -> str:
    """A compiled step carries a fixed set of Variables."""
    return answer(lambda: make_trainer().fit(MakesVariablesLate(), BATCHES))


# --- a value is kept in a plain attribute ---------------------------------------------------------------------------


class KeepsTheLoss(Base):
    """Keeps the loss in a plain attribute, to look at it later."""

    def training_step(self, batch: dict[str, jax.Array]) -> jax.Array:
        self.last_loss = super().training_step(batch)
        return self.last_loss


def value_kept() -> str:
    """The code of a step runs only while it is compiled, on values that stand for others."""
    return answer(lambda: make_trainer().fit(KeepsTheLoss(), BATCHES))


# --- an object is saved instead of state -----------------------------------------------------------------------------


class SavesAnObject(Base):
    """Puts a layer into the checkpoint's plain values."""

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        checkpoint["head"] = self.linear


def object_saved() -> str:
    """Its arrays are in the checkpoint already, by path; the object would tie the file to this version of the code."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer()
        trainer.fit(SavesAnObject(), BATCHES)
        said = answer(lambda: trainer.save_checkpoint(Path(directory) / "mine"))
        return said.replace(directory, "DIRECTORY")


class PicklingLoader:
    """Pickles the model from where no hook is, while it is being trained."""

    def __init__(self, model: Base) -> None:
        self.model = model

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for batch in BATCHES * 5:
            yield batch
            pickle.dumps(self.model)


def pickled_in_training() -> str:
    """Between two steps the values are in the program's hands: what would be pickled is not the model."""
    model = Base()
    return answer(lambda: make_trainer().fit(model, PicklingLoader(model)))


MISTAKES = {
    "the flag is forgotten": flag_forgotten,
    "evaluation changes the model": evaluation_writes,
    "a parameter is written by hand": parameter_written,
    "the same in a hook": parameter_written_in_a_hook,
    "a Variable is made in a step": variable_made_late,
    "a value is kept in a plain attribute": value_kept,
    "an object is saved instead of state": object_saved,
    "a model is pickled in the middle of training": pickled_in_training,
}


def main() -> None:
    for mistake, happens in MISTAKES.items():
        print(f"--- {mistake}\n{happens()}\n")


if __name__ == "__main__":
    main()
