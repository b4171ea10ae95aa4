"""A convolutional model with all three kinds of state: parameters, running statistics and random streams.

python examples/state/three_kinds.py
"""

from __future__ import annotations

import jax
import numpy as np
import optax
from flax import nnx

import nnx_fit as nf


class StripeNet(nf.FitModule):
    """Tells horizontal stripes from vertical ones.

    Args:
        width: Channels of the convolution.
    """

    def __init__(self, width: int = 8, *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, width, (3, 3), use_bias=False, rngs=rngs)  # parameters
        self.norm = nnx.BatchNorm(width, rngs=rngs)  # parameters (scale, bias) and running statistics (mean, var)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)  # a random stream
        self.head = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(images)))
        return self.head(self.dropout(x.mean((1, 2))))

    def training_step(self, batch: dict[str, jax.Array]) -> jax.Array:
        loss = optax.softmax_cross_entropy_with_integer_labels(self(batch["image"]), batch["label"]).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, jax.Array]) -> None:
        self.log("val/accuracy", (self(batch["image"]).argmax(-1) == batch["label"]).mean())

    def configure_optimizers(self) -> optax.GradientTransformation:
        return optax.adam(2e-2)


def make_images(count: int, seed: int) -> nf.ArrayLoader:
    """Noisy 8x8 images of stripes: `{"image": (batch, 8, 8, 1), "label": (batch,)}`."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, size=count).astype(np.int32)
    stripes = np.broadcast_to(np.sign(np.sin(np.arange(8) * np.pi / 2 + 0.5)), (count, 8, 8))
    image = np.where(label[:, None, None] == 1, stripes, stripes.transpose(0, 2, 1))
    image = image + rng.normal(scale=0.3, size=image.shape)
    return nf.ArrayLoader({"image": image[..., None].astype(np.float32), "label": label}, batch_size=32)


def roles_that_changed(before: nnx.State, model: StripeNet) -> set[str]:
    """The roles of which at least one value differs from `before`."""
    now = dict(nnx.to_flat_state(nnx.state(model)))
    roles = {row.path: row.role for row in nf.partition(model).rows}
    return {
        roles[".".join(map(str, path))]
        for path, old in nnx.to_flat_state(before)
        if not np.array_equal(_plain(old), _plain(now[path]))
    }


def _plain(variable: nnx.Variable) -> np.ndarray:
    is_key = isinstance(variable, nnx.RngKey)
    return np.asarray(jax.random.key_data(variable[...]) if is_key else variable[...])


def main() -> dict[str, object]:
    model = StripeNet(rngs=nnx.Rngs(params=0, dropout=1))
    print(nf.partition(model).table())
    trainer = nf.Trainer(
        max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )

    start = nnx.clone(nnx.state(model))
    history = trainer.fit(model, make_images(256, seed=0), make_images(64, seed=1))
    by_training = roles_that_changed(start, model)
    print(f"\nvalidation accuracy {history['val/accuracy'][-1][1]:.0%}; training changed: {sorted(by_training)}")

    trained = nnx.clone(nnx.state(model))
    trainer.validate(model, make_images(64, seed=2))
    by_validation = roles_that_changed(trained, model)
    print(f"validation changed: {sorted(by_validation) or 'nothing'}")
    return {
        "totals": nf.partition(model).totals(),
        "accuracy": history["val/accuracy"][-1][1],
        "by_training": by_training,
        "by_validation": by_validation,
    }


if __name__ == "__main__":
    main()
