"""What a save costs the training thread: written in the background, or waited for.

Two fits with 100 MB of state (8.4 million parameters and Adam's moments) run in one process and take turns, an epoch
of the one, then an epoch of the other; each saves in the middle of every epoch. What is printed is how long a save kept
the training from its next step, next to a bare copy of as many bytes to the host and a bare write of them to the disk;
and what a whole epoch took, since writing in the background takes part of the cores.

    python benchmarks/checkpoint.py --steps 40 --rounds 9
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from turns import alternate, quartiles

from nnx_fit import ArrayLoader, Callback, FitModule, Trainer

WIDTH = (2048, 4096)
BYTES = 3 * 4 * (WIDTH[0] * WIDTH[1] + WIDTH[1])


class Wide(FitModule):
    """One layer: 34 MB of parameters, and two moments of Adam for each."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.layer = nnx.Linear(*WIDTH, rngs=rngs)

    def training_step(self, batch: dict[str, jax.Array]) -> jax.Array:
        return (self.layer(batch["x"]) ** 2).mean()

    def configure_optimizers(self) -> optax.GradientTransformation:
        return optax.adam(1e-3)


class Saves(Callback):
    """Saves in the middle of each epoch, and notes how long that takes."""

    reads_module = False

    def __init__(self, path: Path, at: int, asynchronous: bool):
        self.path, self.at, self.asynchronous = path, at, asynchronous
        self.stalls: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: FitModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if batch_idx == self.at:
            jax.block_until_ready(trainer.peek(...))  # what the step itself takes is no part of it
            start = time.perf_counter()
            trainer.save_checkpoint(self.path, asynchronous=self.asynchronous)
            self.stalls.append(time.perf_counter() - start)


def fit(
    asynchronous: bool, stalls: dict[bool, list[float]], directory: Path, turns: Callback, epochs: int, steps: int
) -> None:
    saves = Saves(directory / "checkpoint", steps // 2, asynchronous)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[turns, saves],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
    )
    data = ArrayLoader({"x": np.ones((8 * steps, WIDTH[0]), np.float32)}, 8)
    trainer.fit(Wide(rngs=nnx.Rngs(0)), data)
    stalls[asynchronous] = saves.stalls[1:]


def bare(rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a copy of as many bytes to the host, and of writing them to a file until they are on the disk."""
    copies, writes = [], []
    for seed in range(rounds):
        array = jax.block_until_ready(jax.random.normal(jax.random.key(seed), (BYTES // 4,), jnp.float32))
        start = time.perf_counter()
        data = np.array(array)
        copies.append(time.perf_counter() - start)
        with tempfile.TemporaryFile(buffering=0) as file:
            start = time.perf_counter()
            file.write(data.data)
            os.fsync(file.fileno())
            writes.append(time.perf_counter() - start)
    return copies, writes


def show(label: str, seconds: list[float]) -> None:
    low, middle, high = (1e3 * each for each in statistics.quantiles(seconds, n=4))
    print(f"  {label:<32}{middle:>8.0f} ms ({low:.0f}..{high:.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps of an epoch (default 40)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds, at least 2 (default 9)")
    args = parser.parse_args()
    stalls: dict[bool, list[float]] = {}
    runs = [functools.partial(fit, asynchronous, stalls) for asynchronous in (True, False)]
    background, blocking = alternate(runs[0], runs[1], args.steps, args.rounds)
    copies, writes = bare(args.rounds)
    print(f"\n{BYTES / 1e6:.0f} MB of state, {jax.default_backend()}: medians over {args.rounds} rounds")
    show("stall, in the background", stalls[True])
    show("stall, waited for", stalls[False])
    show("a bare copy to the host", copies)
    show("a bare write to the disk", writes)
    print(f"  stall ratio: {statistics.median(stalls[True]) / statistics.median(stalls[False]):.3f}")
    low, middle, high = quartiles(background, blocking, "elapsed")
    print(f"  epoch ratio: {middle:.3f} ({low:.3f}..{high:.3f})")


if __name__ == "__main__":
    main()
