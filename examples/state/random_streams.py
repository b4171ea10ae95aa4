"""Separate random streams: one seed for the weights, one for dropout, one of the model's own.

    python examples/state/random_streams.py

Streams are state: they advance once per training batch, are checkpointed, and an evaluation leaves them as it found
them. So a run is the same, bit for bit, however often it validates.
"""

from __future__ import annotations

import jax
import numpy as np
import optax
from flax import nnx

import nnx_fit as nf


class InputNoise(nnx.Module):
    """Adds noise while training; `noise` is a stream that no other layer draws from."""

    def __init__(self, std: float, *, rngs: nnx.Rngs) -> None:
        self.noise = rngs.noise.fork()
        self.std = std

    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        return x if deterministic else x + self.std * jax.random.normal(self.noise(), x.shape)


class Classifier(nf.FitModule):
    """A small MLP with input noise and dropout."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.noise = InputNoise(0.1, rngs=rngs)
        self.hidden = nnx.Linear(2, 32, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.dropout(nnx.relu(self.hidden(self.noise(x)))))

    def training_step(self, batch: dict[str, jax.Array]) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(self(batch["x"]), batch["label"]).mean()

    def validation_step(self, batch: dict[str, jax.Array]) -> None:
        self.log("val/accuracy", (self(batch["x"]).argmax(-1) == batch["label"]).mean())

    def configure_optimizers(self) -> optax.GradientTransformation:
        return optax.adam(1e-2)


def make_data() -> nf.ArrayLoader:
    """Points inside and outside of a circle."""
    x = np.random.default_rng(0).normal(size=(256, 2)).astype(np.float32)
    return nf.ArrayLoader({"x": x, "label": (np.square(x).sum(1) > 1).astype(np.int32)}, batch_size=32)


def build(dropout: int = 1) -> Classifier:
    """The model: the seed of each stream on its own."""
    return Classifier(rngs=nnx.Rngs(params=0, dropout=dropout, noise=2))


def train(model: Classifier, val_check_interval: float | None) -> np.ndarray:
    """Trains for three epochs, validating at this interval or not at all; returns the first layer's weights."""
    trainer = nf.Trainer(
        max_epochs=3,
        val_check_interval=val_check_interval or 1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, make_data(), make_data() if val_check_interval else None)
    return np.asarray(model.hidden.kernel[...])


def main() -> dict[str, object]:
    model = build()
    for row in nf.partition(model).rows:
        if row.role == "rngs":
            print(f"{row.path:<20} {row.type}")

    never, often = train(model, None), train(build(), 0.25)
    same = np.array_equal(never, often)
    print(f"\nvalidating never and four times per epoch gives the same weights, bit for bit: {same}")
    counts = {"dropout": int(model.dropout.rngs.count[...]), "noise": int(model.noise.noise.count[...])}
    print(f"draws from each stream in 24 training steps: {counts}")

    start = np.array_equal(build(dropout=1).hidden.kernel[...], build(dropout=7).hidden.kernel[...])
    other = train(build(dropout=7), None)
    print(f"another dropout seed starts from the same weights: {start}")
    ends_elsewhere = not np.array_equal(never, other)
    print(f"and ends at others: {ends_elsewhere}")
    return {"same": same, "counts": counts, "start": start, "ends_elsewhere": ends_elsewhere}


if __name__ == "__main__":
    main()
