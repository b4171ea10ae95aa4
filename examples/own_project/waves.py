"""A project of your own: one model and one data module. Everything else comes from nnx_fit and from `conf/`."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nnx_fit as nf


class WaveNet(nf.FitModule):
    """Learns the curve that noisy points were drawn from.

    There is no `configure_optimizers`: the optimizer is the one that the configuration names, so that
    `nnx-fit optimizer=sgd` changes it. `rngs` is supplied, from the configured seed.

    Args:
        width: Features of the hidden layers.
        depth: Number of hidden layers.
    """

    def __init__(self, width: int = 32, depth: int = 2, *, rngs: nnx.Rngs) -> None:
        sizes = [1] + [width] * depth
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.head = nnx.Linear(sizes[-1], 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.head(x)

    def training_step(self, batch: dict[str, jax.Array]) -> jax.Array:
        loss = optax.l2_loss(self(batch["x"]), batch["y"]).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, jax.Array]) -> None:
        self.log("val/loss", optax.l2_loss(self(batch["x"]), batch["y"]).mean(), prog_bar=True)


class WaveData(nf.DataModule):
    """Points `{"x": (batch, 1), "y": (batch, 1)}` on a sine, with noise.

    Args:
        points: Number of training points.
        noise: Standard deviation of the noise on `y`.
        batch_size: Points in a batch.
        seed: Fixes points and order; supplied from the configured seed.
    """

    def __init__(self, points: int = 2000, noise: float = 0.1, batch_size: int = 50, seed: int = 0) -> None:
        self.points = points
        self.noise = noise
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        rng = np.random.default_rng(self.seed)
        x = rng.uniform(-3, 3, size=(self.points + 500, 1)).astype(np.float32)
        y = (np.sin(2 * x) + self.noise * rng.normal(size=x.shape)).astype(np.float32)
        self.train = {"x": x[: self.points], "y": y[: self.points]}
        self.val = {"x": x[self.points :], "y": y[self.points :]}

    def train_dataloader(self) -> nf.ArrayLoader:
        return nf.ArrayLoader(self.train, self.batch_size, shuffle=True, seed=self.seed)

    def val_dataloader(self) -> nf.ArrayLoader:
        return nf.ArrayLoader(self.val, 500)
