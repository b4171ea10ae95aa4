"""A layer with two Params of its own: what trains, how to see it, and how to stop a part of it from training.

python examples/state/two_params.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nnx_fit as nf


class Affine(nnx.Module):
    """`scale * x + shift`: two Params, and nothing else to declare."""

    def __init__(self, features: int) -> None:
        self.scale = nnx.Param(jnp.ones(features))
        self.shift = nnx.Param(jnp.zeros(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.scale + self.shift


class Line(nf.FitModule):
    """Learns two slopes and two intercepts."""

    def __init__(self) -> None:
        self.affine = Affine(2)

    def training_step(self, batch: dict[str, jax.Array]) -> jax.Array:
        return optax.squared_error(self.affine(batch["x"]), batch["y"]).mean()

    def configure_optimizers(self) -> optax.GradientTransformation:
        return optax.sgd(0.5)


def make_data() -> nf.ArrayLoader:
    """Points on the lines `3 x - 1` and `-2 x + 5`."""
    x = np.random.default_rng(0).uniform(-1, 1, size=(256, 2)).astype(np.float32)
    return nf.ArrayLoader({"x": x, "y": x * [3, -2] + np.float32([-1, 5])}, batch_size=32)


def train(model: Line) -> Line:
    nf.Trainer(
        max_epochs=10, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    ).fit(model, make_data())
    return model


def main() -> dict[str, Line]:
    both = Line()
    print(nf.partition(both).table())
    train(both)
    print(f"\nboth trained:  scale {both.affine.scale[...]}, shift {both.affine.shift[...]}")

    # Freezing is data, not surgery: it edits the module's `trainable` filter, and the partition follows.
    frozen = Line()
    frozen.freeze("affine.shift")
    print("\n" + nf.partition(frozen).table())
    train(frozen)
    print(f"\nshift frozen:  scale {frozen.affine.scale[...]}, shift {frozen.affine.shift[...]}")
    return {"both": both, "frozen": frozen}


if __name__ == "__main__":
    main()
