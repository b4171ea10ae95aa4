"""The smallest complete program: a model, its data, and a Trainer. Takes a few seconds on a CPU.

    python examples/quickstart.py

Then look at what happened:  tensorboard --logdir outputs
"""

from __future__ import annotations

import jax
import numpy as np
import optax
from flax import nnx

import nnx_fit as nf


class SpiralClassifier(nf.FitModule):
    """Tells which arm of a spiral a point in the plane belongs to."""

    def __init__(self, width: int = 64, learning_rate: float = 3e-3, *, rngs: nnx.Rngs) -> None:
        # A FitModule is a normal nnx.Module: build it from any layers. BatchNorm and Dropout need nothing special;
        # the Trainer switches them between training and evaluation.
        self.net = nnx.Sequential(
            nnx.Linear(2, width, rngs=rngs),
            nnx.BatchNorm(width, rngs=rngs),
            nnx.relu,
            nnx.Dropout(0.1, rngs=rngs),
            nnx.Linear(width, width, rngs=rngs),
            nnx.relu,
            nnx.Linear(width, 3, rngs=rngs),
        )
        self.learning_rate = learning_rate

    def training_step(self, batch: dict[str, jax.Array]) -> jax.Array:
        # Runs inside one compiled program: gradient and update are done by the Trainer.
        logits = self.net(batch["point"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["arm"]).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, jax.Array]) -> None:
        logits = self.net(batch["point"])
        self.log("val/accuracy", (logits.argmax(-1) == batch["arm"]).mean(), prog_bar=True)

    def configure_optimizers(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate)


def make_spirals(points: int, seed: int) -> dict[str, np.ndarray]:
    """Points on three arms of a spiral: `{"point": (points, 2) float32, "arm": (points,) int32}`."""
    rng = np.random.default_rng(seed)
    arm = rng.integers(0, 3, size=points)
    radius = rng.uniform(0.1, 1, size=points)
    angle = 4 * radius + arm * 2 * np.pi / 3 + rng.normal(scale=0.1, size=points)
    point = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return {"point": point.astype(np.float32), "arm": arm.astype(np.int32)}


def main() -> None:
    train_loader = nf.ArrayLoader(make_spirals(3000, seed=0), batch_size=64, shuffle=True)
    val_loader = nf.ArrayLoader(make_spirals(1000, seed=1), batch_size=256)

    model = SpiralClassifier(rngs=nnx.Rngs(0))
    trainer = nf.Trainer(max_epochs=20, callbacks=[nf.EarlyStopping("val/accuracy", mode="max", patience=5)])
    history = trainer.fit(model, train_loader, val_loader)

    step, accuracy = history["val/accuracy"][-1]
    print(f"validation accuracy after {step} steps: {accuracy:.1%}")

    # The model you passed in is the trained one, an nnx.Module like any other.
    model.eval()
    logits = model.net(np.array([[0.5, 0.5]], np.float32))
    print(f"the point (0.5, 0.5) belongs to arm {int(logits.argmax())}")


if __name__ == "__main__":
    main()
