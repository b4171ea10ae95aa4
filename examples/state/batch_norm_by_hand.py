"""A BatchNorm written by hand: running statistics in plain `nnx.Variable`s, updated behind a `train` flag.

    python examples/state/batch_norm_by_hand.py

Nothing in the model passes the flag on. The Trainer gives each call inside a step the value of its mode, and carries
and checkpoints the two Variables like any running statistics: they are in the role *stats*.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nnx_fit as nf


class HandNorm(nnx.Module):
    """Normalizes by the batch while training and by running statistics otherwise.

    Args:
        features: Size of the last axis.
        momentum: Share of the old statistics that one update keeps.
    """

    def __init__(self, features: int, momentum: float = 0.9) -> None:
        self.running_mean = nnx.Variable(jnp.zeros(features))
        self.running_var = nnx.Variable(jnp.ones(features))
        self.momentum = momentum

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if train:
            mean, var = x.mean(0), x.var(0)
            keep = self.momentum
            self.running_mean[...] = keep * self.running_mean[...] + (1 - keep) * mean
            self.running_var[...] = keep * self.running_var[...] + (1 - keep) * var
        else:
            mean, var = self.running_mean[...], self.running_var[...]
        return (x - mean) / jnp.sqrt(var + 1e-5)


class Regressor(nf.FitModule):
    """Normalizes its input, then a linear layer."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = HandNorm(3)
        self.linear = nnx.Linear(3, 1, rngs=rngs)

    def loss(self, batch: dict[str, jax.Array]) -> jax.Array:
        return optax.squared_error(self.linear(self.norm(batch["x"])), batch["y"]).mean()

    def training_step(self, batch: dict[str, jax.Array]) -> jax.Array:
        return self.loss(batch)

    def validation_step(self, batch: dict[str, jax.Array]) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> optax.GradientTransformation:
        return optax.adam(0.05)


def make_data(mean: float, std: float, seed: int) -> nf.ArrayLoader:
    """Inputs of a given mean and standard deviation; the target is the sum of the standardized input."""
    z = np.random.default_rng(seed).normal(size=(512, 3)).astype(np.float32)
    return nf.ArrayLoader({"x": mean + std * z, "y": z.sum(1, keepdims=True)}, batch_size=64)


def main() -> dict[str, object]:
    model = Regressor(rngs=nnx.Rngs(0))
    print(nf.partition(model).table())
    trainer = nf.Trainer(
        max_epochs=10, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(model, make_data(5, 2, seed=0), make_data(5, 2, seed=1))
    val_loss = trainer.callback_metrics["val/loss"]
    learned = np.asarray(model.norm.running_mean[...]), np.asarray(model.norm.running_var[...])
    print(f"\nafter training:  running_mean {learned[0].round(1)}, running_var {learned[1].round(1)}")

    # Data of another distribution: an evaluation sees it, and leaves no trace of it in the model.
    elsewhere = trainer.validate(model, make_data(-40, 9, seed=2))[0]
    kept = np.asarray(model.norm.running_mean[...]), np.asarray(model.norm.running_var[...])
    print(f"after validation on other data (loss {elsewhere['val/loss']:.0f}):  running_mean {kept[0].round(1)}")
    return {"learned": learned, "kept": kept, "val_loss": val_loss}


if __name__ == "__main__":
    main()
