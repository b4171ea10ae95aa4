"""Two optimizers and a training step that uses them itself: a GAN learns eight spots in the plane.

    python examples/gan.py

`automatic_optimization = False` leaves differentiating and updating to `training_step`: first the discriminator, then
the generator, each for its own part of the module. Everything else (modes, compilation, logging, checkpoints) is the
Trainer's as ever.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nnx_fit as nf

SPOTS, RADIUS, SPREAD = 8, 2.0, 0.1
NOISE, SMOOTHING = 16, 0.1


def centres() -> np.ndarray:
    """The middle of each spot, on a circle: shape `(8, 2)`."""
    angle = 2 * np.pi * np.arange(SPOTS) / SPOTS
    return (RADIUS * np.stack([np.cos(angle), np.sin(angle)], axis=-1)).astype(np.float32)


def make_points(points: int, seed: int) -> np.ndarray:
    """Points from all spots alike: shape `(points, 2)`, float32."""
    rng = np.random.default_rng(seed)
    return (centres()[rng.integers(0, SPOTS, points)] + rng.normal(scale=SPREAD, size=(points, 2))).astype(np.float32)


def layers(sizes: list[int], *, rngs: nnx.Rngs) -> nnx.Sequential:
    """Linear layers with a leaky ReLU between them."""
    found: list = []
    for features, out in itertools.pairwise(sizes):
        found += [nnx.Linear(features, out, rngs=rngs), nnx.leaky_relu]
    return nnx.Sequential(*found[:-1])


class GAN(nf.FitModule):
    """A generator turns noise into points; a discriminator tells them from real ones."""

    automatic_optimization = False

    def __init__(self, width: int = 128, learning_rate: float = 2e-3, *, rngs: nnx.Rngs) -> None:
        self.generator = layers([NOISE, width, width, 2], rngs=rngs)
        self.discriminator = layers([2, width, width, 1], rngs=rngs)
        self.noise = rngs.fork()
        self.learning_rate = learning_rate

    def __call__(self, noise: jax.Array) -> jax.Array:
        return self.generator(noise)

    def training_step(self, batch: dict[str, jax.Array]) -> None:
        real = batch["point"]
        noise = self.noise.normal((len(real), NOISE))

        def realness(points: jax.Array) -> jax.Array:
            return self.discriminator(points)[:, 0]

        def discriminator_loss() -> jax.Array:
            # Only the discriminator is differentiated here: what the generator makes is given.
            fake = self(noise)
            loss = (nnx.softplus(-realness(real)) + nnx.softplus(realness(fake))).mean()
            self.log("train/discriminator_loss", loss, prog_bar=True)
            # Its slope at real and fake points is kept small, or the generator would chase from spot to spot.
            slopes = jax.grad(lambda points: realness(points).sum())(jnp.concatenate([real, fake]))
            return loss + SMOOTHING * (slopes**2).sum(axis=-1).mean()

        _, grads = self.value_and_grad(discriminator_loss, optimizer="discriminator")
        self.optimizers("discriminator").update(grads)

        loss, grads = self.value_and_grad(lambda: nnx.softplus(-realness(self(noise))).mean(), optimizer="generator")
        self.optimizers("generator").update(grads)
        self.log("train/generator_loss", loss, prog_bar=True)

    def validation_step(self, batch: dict[str, jax.Array]) -> None:
        points = self(batch["noise"])
        near = jnp.linalg.norm(points[:, None] - centres(), axis=-1)
        inside = near.min(axis=-1) < 4 * SPREAD
        reached = ((near.argmin(axis=-1)[:, None] == np.arange(SPOTS)) & inside[:, None]).sum(axis=0)
        self.log("val/inside", inside.mean(), prog_bar=True)
        self.log("val/spots", (reached > len(points) / SPOTS / 4).sum(), prog_bar=True)

    def configure_optimizers(self) -> dict[str, nf.OptimizerSpec]:
        schedule = optax.cosine_decay_schedule(self.learning_rate, self.trainer.estimated_steps)
        # The keys name the optimizers; a string as `trainable` means everything below that path.
        return {
            part: nf.OptimizerSpec(lambda rate: optax.adam(rate, b1=0.5), schedule=schedule, trainable=part)
            for part in ("generator", "discriminator")
        }


def main() -> None:
    trainer = nf.Trainer(max_epochs=30)
    noise = np.random.default_rng(1).normal(size=(2000, NOISE)).astype(np.float32)
    history = trainer.fit(
        GAN(rngs=nnx.Rngs(0)),
        nf.ArrayLoader({"point": make_points(20_000, seed=0)}, batch_size=200, shuffle=True),
        nf.ArrayLoader({"noise": noise}, batch_size=2000),
    )
    print(
        f"after {trainer.global_step} steps the generator reaches {history['val/spots'][-1][1]:.0f} of {SPOTS} spots; "
        f"{history['val/inside'][-1][1]:.1%} of its points are inside one"
    )


if __name__ == "__main__":
    main()
