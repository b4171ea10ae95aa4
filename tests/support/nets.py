"""Small modules and data that many tests train."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nnx_fit as nf


class Block(nnx.Module):
    """BatchNorm, Dropout and two layers; no bias before the norm, whose true gradient would be zero."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(features, features, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(features, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.relu(self.norm(self.linear(x))))


class Regressor(nf.FitModule):
    """All three kinds of state; logs a loss in training and in evaluation."""

    def __init__(self, features: int = 8, depth: int = 2, learning_rate: float = 1e-2, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(features, rngs=rngs) for _ in range(depth)])
        self.head = nnx.Linear(features, 1, rngs=rngs)
        self.learning_rate = learning_rate

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss(self, batch):
        return ((self(batch["x"]) - batch["y"]) ** 2).mean()

    def training_step(self, batch):
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch):
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch):
        self.log("test/loss", self.loss(batch))

    def predict_step(self, batch):
        return self(batch["x"])

    def configure_optimizers(self):
        return optax.adam(self.learning_rate)


class Scalar(nf.FitModule):
    """One parameter under SGD on (w - target)^2 / 2: everything has a closed form."""

    def __init__(self, start: float = 1.0, learning_rate: float = 0.1):
        self.w = nnx.Param(jnp.asarray(start))
        self.learning_rate = learning_rate

    def training_step(self, batch):
        loss = 0.5 * jnp.mean((self.w[...] - batch["target"]) ** 2)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("val/target", batch["target"].mean())

    def configure_optimizers(self):
        return optax.sgd(self.learning_rate)


def arrays(count: int = 64, features: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs and a linear target of them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, features)).astype(np.float32)
    return {"x": x, "y": (x[:, :1] * 2 - 1).astype(np.float32)}


def loader(count: int = 64, batch_size: int = 16, **options: Any) -> nf.ArrayLoader:
    """A loader of `arrays`."""
    return nf.ArrayLoader(arrays(count), batch_size, **options)


def targets(*values: float, size: int = 2) -> list[dict[str, np.ndarray]]:
    """Batches for `Scalar`, one for each value."""
    return [{"target": np.full(size, value, np.float32)} for value in values]


def quiet(**options: Any) -> nf.Trainer:
    """A Trainer that writes and shows nothing."""
    defaults = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return nf.Trainer(**{**defaults, **options})


class SavesIn(nf.Callback):
    """Saves in one hook, at its n-th call."""

    def __init__(self, path, hook, call):
        self.calls = 0

        def saving(trainer, *args):
            self.calls += 1
            if self.calls == call:
                trainer.save_checkpoint(path)

        setattr(self, hook, saving)
